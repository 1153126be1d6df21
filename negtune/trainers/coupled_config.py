"""Settings of `CoupledTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from negtune.losses.debiased import CET_MODES
from negtune.trainers.ranking_config import RankingConfig

MODES = (*CET_MODES, "em")
KNOWN = ("ips", "ips_posterior")
"""Modes for propensities that are known."""
LEVELLED = ("posterior", "ips_posterior", "em")
"""Modes that read a score as the log-odds of relevance."""


@dataclass
class CoupledConfig(RankingConfig):
    """`RankingConfig`, plus what the models make of each other. The objective is set by `mode`, not by `loss_type`."""

    loss_type: str = field(default="rank_net", metadata={"help": "Not read: the objective is that of mode."})
    mode: str = field(
        default="official",
        metadata={
            "help": "official (as released), posterior, ratio, ips or ips_posterior, see negtune.losses.debiased.cet; "
            "or em: both models climb the likelihood of the labels."
        },
    )
    temperature: float | None = field(default=10.0, metadata={"help": "Of official weights; 10 as in the release."})
    clip: float = field(
        default=0.05, metadata={"help": "Smallest probability of selection that is divided by; 1: not divided."}
    )
    normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Divide weights by their mean over the optimiser step. Default: in all modes but official, whose "
            "weights are 2 on average and double the rate."
        },
    )
    uniform_steps: int = field(
        default=0,
        metadata={"help": "First optimiser steps in which all weigh the same and labels are taken as they are."},
    )
    selection_hidden: int = field(
        default=0, metadata={"help": "Hidden units of the model of selection_features; 0: it is linear."}
    )
    selection_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the selection model; features want 1e-2. Default: the same."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != "rank_net":
            raise ValueError(f"CoupledTrainer has one objective, set by mode; leave loss_type={self.loss_type} out")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.temperature is None or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}; the release takes 10")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, got {self.clip}")
        for name in ("uniform_steps", "selection_hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        rate = self.selection_learning_rate
        if rate is not None and not 0 <= rate < float("inf"):
            raise ValueError(f"selection_learning_rate must be finite and not negative, got {rate}")
        if self.in_batch:
            raise ValueError("in_batch adds documents of which nothing says where they come from; leave it out")

    def objective_settings(self) -> dict[str, Any]:
        """Of `rank_net`, which the weights are put on: `temperature` is not that of its scores."""
        given = super().objective_settings()
        return {name: value for name, value in given.items() if name != "temperature"}

    @property
    def normalizes(self) -> bool:
        """`normalize`, or its default."""
        return self.mode != "official" if self.normalize is None else self.normalize
