"""Objectives over pairs of a better and a worse answer to the same prompt.

Shapes: B pairs. Notation: r = log pi(y|x) - log pi_ref(y|x), summed over tokens.
"""

from __future__ import annotations

import math
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
    return (chosen.mean_log_ratio - rejected.mean_log_ratio - 1 / (2 * beta)).square()


@needs(reference=True)
def dpo_mean(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 5.0) -> Float[Tensor, " B"]:
    """Length-normalised DPO: `dpo` with each r averaged over the tokens of its answer (TRL's `sigmoid_norm`).

    Weight on each token of an answer y beta sigma(-beta margin)/|y|: a long one is pushed no harder in all than a short
    one. For the push of `dpo` take its `beta` times the length of an answer.

    Reduction: mean over pairs of token means. Reference: yes. https://arxiv.org/abs/2411.15124 (Tulu 3)
    """
    return -F.logsigmoid(beta * (chosen.mean_log_ratio - rejected.mean_log_ratio))


@needs(reference=True)
def cdpo(
    chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Tensor, " B"]:
    """Conservative DPO, a share e = label_smoothing of the pairs being the wrong way round:
    -(1 - e) log sigma(beta h) - e log sigma(-beta h), h = r_chosen - r_rejected.

    Weight on both answers beta (sigma(-beta h) - e): the rejected one is pushed down until h = log((1 - e)/e)/beta, and
    raised again beyond. e = 0: `dpo`; e -> 1/2: the margin is held at the reference's.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://ericmitchell.ai/cdpo.pdf
    """
    h = chosen.log_ratio - rejected.log_ratio
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


@needs(reference=True)
def robust_dpo(
    chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Tensor, " B"]:
    """Robust DPO: (-(1 - e) log sigma(beta h) + e log sigma(-beta h))/(1 - 2 e), h = r_chosen - r_rejected.

    Where a share e = label_smoothing of the labels is flipped at random, its mean over flips is `dpo` on the true
    labels. Weight on both answers beta ((1 - e) sigma(-beta h) + e sigma(beta h))/(1 - 2 e), which is that of `dpo` and
    beta e/(1 - 2 e) besides: the rejected answer is pushed for ever. e = 0: `dpo`; e -> 1/2: without bound.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2403.00409
    """
    h = chosen.log_ratio - rejected.log_ratio
    clean, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@needs(reference=True)
def hinge(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Hinge on the margin: max(0, 1 - beta (r_chosen - r_rejected)), SLiC normalised by the reference.

    Weight beta on both answers until the margin is 1/beta, then none.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2309.06657 (RSO)
    """
    return (1 - beta * (chosen.log_ratio - rejected.log_ratio)).relu()


def slic(chosen: SequenceLogps, rejected: SequenceLogps, *, delta: float = 1.0) -> Float[Tensor, " B"]:
    """SLiC-HF's calibration term: max(0, delta - log pi(chosen) + log pi(rejected)), without a reference.

    Weight 1 on both answers until the chosen one is `delta` nats more likely. The paper adds the NLL of a reference
    answer: `nll_weight` of the trainer.

    Reduction: mean over pairs of sequence sums. Reference: no. https://arxiv.org/abs/2305.10425
    """
    return (delta - chosen.sums + rejected.sums).relu()


def cpo(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """The preference half of CPO: `dpo` with a uniform reference, -log sigma(beta log(pi(chosen)/pi(rejected))).

    Weight beta sigma(-beta log(pi(chosen)/pi(rejected))) on both answers; a short answer starts ahead. The paper adds
    the NLL of the chosen answer: `nll_weight` of the trainer.

    Reduction: mean over pairs of sequence sums. Reference: no. https://arxiv.org/abs/2401.08417, equation 3
    """
    return -F.logsigmoid(beta * (chosen.sums - rejected.sums))


def simpo(
    chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Tensor, " B"]:
    """SimPO: -log sigma(beta (log pi(chosen)/|chosen| - log pi(rejected)/|rejected|) - gamma), without a reference.

    Weight on each token of an answer y beta sigma(gamma - beta margin)/|y|: more than half of beta/|y| until the margin
    is gamma/beta nats per token, fading beyond. gamma = 0: `dpo_mean` with a uniform reference. `gamma` is the paper's
    (TRL's CPO trainer calls it `simpo_gamma`).

    Reduction: mean over pairs of token means. Reference: no. https://arxiv.org/abs/2405.14734, equation 6
    """
    return -F.logsigmoid(beta * (chosen.means - rejected.means) - gamma)


def orpo(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """ORPO: -log pi(chosen)/|chosen| - beta log sigma(log odds(chosen)/odds(rejected)), odds(y) = P/(1 - P) with
    P = exp(log pi(y)/|y|); without a reference. `beta` is the paper's lambda.

    The second term pushes each token of the rejected answer down by beta sigma(-log odds ratio)/(|y| (1 - P)), harder
    the likelier it is, and one of the chosen answer up by the same formula; the first is plain NLL on the chosen answer
    and does most of the work at the default.

    Reduction: mean over pairs of token means. Reference: no. https://arxiv.org/abs/2403.07691, equations 4, 6, 7
    """
    log_odds = _log_odds(chosen.means) - _log_odds(rejected.means)
    return -chosen.means - beta * F.logsigmoid(log_odds)


@needs(reference=True)
def apo_zero(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """APO-zero: 1 - sigma(beta r_chosen) + sigma(beta r_rejected): each answer against the reference, not the other.

    Weight on each answer beta s (1 - s), s = sigma(beta r) of its own: strongest at the reference, fading both ways, so
    that the chosen one is raised whatever the rejected one does. For chosen answers better than the model's own.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2408.06266, equation 7
    """
    return torch.sigmoid(-beta * chosen.log_ratio) + torch.sigmoid(beta * rejected.log_ratio)


@needs(reference=True)
def apo_down(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """APO-down: sigma(beta r_chosen) + 1 - sigma(beta (r_chosen - r_rejected)): both answers down, the rejected more.

    Weight on the rejected answer beta m (1 - m), m = sigma(beta margin); on the chosen one
    beta (s (1 - s) - m (1 - m)), s = sigma(beta r_chosen): 0 at the reference, down once the margin is the wider of the
    two. For chosen answers worse than what the model would say.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2408.06266, equation 8
    """
    margin = chosen.log_ratio - rejected.log_ratio
    return torch.sigmoid(beta * chosen.log_ratio) + torch.sigmoid(-beta * margin)


@needs(reference=True)
def dpop(
    chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1, penalty: float = 50.0
) -> Float[Tensor, " B"]:
    """DPO-positive (Smaug): -log sigma(beta (r_chosen - r_rejected - penalty max(0, -r_chosen))).

    Weight on the rejected answer beta sigma(-beta m), m being the bracket; as `dpo` while the chosen one is at least as
    likely as under the reference. Below, it is raised `penalty` + 1 times as hard as the rejected one is pushed down,
    so that it cannot fall along with it. penalty = 0: `dpo`.

    Args:
        penalty: the paper's lambda.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2402.13228
    """
    fallen = (-chosen.log_ratio).relu()
    return -F.logsigmoid(beta * (chosen.log_ratio - rejected.log_ratio - penalty * fallen))


@needs(reference=True)
def nca(chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Noise-contrastive alignment on a pair: -log sigma(beta r_w) - (log sigma(-beta r_w) + log sigma(-beta r_l))/2.

    Weight on the rejected answer beta sigma(beta r_l)/2: it fades as the answer disappears. The chosen one is raised by
    beta (sigma(-beta r_w) - sigma(beta r_w)/2) to r_w = log(2)/beta and held there: absolute, so that it cannot fall
    with the rejected one.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2402.05369
    """
    up, down = beta * chosen.log_ratio, beta * rejected.log_ratio
    return -F.logsigmoid(up) - (F.logsigmoid(-up) + F.logsigmoid(-down)) / 2


@needs(reference=True)
def exo(
    chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Float[Tensor, " B"]:
    """EXO on a pair: KL(q || p), q = softmax(beta (r_chosen, r_rejected)), p = (1 - e, e), e = label_smoothing.

    The reverse of `cdpo`, which is KL(p || q) but for a constant: mode-seeking. With h = r_chosen - r_rejected the
    weight on both answers is beta s (1 - s) (log((1 - e)/e) - beta h), s = sigma(beta h): the rejected one is pushed
    down until h = log((1 - e)/e)/beta and raised again beyond, hardly so far away on either side: a pair that is far
    the wrong way round is given up. e -> 0: ever harder, without end.

    Reduction: mean over pairs of sequence sums. Reference: yes. https://arxiv.org/abs/2402.00856, equation 16
    """
    h = chosen.log_ratio - rejected.log_ratio
    right = F.logsigmoid(beta * h) - math.log1p(-label_smoothing)
    wrong = F.logsigmoid(-beta * h) - math.log(label_smoothing)
    return torch.sigmoid(beta * h) * right + torch.sigmoid(-beta * h) * wrong


def chosen_nll(chosen: SequenceLogps, rejected: SequenceLogps) -> Float[Tensor, " B"]:
    """-log pi(chosen)/|chosen|: fine-tuning on the better answer (Pref-FT), nothing is pushed down. Also the anchor
    that other objectives take a weight of (RPO, https://arxiv.org/abs/2404.19733).

    Reduction: mean over pairs of token means. Reference: no. https://arxiv.org/abs/2404.14367, section 3 (Pref-FT)
    """
    return -chosen.means


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


def _log_odds(mean_logps: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(P/(1 - P)) of P = exp(mean log-probability), finite and without gradient where P is 1 to the last bit."""
    below = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return below - (-below.expm1()).log()


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "cdpo": cdpo,
    "chosen_nll": chosen_nll,
    "cpo": cpo,
    "dpo": dpo,
    "dpo_mean": dpo_mean,
    "dpop": dpop,
    "exo": exo,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "nca": nca,
    "orpo": orpo,
    "robust_dpo": robust_dpo,
    "simpo": simpo,
    "slic": slic,
    "step_dpo": step_dpo,
}
