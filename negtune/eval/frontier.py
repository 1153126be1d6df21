"""What a policy gained, and how far it went for it: reward on fresh samples against KL(pi || pi_ref)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from negtune.metrics.stats import bootstrap_interval
from negtune.rollouts.attest import policy_logps
from negtune.rollouts.sampler import Prompt, Rollout, Sampler, SamplingParams

Reward = Callable[..., Sequence[float | None]]
"""A TRL reward function that takes `completion_ids`, or any others by `**columns`."""


@dataclass(frozen=True)
class Measured:
    """What was drawn, and what came out.

    Args:
        rollouts: `n` of each prompt, in order.
        scores: one each, None where not scored.
        metrics: `reward` with `reward_low`, `reward_high`, its 95 % bootstrap interval over prompts; `kl`, in nats a
            completion, the mean of log pi(y|x) - log pi_ref(y|x), with `kl_low`, `kl_high`; `length` in tokens,
            `truncated`, `unscored`, `tokens`.
    """

    rollouts: list[Rollout]
    scores: list[float | None]
    metrics: dict[str, float]
    n: int

    def by_prompt(self) -> list[float | None]:
        """Mean score of each prompt's samples, for paired differences; None where none was scored."""
        groups = [self.scores[i : i + self.n] for i in range(0, len(self.scores), self.n)]
        known = [[score for score in group if score is not None] for group in groups]
        return [sum(scores) / len(scores) if scores else None for scores in known]


def reward_and_kl(
    sampler: Sampler,
    reward: Reward,
    prompts: Sequence[Prompt],
    reference: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    n: int,
    params: SamplingParams,
) -> Measured:
    """Reward, KL divergence and length of `n` samples of each prompt.

    Args:
        sampler: draws from the policy.
        reward: of completions. A cut one is scored as it stands: of a length its limit is a lower bound, and what never
            ends has no form.
        prompts: held out.
        reference: log pi_ref(y|x) of each sample, summed over its tokens.
        n, params: of the draw. At a temperature other than 1, or from a cut distribution, `kl` is that of the
            distribution that was drawn from.
    """
    rollouts = sampler.sample(prompts, n, params)
    completions: list[Any] = [
        r.text if isinstance(r.prompt, str) else [{"role": "assistant", "content": r.text}] for r in rollouts
    ]
    ids = [r.completion_ids for r in rollouts]
    found = reward(prompts=[r.prompt for r in rollouts], completions=completions, completion_ids=ids)
    scores = [None if score is None else float(score) for score in found]
    ratios = [sum(r.logps) - ref for r, ref in zip(rollouts, reference(rollouts), strict=True)]
    kept = [score for score in scores if score is not None]
    metrics = {
        **{"reward": _mean(kept), "kl": _mean(ratios), "length": _mean([float(len(r)) for r in ids])},
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        **{"unscored": 1 - len(kept) / len(rollouts), "tokens": float(sum(map(len, ids)))},
    }
    measured = Measured(rollouts, scores, metrics, n)
    of_prompts = [score for score in measured.by_prompt() if score is not None]
    if len(of_prompts) > 1:
        metrics["reward_low"], metrics["reward_high"] = bootstrap_interval(of_prompts)
        metrics["kl_low"], metrics["kl_high"] = bootstrap_interval(
            [_mean(ratios[i : i + n]) for i in range(0, len(ratios), n)]
        )
    return measured


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a metric should go; None for those that have no good side."""
    if name in ("kl", "truncated", "unscored"):
        return "lower"
    return "higher" if name == "reward" or name.startswith("minus ") else None


def primary(names: Iterable[str]) -> list[str]:
    """The metrics that a report shows first, in its order, with the bounds of their intervals."""
    found = list(names)
    wanted = ["reward", "reward_low", "reward_high", *(name for name in found if name.startswith("minus "))]
    return [name for name in [*wanted, "kl", "kl_low", "kl_high", "length", "truncated"] if name in found]


def under(model: nn.Module, tokenizer: Any, batch_size: int = 16) -> Callable[[Sequence[Rollout]], list[float]]:
    """log pi(y|x) of samples under `model`, for `reward_and_kl`."""

    def sums(rollouts: Sequence[Rollout]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rollouts), batch_size):
            part = rollouts[start : start + batch_size]
            lengths = [len(r.completion_ids) for r in part]
            tokens = policy_logps(model, tokenizer, part, 1.0)
            found += [float(row.sum()) for row in tokens.split(lengths)]
        return found

    return sums


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
