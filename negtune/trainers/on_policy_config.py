"""Settings of every trainer that can draw its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from negtune.data.steps import SPLITTERS
from negtune.rollouts.sampler import SamplingParams
from negtune.trainers.config import PolicyConfig
from negtune.trainers.rounds import RoundSettings

REACTIONS = ("off", "warn", "anchor", "stop")


@dataclass
class OnPolicyConfig(PolicyConfig):
    """`PolicyConfig`, plus how completions are drawn and scored, in rounds."""

    temperature: float = field(default=1.0, metadata={"help": "Of the draw."})
    num_generations: int = field(default=8, metadata={"help": "With a sampler: completions of each prompt."})
    steps_per_round: int = field(
        default=1,
        metadata={
            "help": "Optimiser steps between two draws: 1 is on-policy, more is semi-online. The engine gets the "
            "weights at every draw."
        },
    )
    reuse: int = field(default=1, metadata={"help": "Passes over the samples of a round; divides steps_per_round."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a drawn completion."})
    mask_truncated_completions: bool = field(
        default=True,
        metadata={
            "help": "Leave completions that were cut there unscored: in no pair, no baseline, no loss. False: they are "
            "scored as they stand, as a reward on length wants them."
        },
    )
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
        default=10, metadata={"help": "Stop after so many rounds in a row without anything to learn from; 0: never."}
    )
    max_unscored: float = field(
        default=0.2, metadata={"help": "Stop where the scorer fails on a larger share. Cut completions do not count."}
    )
    attest_every: int = field(
        default=1, metadata={"help": "Rounds between two proofs that the engine has the trained weights; 0: only one."}
    )
    eval_num_generations: int = field(default=1, metadata={"help": "Completions of each prompt in an evaluation."})
    eval_temperature: float = field(default=1.0, metadata={"help": "Of an evaluation; 0: greedy."})

    anchor_weight: float = field(default=0.1, metadata={"help": "nll_weight once a guard's reaction anchor has acted."})
    min_entropy: float = field(
        default=0.05, metadata={"help": "Nats a token of fresh samples below which entropy_guard acts."}
    )
    entropy_guard: str = field(default="warn", metadata={"help": "When samples lose their entropy: warn, stop, off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(
            {
                **{"step_split": tuple(SPLITTERS), "step_scores": ("rewards", "values")},
                "entropy_guard": ("off", "warn", "stop"),
            }
        )
        self._check_counts(
            at_least_one=(
                *("num_generations", "steps_per_round", "reuse", "max_completion_length", "eval_num_generations"),
            ),
            not_negative=("max_refills", "max_empty_rounds", "attest_every", "anchor_weight", "min_entropy"),
        )
        if self.steps_per_round % self.reuse:
            raise ValueError(
                f"steps_per_round={self.steps_per_round} must be a multiple of reuse={self.reuse}: every pass over a "
                "round takes as many steps"
            )
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"need 0 <= max_unscored <= 1, got {self.max_unscored}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: greedy samples teach nothing new")
        if self.eval_temperature == 0 and self.eval_num_generations > 1:
            raise ValueError("eval_temperature=0 draws the same completion every time; set eval_num_generations to 1")
        self.sampling_params()

    def _check_choices(self, choices: Mapping[str, Sequence[str]]) -> None:
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def _check_counts(self, *, at_least_one: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def sampling_params(self, *, evaluation: bool = False) -> SamplingParams:
        """How completions are drawn."""
        return SamplingParams(
            temperature=self.eval_temperature if evaluation else self.temperature,
            max_tokens=self.max_completion_length,
            top_p=1.0 if evaluation else self.top_p,
            top_k=0 if evaluation else self.top_k,
            min_p=0.0 if evaluation else self.min_p,
            stop=self.stop or (),
            seed=self.seed,
        )

    def rows_per_step(self, processes: int) -> int:
        """Of an optimiser step, over all processes and micro-batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def _rounds_of(self, prompts: int) -> RoundSettings:
        return RoundSettings(
            prompts_per_round=prompts,
            num_generations=self.num_generations,
            dynamic_sampling=self.dynamic_sampling,
            max_refills=self.max_refills,
            max_empty_rounds=self.max_empty_rounds or 2**31,
            step_scores=self.step_scores,
            mask_truncated_completions=self.mask_truncated_completions,
            max_unscored=self.max_unscored,
            seed=self.seed,
        )

    def round_settings(self, processes: int) -> RoundSettings:
        """What a round is. Raises ValueError where its rows are no whole number of prompts."""
        raise NotImplementedError

    def round_rows(self) -> Any:
        """What makes rows of scored completions: a `RowMaker`."""
        raise NotImplementedError
