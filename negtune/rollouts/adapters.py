"""Weights on their way to a vLLM engine: what it can serve, and the folder it reads an adapter from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from negtune.models.policy import is_peft
from negtune.models.structure import causal_lm, unwrapped

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `max_lora_rank` can have."""


def save_adapter(model: nn.Module, path: Path) -> Path:
    """Write the active adapter below `path`; returns the folder that holds it."""
    peft_model: Any = unwrapped(model)
    name = peft_model.active_adapter
    # Not "auto": PEFT would ask the hub at every update whether the vocabulary was resized.
    peft_model.save_pretrained(path, selected_adapters=[name], save_embedding_layers=False)
    inner = path / name  # PEFT puts adapters that are not called "default" one folder lower
    return inner if inner.is_dir() else path


def lora_rank(model: nn.Module) -> int:
    """The smallest `max_lora_rank` of vLLM that holds the adapter."""
    peft_model: Any = unwrapped(model)
    needed = peft_model.peft_config[peft_model.active_adapter].r
    return next((rank for rank in MAX_LORA_RANKS if rank >= needed), needed)


def refuse_unservable(model: nn.Module, quantization: str | None = None) -> None:
    """Raise ValueError for what vLLM would serve differently from how it is trained, or not at all."""
    base = causal_lm(model)
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "the weights are split over processes (FSDP, ZeRO-3), and no process can hand them over; train with DDP "
            "or ZeRO-2, or sample from a saved checkpoint"
        )
    quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    if quantized and not torch.cuda.is_available():
        raise ValueError("vLLM has no bitsandbytes weights on a CPU; HFSampler samples from the model itself")
    if quantized and quantization != "bitsandbytes":
        raise ValueError(
            "vLLM would serve this 4-bit model unquantised; pass quantization='bitsandbytes', or use HFSampler, which "
            "samples from the model itself"
        )
    if is_peft(unwrapped(model)):
        _refuse_adapter(unwrapped(model))


def _refuse_adapter(model: Any) -> None:
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"vLLM serves one adapter at a time, {model.active_adapters} are active; sample with HFSampler"
        )
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"vLLM serves LoRA adapters only, this one is {kind}; sample with HFSampler")
    for name, why in _UNSERVED.items():
        value = getattr(config, name, None)
        if value and value != "none":
            raise ValueError(f"vLLM does not serve {why} ({name}={value!r}); sample with HFSampler")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_REWRITE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} rewrote the base weights, and vLLM loads the original ones; sample with "
            "HFSampler"
        )


_UNSERVED = {
    "modules_to_save": "modules trained in full",
    "use_dora": "DoRA",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "rank_pattern": "ranks of their own for some modules: it scales all alike",
    "alpha_pattern": "scales of their own for some modules",
    "bias": "trained biases",
    "lora_bias": "biases in an adapter",
    "trainable_token_indices": "trained token embeddings",
}
_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq")
