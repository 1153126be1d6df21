"""Objectives that make a model forget some answers, and the terms that make it keep the others.

Shapes: B sequences, T completion tokens, n tokens of one tile, V vocabulary.
Notation: l = log pi(y|x) summed over the |y| tokens, r = l - l_ref, p_t the probability of token t, p a whole
next-token distribution, sigma the logistic function, sg(.) a constant for the gradient. All are minimised.

A result `[B]` is averaged over the rows of the optimiser step, `[B T]` over its scored tokens (0 behind the mask).
Every forget objective is a weighted push: gradient = mean(weight * gradient of l), and the docstring names the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from negtune.losses.preference import dpo
from negtune.ops import LayerActivations, SequenceLogps, TokenDistributions, at_least_float32, needs

# --- Forget: push the answer down -------------------------------------------------------------------------------------


def grad_ascent(forget: SequenceLogps) -> Float[Tensor, "B T"]:
    """Gradient ascent on the forget answers: log p_t.

    Weight 1 on every token for ever: nothing stops once the answer is gone, the loss falls linearly to -infinity and
    takes the rest of the model along.

    Reduction: token mean, as in the TOFU code. Reference: no. https://arxiv.org/abs/2401.06121
    """
    return _scored_logps(forget)


@needs(reference=True)
def npo(forget: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Negative preference optimisation: -(2/beta) log sigma(-beta r), DPO without its preferred half.

    The gradient is gradient ascent's times W = 2 sigma(beta r) (see `npo_weight`): 1 at the reference, towards 0 as
    the answer disappears, so divergence is logarithmic instead of linear, and towards 2 if the answer became *more*
    likely. Never negative. beta -> 0: gradient ascent plus the constant (2/beta) log 2; beta -> infinity: 2 max(r, 0).

    Reduction: row mean of sequence sums. `beta` belongs to sums (`beta_for_mean` converts). Reference: yes.
    https://arxiv.org/abs/2404.05868
    """
    return -(2 / beta) * F.logsigmoid(-beta * forget.log_ratio)


def simnpo(forget: SequenceLogps, *, beta: float = 2.5, gamma: float = 0.0) -> Float[Tensor, " B"]:
    """Simple NPO: -(2/beta) log sigma(-(beta/|y|) l - gamma). No reference, normalised by length.

    Weight on l: (2/|y|) sigma(beta l/|y| + gamma): an answer with low probability per token is left alone from the
    first step, whatever the reference thought. `gamma` shifts the point where the push fades: larger pushes longer.
    `beta` 2.5 is the paper's for TOFU forget05 (4.5 for forget10).

    The released code and open-unlearning compute log sigma(beta (-l/|y| - gamma)): their gamma is ours over beta.

    Reduction: row mean. `beta` belongs to means (`beta_for_sum` converts). Reference: no.
    https://arxiv.org/abs/2410.07163
    """
    return -(2 / beta) * F.logsigmoid(-beta * forget.means - gamma)


@needs(reference=True)
def kto(forget: SequenceLogps, z0: Float[Tensor, ""], *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """Kahneman-Tversky optimisation of the forget side: 1 - (2/beta) sigma(z0 - beta r).

    Weight 2 s (1 - s) with s = sigma(z0 - beta r), at most 1/2: it fades for answers that are gone and also for
    answers that are far more likely than under the reference, which NPO pushes hardest.

    As in the NPO authors' code: `z0` is the mean log-ratio of the alternative answers over the optimiser step, without
    gradient, neither multiplied by beta nor clamped at 0 (KTO itself does both). It sees the alternatives only here.

    Reduction: row mean of sequence sums. `beta` belongs to sums. Reference: yes.
    https://arxiv.org/abs/2402.01306 · form: https://arxiv.org/abs/2404.05868
    """
    return 1 - (2 / beta) * torch.sigmoid(z0.detach() - beta * forget.log_ratio)


@needs(reference=True)
def kto_logsigmoid(forget: SequenceLogps, z0: Float[Tensor, ""], *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """KTO with a log-sigmoid: 1 - (2/beta) log sigma(z0 - beta r). With z0 = 0 it is 1 + NPO.

    Weight 2 sigma(beta r - z0): NPO's, faded earlier when the alternatives have become likely (z0 > 0).
    `z0`, reduction and beta as in `kto`. Reference: yes. https://arxiv.org/abs/2404.05868
    """
    return 1 - (2 / beta) * F.logsigmoid(z0.detach() - beta * forget.log_ratio)


def wga(forget: SequenceLogps, *, beta: float = 1.0) -> Float[Tensor, "B T"]:
    """Weighted gradient ascent: sg(p_t^beta) log p_t.

    Weight p_t^beta: tokens that are already improbable are left alone, one by one. beta = 0 is gradient ascent, a large
    beta touches only tokens the model is sure of.

    Reduction: token mean, as in the authors' code and open-unlearning; the paper writes a sum over the answer's tokens.
    Reference: no. https://arxiv.org/abs/2502.19301
    """
    logps = _scored_logps(forget)
    return _weighted((beta * logps).exp(), logps)


def satimp(forget: SequenceLogps, *, beta1: float = 5.0, beta2: float = 1.0) -> Float[Tensor, "B T"]:
    """Saturation-importance reweighting: sg(p_t^beta1 (1 - p_t)^beta2) log p_t.

    Weight p_t^beta1 (saturation: leave what is gone) times (1 - p_t)^beta2 (importance: leave what any model would
    predict), largest at p_t = beta1/(beta1 + beta2). beta2 = 0 is `wga`.

    Reduction: token mean, as in the authors' code and open-unlearning; the paper writes a sum over the answer's tokens.
    Reference: no. https://arxiv.org/abs/2505.11953
    """
    logps = _scored_logps(forget)
    weight = (beta1 * logps).exp() * (-logps.expm1()).clamp(min=0) ** beta2
    return _weighted(weight, logps)


@needs(reference=True, distributions=True)
def undial(forget: TokenDistributions, *, beta: float = 10.0) -> Float[Tensor, "B T"]:
    """Self-distillation on adjusted logits: cross-entropy of p to softmax(z_ref - beta onehot(y_t)).

    The gradient in the logits is p - q with a *fixed* q: the answer's token falls to the reference's probability with
    its logit lowered by beta, the others keep their proportions, and learning stops there. beta = 0: stay at the
    reference; beta -> infinity: the reference without that token. The minimum is the entropy of q, not 0.

    Reduction: token mean over scored tokens. The authors' code and open-unlearning average over prompt and padding as
    well, and index the one-hot with the ignored label there. Reference: whole distributions.
    https://arxiv.org/abs/2402.10052
    """
    return forget.map_with_reference(partial(_undial, beta=beta))


@needs(distributions=True)
def ce_u(forget: TokenDistributions, *, skip_first: int = 1) -> Float[Tensor, "B T"]:
    """Cross-entropy unlearning: cross-entropy of p to sg(softmax(z with z_y = -infinity)).

    Weight p_t/(1 - p_t) on log p_t, the gradient of unlikelihood -log(1 - p_t); in the logits it is p_t on the answer's
    token and at most p_t on all others together, so it is bounded and fades as the token disappears.

    The first `skip_first` tokens of each answer yield 0 (a footnote of the paper: otherwise the model learns to open
    every answer differently), and an answer no longer than that is not unlearned at all. They stay in the trainer's
    token count, whereas the released code divides by the remaining tokens.

    Reduction: token mean. Reference: no, but whole distributions. https://arxiv.org/abs/2503.01224
    """
    skipped = forget.mask.cumsum(-1) <= skip_first
    return forget.map(_ce_u).masked_fill(skipped, 0.0)


@needs(activations=True)
def rmu(forget: LayerActivations, *, layer: int = 7, steering: float = 20.0, seed: int = 0) -> Float[Tensor, "B T"]:
    """Representation misdirection for unlearning: |h_t - c u|^2 / H for the activations h_t after `layer`.

    Pulls the hidden states of the forget answers towards one random direction u of norm c = `steering`, whatever they
    held, so that the layers above cannot read them; it fades as they arrive. It has no gradient above `layer`. The
    method of the paper is more than this term: `activation_mse` at the same layer as retain objective with a large
    `retain_weight`, and only the down projections of this layer and the two below trained
    (`trainable="layers\\.[567]\\.mlp\\.down_proj"`, or `layers_to_transform` of a LoRA).

    u has entries uniform in [0, 1), normalised, and is the same for a whole run: `seed` draws it. c belongs to the
    model and has to stand out from the norm of its activations at that layer (logged as `forget/activation_norm`):
    20 is the released codes' default; on SmolLM2-135M the norm at layer 7 is 110. The codes average over the width H,
    as here; the paper writes the squared norm.

    The scored positions are those of the answer's tokens, as in open-unlearning; the paper's corpora have no prompts.
    The prompt's last position, which predicts the first token of the answer, is left alone.

    Reduction: token mean. Reference: no. https://arxiv.org/abs/2403.03218
    """
    return forget.squared_distance(steering * control_vector(forget.hidden.shape[-1], seed))


# --- Forget: pull another answer up -----------------------------------------------------------------------------------


@needs(reference=True)
def idk_dpo(forget: SequenceLogps, alternative: SequenceLogps, *, beta: float = 0.1) -> Float[Tensor, " B"]:
    """DPO with an alternative answer chosen and the forget answer rejected, times 2/beta: scaled like `npo`.

    Weight 2 sigma(-beta (r_alternative - r_forget)) down on the forget answer and up on the alternative: it fades as
    soon as the alternative has gained enough, even if the forget answer has not moved. A refusal as alternative is
    IDK-DPO, a plausible other answer is AltPO (https://arxiv.org/abs/2409.13474).

    Reduction: row mean of sequence sums. `beta` belongs to sums. Reference: yes. https://arxiv.org/abs/2404.05868
    """
    return (2 / beta) * dpo(alternative, forget, beta=beta)


def idk_nll(alternative: SequenceLogps) -> Float[Tensor, "B T"]:
    """Refusal ("I don't know") fine-tuning: -log p_t of the alternative answer.

    The forget answer is touched only through what the alternative takes from it; it stays likely once forced.

    Reduction: token mean, as in the TOFU code. Reference: no. https://arxiv.org/abs/2401.06121
    """
    return -_scored_logps(alternative)


def jensun(alternative: SequenceLogps) -> Float[Tensor, "B T"]:
    """Jensen-Shannon unlearning: JSD(p, onehot(y_t)) for each token of a refusal, between 0 and log 2.

    Only p_t = p(y_t) matters. With m = (p + onehot)/2:
    KL(onehot | m) = log 2 - log(1 + p_t) and KL(p | m) = p_t log(2 p_t/(1 + p_t)) + (1 - p_t) log 2, half of each gives
    JSD = log 2 + (p_t log p_t - (1 + p_t) log(1 + p_t))/2.

    Weight (p_t/2) log(1 + 1/p_t), upwards: at most log(2)/2, and 0 for a refusal the model would never utter, so the
    forget answer falls only as fast as the refusal can rise.

    Reduction: token mean over the refusal's own positions. The released code scores every position of the forget row,
    prompt and padding included, against a target of 1 on *all* refusal tokens at once. Reference: no.
    https://arxiv.org/abs/2509.02820
    """
    logps = _scored_logps(alternative)
    logps = logps.clamp(min=torch.finfo(logps.dtype).min)  # 0 * -inf is NaN
    probabilities = logps.exp()
    divergence = math.log(2) + (probabilities * logps - (1 + probabilities) * probabilities.log1p()) / 2
    return divergence.masked_fill(~alternative.mask, 0.0)


# --- Retain -----------------------------------------------------------------------------------------------------------


def nll(retain: SequenceLogps) -> Float[Tensor, "B T"]:
    """Fine-tuning on the answers to keep (RT, "GradDiff"): -log p_t. Reduction: token mean. Reference: no."""
    return -_scored_logps(retain)


@needs(reference=True, distributions=True)
def kl(retain: TokenDistributions, *, direction: str = "forward") -> Float[Tensor, "B T"]:
    """Stay near the reference's next-token distributions on answers to keep.

    "forward" is KL(p_ref | p), what the NPO authors' and open-unlearning's code compute: keep everything the reference
    could say. "reverse" is KL(p | p_ref), the NPO paper's notation: say nothing the reference would not.

    Reduction: token mean over the answer. The released codes also sum over prompt and padding and divide by the padded
    length, so that their strength depends on the padding. Reference: whole distributions.
    https://arxiv.org/abs/2404.05868
    """
    if direction not in _KL:
        raise ValueError(f"direction must be one of {sorted(_KL)}, got {direction!r}")
    return retain.map_with_reference(_KL[direction])


@needs(reference=True, distributions=True)
def jsd(retain: TokenDistributions) -> Float[Tensor, "B T"]:
    """Jensen-Shannon divergence to the reference, JensUn's retain term: between 0 and log 2, finite for any two.

    Reduction: token mean over the answer (the released code: over all positions). Reference: whole distributions.
    https://arxiv.org/abs/2509.02820
    """
    return retain.map_with_reference(_jsd)


@needs(reference=True, activations=True)
def activation_mse(retain: LayerActivations, *, layer: int = 7) -> Float[Tensor, "B T"]:
    """Keep the activations after `layer` where the reference has them, RMU's retain term: |h_t - h_ref,t|^2 / H.

    Holds nothing above `layer`: enough as long as nothing above is trained.

    Reduction: token mean over the answer's own positions. Reference: activations. https://arxiv.org/abs/2403.03218
    """
    return retain.squared_distance_to_reference()


# --- Weights and conventions ------------------------------------------------------------------------------------------


def npo_weight(log_ratio: Float[Tensor, "*n"], *, beta: float) -> Float[Tensor, "*n"]:
    """W = 2 sigma(beta r), NPO's gradient over gradient ascent's, for logging: 1 untouched, 0 forgotten, 2 grown."""
    return 2 * torch.sigmoid(beta * log_ratio.detach())


def control_vector(width: int, seed: int) -> Float[Tensor, " H"]:
    """RMU's direction u: entries uniform in [0, 1) drawn on the CPU from `seed`, normalised to length 1."""
    direction = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()


def beta_for_mean(beta: float, length: int | float) -> float:
    """The beta that gives a length-normalised objective the weight which `beta` gives the sequence sum: beta |y|.

    Only sigma's argument is converted; (2/beta) f(beta r) then comes out divided by the length as well.
    """
    return beta * length


def beta_for_sum(beta: float, length: int | float) -> float:
    """The inverse of `beta_for_mean`: beta / |y|."""
    return beta / length


# --- Equations over logits and log-probabilities ----------------------------------------------------------------------


def _scored_logps(sequence: SequenceLogps) -> Float[Tensor, "B T"]:
    """Log-probabilities, float32 or wider, 0 behind the mask."""
    return at_least_float32(sequence.logps).masked_fill(~sequence.mask, 0.0)


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    """sg(weight) * values, with 0 * -inf = 0."""
    weight = weight.detach()
    return weight * values.masked_fill(weight == 0, 0.0)


def _expectation(probabilities: Float[Tensor, "n V"], values: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Sum of probability times value, where probability 0 silences even an infinite value, in value and gradient."""
    return (probabilities * values.masked_fill(probabilities == 0, 0.0)).sum(-1)


def _log_softmax(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    return at_least_float32(logits).log_softmax(-1)


def _undial(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Float[Tensor, "n V"], *, beta: float
) -> Float[Tensor, " n"]:
    ref_logits = at_least_float32(ref_logits)
    lowered = ref_logits.scatter_add(-1, targets[:, None], ref_logits.new_full((targets.shape[0], 1), -beta))
    return -_expectation(lowered.softmax(-1), _log_softmax(logits))


def _ce_u(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Tensor | None = None
) -> Float[Tensor, " n"]:
    others = at_least_float32(logits.detach()).scatter(-1, targets[:, None], -torch.inf)
    return -_expectation(others.softmax(-1), _log_softmax(logits))


def _forward_kl(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Float[Tensor, "n V"]
) -> Float[Tensor, " n"]:
    logps, ref_logps = _log_softmax(logits), _log_softmax(ref_logits)
    return _expectation(ref_logps.exp(), ref_logps - logps)


def _reverse_kl(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Float[Tensor, "n V"]
) -> Float[Tensor, " n"]:
    logps, ref_logps = _log_softmax(logits), _log_softmax(ref_logits)
    return _expectation(logps.exp(), logps - ref_logps)


def _jsd(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Float[Tensor, "n V"]
) -> Float[Tensor, " n"]:
    logps, ref_logps = _log_softmax(logits), _log_softmax(ref_logits)
    finite_ref_logps = ref_logps.clamp(min=torch.finfo(ref_logps.dtype).min)  # logaddexp(-inf, -inf) has gradient NaN
    middle = torch.logaddexp(logps, finite_ref_logps) - math.log(2)
    return (_expectation(logps.exp(), logps - middle) + _expectation(ref_logps.exp(), ref_logps - middle)) / 2


_KL = {"forward": _forward_kl, "reverse": _reverse_kl}

FORGET_LOSSES: dict[str, Callable[..., Tensor]] = {
    "grad_ascent": grad_ascent,
    "npo": npo,
    "simnpo": simnpo,
    "kto": kto,
    "kto_logsigmoid": kto_logsigmoid,
    "wga": wga,
    "satimp": satimp,
    "undial": undial,
    "ce_u": ce_u,
    "idk_dpo": idk_dpo,
    "idk_nll": idk_nll,
    "jensun": jensun,
    "rmu": rmu,
}
RETAIN_LOSSES: dict[str, Callable[..., Tensor]] = {"nll": nll, "kl": kl, "jsd": jsd, "activation_mse": activation_mse}
