"""A static table cut to the tokens of a collection: the same training, without a step over rows that nothing reads.

An optimiser goes over every weight at every step. A table of 32,000 rows of which a small collection reads 6,000 spends
most of a step on rows without a gradient, and most of what is left on writing texts as tokens again. Many short runs on
one collection want neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from negtune._st_compat import StaticEmbedding


class KnownTexts:
    """Tokens of texts, made once and shared by copies of a model.

    Args:
        tokenizer: of the whole table.
        texts: all that will be read.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self.texts = list(dict.fromkeys(texts))
        found = tokenizer.encode_batch(self.texts, add_special_tokens=False)
        used = sorted({token for one in found for token in one.ids})
        self.rows = torch.tensor(used, dtype=torch.long)
        place = {token: i for i, token in enumerate(used)}
        self._ids = {
            text: torch.tensor([place[token] for token in one.ids], dtype=torch.long)
            for text, one in zip(self.texts, found, strict=True)
        }

    def __getitem__(self, text: str) -> Tensor:
        if text not in self._ids:
            raise ValueError(f"this table was cut to the texts of a collection, and {text[:60]!r} is none of them")
        return self._ids[text]

    def __deepcopy__(self, memo: dict[int, Any]) -> KnownTexts:
        return self


class StaticRows(StaticEmbedding):
    """The rows of a static table that some texts read; of other texts it knows nothing.

    Args:
        table: a `StaticEmbedding`.
        texts: all that will be encoded, without a prompt or with it, as they will be read.
    """

    def __init__(self, table: StaticEmbedding, texts: Iterable[str]) -> None:
        known = KnownTexts(table.tokenizer, texts)
        super().__init__(table.tokenizer, embedding_weights=table.embedding.weight.detach()[known.rows].clone())
        self.known = known
        self.tokenizer = _Shared(tokenizer_object=table.tokenizer)  # sentence-transformers' GIST asks for this kind

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """As `StaticEmbedding`, with tokens by their rows in the cut table."""
        ids = [self.known[(prompt or "") + text] for text in inputs]
        ends = torch.tensor([0, *map(len, ids[:-1])], dtype=torch.long).cumsum(0)
        return {"input_ids": torch.cat(ids), "offsets": ends}


class _Shared(PreTrainedTokenizerFast):
    """Not copied with the model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def only_used_rows(model: Any, texts: Iterable[str]) -> Any:
    """A static encoder that reads these texts as `model` does, and no others; another model as it is.

    Args:
        model: `SentenceTransformer` whose first module is a `StaticEmbedding`.
        texts: queries and documents, with their prompts if there are any.

    Returns:
        a new model on the same device. Trained with an optimiser that works weight by weight (AdamW) it moves as the
        whole table does: rows that no text reads have no gradient.
    """
    if not isinstance(model[0], StaticEmbedding):
        return model
    rest = [model[i] for i in range(1, len(model))]
    return type(model)(
        modules=[StaticRows(model[0], texts), *rest],
        similarity_fn_name=model.similarity_fn_name,
        device=str(model.device),
    )
