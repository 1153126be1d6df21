"""Settings that every trainer of a causal LM shares."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from negtune._trl_compat import BaseConfig

CHOICES = {
    "reference": ("auto", "adapter", "cached", "copy"),
    "overlong": ("truncate", "drop", "error"),
    "prefix_sharing": ("auto", "on", "off"),
}


CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""What this transformers calls recomputing activations; newer ones warn of the older name."""


@dataclass
class PolicyConfig(BaseConfig):
    """`TrainingArguments` with TRL's defaults, plus the policy, its reference, and how rows become tokens.

    `bf16` and `gradient_checkpointing` default to on where there is an accelerator and off on a CPU, where bf16
    autocast is slower than float32.
    """

    reference: Literal["auto", "adapter", "cached", "copy"] = field(
        default="auto",
        metadata={
            "help": "Reference policy. adapter: the weights under the adapter, or a frozen twin of an adapter that "
            "came with the model; cached: log-probabilities computed once, kept on disk, no second model; copy: a "
            "frozen second model. auto: adapter if there is one, else cached where they allow, else copy."
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where cached reference log-probabilities live; share it between runs. Default: output_dir."},
    )
    trainable: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression of the parameters to train, e.g. layers\\.[567]\\.mlp\\.down_proj for RMU; all "
            "others are frozen. Default: whatever the model or the adapter leaves trainable."
        },
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of prompt plus completion; None: no limit."})
    overlong: Literal["truncate", "drop", "error"] = field(
        default="truncate",
        metadata={"help": "Rows longer than max_length: cut the completion (no EOS then), drop, or refuse. Counted."},
    )
    prefix_sharing: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Compute tokens that rows share once, exactly. "
            "auto: where it saves work and the model allows it; on: always, or an error; off: padded rows."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout probability to 0."})
    redact: bool = field(
        default=False, metadata={"help": "Keep the text of the data out of reports, cards, caches and dumps."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass. Default: on, except on a CPU."}
    )

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        on_cpu = self.use_cpu or trains_on_cpu()
        if self.bf16 is None:
            self.bf16 = not on_cpu and not self.fp16
        newer = getattr(self, CHECKPOINTING)
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = not on_cpu if newer is None else newer
        if newer is None:
            setattr(self, CHECKPOINTING, self.gradient_checkpointing)
        if on_cpu:
            self.dataloader_pin_memory = False
        self.remove_unused_columns = False
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {getattr(self, name)!r}"
                )
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # batches carry counts, which cannot be sliced and sent


def trains_on_cpu() -> bool:
    """Whether there is no accelerator, or `accelerate launch` was told not to use it."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return told or not torch.accelerator.is_available()


LEVELS = ("token", "step", "sequence")
RANGES = {
    "epsilon_low": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "epsilon_high": ("at least 0 and finite", lambda value: 0 <= value < float("inf")),
    "level": ("one of " + ", ".join(LEVELS), lambda value: value in LEVELS),
    "alpha": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "label_smoothing": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "penalty": ("at least 0 and finite", lambda value: 0 <= value < float("inf")),
}


def bind_objective(family: dict[str, Any], name: str, kwargs: dict[str, Any], setting: str) -> Any:
    """The objective called `name` with its hyper-parameters bound.

    Raises:
        ValueError: no such objective, no such hyper-parameter, or a value it cannot have; names `setting`.
    """
    if name not in family:
        extra = ["none"] if setting == "retain_loss_type" else []
        raise ValueError(f"unknown {setting} {name!r}; choose one of {', '.join(sorted(family) + extra)}")
    parameters = inspect.signature(family[name]).parameters
    known = sorted(k for k, p in parameters.items() if p.default is not inspect.Parameter.empty)
    for key in kwargs:
        if key not in known:
            raise ValueError(f"{name} has no hyper-parameter {key!r}; it has {', '.join(known) or 'none'}")
    for key, value in kwargs.items():
        if isinstance(parameters[key].default, float) and not isinstance(value, int | float):
            raise ValueError(f"{key} must be a number, got {value!r}")
    for key in ("beta", "beta1", "beta2", "steering", "tau", "cap"):
        if key in kwargs and not kwargs[key] > 0:
            raise ValueError(f"{key} must be positive, got {kwargs[key]}")
    for key, (rule, holds) in RANGES.items():
        if key in kwargs and not holds(kwargs[key]):
            raise ValueError(f"{key} must be {rule}, got {kwargs[key]}")
    if name == "clipped" and (most := kwargs.get("delta")) is not None:
        least = 1 + kwargs.get("epsilon_high", parameters["epsilon_high"].default)
        if not isinstance(most, int | float) or most <= least:
            raise ValueError(f"delta must be more than 1 + epsilon_high = {least:g}, or it caps positives; got {most}")
    if name == "exo" and kwargs.get("label_smoothing") == 0:
        raise ValueError("label_smoothing of exo must be above 0: at 0 every pair would have an infinite loss")
    for key in ("layer", "seed"):
        if key in kwargs and type(kwargs[key]) is not int:
            raise ValueError(f"{key} must be a whole number, got {kwargs[key]!r}")
    return partial(family[name], **kwargs)
