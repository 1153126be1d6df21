"""TRL's `GRPOTrainer` with advantages per step: the same config, reward functions and vLLM modes, and three dials more.

Two of its methods are overridden by what they return: rewards of which one is missing become missing altogether, and
the advantages `[B]` become `[B T]`. Two more are listened to: the loss, and the log-probabilities it is computed from.
`tests/contracts` pins all four.

Shapes: B completions, T completion tokens, F reward functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from negtune._trl_compat import sync_weights_on_cpu
from negtune.data.steps import SPLITTERS, TokenSteps, token_steps
from negtune.models.four_bit import keep_gradients
from negtune.models.structure import eval_mode, unwrapped
from negtune.models.vllm_engine import tolerate_lazy_modules
from negtune.ops import weigh_signs
from negtune.rollouts.attest import policy_name
from negtune.rollouts.collect import RECENT
from negtune.trainers.config import trains_on_cpu
from negtune.trainers.guards import warn_of_lost_penalty
from negtune.trainers.progress import MetricSums
from negtune.trainers.rounds import (
    RESERVED_BY_STEPS,
    StepCredit,
    advantages_of_steps,
    checked_step_scores,
    refuse_reserved,
)
from negtune.verifiers.verdict import Verdict, stop_if_unscored


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
    max_unscored: float = field(
        default=0.9,
        metadata={
            "help": "Stop where reward functions leave a larger share of completions out (None): nothing would be "
            "learnt. Cut completions do not count; 1: never."
        },
    )
    gradient_norms_every: int = field(
        default=0,
        metadata={
            "help": "Optimiser steps between two measurements of the gradient of positives and negatives apart, on the "
            "last micro-batch. 0: never. Costs a forward and two backward passes; not with FSDP or DeepSpeed."
        },
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
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"need 0 <= max_unscored <= 1, got {self.max_unscored}")
        if self.gradient_norms_every < 0:
            raise ValueError(f"gradient_norms_every must be >= 0, got {self.gradient_norms_every}; 0 is never")


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
        self._seen: list[Verdict] = []
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._scored: tuple[Tensor, ...] | None = None
        self._measuring = False
        if given is not None and given.use_vllm:
            tolerate_lazy_modules()  # TRL starts an engine of its own
        super().__init__(*args, **kwargs)
        keep_gradients(self.model)
        generation = getattr(self, "vllm_generation", None)
        if generation is not None and generation.mode == "colocate" and self.accelerator.device.type == "cpu":
            generation.sync_weights = partial(sync_weights_on_cpu, generation)

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Float[Tensor, "B F"]:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        counts = self.reward_weights.to(rewards.device) != 0
        missing = rewards.isnan() & counts
        unscored = missing.any(1)
        self._stop_if_unscored(missing)
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

    def _stop_if_unscored(self, missing: Bool[Tensor, "B F"]) -> None:
        """Raise `TooManyUnscored` once reward functions have left out too many of the last completions."""
        new = [
            Verdict("unscored", reason=f"{self.reward_func_names[row.index(True)]} returned None")
            if any(row)
            else Verdict("correct")
            for row in missing.tolist()
        ]
        self._seen = [*self._seen, *new][-RECENT:]
        stop_if_unscored(self._seen, self.args.max_unscored)

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
            scores = checked_step_scores(found, cut, self.args.step_scores)
            totals = [
                _added(total, advantages_of_steps(of_steps, len(steps), self.args.step_scores))
                for total, of_steps, steps in zip(totals, scores, cut, strict=True)
            ]
        return totals

    def _policy(self) -> str:
        """Name of the weights of this moment, which other weights do not get."""
        return policy_name(self.model, f"step {self.state.global_step}")

    # --- what a person sees -------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's, and a record of what it was computed from."""
        if model.training and self._gradients_are_due():
            self._record_gradients(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._scored is not None
        self._record(inputs, self._scored[0].detach())
        self._scored = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """TRL's. Its last answer is kept; while gradients are measured, it is the answer to everything."""
        if self._scored is None or not self._measuring:
            self._scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._scored

    @torch.no_grad()
    def _record(self, inputs: Mapping[str, Any], logps: Float[Tensor, "B T"]) -> None:
        """Positives and negatives apart: their share of the tokens, how likely they are, and what they deserve."""
        sums = self._sums["train" if self.model.training else "eval"]
        mask, advantages = _in_loss(inputs), inputs["advantages"]
        for side, tokens in (("positive", mask & (advantages > 0)), ("negative", mask & (advantages < 0))):
            sums.add_ratio(f"{side}/tokens", int(tokens.sum()), int(mask.sum()))
            if tokens.any():
                sums.add(f"{side}/logp", logps[tokens])
                sums.add(f"{side}/probability", logps[tokens].exp())
                sums.add(f"{side}/advantage", advantages[tokens])

    def _gradients_are_due(self) -> bool:
        """At the last micro-batch of every so manieth step. Where parameters are split no process has a gradient."""
        every = self.args.gradient_norms_every
        if not every or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        return self.accelerator.sync_gradients and (self.state.global_step + 1) % every == 0

    def _record_gradients(self, inputs: Mapping[str, Any]) -> None:
        """Norm of the gradient of the policy term on positive and on negative tokens alone, and the angle between them.

        All of TRL's losses are sums over tokens, to which a token of advantage 0 brings its KL and entropy terms alone:
        the loss with the advantages of one sign minus the loss with none is the part of that sign. Of one micro-batch,
        averaged as if it were the whole step, in a pass of its own without dropout and without random numbers, so that
        the training step is what it would be without. Holds two gradients besides.
        """
        model, advantages = unwrapped(self.model), inputs["advantages"]
        kept = {"positive": advantages.clamp(min=0), "negative": advantages.clamp(max=0), "neither": advantages * 0}
        alone = {"num_items_in_batch": _in_loss(inputs).sum() * self.accelerator.num_processes}
        losses, metrics = {}, self._metrics
        self._metrics, self._measuring, self._scored = {"eval": defaultdict(list)}, True, None
        try:
            with eval_mode(model):
                for side, part in kept.items():
                    losses[side] = super().compute_loss(model, {**inputs, **alone, "advantages": part})
        finally:
            self._metrics, self._measuring, self._scored = metrics, False, None
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = {
            side: torch.autograd.grad(
                losses[side] - losses["neither"],
                parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for side in ("positive", "negative")
        }
        self._sums["train"].add_gradients(gradients)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the records since the last logging step or of the evaluation, over all tokens of all processes."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update({name: [value] for name, value in self._sums[mode].flush().items()})
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _in_loss(inputs: Mapping[str, Any]) -> Bool[Tensor, "B T"]:
    """The tokens that TRL's loss counts: of whole completions, and not what a tool wrote."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def _added(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x + y for x, y in zip(a, b, strict=True)]
