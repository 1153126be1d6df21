"""What a policy gained, and how far it went for it: reward on fresh samples against KL(pi || pi_ref)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from negtune.metrics.stats import mean_interval
from negtune.rollouts.attest import policy_logps
from negtune.rollouts.sampler import Prompt, Rollout, Sampler, SamplingParams

Reward = Callable[..., Sequence[float | None]]


def reward_and_kl(
    sampler: Sampler,
    reward: Reward,
    prompts: Sequence[Prompt],
    reference: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    n: int,
    params: SamplingParams,
) -> dict[str, float]:
    """Mean reward, KL divergence and length of `n` samples of each prompt.

    Args:
        sampler: draws from the policy.
        reward: TRL reward function. A cut completion is scored as it stands: of a length its limit is a lower bound,
            and what never ends has no form.
        prompts: held out.
        reference: log pi_ref(y|x) of each sample, summed over its tokens.
        n, params: of the draw. At a temperature other than 1, or from a cut distribution, `kl` is that of the
            distribution that was drawn from.

    Returns:
        `reward`; `kl`, in nats a completion, the mean of log pi(y|x) - log pi_ref(y|x), and `kl_error`, half the width
        of its 95 % interval; `length` in tokens, `truncated`, `unscored`; `tokens`.
    """
    rollouts = sampler.sample(prompts, n, params)
    completions: list[Any] = [
        r.text if isinstance(r.prompt, str) else [{"role": "assistant", "content": r.text}] for r in rollouts
    ]
    found = reward([r.prompt for r in rollouts], completions, completion_ids=[r.completion_ids for r in rollouts])
    scores = [float(score) for score in found if score is not None]
    ratios = [sum(r.logps) - ref for r, ref in zip(rollouts, reference(rollouts), strict=True)]
    kl, error = mean_interval(ratios)
    lengths = [len(r.completion_ids) for r in rollouts]
    return {
        "reward": sum(scores) / len(scores) if scores else float("nan"),
        **{"kl": kl, "kl_error": error, "length": sum(lengths) / len(lengths), "tokens": float(sum(lengths))},
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "unscored": 1 - len(scores) / len(rollouts),
    }


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
