"""Settings of `AdvantageTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from negtune.data.steps import SPLITTERS
from negtune.losses.policy import POLICY_LOSSES
from negtune.rollouts.sampler import SamplingParams
from negtune.trainers.config import PolicyConfig, bind_objective
from negtune.trainers.rounds import RoundSettings

BASELINES = ("none", "group", "leave_one_out", "batch", "moving_average")
SCALES = ("none", "group", "batch")
REDUCTIONS = ("token_mean", "row_mean", "row_sum")
REACTIONS = ("off", "warn", "anchor", "stop")
ONE_SIGNED = ("psr", "nsr", "w_reinforce", "step_kto", "awr", "asymre")
"""Objectives whose weight is not a number times the advantage: a scaled one would not scale the push."""


@dataclass
class AdvantageConfig(PolicyConfig):
    """`PolicyConfig`, plus the objective, the sign dial, rounds of on-policy samples, and guards.

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
    temperature: float = field(
        default=1.0,
        metadata={"help": "Of the draw, and of the log-probabilities that are trained: both are of one distribution."},
    )

    num_generations: int = field(default=8, metadata={"help": "With a sampler: completions of each prompt."})
    steps_per_round: int = field(
        default=1,
        metadata={
            "help": "Optimiser steps between two draws: 1 is on-policy, more is semi-online. The engine gets the "
            "weights at every draw."
        },
    )
    reuse: int = field(default=1, metadata={"help": "Passes over the completions of a round; divides steps_per_round."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a drawn completion."})
    top_p: float = field(default=1.0, metadata={"help": "Of the draw. Below 1 no importance ratio is right."})
    top_k: int = field(
        default=0, metadata={"help": "Of the draw; 0: all tokens. Above 0 no importance ratio is right."}
    )
    min_p: float = field(default=0.0, metadata={"help": "Of the draw. Above 0 no importance ratio is right."})
    stop: list[str] | None = field(default=None, metadata={"help": "Texts that end a completion."})
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One per reward function. A completion that any weighted one left out is unscored."},
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={
            "help": "Subtracted from rewards: none, group (mean), leave_one_out (mean of the others in the group), "
            "batch, moving_average."
        },
    )
    baseline_decay: float = field(default=0.9, metadata={"help": "Of the moving average, per round."})
    scale_advantages: str = field(
        default="none",
        metadata={
            "help": "Divide by the standard deviation of the group or the batch. group cancels a penalty's size."
        },
    )
    outcome_weight: float = field(default=1.0, metadata={"help": "Of the completion's advantage on all of its steps."})
    step_weight: float = field(default=1.0, metadata={"help": "Of a step's own advantage (step_credit)."})
    step_split: str = field(default="lines", metadata={"help": "What a step is: lines or sentences."})
    step_scores: str = field(
        default="rewards",
        metadata={"help": "What step_credit gives: rewards (taken as advantages) or values (differences are taken)."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace groups without signal by other prompts, up to max_refills times a round."},
    )
    max_refills: int = field(default=4, metadata={"help": "Of a round, under dynamic_sampling."})
    max_empty_rounds: int = field(
        default=10, metadata={"help": "Stop after so many rounds in a row without any advantage."}
    )
    max_unscored: float = field(
        default=0.2, metadata={"help": "Stop where the scorer fails on a larger share. Cut completions do not count."}
    )
    attest_every: int = field(
        default=1, metadata={"help": "Rounds between two proofs that the engine has the trained weights; 0: only one."}
    )
    eval_num_generations: int = field(default=1, metadata={"help": "Completions of each prompt in an evaluation."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Of an evaluation; 0: greedy."})

    positive_guard: str = field(
        default="warn",
        metadata={
            "help": "When what is right gets less likely: warn, anchor (nll_weight becomes anchor_weight), stop, off."
        },
    )
    max_positive_drop: float = field(
        default=0.5, metadata={"help": "Nats a token by which positives may fall, see the metric positive/drift."}
    )
    anchor_weight: float = field(default=0.1, metadata={"help": "nll_weight once positive_guard=anchor has acted."})
    min_entropy: float = field(
        default=0.05, metadata={"help": "Nats a token of fresh samples below which entropy_guard acts."}
    )
    entropy_guard: str = field(default="warn", metadata={"help": "When samples lose their entropy: warn, stop, off."})
    gradient_norms_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps between two measurements of the gradient of positives and negatives apart, on one "
            "micro-batch. Default: logging_steps; 0: never. Costs two backward passes."
        },
    )

    _VALID_DICT_FIELDS = [*PolicyConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_names()
        self._check_numbers()
        self.objective()
        self.sampling_params()

    def _check_names(self) -> None:
        choices = {
            **{"reduction": REDUCTIONS, "baseline": BASELINES, "scale_advantages": SCALES},
            **{"step_split": tuple(SPLITTERS), "step_scores": ("rewards", "values")},
            **{"positive_guard": REACTIONS, "entropy_guard": ("off", "warn", "stop")},
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        weights = self.positive_weight != 1 or self.negative_weight != 1
        if self.loss_type in ONE_SIGNED and weights:
            raise ValueError(
                f"positive_weight and negative_weight have no meaning beside loss_type={self.loss_type}, whose weights "
                "are its own (loss_kwargs); use reinforce, topr or clipped, or leave them at 1"
            )
        if self.dynamic_sampling and "batch" in (self.baseline, self.scale_advantages):
            raise ValueError(
                "dynamic_sampling scores a round in parts, and a baseline or scale over the batch would differ between "
                "them; use group, leave_one_out, moving_average or none"
            )
        if self.eval_temperature == 0 and self.eval_num_generations > 1:
            raise ValueError("eval_temperature=0 draws the same completion every time; set eval_num_generations to 1")

    def _check_numbers(self) -> None:
        for name in ("num_generations", "steps_per_round", "reuse", "max_completion_length", "eval_num_generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_refills", "max_empty_rounds", "attest_every", "nll_weight", "kl_weight", "anchor_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        if min(self.positive_weight, self.negative_weight) < 0:
            raise ValueError(
                f"sign weights cannot be negative, got positive_weight={self.positive_weight}, "
                f"negative_weight={self.negative_weight}; 0 leaves a sign out"
            )
        if self.steps_per_round % self.reuse:
            raise ValueError(
                f"steps_per_round={self.steps_per_round} must be a multiple of reuse={self.reuse}: every pass over a "
                "round takes as many steps"
            )
        if not 0 <= self.max_unscored <= 1 or not 0 <= self.baseline_decay < 1:
            raise ValueError(
                f"need 0 <= max_unscored <= 1 and 0 <= baseline_decay < 1, got {self.max_unscored} and "
                f"{self.baseline_decay}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: greedy samples teach nothing new")

    def objective(self) -> Any:
        """The objective with its hyper-parameters bound."""
        return bind_objective(POLICY_LOSSES, self.loss_type, self.loss_kwargs or {}, "loss_type")

    def sampling_params(self, *, evaluation: bool = False) -> SamplingParams:
        """How completions are drawn."""
        return SamplingParams(
            temperature=self.eval_temperature if evaluation else self.temperature,
            max_tokens=self.max_completion_length,
            top_p=1.0 if evaluation else self.top_p,
            top_k=0 if evaluation else self.top_k,
            min_p=0.0 if evaluation else self.min_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )

    def round_settings(self, processes: int) -> RoundSettings:
        """What a round is. Raises ValueError where its completions are no whole number of groups."""
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        completions = step * self.steps_per_round // self.reuse
        if self.baseline == "leave_one_out" and self.num_generations < 2:
            raise ValueError(
                "leave_one_out needs at least 2 samples per prompt, got num_generations=1; set baseline to none, batch "
                "or moving_average"
            )
        if completions % self.num_generations:
            raise ValueError(
                f"a round has {completions} completions (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps} "
                f"x processes {processes} x steps_per_round {self.steps_per_round} / reuse {self.reuse}), which are no "
                f"whole number of groups of num_generations={self.num_generations}"
            )
        return RoundSettings(
            prompts_per_round=completions // self.num_generations,
            num_generations=self.num_generations,
            baseline=self.baseline,
            scale=self.scale_advantages,
            decay=self.baseline_decay,
            dynamic_sampling=self.dynamic_sampling,
            max_refills=self.max_refills,
            max_empty_rounds=self.max_empty_rounds or 2**31,
            outcome_weight=self.outcome_weight,
            step_weight=self.step_weight,
            step_scores=self.step_scores,
            max_unscored=self.max_unscored,
            seed=self.seed,
            signs=self.signs(),
        )

    def signs(self) -> tuple[bool, bool]:
        """Whether the objective moves anything for positive, and for negative advantages."""
        if self.loss_type in ("psr", "nsr"):
            return self.loss_type == "psr", self.loss_type == "nsr"
        given = self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}
        weights = given if self.loss_type == "w_reinforce" else vars(self)
        return weights.get("positive_weight", 1) > 0, weights.get("negative_weight", 1) > 0
