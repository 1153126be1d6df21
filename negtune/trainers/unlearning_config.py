"""Settings of `UnlearningTrainer`."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from negtune._trl_compat import BaseConfig
from negtune.eval.unlearning import better
from negtune.losses.unlearning import FORGET_LOSSES, RETAIN_LOSSES


@dataclass
class UnlearningConfig(BaseConfig):
    """`TrainingArguments` with TRL's defaults, plus what to forget and how.

    `bf16` and `gradient_checkpointing` default to on where there is an accelerator and off on a CPU, where bf16
    autocast is slower than float32. `per_device_train_batch_size` counts *forget* rows.
    """

    loss_type: str = field(
        default="npo",
        metadata={"help": "Forget objective: one of negtune.losses.unlearning.FORGET_LOSSES."},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "beta of the forget objective; its own default if not given. Must be positive."},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Further hyper-parameters of the forget objective, e.g. {"gamma": 0.5} for simnpo.'},
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Coefficient of the forget objective."})
    retain_loss_type: str = field(
        default="nll",
        metadata={"help": "Retain objective: one of negtune.losses.unlearning.RETAIN_LOSSES, or none."},
    )
    retain_loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Hyper-parameters of the retain objective, e.g. {"direction": "reverse"} for kl.'},
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Coefficient of the retain objective."})
    retain_per_forget: int = field(
        default=1,
        metadata={
            "help": "Retain rows per forget row, drawn anew every epoch; an epoch is one pass over the forget rows."
        },
    )
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
            "help": "Compute tokens that rows share (a question with its answer and its alternative) once, exactly. "
            "auto: where it saves work and the model allows it; on: always, or an error; off: padded rows."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout probability to 0."})
    redact: bool = field(
        default=False, metadata={"help": "Keep the text of the data out of reports, cards, caches and dumps."}
    )
    eval_generate: bool = field(
        default=False, metadata={"help": "Evaluation during training also generates answers (ROUGE): slower."}
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Tokens per generated answer."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained when the model is given by name."}
    )

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass. Default: on, except on a CPU."}
    )

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "loss_kwargs", "retain_loss_kwargs", "model_init_kwargs"]

    def __post_init__(self) -> None:
        on_cpu = self.use_cpu or trains_on_cpu()
        if self.bf16 is None:
            self.bf16 = not on_cpu and not self.fp16
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = not on_cpu
        if on_cpu:
            self.dataloader_pin_memory = False
        self.remove_unused_columns = False
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = better(self.metric_for_best_model.removeprefix("eval_")) != "lower"
        super().__post_init__()
        self._validate()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # batches carry counts, which cannot be sliced and sent

    def forget_objective(self) -> Any:
        """The forget objective with its hyper-parameters bound."""
        kwargs = dict(self.loss_kwargs or {})
        if self.beta is not None:
            kwargs["beta"] = self.beta
        return _bind(FORGET_LOSSES, self.loss_type, kwargs, "loss_type")

    def retain_objective(self) -> Any | None:
        """The retain objective with its hyper-parameters bound, or None."""
        if self.retain_loss_type == "none":
            return None
        return _bind(RETAIN_LOSSES, self.retain_loss_type, dict(self.retain_loss_kwargs or {}), "retain_loss_type")

    def _validate(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"):
            raise ValueError(
                "load_best_model_at_end needs metric_for_best_model, for instance eval_separation (retain minus forget "
                "probability) or eval_forget_quality_x_model_utility; there is no eval_loss"
            )
        if "model_utility" in (self.metric_for_best_model or "") and not self.eval_generate:
            raise ValueError(f"{self.metric_for_best_model} needs generated answers (ROUGE); set eval_generate=True")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(
                f"beta must be positive, got {self.beta}; 0 would divide by it (small beta is gradient ascent)"
            )
        if self.retain_per_forget < 1:
            raise ValueError(
                f"retain_per_forget must be at least 1, got {self.retain_per_forget}; "
                "for no retain rows set retain_loss_type=none"
            )
        if self.overlong not in ("truncate", "drop", "error"):
            raise ValueError(f"overlong must be truncate, drop or error, got {self.overlong!r}")
        if self.prefix_sharing not in ("auto", "on", "off"):
            raise ValueError(f"prefix_sharing must be auto, on or off, got {self.prefix_sharing!r}")
        if self.reference not in ("auto", "adapter", "cached", "copy"):
            raise ValueError(f"reference must be auto, adapter, cached or copy, got {self.reference!r}")
        for name in ("forget_weight", "retain_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; it would train the opposite")
        self.forget_objective()
        self.retain_objective()


def trains_on_cpu() -> bool:
    """Whether there is no accelerator, or `accelerate launch` was told not to use it."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return told or not torch.accelerator.is_available()


def _bind(family: dict[str, Any], name: str, kwargs: dict[str, Any], setting: str) -> Any:
    if name not in family:
        extra = ["none"] if setting == "retain_loss_type" else []
        raise ValueError(f"unknown {setting} {name!r}; choose one of {', '.join(sorted(family) + extra)}")
    parameters = inspect.signature(family[name]).parameters
    known = sorted(k for k, p in parameters.items() if p.default is not inspect.Parameter.empty)
    for key in kwargs:
        if key not in known:
            raise ValueError(f"{name} has no hyper-parameter {key!r}; it has {', '.join(known) or 'none'}")
    for key in ("beta", "beta1", "beta2", "steering"):
        if key in kwargs and not kwargs[key] > 0:
            raise ValueError(f"{key} must be positive, got {kwargs[key]}")
    for key in ("layer", "seed"):
        if key in kwargs and type(kwargs[key]) is not int:
            raise ValueError(f"{key} must be a whole number, got {kwargs[key]!r}")
    return partial(family[name], **kwargs)
