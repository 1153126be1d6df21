"""Objectives for labels that lack relevant documents: only what was selected for judging could be found relevant.

A document is labelled (l = 1) if it is relevant (r) *and* was selected (s): P(l = 1) = P(r = 1) P(s = 1). A negative is
either irrelevant, or a relevant document that nobody looked at. Two models, one for each cause, are trained together;
each weighs the other's negatives.

Shapes: Q queries, D documents of the longest list, `*A` anything. Logits: sigmoid(logit) is a probability. `judged` is
False where a gain of 0 stands for want of a judgement. No weight carries a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.losses.ranking import pair_losses, refuse_not_positive, sides
from negtune.ops import at_least_float32

CET_MODES = ("official", "posterior", "ratio", "ips")


# --- What a missing label says ----------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_relevance(relevance: Float[Tensor, "*A"], selection: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """P(r = 1 | l = 0) = r (1 - s) / (1 - r s), which is sigmoid(relevance - softplus(selection)).

    s -> 0: nothing was looked at, and the label says nothing: r. s -> 1: everything was, and it is irrelevant: 0.

    Args:
        relevance, selection: logits of r and s. Exchanged, the result is P(s = 1 | l = 0).

    Selected at random, positive and unlabelled: https://arxiv.org/abs/1808.08755, section 4
    """
    relevance, selection = at_least_float32(relevance), at_least_float32(selection)
    return torch.sigmoid(relevance - F.softplus(selection))


@torch.no_grad()
def expected_gains(
    gains: Float[Tensor, "Q D"],
    judged: Bool[Tensor, "Q D"],
    relevance: Float[Tensor, "Q D"],
    selection: Float[Tensor, "Q D"],
) -> Float[Tensor, "Q D"]:
    """Gains in which a document that nobody judged has the probability that it is relevant, instead of 0.

    Any objective over lists can be trained on them: PG-Rank is then rewarded with the expected metric over what the
    labels leave open, LambdaRank weighs exchanges by it.

    Take the logits from a model that was trained to them, by `em_relevance`: a ranker that is rewarded with its own
    opinion confirms itself.
    """
    unknown = ~judged & (gains <= 0)
    return torch.where(unknown, hidden_relevance(relevance, selection), at_least_float32(gains))


# --- Weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def official_weights(other: Float[Tensor, "*A"], *, temperature: float = 10.0) -> Float[Tensor, "*A"]:
    """CET's weight of a negative, 1/(1 - sigmoid(other/t)) = 1 + exp(other/t), as released.

    `other` is the logit of the other model: a negative that was probably selected is a trustworthy one and weighs more.
    No weight is below 1; at a logit of 0 it is 2, so that the released, unnormalised loss also doubles the rate.
    t -> infinity: 2 for all. Weights end at the square root of the largest number, which no sane logit comes near.
    """
    refuse_not_positive(temperature=temperature)
    exponents = at_least_float32(other) / temperature
    return 1 + torch.exp(exponents.clamp(max=math.log(torch.finfo(exponents.dtype).max) / 2))


@torch.no_grad()
def ratio_weights(
    selection: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"], *, clip: float = 0.05
) -> Float[Tensor, "Q D"]:
    """Dual learning's weight of a positive, max_d s_d / s, at most 1/clip: 1 for the document most surely selected.

    Only the ratio of selection probabilities is needed, which is all that a model of clicks or pools can know.

    https://arxiv.org/abs/1804.05938, equation 11, where the first place stands for the surest
    """
    _refuse_clip(clip)
    chances = torch.sigmoid(at_least_float32(selection)).masked_fill(~mask, 0.0)
    return (chances.amax(-1, keepdim=True) / chances.clamp(min=torch.finfo(chances.dtype).tiny)).clamp(max=1 / clip)


@torch.no_grad()
def propensity_weights(propensities: Float[Tensor, "*A"], *, clip: float = 0.05) -> Float[Tensor, "*A"]:
    """Inverse propensity weight of a positive, 1/max(s, clip): a positive that was found against the odds stands for
    the others like it that were not.

    clip -> 0 is unbiased, and its variance unbounded. https://arxiv.org/abs/1608.04468, equation 6
    """
    _refuse_clip(clip)
    return 1 / at_least_float32(propensities).clamp(min=clip)


# --- The objectives ---------------------------------------------------------------------------------------------------


def cet(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    selection: Float[Tensor, "Q D"] | None = None,
    propensities: Float[Tensor, "Q D"] | None = None,
    judged: Bool[Tensor, "Q D"] | None = None,
    mode: str = "official",
    temperature: float = 10.0,
    clip: float = 0.05,
    normalize: bool | None = None,
) -> Float[Tensor, " Q"]:
    """CET, coupled estimation: w_p w_n softplus(s_n - s_p), averaged over pairs of a relevant p and an irrelevant n.

    A negative is pushed down with weight w_n sigma(s_n - s_p). The modes differ in whom they believe:

    - `official`, as published and released: w_n = 1 + exp(selection/temperature), w_p = 1. The selection model is
      trained with the same call and the models' roles exchanged.
    - `posterior`: w_n = P(r = 0 | l = 0) = (1 - r)/(1 - r s), with r from `scores` themselves: a likely false negative
      is let go. A negative that was judged keeps 1.
    - `ratio`: w_p = max_d s_d / s_p: rarely selected positives count more; negatives are all believed.
    - `ips`: s is known. w_p = 1/s_p and w_n as in `posterior`: on simulated pools either alone brought about half
      of what both do (tests/losses/test_debiased_training.py).

    The level of the scores is not in any pair, and `posterior` and `ips` read it as the log-odds of relevance: start
    from a calibrated model, or add `em_relevance`, which learns it.

    Args:
        scores: of the relevance model.
        gains: above 0 is relevant.
        selection: logits of the selection model; all modes but `ips`.
        propensities: P(s = 1), above 0 and at most 1; `ips` only.
        judged: where a gain of 0 is a judgement, for `posterior` and `ips`; by default nowhere.
        temperature: of `official`. clip: smallest probability of selection that is divided by, `ratio` and `ips`.
        normalize: divide the weights by their mean over the pairs of the batch, so that a mode does not change the
            step's size. Default: False for `official`, as released, else True.

    Reduction: mean over queries of means over pairs. https://arxiv.org/abs/2209.05072; `posterior`, `ratio` and `ips`
    are ours, from the same model of the labels.
    """
    scores = at_least_float32(scores)
    relevant, irrelevant = sides(gains, mask)
    up, down = _weights(scores, mask, selection, propensities, judged, mode, temperature, clip)
    pairs = relevant.unsqueeze(-1) & irrelevant.unsqueeze(-2)
    weights = (up.unsqueeze(-1) * down.unsqueeze(-2)).masked_fill(~pairs, 0.0)
    if mode != "official" if normalize is None else normalize:
        weights = weights * pairs.sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    losses, _ = pair_losses(scores, gains, mask)
    return (losses * weights).masked_fill(~pairs, 0.0).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


def em_relevance(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    selection: Float[Tensor, "Q D"],
    judged: Bool[Tensor, "Q D"] | None = None,
) -> Float[Tensor, " Q"]:
    """Expectation-maximisation of relevance: cross-entropy of sigmoid(score) against l + (1 - l) P(r = 1 | l = 0).

    The gradient on an unlabelled document is sigma(score) minus the probability that it is a hidden positive: where
    nothing is selected it is 0. It is the gradient of -log P(l), so that both models together climb the likelihood.
    Relevance and selection cannot be told apart where both models see the same: give one something that the other
    does not have.

    Args:
        scores, selection: logits of the two models. Exchanged, and with `judged` left out, this trains the selection
            model; a judged document was selected.
        judged: where a gain of 0 is a judgement: its target is 0.

    Reduction: mean over queries of means over documents. https://arxiv.org/abs/1808.08755, section 5
    """
    scores, relevant = at_least_float32(scores), sides(gains, mask)[0]
    hidden = hidden_relevance(scores, selection)
    if judged is not None:
        hidden = hidden.masked_fill(judged, 0.0)
    return _cross_entropy(scores, torch.where(relevant, 1.0, hidden), mask)


def em_selection(
    selection: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    scores: Float[Tensor, "Q D"],
    judged: Bool[Tensor, "Q D"] | None = None,
) -> Float[Tensor, " Q"]:
    """The same for the selection model: what is relevant or judged was selected, of the rest P(s = 1 | l = 0).

    Reduction: mean over queries of means over documents.
    """
    selection, selected = at_least_float32(selection), sides(gains, mask)[0]
    if judged is not None:
        selected = selected | judged
    return _cross_entropy(selection, torch.where(selected, 1.0, hidden_relevance(selection, scores)), mask)


# --- Shared -----------------------------------------------------------------------------------------------------------


def _weights(scores, mask, selection, propensities, judged, mode, temperature, clip) -> tuple[Tensor, Tensor]:
    """Of the document as a positive and as a negative, both [Q D]."""
    if mode not in CET_MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(CET_MODES)}")
    ones = torch.ones_like(scores)
    if mode == "ips":
        known = _checked(propensities, mask)
        return propensity_weights(known, clip=clip), _believed(scores, torch.logit(known), mask, judged)
    if selection is None:
        raise ValueError(f"mode {mode!r} needs selection, the logits of the selection model")
    if mode == "official":
        return ones, official_weights(selection, temperature=temperature)
    if mode == "ratio":
        return ratio_weights(selection, mask, clip=clip), ones
    return ones, _believed(scores, selection, mask, judged)


def _believed(scores: Tensor, selection: Tensor, mask: Tensor, judged: Tensor | None) -> Tensor:
    """P(r = 0 | l = 0); 1 where it was judged."""
    irrelevant = 1 - hidden_relevance(scores.masked_fill(~mask, 0.0), selection)
    return irrelevant if judged is None else irrelevant.masked_fill(judged, 1.0)


def _checked(propensities: Tensor | None, mask: Tensor) -> Tensor:
    if propensities is None:
        raise ValueError("mode 'ips' needs propensities, the known probability of each document to be selected")
    known = at_least_float32(propensities).masked_fill(~mask, 1.0)
    bad = (~((known > 0) & (known <= 1))).nonzero()
    if len(bad):
        query, document = bad[0].tolist()
        raise ValueError(
            f"the propensity of document {document} of query {query} is {known[query, document]:g}; it is a "
            "probability, above 0 and at most 1: what cannot be selected cannot be corrected for"
        )
    return known


def _cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(
        logits.masked_fill(~mask, 0.0), targets.to(logits).masked_fill(~mask, 0.0), reduction="none"
    )
    return losses.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _refuse_clip(clip: float) -> None:
    if not 0 < clip <= 1:
        raise ValueError(f"clip is a probability that is divided by and must be above 0 and at most 1, got {clip}")
