"""Settings of `PreferenceTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from negtune.data.pair_selection import PairSelection
from negtune.losses.preference import PREFERENCE_LOSSES
from negtune.trainers.config import bind_objective
from negtune.trainers.on_policy_config import REACTIONS, OnPolicyConfig
from negtune.trainers.round_pairs import PairRows
from negtune.trainers.rounds import RoundSettings


@dataclass
class PreferenceConfig(OnPolicyConfig):
    """`OnPolicyConfig`, plus how pairs are compared, and with a sampler how they are made of fresh samples.

    `per_device_train_batch_size` counts *pairs*. With a sampler a round has
    on_policy_fraction x per_device_train_batch_size x gradient_accumulation_steps x processes x steps_per_round / reuse
    pairs of fresh samples, `pairs_per_prompt` of each prompt.
    """

    loss_type: str = field(
        default="dpo", metadata={"help": "Objective: one of negtune.losses.preference.PREFERENCE_LOSSES."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "beta of the objective; its own default if not given. Must be positive."}
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further hyper-parameters of the objective."}
    )
    nll_weight: float = field(
        default=0.0,
        metadata={"help": "Anchor: add this times the NLL of the chosen answer, per token (RPO, arXiv:2404.19733)."},
    )
    kl_weight: float = field(
        default=0.0,
        metadata={"help": "Add this times the KL divergence from the reference on both answers (k3, per token)."},
    )

    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch on each process, in place of per_device_train_batch_size: pairs of similar "
            "length fill it, redrawn every epoch, so that little is padding. Where prefixes are shared a prompt counts "
            "once. Without a sampler."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "With tokens_per_batch: pairs of one prompt stay in one batch; prefix sharing computes it once."
        },
    )

    on_policy_fraction: float = field(
        default=1.0,
        metadata={
            "help": "With a sampler: share of fresh pairs in every optimiser step; the others are of the data set."
        },
    )
    prompts_per_round: int | None = field(
        default=None,
        metadata={"help": "Prompts of a round; sets steps_per_round, and is set by it if not given."},
    )
    pair_selection: str = field(
        default="best_worst",
        metadata={
            "help": "Which samples of a prompt become pairs: best_worst, all (a random subset of pairs_per_prompt), "
            "mu_minus_2sigma, random, first_pit (needs step_credit). Ties are never pairs."
        },
    )
    pairs_per_prompt: int = field(default=1, metadata={"help": "Pairs of fresh samples of one prompt, at most."})
    min_gap: float = field(default=0.0, metadata={"help": "Least difference between the scores of a fresh pair."})
    min_chosen: float | None = field(
        default=None, metadata={"help": "Least score of the better answer of a fresh pair."}
    )
    dynamic_sampling: bool = field(
        default=True,
        metadata={"help": "Replace prompts without a pair by others, up to max_refills times a round."},
    )
    importance_cap: float | None = field(
        default=None,
        metadata={
            "help": "Weigh a fresh pair by min(pi/mu, this), mu having drawn both answers: for reuse above 1, whose "
            "later passes are not on-policy. Default: every pair weighs 1."
        },
    )

    reference_decay: float | None = field(
        default=None,
        metadata={
            "help": "Moving reference (TR-DPO): at an update it keeps this share of itself and takes the rest from the "
            "policy; 0: it becomes the policy. A twin of the adapter, or of the model. Default: a fixed reference."
        },
    )
    reference_every: int = field(
        default=1, metadata={"help": "Optimiser steps between two updates of a moving reference."}
    )

    displacement_guard: str = field(
        default="warn",
        metadata={
            "help": "When the margin grows while the chosen answers get less likely: warn, anchor (nll_weight becomes "
            "anchor_weight), stop, off."
        },
    )
    max_chosen_drop: float = field(
        default=0.5, metadata={"help": "Nats a token by which chosen answers may fall, see the metric chosen/drift."}
    )
    displacement_pairs: int = field(
        default=8,
        metadata={
            "help": "Pairs that are followed through training, at every logging step; 0: none, and no guard. Costs a "
            "forward pass of them."
        },
    )
    gradient_norms_every: int | None = field(
        default=0,
        metadata={
            "help": "Optimiser steps between two measurements of the gradient of chosen and rejected answers apart, "
            "and their inner product, on one micro-batch. None: logging_steps; 0: never. Costs two backward passes."
        },
    )

    _VALID_DICT_FIELDS = [*OnPolicyConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        given = self.steps_per_round
        if self.prompts_per_round is not None:
            self.steps_per_round = self.reuse  # until the number of processes is known
        super().__post_init__()
        self._check_choices({"displacement_guard": REACTIONS})
        self._check_counts(
            at_least_one=("reference_every",),
            not_negative=("nll_weight", "kl_weight", "max_chosen_drop", "displacement_pairs"),
        )
        self._check_token_budget()
        if self.displacement_guard in ("anchor", "stop") and self.displacement_pairs == 0:
            raise ValueError(
                f"displacement_guard={self.displacement_guard} watches followed pairs, and displacement_pairs=0 "
                "follows none; set one of them"
            )
        if not 0 < self.on_policy_fraction <= 1:
            raise ValueError(
                f"need 0 < on_policy_fraction <= 1, got {self.on_policy_fraction}; without fresh samples leave the "
                "sampler out"
            )
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap must be above 0, got {self.importance_cap}")
        if self.reference_decay is not None and not 0 <= self.reference_decay < 1:
            raise ValueError(f"reference_decay must be at least 0 and below 1, got {self.reference_decay}")
        if self.reference_decay is not None and self.reference != "auto":
            raise ValueError(
                f"reference={self.reference} is a fixed reference and reference_decay moves it; leave one of them out"
            )
        self.selection()
        self.objective()
        if self.prompts_per_round is not None:
            self._set_steps(self.prompts_per_round)
            if given not in (1, self.steps_per_round):
                raise ValueError(
                    f"prompts_per_round={self.prompts_per_round} makes {self.steps_per_round} steps, and "
                    f"steps_per_round={given}; leave one of them out"
                )

    def _check_token_budget(self) -> None:
        if self.tokens_per_batch is None:
            if self.group_by_prompt:
                raise ValueError(
                    "group_by_prompt needs tokens_per_batch: a fixed number of pairs may tear a prompt apart"
                )
            return
        if self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be positive, got {self.tokens_per_batch}")
        if self.accelerator_config.split_batches:
            raise ValueError("tokens_per_batch is for each process; set split_batches to false in accelerator_config")

    def _set_steps(self, prompts: int) -> None:
        """Steps of a round that has so many prompts."""
        fresh = self.fresh_per_step(self.world_size)
        steps, rest = divmod(prompts * self.pairs_per_prompt * self.reuse, fresh)
        if prompts < 1 or rest or steps % self.reuse:
            raise ValueError(
                f"prompts_per_round={prompts} with pairs_per_prompt={self.pairs_per_prompt} gives "
                f"{prompts * self.pairs_per_prompt} pairs, which fill no whole number of optimiser steps of {fresh} "
                "fresh pairs; change one of them, or set steps_per_round instead"
            )
        self.steps_per_round = steps

    def objective(self) -> Any:
        """The objective with its hyper-parameters bound."""
        given = {} if self.beta is None else {"beta": self.beta}
        return bind_objective(PREFERENCE_LOSSES, self.loss_type, {**(self.loss_kwargs or {}), **given}, "loss_type")

    def selection(self) -> PairSelection:
        """Which samples become pairs."""
        return PairSelection(self.pair_selection, self.pairs_per_prompt, self.min_gap, self.min_chosen)

    def fresh_per_step(self, processes: int) -> int:
        """Fresh pairs of an optimiser step. Raises ValueError where that is no whole number."""
        rows = self.rows_per_step(processes)
        fresh = round(self.on_policy_fraction * rows)
        if fresh < 1 or abs(fresh - self.on_policy_fraction * rows) > 1e-6 * rows:
            raise ValueError(
                f"on_policy_fraction={self.on_policy_fraction} of the {rows} pairs of an optimiser step is no whole "
                f"number; {max(1, fresh)} of them is {max(1, fresh) / rows:g}"
            )
        return fresh

    def round_settings(self, processes: int) -> RoundSettings:
        """What a round is. Raises ValueError where its pairs are no whole number of prompts."""
        if self.num_generations < 2:
            raise ValueError("a pair needs at least 2 samples of a prompt, got num_generations=1")
        most = self.selection().most(self.num_generations)
        if self.pairs_per_prompt > most:
            raise ValueError(
                f"pairs_per_prompt={self.pairs_per_prompt} is more than the {most} that pair_selection="
                f"{self.pair_selection} makes of num_generations={self.num_generations} samples; raise that, or take "
                "pair_selection=all"
            )
        pairs = self.fresh_per_step(processes) * self.steps_per_round // self.reuse
        if pairs % self.pairs_per_prompt:
            raise ValueError(
                f"a round has {pairs} fresh pairs, which are no whole number of prompts with "
                f"pairs_per_prompt={self.pairs_per_prompt}; change the batch size or steps_per_round"
            )
        return self._rounds_of(pairs // self.pairs_per_prompt)

    def round_rows(self) -> PairRows:
        """What makes pairs of scored completions."""
        return PairRows(self.selection(), self.step_scores, self.seed)
