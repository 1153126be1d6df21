"""Objectives for labels that lack relevant documents: only what was selected for judging could be found relevant.

A document is labelled (l = 1) if it is relevant (r) *and* was selected (s): P(l = 1) = P(r = 1) P(s = 1). A negative is
either irrelevant, or a relevant document that nobody looked at. Two models, one for each cause, are trained together;
each weighs the other's negatives.

Labels alone cannot tell r from s: two models that read the same and start the same stay the same. What tells them apart
is something that one of them does not read (which retriever found the document, at which rank), or selection that is
known.

Shapes: Q queries, D documents of the longest list, `*A` anything. Logits: sigmoid(logit) is a probability. `judged` is
False where a gain of 0 stands for want of a judgement. No weight and no target carries a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.losses.ranking import pair_losses, refuse_not_positive, sides
from negtune.ops import at_least_float32

CET_MODES = ("official", "posterior", "ratio", "ips", "ips_posterior")


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
    opinion confirms itself. In the simulation of `cet`, where `pg_rank` on labels gave .717 of true nDCG@10, its own
    opinion gave .596 and true log-odds .914.
    """
    unknown = ~judged & (gains <= 0)
    return torch.where(unknown, hidden_relevance(relevance, selection), at_least_float32(gains))


@torch.no_grad()
def matching_level(scores: Float[Tensor, " A"], share: float) -> float:
    """The number b with which sigmoid(scores + b) has the mean `share`: where to start, if scores have no level.

    Scores that were trained on pairs, and cosines, are log-odds up to a shift at best.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    scores = scores.double()
    middle = math.log(share) - math.log1p(-share)
    low, high = middle - float(scores.max()), middle - float(scores.min())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if float(torch.sigmoid(scores + level).mean()) < share else (low, level)
    return (low + high) / 2


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

    Only the ratio of selection probabilities is needed, which is all that a model of clicks or pools can know: a factor
    that all of a list share changes nothing, however small it is.

    https://arxiv.org/abs/1804.05938, equation 11, where the first place stands for the surest
    """
    _refuse_clip(clip)
    chances = F.logsigmoid(at_least_float32(selection))
    surest = chances.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return 1 / (chances - surest).exp().clamp(min=clip)


@torch.no_grad()
def propensity_weights(propensities: Float[Tensor, "*A"], *, clip: float = 0.05) -> Float[Tensor, "*A"]:
    """Inverse propensity weight of a positive, 1/max(s, clip): a positive that was found against the odds stands for
    the others like it that were not.

    clip -> 0 is unbiased, and its variance unbounded. https://arxiv.org/abs/1608.04468, equation 6
    """
    _refuse_clip(clip)
    return 1 / at_least_float32(propensities).clamp(min=clip)


@torch.no_grad()
def cet_weights(
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
) -> Float[Tensor, "Q D"]:
    """What each document weighs in `cet`, 1 where the mode has nothing to say; arguments as there."""
    if mode not in CET_MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(CET_MODES)}")
    relevant, irrelevant = sides(gains, mask)
    weights = torch.ones_like(at_least_float32(scores))
    if mode.startswith("ips"):
        whole = mode == "ips_posterior"
        propensities = _checked(propensities, mode, mask if whole else relevant)
        weights = propensity_weights(propensities, clip=clip).to(weights).where(relevant, weights)
        selection = torch.logit(propensities) if whole else None
    elif selection is None:
        raise ValueError(f"mode {mode!r} needs selection, the logits of the selection model")
    if selection is None:
        return weights
    if mode == "official":
        return official_weights(selection, temperature=temperature).to(weights).where(irrelevant, weights)
    if mode == "ratio":
        return ratio_weights(selection, mask, clip=clip).to(weights).where(relevant, weights)
    unknown = irrelevant if judged is None else irrelevant & ~judged
    return (1 - hidden_relevance(scores, selection)).to(weights).where(unknown, weights)


def pair_means(
    weights: Float[Tensor, "Q D"], gains: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"]
) -> Float[Tensor, " Q"]:
    """Mean of w_p w_n over the pairs of a relevant p and an irrelevant n of each list; 0 where there is none."""
    relevant, irrelevant = sides(gains, mask)
    up = weights.masked_fill(~relevant, 0.0).sum(-1) / relevant.sum(-1).clamp(min=1)
    return up * weights.masked_fill(~irrelevant, 0.0).sum(-1) / irrelevant.sum(-1).clamp(min=1)


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

    - `official`, as published and released: w_n = 1 + exp(selection/temperature), w_p = 1. A negative that was probably
      selected is pushed harder, one that was probably not is still pushed. The selection model is trained with the same
      call and the models' roles exchanged; in the other modes by `em_selection`.
    - `posterior`: w_n = P(r = 0 | l = 0) = (1 - r)/(1 - r s), with r from `scores` themselves: a likely false negative
      is let go. A negative that was judged keeps 1.
    - `ratio`: w_p = max_d s_d / s_p: rarely selected positives count more; negatives are all believed.
    - `ips`: s is known. w_p = 1/s_p; negatives are all believed.
    - `ips_posterior`: s is known. w_p as in `ips` and w_n as in `posterior`.

    On simulated pools whose selection is known, and where the ranker reads what it depends on, labels alone gave .717
    of true nDCG@10, `official` .725, `ratio` and `ips` .778, `posterior` .840, `ips_posterior` .887 and `em_relevance`
    .895: letting hidden positives go is worth more than weighing positives up (tests/losses/test_debiased_training.py).

    The level of the scores is not in any pair, and the posterior modes read it as the log-odds of relevance: start from
    a calibrated model, or add `em_relevance`, which learns it.

    Args:
        scores: of the relevance model.
        gains: above 0 is relevant, whatever `judged` says.
        selection: logits of the selection model; all modes but those with `ips`.
        propensities: P(s = 1), above 0 and at most 1; only for `ips`, which reads those of relevant documents, and
            `ips_posterior`.
        judged: where a gain of 0 is a judgement, for the posterior modes; by default nowhere.
        temperature: of `official`. clip: smallest probability of selection that is divided by, `ratio` and `ips`.
        normalize: divide the weights by their mean over the batch, each pair counted as it is in the loss, so that a
            mode does not change the step's size. Default: False for `official`, as released, else True.

    Reduction: mean over queries of means over pairs. https://arxiv.org/abs/2209.05072; all modes but `official` are
    ours, from the same model of the labels.
    """
    settings = {"judged": judged, "mode": mode, "temperature": temperature, "clip": clip}
    weights = cet_weights(scores, gains, mask, selection=selection, propensities=propensities, **settings)
    if mode != "official" if normalize is None else normalize:
        means = pair_means(weights, gains, mask)
        relevant, irrelevant = sides(gains, mask)
        both = (relevant.any(-1) & irrelevant.any(-1)).sum().clamp(min=1)
        weights = weights / (means.sum() / both).clamp(min=torch.finfo(weights.dtype).tiny).sqrt()  # of a pair, two
    return weighed_pairs(scores, gains, mask, weights=weights)


def weighed_pairs(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    weights: Float[Tensor, "Q D"],
) -> Float[Tensor, " Q"]:
    """w_p w_n softplus(s_n - s_p), averaged over the pairs of a relevant p and an irrelevant n of a list.

    Each document is pushed in proportion to its weight, and to the mean weight of the other side. Grades above 0 are
    all the same.

    Args:
        weights: of documents, constants for the gradient; see `cet_weights`.

    Reduction: mean over queries of means over pairs; a list without both sides yields 0.
    """
    scores = at_least_float32(scores)
    relevant, irrelevant = sides(gains, mask)
    pairs = relevant.unsqueeze(-1) & irrelevant.unsqueeze(-2)
    weights = weights.detach().to(scores)
    losses, _ = pair_losses(scores, gains, mask)
    losses = losses * (weights.unsqueeze(-1) * weights.unsqueeze(-2)).masked_fill(~pairs, 0.0)
    return losses.masked_fill(~pairs, 0.0).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


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
    does not have. In the simulation of `cet`, beside an `em_selection` that reads only what selection depends on, it
    gave .889, beside one that reads everything .566, less than labels alone.

    Args:
        scores, selection: logits of the two models; selection that is known: the logit of its probability.
        judged: where a gain of 0 is a judgement: its target is 0.

    Reduction: mean over queries of means over documents. https://arxiv.org/abs/1808.08755, section 5
    """
    return soft_labels(scores, gains, mask, targets=relevance_targets(gains, judged, scores, selection))


def em_selection(
    selection: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    scores: Float[Tensor, "Q D"],
    judged: Bool[Tensor, "Q D"] | None = None,
) -> Float[Tensor, " Q"]:
    """The same for the selection model: what is relevant or judged was selected, of the rest P(s = 1 | l = 0).

    A document that is surely irrelevant says nothing of selection; one that is surely relevant and has no label was
    not selected.

    Reduction: mean over queries of means over documents.
    """
    return soft_labels(selection, gains, mask, targets=selection_targets(gains, judged, scores, selection))


def relevance_targets(gains: Tensor, judged: Tensor | None, relevance: Tensor, selection: Tensor) -> Tensor:
    """P(r = 1) given the label, `[Q D]`: 1 where it is relevant, 0 where it was judged not to be; else a posterior."""
    known = torch.zeros_like(gains, dtype=torch.bool) if judged is None else judged
    return expected_gains((gains > 0).to(at_least_float32(relevance)), known, relevance, selection)


def selection_targets(gains: Tensor, judged: Tensor | None, relevance: Tensor, selection: Tensor) -> Tensor:
    """P(s = 1) given the label, `[Q D]`: 1 where it is relevant or judged, else the posterior."""
    known = gains > 0 if judged is None else (gains > 0) | judged
    return expected_gains(known.to(at_least_float32(selection)), known, selection, relevance)


def soft_labels(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    targets: Float[Tensor, "Q D"],
) -> Float[Tensor, " Q"]:
    """Cross-entropy of sigmoid(score) against probabilities, averaged over the list; `gains` are not read.

    Reduction: mean over queries of means over documents.
    """
    scores = at_least_float32(scores).masked_fill(~mask, 0.0)
    targets = targets.detach().to(scores).masked_fill(~mask, 0.0)
    losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return losses.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


# --- Shared -----------------------------------------------------------------------------------------------------------


def _checked(propensities: Tensor | None, mode: str, read: Tensor) -> Tensor:
    """1 where they are not read."""
    if propensities is None:
        raise ValueError(f"mode {mode!r} needs propensities, the known probability of each document to be selected")
    known = at_least_float32(propensities).masked_fill(~read, 1.0)
    bad = (~((known > 0) & (known <= 1))).nonzero()
    if len(bad):
        query, document = bad[0].tolist()
        raise ValueError(
            f"the propensity of document {document} of query {query} is {known[query, document]:g}; it is a "
            "probability, above 0 and at most 1: what cannot be selected cannot be corrected for"
        )
    return known


def _refuse_clip(clip: float) -> None:
    if not 0 < clip <= 1:
        raise ValueError(f"clip is a probability that is divided by and must be above 0 and at most 1, got {clip}")
