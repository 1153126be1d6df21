"""Models that rank, by name: bi-encoders, multi-vector encoders, cross-encoders, and causal LMs asked for yes or no."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from negtune.data.completions import RowError
from negtune.models import ModelError
from negtune.models.load import BUILT_IN, HUB_ID, resolve
from negtune.retrieval.encoder import load_encoder, refuse_pickles

logger = logging.getLogger(__name__)

NO_RERANKERS = ("minilm", "wordllama", "smollm2", "tiny")
"""Names of bi-encoders, for which sentence-transformers would ask the Hub."""

INSTRUCTION = "Judge whether the document is relevant to the query. The answer can only be yes or no."


def load_ranker(
    name: str | os.PathLike,
    kind: str = "bi_encoder",
    *,
    model_kwargs: dict[str, Any] | None = None,
    answers: tuple[str, str] = ("yes", "no"),
    trust_remote_code: bool = False,
) -> Any:
    """The sentence-transformers model of a folder, hub id or built-in name.

    Args:
        name: for `bi_encoder` also what `encoder.load_encoder` knows (`minilm`, `wordllama`, ...); for `causal_lm` what
            `load_model` knows (`smollm2`, ...).
        kind: bi_encoder, cross_encoder, multi_vector, or causal_lm for `causal_reranker`.
        model_kwargs: of `from_pretrained`; `quantization_config` for QLoRA. Safetensors only.
        answers: of a causal LM, for and against.
        trust_remote_code: run model code that comes with the checkpoint of a reranker.

    Raises:
        ValueError: no such kind.
        OSError, ModelError: no such model.
    """
    from sentence_transformers import CrossEncoder

    from negtune._st_compat import MultiVectorEncoder

    if kind == "causal_lm":
        yes, no = answers
        return causal_reranker(name, yes=yes, no=no, model_kwargs=model_kwargs, trust_remote_code=trust_remote_code)
    if kind == "bi_encoder":
        return load_encoder(str(name), model_kwargs=model_kwargs)
    classes = {"cross_encoder": CrossEncoder, "multi_vector": MultiVectorEncoder}
    if kind not in classes:
        raise ValueError(f"unknown kind of model {kind!r}; choose bi_encoder, cross_encoder, multi_vector or causal_lm")
    folder, called = Path(name).expanduser(), kind.replace("_", "-")
    if not folder.is_dir() and (str(name) in NO_RERANKERS or not HUB_ID.fullmatch(str(name))):
        raise ModelError(f"no {called} {name}; give its folder or a Hub id")
    refuse_pickles(folder)
    arguments = {"use_safetensors": True, **(model_kwargs or {})}
    try:
        return classes[kind](str(name), model_kwargs=arguments, trust_remote_code=trust_remote_code)
    except OSError as error:
        said = str(error).strip().split("\n")[0]
        raise ModelError(f"cannot load {called} {name} ({said}); give its folder or a Hub id") from None


def causal_reranker(
    name: str | os.PathLike,
    *,
    instruction: str = INSTRUCTION,
    yes: str = "yes",
    no: str = "no",
    max_length: int | None = 512,
    model_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM as a cross-encoder: the score is logit(yes) - logit(no) behind the instruction, query and document.

    Nothing is generated. The prompt is the model's own chat format around `instruction`, kept as the chat template of
    the returned model, so that a saved one is an ordinary sentence-transformers `CrossEncoder`. A document that is too
    long is cut, what stands behind it is not; see `query_room` for long queries. Special tokens in a text are text.

    Args:
        name: what `load_model` knows: folder, hub id, `smollm2`, `tiny`.
        instruction: asked before query and document.
        yes, no: the two answers, one token each.
        max_length: tokens of prompt and pair; None: the model's own limit.
        model_kwargs, trust_remote_code: see `load_ranker`.

    Raises:
        ValueError: an answer is no single token, or both are the same.
    """
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    folder = resolve(name)
    arguments = {"use_safetensors": True, **(model_kwargs if model_kwargs else {"dtype": "float32"})}
    transformer = Transformer(
        folder,
        transformer_task="text-generation",
        model_kwargs={**arguments, "trust_remote_code": trust_remote_code},
    )
    tokenizer = transformer.tokenizer
    tokenizer.chat_template = pair_template(tokenizer, instruction)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if max_length is not None:
        transformer.max_seq_length = max_length
    score = LogitScore(true_token_id=_one_token(tokenizer, yes), false_token_id=_one_token(tokenizer, no))
    if score.true_token_id == score.false_token_id:
        raise ValueError(f"{yes!r} and {no!r} are the same token of {name}; choose other answers")
    built_in = str(name) in BUILT_IN and not Path(str(name)).exists()
    model = CrossEncoder(modules=[transformer, score], prompts={})
    model.model_card_data.base_model = None if built_in else str(name)
    return model


def pair_template(tokenizer: Any, instruction: str) -> str:
    """Chat template for the roles query and document: `instruction`, query and document as one turn of the user.

    A space behind the first character of what would be a special token keeps texts from ending the turn or answering.
    """
    body = "\x02body\x02"
    if tokenizer.chat_template is None:
        before, after = "", "\nAnswer: "
    else:
        turn = [{"role": "user", "content": body}]
        before, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(body)
    text = "plain(m.content if m.content is string else m.content[0].text)"
    tokens = json.dumps(_breakable(tokenizer, before + after), ensure_ascii=False)
    return (
        "{% macro plain(text) %}{% set found = namespace(text=text) %}"
        f"{{% for token in {tokens} %}}"
        '{% set found.text = found.text.replace(token, token[0] ~ " " ~ token[1:]) %}'
        "{% endfor %}{{ found.text }}{% endmacro %}"
        f"{{{{ {json.dumps(before + instruction, ensure_ascii=False)} }}}}"
        "{% for m in messages %}"
        f'{{% if m.role == "query" %}}{{{{ "\\n\\nQuery: " + {text} }}}}'
        f'{{% elif m.role == "document" %}}{{{{ "\\n\\nDocument: " + {text} }}}}'
        "{% endif %}{% endfor %}"
        f"{{{{ {json.dumps(after, ensure_ascii=False)} }}}}"
    )


def _breakable(tokenizer: Any, written: str) -> list[str]:
    """Special tokens, and others outside the vocabulary of words that the template has `written`; longest first."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in written}
    return sorted((t for t in {*tokens, *tokenizer.all_special_tokens} if len(t) > 1), key=lambda t: (-len(t), t))


def query_room(model: Any) -> QueryRoom | None:
    """What checks queries of a causal LM, before and behind saving; None for other models, which cut both texts."""
    from negtune.retrieval.losses import kind_of

    if kind_of(model) != "cross_encoder" or getattr(model[0], "transformer_task", None) != "text-generation":
        return None
    return None if model.max_seq_length is None else QueryRoom(model)


class QueryRoom:
    """Refuse queries that leave no token for a document, and tell once of those that take more than half.

    A causal LM reads query and document as one text that is cut at its end.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.limit, self.prompt, self.told = model, model.max_seq_length, 0, False
        self.prompt = self._tokens("?") - 1  # a template may have no token of its own, and the host wants one

    def __call__(self, rows: Iterable[Mapping[str, Any]], name: str = "") -> None:
        """Check `query` of rows of `data.candidates`.

        Raises:
            RowError: naming the first one without room.
        """
        room, wide, name = self.limit - self.prompt, [], f"{name} ".lstrip()
        for row in rows:
            where, taken = f"{name}row {row['row']}", self._tokens(row["query"]) - self.prompt
            if taken >= room:
                raise RowError(
                    f"{where}: its query of {taken} tokens or more leaves no room for a document in {self.limit} "
                    f"tokens, {self.prompt} of which are the prompt; raise max_length, or shorten the query"
                )
            if taken > room / 2:
                wide.append(f"{where}: its query takes {taken} of the {room} tokens for query and document")
        if wide and not self.told:
            self.told = True
            more = f", and {len(wide) - 1} more like it" if len(wide) > 1 else ""
            logger.warning("%s%s; longer documents are cut at their end. Raise max_length", wide[0], more)

    def _tokens(self, query: str) -> int:
        """Of the prompt and the query; a text of few bytes has no more tokens than those, and is not looked at."""
        if self.prompt and self.prompt + 2 * len(query.encode()) <= self.limit:
            return self.prompt
        return self.model.preprocess([(query, "")])["input_ids"].numel()


def _one_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the answer {word!r} is {len(ids)} tokens; choose one that is a single token of the model")
    return ids[0]
