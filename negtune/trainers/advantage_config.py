"""Settings of `AdvantageTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from negtune.losses.policy import POLICY_LOSSES
from negtune.trainers.config import bind_objective
from negtune.trainers.on_policy_config import REACTIONS, OnPolicyConfig
from negtune.trainers.round_advantages import AdvantageRows
from negtune.trainers.rounds import RoundSettings

BASELINES = ("none", "group", "leave_one_out", "batch", "moving_average")
SCALES = ("none", "group", "batch")
REDUCTIONS = ("token_mean", "row_mean", "row_sum")
SELECTIONS = ("all", "best")
ONE_SIGNED = ("psr", "nsr", "w_reinforce", "step_kto", "awr", "rwr", "asymre", "pmpo")
"""Objectives whose weight is not a number times the advantage: a scaled one would not scale the push."""


@dataclass
class AdvantageConfig(OnPolicyConfig):
    """`OnPolicyConfig`, plus the objective, the sign dial, what rewards become, and guards.

    `per_device_train_batch_size` counts completions. With a sampler one round has
    per_device_train_batch_size x gradient_accumulation_steps x processes x steps_per_round / reuse completions.
    """

    loss_type: str = field(
        default="reinforce", metadata={"help": "Objective: one of negtune.losses.policy.POLICY_LOSSES."}
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the objective, such as beta of awr or level of topr."}
    )
    reduction: str = field(
        default="token_mean",
        metadata={
            "help": "token_mean: all judged tokens of the optimiser step weigh alike; row_mean: all completions; "
            "row_sum: sum over the tokens of a completion, mean over completions, as in the papers' equations."
        },
    )
    positive_weight: float = field(default=1.0, metadata={"help": "Sign dial: positive advantages times this, last."})
    negative_weight: float = field(
        default=1.0,
        metadata={"help": "Sign dial: negative advantages times this, last, so that no normalisation undoes it."},
    )
    nll_weight: float = field(
        default=0.0, metadata={"help": "Anchor: add this times the NLL of the tokens with a positive advantage."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Add this times the KL divergence from the reference (k3 estimate, per token)."}
    )

    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Subtracted from rewards: none, group (mean), leave_one_out (mean of the others in the group), "
            "batch, moving_average. Default: leave_one_out; batch for rwr."
        },
    )
    baseline_decay: float = field(default=0.9, metadata={"help": "Of the moving average, per round."})
    scale_advantages: str = field(
        default="none",
        metadata={
            "help": "Divide by the standard deviation of the group or the batch. group cancels a penalty's size."
        },
    )
    selection: str = field(
        default="all",
        metadata={
            "help": "Completions of a prompt that are trained on: all, or best: the one with the highest reward alone, "
            "with advantage 1 (best-of-n fine-tuning, RAFT: with loss_type=reinforce it is its NLL). Prompts whose "
            "rewards are all alike are left out then, as ties."
        },
    )
    min_reward: float | None = field(
        default=None, metadata={"help": "With selection=best: leave out prompts whose best completion has less."}
    )
    outcome_weight: float = field(default=1.0, metadata={"help": "Of the completion's advantage on all of its steps."})
    step_weight: float = field(default=1.0, metadata={"help": "Of a step's own advantage (step_credit)."})

    positive_guard: str = field(
        default="warn",
        metadata={
            "help": "When what is right gets less likely: warn, anchor (nll_weight becomes anchor_weight), stop, off."
        },
    )
    max_positive_drop: float = field(
        default=0.5, metadata={"help": "Nats a token by which positives may fall, see the metric positive/drift."}
    )

    gradient_norms_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between two measurements of the gradient of positives and negatives apart, on one "
            "micro-batch. Default: logging_steps; 0: never. Costs two backward passes."
        },
    )

    _VALID_DICT_FIELDS = [*OnPolicyConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        if self.baseline is None:
            self.baseline = "batch" if self.loss_type == "rwr" else "leave_one_out"
            if self.selection == "best":
                self.baseline = "none"  # which plays no part
        super().__post_init__()
        self._check_choices(
            {
                **{"reduction": REDUCTIONS, "baseline": BASELINES, "scale_advantages": SCALES},
                **{"positive_guard": REACTIONS, "selection": SELECTIONS},
            }
        )
        self._check_counts(not_negative=("nll_weight", "kl_weight", "baseline_decay"))
        self._check_weights()
        self.objective()

    def _check_weights(self) -> None:
        weights = self.positive_weight != 1 or self.negative_weight != 1
        if self.loss_type in ONE_SIGNED and weights:
            raise ValueError(
                f"positive_weight and negative_weight have no meaning beside loss_type={self.loss_type}, whose weights "
                "are its own (loss_kwargs); use reinforce, topr or clipped, or leave them at 1"
            )
        if min(self.positive_weight, self.negative_weight) < 0:
            raise ValueError(
                f"sign weights cannot be negative, got positive_weight={self.positive_weight}, "
                f"negative_weight={self.negative_weight}; 0 leaves a sign out"
            )
        if self.baseline_decay >= 1:
            raise ValueError(f"need 0 <= baseline_decay < 1, got {self.baseline_decay}")
        if self.selection == "best" and (self.baseline != "none" or self.scale_advantages != "none"):
            raise ValueError(
                "selection=best gives the best completion advantage 1, whatever the others have; leave baseline and "
                "scale_advantages out"
            )
        if self.selection == "best" and not self.signs()[0]:
            raise ValueError(
                f"selection=best trains on good completions alone, and loss_type={self.loss_type} moves nothing for "
                "them with these weights; set one of the two otherwise"
            )
        if self.min_reward is not None and self.selection != "best":
            raise ValueError("min_reward is a limit for selection=best; set that, or leave it out")
        if self.dynamic_sampling and "batch" in (self.baseline, self.scale_advantages):
            raise ValueError(
                "dynamic_sampling scores a round in parts, and a baseline or scale over the batch would differ between "
                "them; use group, leave_one_out, moving_average or none"
            )

    def objective(self) -> Any:
        """The objective with its hyper-parameters bound."""
        return bind_objective(POLICY_LOSSES, self.loss_type, self.loss_kwargs or {}, "loss_type")

    def round_settings(self, processes: int) -> RoundSettings:
        """What a round is. Raises ValueError where its completions are no whole number of groups."""
        completions = self.rows_per_step(processes) * self.steps_per_round // self.reuse
        if self.baseline == "leave_one_out" and self.num_generations < 2:
            raise ValueError(
                "leave_one_out needs at least 2 samples per prompt, got num_generations=1; set baseline to none, batch "
                "or moving_average"
            )
        kept = 1 if self.selection == "best" else self.num_generations
        if completions % kept:
            raise ValueError(
                f"a round has {completions} completions (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps} "
                f"x processes {processes} x steps_per_round {self.steps_per_round} / reuse {self.reuse}), which are no "
                f"whole number of groups of num_generations={self.num_generations}"
            )
        return self._rounds_of(completions // kept)

    def round_rows(self) -> AdvantageRows:
        """What makes rows of scored completions."""
        return AdvantageRows(
            num_generations=self.num_generations,
            baseline=str(self.baseline),
            scale=self.scale_advantages,
            decay=self.baseline_decay,
            best=self.selection == "best",
            min_reward=self.min_reward,
            outcome_weight=self.outcome_weight,
            step_weight=self.step_weight,
            step_scores=self.step_scores,
            signs=self.signs(),
        )

    def signs(self) -> tuple[bool, bool]:
        """Whether the objective moves anything for positive, and for negative advantages."""
        if self.loss_type in ("psr", "nsr"):
            return self.loss_type == "psr", self.loss_type == "nsr"
        given = self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}
        if self.loss_type == "pmpo":
            alpha = given.get("alpha", 0.5)
            return alpha > 0, alpha < 1
        weights = given if self.loss_type == "w_reinforce" else vars(self)
        return weights.get("positive_weight", 1) > 0, weights.get("negative_weight", 1) > 0
