"""The policy as a trainer takes it over: loaded, adapted, frozen where asked, checked before anything is computed."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoTokenizer, set_seed

from negtune.models.policy import (
    check_output_folder,
    checkpoint_bytes,
    disable_dropout,
    is_peft,
    prepare_policy,
    share_prefixes,
    train_only,
)
from negtune.trainers.config import PolicyConfig


def tokenizer_of(model: str | os.PathLike | nn.Module) -> Any:
    """The tokenizer saved with a model that is given by name, path or object."""
    name = model if isinstance(model, str | os.PathLike) else getattr(model, "name_or_path", "")
    return AutoTokenizer.from_pretrained(name)


def arrives_with_adapter(model: str | os.PathLike | nn.Module) -> bool:
    """Whether the user's own model is a `PeftModel`: its adapter is then part of the reference."""
    return not isinstance(model, str | os.PathLike) and is_peft(model)


def set_up_policy(model: str | os.PathLike | nn.Module, args: PolicyConfig, peft_config: Any) -> nn.Module:
    """The model ready to be trained as `args` says.

    Raises:
        ValueError: it cannot be trained, or not exactly; see `prepare_policy`, `train_only`, `share_prefixes`.
        OSError: `output_dir` cannot be written, or has no room for a checkpoint.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would split each batch between them; start with "
            "accelerate launch --config_file accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0"
        )
    set_seed(args.seed)  # the adapter's first weights are drawn before the host seeds
    model = prepare_policy(model, peft_config, args.model_init_kwargs)
    if args.trainable is not None:
        train_only(model, args.trainable)
    check_output_folder(args.output_dir, checkpoint_bytes(model) if args.save_strategy != "no" else 0)
    if args.disable_dropout:
        disable_dropout(model)
    share_prefixes(model, args.prefix_sharing)
    if args.gradient_checkpointing and is_peft(model):
        model.enable_input_require_grads()
    return model
