"""Adapters on their way to a vLLM engine: which it can serve, and the folder it reads one from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from negtune.models.policy import is_peft


def save_adapter(model: Any, path: Path) -> Path:
    """Write the active adapter below `path`; returns the folder that holds it."""
    model.save_pretrained(path, selected_adapters=[model.active_adapter])
    inner = path / model.active_adapter  # PEFT puts adapters that are not called "default" one folder lower
    return inner if inner.is_dir() else path


def lora_rank(model: Any) -> int:
    """The smallest `max_lora_rank` of vLLM that holds the adapter."""
    config = model.peft_config[model.active_adapter]
    needed = max([config.r, *(config.rank_pattern or {}).values()])
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= needed), needed)


def refuse_unservable(model: Any, quantization: str | None = None) -> None:
    """Raise ValueError for what vLLM would serve differently from how it is trained, or not at all."""
    base = model.get_base_model() if is_peft(model) else model
    quantized = getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)
    if quantized and not torch.cuda.is_available():
        raise ValueError("vLLM has no bitsandbytes weights on a CPU; HFSampler samples from the model itself")
    if quantized and quantization != "bitsandbytes":
        raise ValueError(
            "vLLM would serve this 4-bit model unquantised; pass quantization='bitsandbytes', or use HFSampler, which "
            "samples from the model itself"
        )
    if not is_peft(model):
        return
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"vLLM serves LoRA adapters only, this one is {kind}; sample with HFSampler")
    for name, why in (
        ("modules_to_save", "modules trained in full"),
        ("use_dora", "DoRA"),
        ("target_parameters", "adapters on bare parameters"),
        ("alora_invocation_tokens", "activated LoRA"),
    ):
        if getattr(config, name, None):
            raise ValueError(f"vLLM does not serve {why} ({name}={getattr(config, name)!r}); sample with HFSampler")
