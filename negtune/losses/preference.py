"""Objectives over pairs of a better and a worse answer to the same prompt.

Shapes: B pairs. Notation: r = log pi(y|x) - log pi_ref(y|x), summed over tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from negtune.ops import SequenceLogps, needs


@needs(reference=True)
def dpo(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Direct preference optimisation: -log sigma(beta (r_chosen - r_rejected)).

    The gradient pushes the rejected answer down and the chosen one up, both with weight beta sigma(-beta margin):
    a pair that is already well separated is left alone. Only the margin counts, so *both* log-probabilities may fall.
    beta -> 0: constant weight on every pair; beta -> infinity: a hinge on the margin (times beta).

    Reduction: mean over pairs of sequence sums. `beta` belongs to sums. Reference: yes.
    https://arxiv.org/abs/2305.18290
    """
    return -F.logsigmoid(beta * (chosen.log_ratio - rejected.log_ratio))


@needs(reference=True)
def ipo(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Identity preference optimisation: (r_chosen - r_rejected - 1/(2 beta))^2, with r summed over tokens.

    The gradient pushes the rejected answer down and the chosen one up until the margin is 1/(2 beta), and back again
    beyond it: unlike with `dpo` repeating a pair does not separate it without end. `beta` is the paper's tau.
    beta -> 0: an ever larger margin is asked for; beta -> infinity: the pair is tied together.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2310.12036, equation 17
    """
    return (chosen.log_ratio - rejected.log_ratio - 1 / (2 * beta)).square()


@needs(reference=True)
def ipo_mean(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """`ipo` with each r averaged over the tokens of its answer, as in TRL's `loss_type="ipo"`.

    The margin 1/(2 beta) is one of nats per token, so a `beta` for this form is not one for `ipo`; long answers are
    pushed less per token.

    Reduction: mean over pairs of token means. Reference: yes. https://arxiv.org/abs/2310.12036
    """
    chosen_ratio = chosen.log_ratio / chosen.lengths.clamp(min=1)
    rejected_ratio = rejected.log_ratio / rejected.lengths.clamp(min=1)
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)).square()


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo, "ipo_mean": ipo_mean}
