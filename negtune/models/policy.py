"""The model to be trained: loaded, wrapped in an adapter, refused where its log-probabilities would be wrong."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from negtune.models.forward import attach_scoring, check_scoring
from negtune.models.four_bit import keep_gradients
from negtune.models.sharing import PrefixSharing, set_prefix_sharing
from negtune.models.structure import causal_lm

logger = logging.getLogger(__name__)


def prepare_policy(model: Any, peft_config: Any = None, model_init_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """Load `model` if it is a name or path, add the adapter, attach scoring, and check that it can be trained exactly.

    Args:
        model: hub id, path, transformers causal LM, or `PeftModel`.
        peft_config: adapter to add; not together with a `PeftModel`.
        model_init_kwargs: for `from_pretrained` (`dtype`, `quantization_config`, ...). float32 unless given.

    Raises:
        ValueError: nothing to train, an adapter on the LM head or of virtual tokens, or an architecture whose head is
            not understood.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(str(model), dict(model_init_kwargs or {}))
    elif model_init_kwargs:
        raise ValueError("model_init_kwargs are for loading by name; this model is already an object, drop them")
    if is_peft(model):
        if peft_config is not None:
            raise ValueError("the model already carries an adapter; pass it without peft_config, or merge it first")
    elif peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    _refuse_prompt_learning(model)
    _refuse_adapted_head(model)
    if not any(p.requires_grad for p in model.parameters()):
        hint = "a quantised model needs a peft_config" if _quantized(model) else "nothing has requires_grad=True"
        raise ValueError(f"the model has no trainable parameters: {hint}")
    if _quantized(model) and not is_peft(model):
        raise ValueError("4-bit and 8-bit weights cannot be trained; pass peft_config=LoraConfig(...)")
    attach_scoring(keep_gradients(model))
    if not sharded_at_load():
        check_scoring(model)
    return model


def sharded_at_load() -> bool:
    """Whether DeepSpeed ZeRO-3 splits weights while they load: before training no process can use the model then."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Whole model on `device` for a while; FSDP and DeepSpeed leave it on the CPU until training starts."""
    home = next(model.parameters()).device
    if home != device:
        model.to(device)
    try:
        yield
    finally:
        if home != device:
            model.to(home)


def is_peft(model: nn.Module) -> bool:
    """Whether the model carries a PEFT adapter."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def has_dropout(model: nn.Module) -> bool:
    """Whether the model computes something else in training than in evaluation mode: dropout, or batch statistics."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or isinstance(module, nn.modules.batchnorm._BatchNorm)
        or any(isinstance(value, float) and value > 0 for name, value in vars(module).items() if "drop" in name)
        for module in model.modules()
    )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: a log-ratio between two noisy passes is noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # many transformers modules hold a number and call F.dropout
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def share_prefixes(model: nn.Module, mode: PrefixSharing) -> None:
    """`set_prefix_sharing` on the model inside `model`; says once why `auto` keeps padded rows."""
    reason = set_prefix_sharing(model, mode, check=not sharded_at_load())
    if reason is not None:
        logger.warning("prefix_sharing=auto keeps padded rows: %s", reason)


def train_only(model: nn.Module, pattern: str) -> None:
    """Freeze every parameter whose name `pattern` (a regular expression, searched) does not match.

    Raises:
        ValueError: not a regular expression, or nothing trainable matches.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"trainable={pattern!r} is no regular expression: {error}") from None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any(wanted.search(name) for name in names):
        raise ValueError(
            f"trainable={pattern!r} matches none of the {len(names)} trainable parameters, e.g. {names[-1]}"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not wanted.search(name):
            parameter.requires_grad_(False)


def checkpoint_bytes(model: nn.Module) -> int:
    """Rough size of one checkpoint: the saved weights and two AdamW moments of what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    saved = trained if is_peft(model) else sum(p.numel() * p.element_size() for p in model.parameters())
    return saved + 2 * trained


def check_output_folder(folder: str | os.PathLike, bytes_needed: int) -> None:
    """Create `folder` and raise `OSError` now, not after hours, if it cannot be written or is on a full disk."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".negtune_write_test_{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"output_dir {str(path)!r} cannot be written ({error.strerror}); choose another one") from None
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise OSError(
            f"output_dir {str(path)!r} has {free / 2**20:.0f} MiB free and one checkpoint needs about "
            f"{bytes_needed / 2**20:.0f} MiB; free some space or choose another folder"
        )


def _load(name: str, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = kwargs.pop("dtype", torch.float32)
    kwargs.setdefault("use_safetensors", True)
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype, **kwargs
    )


def _quantized(model: nn.Module) -> bool:
    return bool(getattr(causal_lm(model), "is_quantized", False))


def _refuse_prompt_learning(model: nn.Module) -> None:
    if is_peft(model) and getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"{kind} adapters are made of virtual tokens, which neither the scoring of completions nor the samplers "
            "place; use one that changes weights, peft_config=LoraConfig(...)"
        )


def _refuse_adapted_head(model: nn.Module) -> None:
    if not is_peft(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "the adapter targets lm_head, which cannot be merged where it is tied to the input embeddings; remove "
            'lm_head from target_modules ("all-linear" leaves it out) or train it with modules_to_save=["lm_head"]'
        )
