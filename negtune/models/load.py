"""A model and its tokenizer from a folder, a hub id, or one of the two names that need no hub."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from negtune.models import ModelError
from negtune.models.arithmetic import save_arithmetic
from negtune.models.cache import build_once
from negtune.models.four_bit import keep_gradients
from negtune.models.smollm2 import smollm2_folder
from negtune.models.tiny import save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = {
    "smollm2": smollm2_folder,
    "tiny": lambda: build_once("tiny-v1", lambda folder: _save_tiny(folder)),
    "arithmetic": lambda: build_once("arithmetic-v1", lambda folder: _save_arithmetic(folder)),
}
"""Names of models that need no hub, and how to get their folder."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    load_in_4bit: bool = False,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer with a pad token.

    Args:
        name_or_path: folder, hub id, `smollm2` or `tiny`. The folder of a PEFT adapter loads its base model too.
        adapter: PEFT adapter folder or hub id, put on top; frozen, as for evaluation.
        load_in_4bit: NF4 quantisation of the linear layers, on a GPU or a CPU; needs `negtune[quant]`.
        dtype: of the weights (of the computation, in 4-bit); by default the checkpoint's own.
        trust_remote_code: run model code that comes with the checkpoint.

    Returns:
        `(model, tokenizer)`. Tokens are never added: a tokenizer without pad token pads with its EOS token. Only
        safetensors weights are read.

    Raises:
        ModelError: in one line, for whatever of this is missing.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name_or_path)
    if adapter is None and _is_adapter_folder(source):
        adapter, source = source, resolve(_base_of(Path(source)))
    arguments = _four_bit(dtype) if load_in_4bit else {"dtype": dtype or "auto"}
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, trust_remote_code=trust_remote_code, **arguments
        )
    except OSError as error:
        raise ModelError(_not_loadable(str(name_or_path), error)) from None
    _agree_on_tokens(model, tokenizer, str(name_or_path))
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return keep_gradients(model).eval(), tokenizer


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, hub id, `smollm2` or `tiny`, with its EOS token as pad token if it has none."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(name_or_path), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {name_or_path} has no EOS token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(name_or_path: str | Path) -> str:
    """What transformers can load: the folder behind a built-in name, an existing model folder, or a hub id as it is.

    Raises:
        ModelError: a path that is missing or holds no model in safetensors.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        raise ModelError(f"{name} is a file; give the model's folder, with config.json and *.safetensors in it")
    if name in BUILT_IN:
        return str(BUILT_IN[name]())
    if not _is_hub_id(name):
        raise ModelError(f"no model folder {name}{_did_you_mean(name)}")
    return name


def _check_folder(path: Path) -> None:
    files = sorted(file.name for file in path.iterdir())
    if "config.json" not in files and "adapter_config.json" not in files:
        checkpoints = [name for name in files if name.startswith("checkpoint-")]
        hint = f"; it has {', '.join(checkpoints)}: name one of those" if checkpoints else ""
        raise ModelError(f"{path} is not a model folder: it has no config.json{hint}")
    if not any(name.endswith(".safetensors") for name in files):
        pickles = ", ".join(name for name in files if name.endswith((".bin", ".pt", ".pth", ".gguf")))
        found = f"only {pickles}" if pickles else "none"
        raise ModelError(
            f"{path} has no safetensors weights (found {found}); negtune reads nothing else: "
            "save the model again with save_pretrained"
        )


def _is_adapter_folder(source: str) -> bool:
    folder = Path(source)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"the adapter {adapter} does not name its base model; load that with adapter={adapter}")
    return base


def _with_adapter(model: Any, adapter: str | Path) -> Any:
    from peft import PeftModel

    path = Path(adapter).expanduser()
    if path.exists() and not (path / "adapter_config.json").is_file():
        raise ModelError(f"{adapter} is not an adapter folder: it has no adapter_config.json")
    if not path.exists() and not _is_hub_id(str(adapter)):
        raise ModelError(f"no adapter folder {adapter}")
    if path.exists():
        _check_folder(path)
    try:
        return PeftModel.from_pretrained(model, str(path) if path.exists() else str(adapter))
    except (OSError, ValueError) as error:  # ValueError: no such adapter on the hub
        raise ModelError(f"adapter {adapter} could not be loaded: {_first_line(error)}") from None


def _four_bit(dtype: torch.dtype | str | None) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for NF4; on GPUs, one whole copy for each process."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("load_in_4bit needs bitsandbytes, which is not installed; run: pip install 'negtune[quant]'")
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")
    compute = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    device = int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"
    return {"quantization_config": config, "device_map": {"": device}, "dtype": compute}


def _agree_on_tokens(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens but the model embeds {rows}; give the model its own"
        )
    for config in (model.config, model.generation_config):
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id


def _not_loadable(name: str, error: OSError) -> str:
    if Path(name).expanduser().is_dir():
        return f"model {name} could not be loaded: {_first_line(error)}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        reason = "not in the local hub cache (HF_HUB_OFFLINE is set)"
    else:
        reason = f"the hub says: {_first_line(error)}"
    return f"no model {name}: no such folder, and {reason}{_did_you_mean(name)}"


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not name.startswith(".")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _did_you_mean(name: str) -> str:
    """A hint with the built-in name or the neighbouring folder that looks most like `name`."""
    path = Path(name).expanduser()
    neighbours = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*BUILT_IN, *neighbours], n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0] if close[0] in BUILT_IN else path.parent / close[0]}?"
    return f"; without a hub use one of: {', '.join(BUILT_IN)}"


def _save_arithmetic(folder: Path) -> None:
    save_arithmetic(folder)


def _save_tiny(folder: Path) -> None:
    save_tiny(folder)
