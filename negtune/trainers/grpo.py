"""TRL's `GRPOTrainer` with advantages per step: the same config, reward functions and vLLM modes, and three dials more.

Two of its methods are overridden, both by what they return: rewards of which one is missing become missing altogether,
and the advantages `[B]` become `[B T]`. `tests/contracts` pins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from negtune._trl_compat import sync_weights_on_cpu
from negtune.credit import step_advantages
from negtune.data.steps import SPLITTERS, TokenSteps, token_steps
from negtune.models.structure import unwrapped
from negtune.ops import weigh_signs
from negtune.rollouts.attest import policy_name
from negtune.trainers.config import trains_on_cpu
from negtune.trainers.guards import warn_of_lost_penalty
from negtune.trainers.rounds import RESERVED_BY_STEPS, StepCredit, refuse_reserved


@dataclass
class StepGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, plus what a step is and what it weighs.

    One default differs: completions that were cut at `max_completion_length` are masked, and unscored besides: their
    rewards are in no baseline.
    """

    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Leave completions that were cut out of the loss and out of the baseline."}
    )

    step_split: str = field(default="lines", metadata={"help": "What a step is: lines or sentences."})
    step_scores: str = field(
        default="rewards",
        metadata={"help": "What step_reward_funcs give: rewards (taken as advantages) or values (differences)."},
    )
    outcome_weight: float = field(default=1.0, metadata={"help": "Of the completion's advantage on all of its steps."})
    step_weight: float = field(default=1.0, metadata={"help": "Of a step's own advantage."})
    positive_weight: float = field(default=1.0, metadata={"help": "Sign dial: positive advantages times this, last."})
    negative_weight: float = field(
        default=1.0,
        metadata={"help": "Sign dial: negative advantages times this, last, so that no normalisation undoes it."},
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and (self.use_cpu or trains_on_cpu()):
            self.bf16 = False
        super().__post_init__()
        for name, allowed in {"step_split": tuple(SPLITTERS), "step_scores": ("rewards", "values")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if min(self.positive_weight, self.negative_weight) < 0:
            raise ValueError(
                f"sign weights cannot be negative, got positive_weight={self.positive_weight}, "
                f"negative_weight={self.negative_weight}; 0 leaves a sign out"
            )


class StepGRPOTrainer(GRPOTrainer):
    """GRPO whose tokens carry outcome_weight x the completion's advantage + step_weight x that of their step.

    A completion for which any reward function of non-zero weight returns None is unscored: advantage 0, and no part in
    the baseline of its group. (TRL counts the None as 0 beside another reward.)

    Args:
        step_reward_funcs: one or several callables `(prompts, completions, steps, **columns)` that give each completion
            a list of numbers, one per step (None: not judged, advantage 0), or with `step_scores="values"` one more
            first, the value of the bare prompt. `steps` are lists of texts; columns are those of the data set, and
            `prompt_ids`, `completion_ids`, `step_ends`, `rewards`. `rollouts.steps.RolloutCredit` gives Monte-Carlo
            values. Several are added, None where any gives None.
        args, kwargs: as for `GRPOTrainer`.
    """

    _tag_names = ["negtune", "grpo"]
    _name = "Step GRPO"

    def __init__(
        self,
        *args: Any,
        step_reward_funcs: StepCredit | Sequence[StepCredit] | None = None,
        **kwargs: Any,
    ) -> None:
        given = kwargs.get("args") or next((a for a in args if isinstance(a, GRPOConfig)), None)
        if not isinstance(given, StepGRPOConfig):
            raise ValueError(
                "StepGRPOTrainer needs args=StepGRPOConfig(...), which takes everything that GRPOConfig takes"
            )
        single = callable(step_reward_funcs)
        self.step_reward_funcs: list[Callable] = [step_reward_funcs] if single else list(step_reward_funcs or ())
        self._captured: tuple[list, list, list, list] | None = None
        self._warned = False
        super().__init__(*args, **kwargs)
        generation = getattr(self, "vllm_generation", None)
        if generation is not None and generation.mode == "colocate" and self.accelerator.device.type == "cpu":
            generation.sync_weights = partial(sync_weights_on_cpu, generation)

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Float[Tensor, "B F"]:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        counts = self.reward_weights.to(rewards.device) != 0
        unscored = (rewards.isnan() & counts).any(1)
        if self.mask_truncated_completions:
            ends = {self._tokenizer.pad_token_id, *self.eos_token_ids}
            cut = torch.tensor([ids[-1] not in ends for ids in completion_ids_list], device=rewards.device)
            unscored |= self.accelerator.gather(cut)
        rewards = rewards.masked_fill(unscored[:, None], torch.nan)
        self._captured = inputs, prompts, completions, completion_ids_list
        weighted = (rewards.nan_to_num(0.0) * self.reward_weights.to(rewards.device)).sum(1)
        start = self.accelerator.process_index * len(prompts)
        self._rewards = [
            None if gone else value for gone, value in zip(unscored.tolist(), weighted.tolist(), strict=True)
        ]
        if self.scale_rewards == "group" and not self._warned:
            known = [reward for reward in self._rewards if reward is not None]
            self._warned = warn_of_lost_penalty(known, "scale_rewards=group", "Set scale_rewards to none")
        self._rewards = self._rewards[start : start + len(prompts)]
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        outcome = out["advantages"]
        advantages = self.args.outcome_weight * outcome[:, None].expand(out["completion_ids"].shape).clone()
        if self.step_reward_funcs:
            advantages = self._with_steps(advantages, out)
        advantages = weigh_signs(
            advantages, positive_weight=self.args.positive_weight, negative_weight=self.args.negative_weight
        )
        unscored = torch.tensor([reward is None for reward in self._rewards], device=advantages.device)
        out["advantages"] = advantages.masked_fill(unscored[:, None], 0.0)
        self._log_signs(out)
        return out

    def _with_steps(self, advantages: Float[Tensor, "B T"], out: dict[str, Any]) -> Float[Tensor, "B T"]:
        """Add each step's own advantage to its tokens; a step that was not judged has none, whatever the outcome."""
        inputs, prompts, completions, completion_ids = self._captured or ([], [], [], [])
        splitter = SPLITTERS[self.args.step_split]
        cut = [token_steps(ids, self._tokenizer, splitter) for ids in completion_ids]
        for i, (steps, scores) in enumerate(
            zip(cut, self._step_scores(inputs, prompts, completions, cut, out), strict=True)
        ):
            start = 0
            for end, score in zip(steps.ends, scores, strict=True):
                if score is None:
                    advantages[i, start:end] = 0.0
                else:
                    advantages[i, start:end] += self.args.step_weight * score
                start = end
        return advantages

    def _step_scores(
        self, inputs: list, prompts: list, completions: list, cut: Sequence[TokenSteps], out: dict[str, Any]
    ) -> list[list[float | None]]:
        """The advantage of every step of every completion, from all functions."""
        refuse_reserved(inputs[0], RESERVED_BY_STEPS)
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
        masks = zip(out["prompt_ids"], out["prompt_mask"].bool(), strict=True)
        columns |= {
            "prompt_ids": [ids[mask].tolist() for ids, mask in masks],
            "completion_ids": (self._captured or ([],) * 4)[3],
            "step_ends": [steps.ends for steps in cut],
            "rewards": self._rewards,
        }
        totals: list[list[float | None]] = [[0.0] * len(steps) for steps in cut]
        for function in self.step_reward_funcs:
            if hasattr(function, "update"):
                function.update(unwrapped(self.model), self._policy())
            found = function(prompts, completions, [steps.texts for steps in cut], **columns)
            totals = [
                _added(total, _as_advantages(scores, len(steps), self.args.step_scores))
                for total, scores, steps in zip(totals, found, cut, strict=True)
            ]
        return totals

    def _policy(self) -> str:
        """Name of the weights of this moment, which other weights do not get."""
        return policy_name(self.model, f"step {self.state.global_step}")

    def _log_signs(self, out: dict[str, Any]) -> None:
        """Share of tokens that are pushed up and down, and how likely the engine found each kind."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        mask, advantages = out["completion_mask"].bool(), out["advantages"]
        if "tool_mask" in out:
            mask = mask & out["tool_mask"].bool()
        logps = out.get("sampling_per_token_logps", out.get("old_per_token_logps"))
        total = self.accelerator.gather(mask.sum()).sum().clamp(min=1)
        for side, tokens in (("positive", mask & (advantages > 0)), ("negative", mask & (advantages < 0))):
            count = self.accelerator.gather(tokens.sum()).sum()
            metrics[f"{side}/tokens"].append((count / total).item())
            if logps is not None:
                drawn = logps.nan_to_num(0.0).masked_fill(~tokens, 0.0)
                metrics[f"{side}/logp"].append((self.accelerator.gather(drawn.sum()).sum() / count.clamp(min=1)).item())

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _as_advantages(scores: Sequence[float | None], steps: int, kind: str) -> list[float | None]:
    """One advantage per step. Raises ValueError for another number of scores, and for what is no number."""
    wrong = [score for score in scores if score is not None and not math.isfinite(score)]
    if wrong:
        raise ValueError(f"a step reward function gave {wrong[0]}; give None for a step that was not judged")
    if kind == "values" and len(scores) in (steps, steps + 1):
        return step_advantages(scores if len(scores) > steps else [None, *scores])
    if len(scores) != steps:
        raise ValueError(
            f"a step reward function gave {len(scores)} numbers for {steps} steps; give one per step (one more, "
            "that of the bare prompt, with step_scores=values)"
        )
    return list(scores)


def _added(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x + y for x, y in zip(a, b, strict=True)]
