"""What pairs of a better and a worse answer say before and while a model is trained on them.

Shapes: B pairs, H hidden width.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def ches(
    chosen: Float[Tensor, "B H"],
    rejected: Float[Tensor, "B H"],
    chosen_lengths: Int[Tensor, " B"] | None = None,
    rejected_lengths: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Centred hidden embedding similarity of each pair: <h_w, h_l> - |h_w|^2, h the sum over an answer of the last
    hidden states that predict its tokens.

    The higher, the more pushing the rejected answer down pushes the chosen one down too (likelihood displacement). The
    paper keeps the 5 % of pairs with the lowest length-normalised score.

    Args:
        chosen, rejected: sums of hidden states.
        chosen_lengths, rejected_lengths: tokens of each answer: means take the place of sums, which compares pairs of
            unequal length. Both or neither.

    https://arxiv.org/abs/2410.08847, definition 2
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("give the lengths of both answers, or of none")
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen = chosen / chosen_lengths.clamp(min=1)[:, None]
        rejected = rejected / rejected_lengths.clamp(min=1)[:, None]
    return (chosen * rejected).sum(-1) - chosen.square().sum(-1)
