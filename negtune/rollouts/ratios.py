"""Log-probabilities of the policy that drew, where importance ratios may be formed from them.

A ratio needs the behaviour policy's probability in a distribution that covers the trained one's. `top_p`, `top_k` and
`min_p` cut it: the stored log-probabilities are those of the cut and renormalised distribution, and what was cut away
could never have been drawn, so that no weight makes up for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.rollouts.sampler import Rollout, SamplingParams

WAY_OUT = "draw with top_p=1, top_k=0, min_p=0 and temperature > 0, or train without ratios"


class TruncatedSamplingWarning(UserWarning):
    """Importance ratios were left out because samples come from a cut distribution."""


def use_ratios(params: SamplingParams, wanted: bool | None = None) -> bool:
    """Whether a trainer that draws with `params` may weigh samples by importance ratios.

    Args:
        params: of the draw.
        wanted: True if the user asked for ratios, False if for none, None for ratios wherever they are right.

    Returns:
        `wanted` if that is False; else True, or False with a `TruncatedSamplingWarning` where `wanted` is None and the
        distribution is cut or drawn from greedily.

    Raises:
        ValueError: ratios are wanted and would be wrong.
    """
    if wanted is False:
        return False
    cuts = [f"{name}={getattr(params, name)}" for name, off in _OFF.items() if getattr(params, name) != off]
    if params.temperature == 0:
        cuts.append("temperature=0")
    if not cuts:
        return True
    why = f"importance ratios are wrong for samples drawn with {', '.join(cuts)}"
    if wanted:
        raise ValueError(f"{why}; {WAY_OUT}")
    warnings.warn(f"{why} and are switched off; {WAY_OUT}", TruncatedSamplingWarning, stacklevel=2)
    return False


def behaviour_logps(rollouts: Sequence[Rollout]) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Log-probability of each completion token under the policy that drew it, at the temperature it was drawn at.

    A ratio divides the trained policy's probability *at the same temperature* by this one.

    Args:
        rollouts: drawn from the whole distribution.

    Returns:
        Nats in float64, 0 behind a completion's end, and the mask of its tokens; padded on the right.

    Raises:
        ValueError: a rollout that was drawn from a cut distribution, or greedily; names it.
    """
    for rollout in rollouts:
        if rollout.truncated or rollout.temperature == 0:
            how = "greedily" if rollout.temperature == 0 else "with top_p, top_k or min_p"
            raise ValueError(
                f"rollout {rollout.key} was drawn {how}: its log-probabilities give no importance ratio; {WAY_OUT}"
            )
    longest = max((len(rollout.logps) for rollout in rollouts), default=0)
    logps = torch.zeros(len(rollouts), longest, dtype=torch.float64)
    mask = torch.zeros(len(rollouts), longest, dtype=torch.bool)
    for i, rollout in enumerate(rollouts):
        logps[i, : len(rollout.logps)] = torch.tensor(rollout.logps, dtype=torch.float64)
        mask[i, : len(rollout.logps)] = True
    return logps, mask


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
