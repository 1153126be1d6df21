"""Settings of `UnlearningTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from negtune.eval.unlearning import better
from negtune.losses.unlearning import FORGET_LOSSES, RETAIN_LOSSES
from negtune.trainers.config import PolicyConfig, bind_objective


@dataclass
class UnlearningConfig(PolicyConfig):
    """`PolicyConfig`, plus what to forget and how. `per_device_train_batch_size` counts *forget* rows."""

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
    eval_generate: bool = field(
        default=False, metadata={"help": "Evaluation during training also generates answers (ROUGE): slower."}
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Tokens per generated answer."})

    _VALID_DICT_FIELDS = [*PolicyConfig._VALID_DICT_FIELDS, "loss_kwargs", "retain_loss_kwargs"]

    def __post_init__(self) -> None:
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = better(self.metric_for_best_model.removeprefix("eval_")) != "lower"
        super().__post_init__()
        self._validate()

    def forget_objective(self) -> Any:
        """The forget objective with its hyper-parameters bound."""
        kwargs = dict(self.loss_kwargs or {})
        if self.beta is not None:
            kwargs["beta"] = self.beta
        return bind_objective(FORGET_LOSSES, self.loss_type, kwargs, "loss_type")

    def retain_objective(self) -> Any | None:
        """The retain objective with its hyper-parameters bound, or None."""
        if self.retain_loss_type == "none":
            return None
        return bind_objective(
            RETAIN_LOSSES, self.retain_loss_type, dict(self.retain_loss_kwargs or {}), "retain_loss_type"
        )

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
        for name in ("forget_weight", "retain_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; it would train the opposite")
        self.forget_objective()
        self.retain_objective()
