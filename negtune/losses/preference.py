"""Objectives over pairs of a better and a worse answer to the same prompt.

Shapes: B pairs. Notation: r = log pi(y|x) - log pi_ref(y|x), summed over tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from negtune.ops import MissingReferenceError, SequenceLogps, TokenCredit, needs, segment_sums


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


@needs(reference=True, step=True)
def step_dpo(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Per-step DPO: `dpo` on the step in which the two answers part, -log sigma(beta (r_chosen - r_rejected)) with r
    summed over that step's tokens alone.

    The gradient pushes down the one step that ruined the rejected answer, the first pit; the steps before it, which
    both share, and those behind it, which only carry the mistake on, get none. If pairs are labelled by the steps'
    advantages under a Bradley-Terry model, the optimum is pi_ref(y_i|s) exp(A_i/beta)/Z (theorem 6.1).

    Reduction: mean over pairs of sums over the step. Reference: yes. https://arxiv.org/abs/2406.14532, algorithm 1
    """
    return dpo(chosen.on_step, rejected.on_step, beta=beta)


@needs(reference=True, step=True)
def step_kto(
    policy: SequenceLogps,
    credit: TokenCredit,
    *,
    beta: float = 0.1,
    z0: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """Step-KTO's process half: KTO on every judged step, no pairs needed.

    With r_i = log pi(step i)/pi_ref(step i), summed over its tokens: desirable_weight (1 - sigma(beta (r_i - z0))) for
    a step of positive advantage, undesirable_weight (1 - sigma(beta (z0 - r_i))) for one of negative advantage,
    averaged over the judged steps of a completion. Only the sign of an advantage is read.

    Weight on a bad step: beta s (1 - s)/steps with s = sigma(beta (r_i - z0)): it fades once the step is gone, and also
    where it is far more likely than under the reference. `z0` is the reference point; 0 stands for an estimate of the
    KL divergence, as in APO-zero. The paper adds the same term for the whole completion.

    Reduction: mean over completions. `beta` belongs to sums. Reference: yes. https://arxiv.org/abs/2501.10799 (built
    from its abstract and KTO's formula, https://arxiv.org/abs/2402.01306; its equation was not at hand)
    """
    judged = credit.known & (credit.advantages != 0)
    segments = credit.segments("step")
    if policy.ref_logps is None:
        raise MissingReferenceError("step_kto needs reference log-probabilities; pass reference= to the trainer")
    ratio = segment_sums((policy.logps - policy.ref_logps).masked_fill(~judged, 0.0), segments)
    good = credit.advantages > 0
    values = torch.where(
        good,
        desirable_weight * torch.sigmoid(-beta * (ratio - z0)),
        undesirable_weight * torch.sigmoid(beta * (ratio - z0)),
    )
    per_token = 1 / segment_sums(judged.to(values), segments).clamp(min=1)  # every step counts once, however long
    steps = (per_token.masked_fill(~judged, 0.0)).sum(-1).clamp(min=1)
    return (values * per_token).masked_fill(~judged, 0.0).sum(-1) / steps


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "step_dpo": step_dpo,
}
