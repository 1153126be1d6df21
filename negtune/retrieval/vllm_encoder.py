"""Encoding with vLLM in this process: the vectors of a sentence-transformers folder, from a pooling engine.

Letters: `N` texts, `H` width of a vector.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negtune.models import ModelError
from negtune.models.vllm_engine import emptied_on_error, leave_others_alone, start_engine
from negtune.retrieval.encoder import HUB_ID, encoder_folder, is_causal, not_loadable, refuse_pickles

POOLING = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""Ways of sentence-transformers, as vLLM calls them."""
FIXED = ("model", "runner", "pooler_config", "max_model_len", "load_format", "trust_remote_code")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class VLLMEncoder:
    """A frozen bi-encoder in vLLM, for wherever a SentenceTransformer only encodes: `encode`, `DenseRetriever`, `mine`,
    `evaluate_retrieval`.

    It gives the vectors of the SentenceTransformer that `load_encoder` makes of the same folder, up to rounding. For
    inference only: nothing in it can be trained, and what is trained elsewhere is not seen; save it and make another.
    An encoder with a LoRA adapter is merged and saved first.

    Args:
        name_or_path: as in `load_encoder`, but neither wordllama nor, on a CPU, tiny. No code of a model is run, only
            safetensors are read.
        prompts: put before the texts of a side, keys `query` and `document`; by default the folder's.
        max_length: tokens after which a text is cut; by default, and at most, the folder's.
        engine: further arguments of `vllm.LLM` (`enforce_eager`, `gpu_memory_utilization` ...). `dtype` is float32 on a
            CPU if not given, and the checkpoint's on a GPU: vLLM by itself would take half precision.

    Raises:
        ModelError: in one line, for what is missing in the folder or cannot be served from it.
        ValueError: prompts of an unknown side, or arguments that contradict the folder.
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        prompts: Mapping[str, str] | None = None,
        max_length: int | None = None,
        **engine: Any,
    ) -> None:
        _refuse_arguments(prompts or {}, engine)
        folder = _local(name_or_path)
        stack = _stack(folder)
        saved = _read(folder / "config_sentence_transformers.json")
        named = saved.get("prompts") or {}
        self.prompts = {side: named.get(side) or "" for side in ("query", "document")} | dict(prompts or {})
        self._default_prompt = {**named, **self.prompts}.get(saved.get("default_prompt_name"), "")
        if not stack.includes_prompt and any((*self.prompts.values(), self._default_prompt)):
            raise ModelError(f"{folder} leaves prompts out of its pooling, which vLLM cannot; use load_encoder")
        self.similarity_fn_name = saved.get("similarity_fn_name") or "cosine"
        self._width = saved.get("truncate_dim")
        self.tokenizer, limit = _tokenizer(stack.transformer)
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"need 1 <= max_length <= {limit}, which {folder} is made for, got {max_length}")
        self.llm: Any = _engine(stack, self.max_length, engine)
        leave_others_alone(self.llm)

    def encode_query(self, texts: Sequence[str], **settings: Any) -> np.ndarray | Tensor:
        """As `encode`, behind the prompt of queries."""
        return self.encode(texts, prompt=self.prompts["query"], **settings)

    def encode_document(self, texts: Sequence[str], **settings: Any) -> np.ndarray | Tensor:
        """As `encode`, behind the prompt of documents."""
        return self.encode(texts, prompt=self.prompts["document"], **settings)

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
    ) -> np.ndarray | Tensor:
        """Vectors `[N H]`, float32, in the order of the texts.

        Args:
            texts: at least one; too long ones are cut at `max_length`.
            prompt: put before each; by default that of `default_prompt_name` in the folder, mostly none.
            batch_size: not used, vLLM makes its own batches.
            show_progress_bar: of vLLM.
            convert_to_numpy: or a tensor.

        Raises:
            ValueError: a single text, a text without a token, or a closed encoder.
        """
        if isinstance(texts, str):
            raise ValueError("texts is a single text; give a list of texts")
        if self.llm is None:
            raise ValueError("this encoder was closed; make another VLLMEncoder")
        prompt = self._default_prompt if prompt is None else prompt
        tokens = self.tokenizer([prompt + text for text in texts], truncation=True, max_length=self.max_length)
        ids = tokens["input_ids"]
        if [] in ids:
            raise ValueError(f"text {ids.index([])} (from 0) has no token, so it has no vector; leave it out")
        with emptied_on_error(self.llm):
            outputs = self.llm.encode(
                [{"prompt_token_ids": row} for row in ids], pooling_task="embed", use_tqdm=show_progress_bar
            )
        vectors = torch.stack([output.outputs.data for output in outputs]).float().cpu()[:, : self._width]
        return vectors.numpy() if convert_to_numpy else vectors

    def close(self) -> None:
        """Give the engine's memory back; other engines in this process go on."""
        self.llm = None
        gc.unfreeze()  # vLLM hides its weights from the collector
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Stack:
    """What becomes of the states of a transformer.

    Attributes:
        transformer: folder with its weights and tokenizer.
        pooling: as vLLM calls it.
        normalized: whether vectors have length 1.
        includes_prompt: whether the states of a prompt's tokens are pooled as well.
    """

    transformer: Path
    pooling: str
    normalized: bool
    includes_prompt: bool = True


def _refuse_arguments(prompts: Mapping[str, str], engine: Mapping[str, Any]) -> None:
    if unknown := sorted(set(prompts) - {"query", "document"}):
        raise ValueError(f"prompts has {unknown}, which are no sides; give 'query' and 'document'")
    if taken := [name for name in FIXED if name in engine]:
        raise ValueError(f"{', '.join(taken)} follow from the folder; for shorter texts give max_length")


def _local(name_or_path: str | Path) -> Path:
    name, folder = str(name_or_path), encoder_folder(name_or_path)
    if name == "wordllama" and folder is None:
        raise ModelError(_unservable(name, "StaticEmbedding"))
    if folder is None:
        if not HUB_ID.fullmatch(name):
            raise ModelError(f"no encoder folder {name}; give a folder, a Hub id, or minilm, smollm2 or tiny")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=FILES))
        except OSError as error:
            raise ModelError(not_loadable(name, error)) from None
    refuse_pickles(folder)
    return folder


def _stack(folder: Path) -> _Stack:
    """Read `modules.json`; without one, what `load_encoder` makes of the folder.

    vLLM by itself leaves out modules that it does not know, and takes one way of pooling for another.
    """
    modules = _read(folder / "modules.json")
    if not modules:
        stack = _Stack(folder, "LAST", True) if is_causal(folder) else _Stack(folder, "MEAN", False)
    else:
        kinds = [_kind(module["type"]) for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ModelError(_unservable(folder, ", ".join(kinds)))
        pooling = _read(folder / modules[1]["path"] / "config.json")
        way = _way(pooling)
        if way not in POOLING:
            raise ModelError(_unservable(folder, f"pooling by {way}"))
        include = pooling.get("include_prompt", True)
        stack = _Stack(folder / modules[0]["path"], POOLING[way], "Normalize" in kinds, include)
    if (stack.transformer / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter; merge it into its base, save that and give its folder")
    if not any(stack.transformer.glob("*.safetensors")):
        raise ModelError(f"{stack.transformer} has no safetensors; save the model as such")
    return stack


def _kind(module: str) -> str:
    """Name of a class of sentence-transformers, or where another comes from."""
    return module.rpartition(".")[2] if module.startswith("sentence_transformers.") else module


def _way(pooling: Mapping[str, Any]) -> str:
    """One or several ways of pooling; older folders have a flag for each."""
    way = pooling.get("pooling_mode")
    if way is None:
        flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        way = [flags.get(name, name.removeprefix("pooling_mode_")) for name, on in pooling.items() if on is True]
        way = [name for name in way if name != "include_prompt"]
    return way if isinstance(way, str) else " and ".join(way)


def _unservable(name: str | Path, what: str) -> str:
    return f"vLLM cannot serve {name} ({what}): it takes Transformer, Pooling and Normalize; use load_encoder"


def _tokenizer(folder: Path) -> tuple[Any, int]:
    """The tokenizer, and the number of tokens after which sentence-transformers cuts a text."""
    from transformers import AutoConfig, AutoTokenizer

    saved = _read(folder / "sentence_bert_config.json")
    known = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}
    if unknown := sorted(name for name, value in saved.items() if value and name not in known):
        raise ModelError(
            f"{folder}/sentence_bert_config.json sets {', '.join(unknown)}, not known here; use load_encoder"
        )
    if list(saved.get("modality_config") or ["text"]) != ["text"]:
        raise ModelError(
            f"{folder} reads texts as chat turns or more than texts, which is not done here; use load_encoder"
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if saved.get("do_lower_case"):
        from tokenizers.normalizers import Lowercase
        from tokenizers.normalizers import Sequence as InTurn

        words = tokenizer.backend_tokenizer
        words.normalizer = InTurn([Lowercase(), *([words.normalizer] if words.normalizer else [])])
    positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", tokenizer.model_max_length)
    return tokenizer, saved.get("max_seq_length") or min(tokenizer.model_max_length, positions)


def _engine(stack: _Stack, max_length: int, engine: Mapping[str, Any]) -> Any:
    checkpoint = _read(stack.transformer / "config.json")
    _refuse_narrow_heads(stack.transformer, checkpoint)
    dtype = checkpoint.get("dtype") or checkpoint.get("torch_dtype") or "float32"
    return start_engine(
        **{"dtype": dtype if torch.cuda.is_available() else "float32", "disable_log_stats": True, "seed": 0, **engine},
        model=str(stack.transformer),
        runner="pooling",
        max_model_len=max_length,
        load_format="safetensors",
        pooler_config={"seq_pooling_type": stack.pooling, "use_activation": stack.normalized},
    )


def _refuse_narrow_heads(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    """On a CPU vLLM 0.31 starts with such a model, and dies of the first text."""
    heads = checkpoint.get("num_attention_heads")
    width = checkpoint.get("head_dim") or (checkpoint["hidden_size"] // heads if heads else 32)
    if width < 32 and not torch.cuda.is_available():
        raise ModelError(f"vLLM on a CPU needs attention heads of 32 or wider, {folder} has {width}; use load_encoder")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
