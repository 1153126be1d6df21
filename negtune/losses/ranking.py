"""Objectives over lists of scored documents: the policy gradient of a ranking metric, and what it is compared with.

Shapes: Q queries, D documents of the longest list, N sampled rankings, I judged documents. `scores` are the model's,
`gains` grades of relevance (above 0: relevant), `mask` is True where a document is no padding. Every objective returns
one value per query; a list without a relevant document, or without an irrelevant one where both are needed, yields 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from negtune.losses.plackett_luce import (
    RewardFunction,
    place_logps,
    plackett_luce_logps,
    policy_gradient,
    without_padding,
)
from negtune.metrics.ranking import exponential_gain, ideal_value, rank_documents
from negtune.ops import at_least_float32

SCHEMES = ("lambda_rank", "ndcg1", "ndcg2", "ndcg2++", "mrr")


def pg_rank(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    k: int = 10,
    n_samples: int = 16,
    estimator: str | None = None,
    metric: str = "ndcg",
    gain: str = "linear",
    reward_fn: RewardFunction | None = None,
    ideal_gains: Float[Tensor, "Q I"] | None = None,
    temperature: float = 1.0,
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
    ref_scores: Float[Tensor, "Q D"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " Q"]:
    """Neural PG-RANK: minus the expected metric of rankings drawn from the Plackett-Luce policy of the scores.

    A document is pushed up where rankings that place it high earn more than others do, and down where they earn less:
    a negative that is ranked below the first k, and a positive that is hopelessly far behind, are left alone. With P@1
    and one relevant document this is InfoNCE's gradient times that document's probability.

    In value the loss is minus the mean reward of the sampled rankings, in gradient an unbiased estimate of the
    expected one's. Only the first k places are credited: what comes later cannot change the metric and is noise.

    Args:
        scores, gains, mask: see the top of the file.
        k: places that count.
        n_samples: sampled rankings per query, N.
        estimator: `pl_rank`: the analytic expectation over the document at each place, for metrics that are sums over
            documents; `pl_rank_loo`: the same with the expected reward of the place computed, and what is earned behind
            it minus the mean of the other samples; `rtg_loo`: what is earned from a place on, minus the mean of the
            others; `loo`: what the whole ranking earns, minus the mean of the others; `reinforce`: without a baseline.
            Default: `pl_rank_loo`, with one sample `pl_rank`, for `mrr` and `map` `rtg_loo`, for a `reward_fn` `loo`.
            `loo` *raises* the variance where most rankings earn nothing (one relevant document among hundreds).
        metric: ndcg, dcg, precision, recall, mrr or map, of the first k.
        gain: of a grade g, g or 2^g - 1: take what the evaluation takes.
        reward_fn: black box instead of the metric, `rankings [N Q k] -> rewards [N Q]`; NaN is unscored and has no
            part in anything.
        ideal_gains: of *all* judged documents of a query, zeros behind them, for the normaliser of nDCG and recall;
            the list's own by default, which is a higher number where the list lacks a relevant document.
        temperature: scores are divided by it. Cosines need .02 to .1, or the policy is uniform.
        entropy_weight: bonus for the entropy of the first place. kl_weight: cost of its KL divergence from
            `ref_scores`, those of the warm start. In nats; temperature applies to both.
        generator: of the draws.

    Reduction: mean over queries. https://arxiv.org/abs/2310.04407; PL-Rank: https://arxiv.org/abs/2204.10872
    """
    return policy_gradient(
        scores,
        gains,
        mask,
        k=k,
        n_samples=n_samples,
        estimator=estimator,
        metric=metric,
        gain=gain,
        reward_fn=reward_fn,
        ideal_gains=ideal_gains,
        temperature=temperature,
        entropy_weight=entropy_weight,
        kl_weight=kl_weight,
        ref_scores=ref_scores,
        generator=generator,
    ).loss


# --- One relevant document against the others ------------------------------------------------------------------------


def infonce(
    scores: Float[Tensor, "Q D"], gains: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"], *, temperature: float = 1.0
) -> Float[Tensor, " Q"]:
    """InfoNCE: -log e^{s_p/t} / (e^{s_p/t} + sum_n e^{s_n/t}), averaged over the relevant documents p.

    Each irrelevant document n is pushed down in proportion to its probability, however far the positive is behind: a
    mislabelled query pulls for ever. Other relevant documents are in no denominator.

    Reduction: mean over queries. https://arxiv.org/abs/1807.03748, equation 4
    """
    refuse_not_positive(temperature=temperature)
    scores = at_least_float32(scores) / temperature
    relevant, irrelevant = sides(gains, mask)
    negatives = without_padding(scores, irrelevant).logsumexp(-1, keepdim=True)
    losses = F.softplus(negatives - scores.masked_fill(~mask, 0.0))
    both = relevant & irrelevant.any(-1, keepdim=True)
    return losses.masked_fill(~both, 0.0).sum(-1) / both.sum(-1).clamp(min=1)


# --- Whole rankings ---------------------------------------------------------------------------------------------------


def list_mle(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    k: int | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """ListMLE: -log of the Plackett-Luce probability of the ranking by gain.

    Also the order *among* irrelevant documents is learned, as they stand in the list; `k` stops at the first k places
    (top-k ListMLE), e.g. the number of relevant documents. Equal gains keep the order of the list.

    Reduction: mean over queries of sums over places. https://dl.acm.org/doi/10.1145/1390156.1390306
    """
    refuse_not_positive(temperature=temperature, k=1 if k is None else k)
    best = rank_documents(at_least_float32(gains), mask)
    logps = plackett_luce_logps(at_least_float32(scores) / temperature, best, mask, k=k)
    return -logps.masked_fill(~sides(gains, mask)[0].any(-1), 0.0)


def p_list_mle(
    scores: Float[Tensor, "Q D"], gains: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"], *, temperature: float = 1.0
) -> Float[Tensor, " Q"]:
    """Position-aware ListMLE: place j of n weighs 2^(n-j) - 1, the weights made to sum to 1.

    The first places decide; the order among the last documents hardly counts.

    Reduction: mean over queries of weighted means over places. https://auai.org/uai2014/proceedings/individuals/164.pdf
    """
    refuse_not_positive(temperature=temperature)
    best = rank_documents(at_least_float32(gains), mask)
    logps = place_logps(at_least_float32(scores) / temperature, best, mask)
    places = torch.arange(1, scores.shape[-1] + 1, device=logps.device, dtype=logps.dtype)
    weights = torch.exp2(-places) - torch.exp2(-mask.sum(-1, keepdim=True).to(logps.dtype))
    weights = weights.masked_fill(~mask.gather(-1, best), 0.0)
    losses = -(logps * weights).sum(-1) / weights.sum(-1).clamp(min=torch.finfo(logps.dtype).tiny)
    return losses.masked_fill(~sides(gains, mask)[0].any(-1), 0.0)


def list_net(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    temperature: float = 1.0,
    gain_temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """ListNet: cross-entropy of the first place, softmax(gains) against softmax(scores).

    Irrelevant documents keep the share exp(0) of the target: with binary gains and long lists most of it, and the
    scores are held together; lower `gain_temperature` against that. Towards 0 it is the mean of log-softmax over the
    documents with the highest gain.

    Reduction: mean over queries. https://dl.acm.org/doi/10.1145/1273496.1273513
    """
    refuse_not_positive(temperature=temperature, gain_temperature=gain_temperature)
    target = without_padding(at_least_float32(gains) / gain_temperature, mask).softmax(-1)
    logps = without_padding(at_least_float32(scores) / temperature, mask).log_softmax(-1)
    losses = -(target * logps).masked_fill(~mask, 0.0).sum(-1)
    return losses.masked_fill(~sides(gains, mask)[0].any(-1), 0.0)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def rank_net(
    scores: Float[Tensor, "Q D"], gains: Float[Tensor, "Q D"], mask: Bool[Tensor, "Q D"], *, temperature: float = 1.0
) -> Float[Tensor, " Q"]:
    """RankNet: softplus(s_j - s_i), averaged over the pairs in which i has the higher gain.

    Every misordered pair is pushed apart, also at the bottom of the list.

    Reduction: mean over queries of means over pairs. https://icml.cc/Conferences/2015/wp-content/uploads/2015/06/icml_ranking.pdf
    """
    refuse_not_positive(temperature=temperature)
    losses, pairs = pair_losses(at_least_float32(scores) / temperature, gains, mask)
    return losses.masked_fill(~pairs, 0.0).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


def lambda_rank(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    k: int | None = 10,
    scheme: str = "lambda_rank",
    mu: float = 10.0,
    gain: str = "linear",
    ideal_gains: Float[Tensor, "Q I"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """LambdaLoss: sum over pairs with gain_i > gain_j of w_ij softplus(s_j - s_i), w from the current ranking.

    A pair weighs what exchanging its documents would do to the metric: errors at the top count. With G gain over the
    ideal DCG, D_r = log2(1 + r) and ranks r by score: `lambda_rank` |G_i - G_j| |1/D_{r_i} - 1/D_{r_j}|; `ndcg2`
    |G_i - G_j| |1/D_{|r_i - r_j|} - 1/D_{|r_i - r_j| + 1}|; `ndcg2++` mu times `ndcg2` plus `lambda_rank`; `ndcg1`
    G_i / D_{r_i}; `mrr` |1/r_i - 1/r_j|. Pairs with neither document among the first k weigh nothing. The weights take
    no gradient. Equal scores are ranked in the worst order.

    Reduction: mean over queries of sums over pairs. https://dl.acm.org/doi/10.1145/3269206.3271784
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; choose one of {', '.join(SCHEMES)}")
    refuse_not_positive(temperature=temperature, k=1 if k is None else k)
    refuse_unknown_gain(gain)
    scores = at_least_float32(scores) / temperature
    with torch.no_grad():
        weights = _pair_weights(scores, gains.to(scores), mask, k or scores.shape[-1], scheme, mu, gain, ideal_gains)
    losses, pairs = pair_losses(scores, gains, mask)
    return (losses * weights).masked_fill(~pairs, 0.0).sum((-1, -2))


def _pair_weights(scores, gains, mask, k, scheme, mu, gain, ideal_gains) -> Tensor:
    """[Q D D], in the dtype of the scores and gains."""
    gains = gains.masked_fill(~mask, 0.0).clamp(min=0)
    ranks = ranks_by_score(scores, gains, mask).to(gains)
    top = ranks <= k
    near = (top.unsqueeze(-1) | top.unsqueeze(-2)).to(gains)
    if scheme == "mrr":
        return near * apart(1 / ranks)
    gained = shares_of_ideal(gains, k, gain, ideal_gains)
    if scheme == "ndcg1":
        return near * (gained / discount(ranks)).unsqueeze(-1)
    exchanged = apart(gained) * apart(1 / discount(ranks))
    if scheme == "lambda_rank":
        return near * exchanged
    distance = (ranks.unsqueeze(-1) - ranks.unsqueeze(-2)).abs().clamp(min=1)
    tight = apart(gained) * (1 / discount(distance) - 1 / discount(distance + 1))
    return near * (tight if scheme == "ndcg2" else mu * tight + exchanged)


# --- Teachers ---------------------------------------------------------------------------------------------------------


def margin_mse(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    teacher_scores: Float[Tensor, "Q D"],
) -> Float[Tensor, " Q"]:
    """MarginMSE: ((t_p - t_n) - (s_p - s_n))^2, averaged over the pairs of a relevant p and an irrelevant n.

    A negative that the teacher finds close to the positive is held close: false negatives are not pushed away.

    Reduction: mean over queries of means over pairs. https://arxiv.org/abs/2010.02666
    """
    scores, teacher = (
        at_least_float32(scores).masked_fill(~mask, 0.0),
        at_least_float32(teacher_scores).masked_fill(~mask, 0.0),
    )
    relevant, irrelevant = sides(gains, mask)
    pairs = relevant.unsqueeze(-1) & irrelevant.unsqueeze(-2)
    gap = (teacher - scores).unsqueeze(-1) - (teacher - scores).unsqueeze(-2)
    return gap.square().masked_fill(~pairs, 0.0).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


def kl_distill(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    teacher_scores: Float[Tensor, "Q D"],
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """KL(softmax(teacher) || softmax(scores)) over the list, in nats; `gains` are not read.

    A document is pushed down only as far as the teacher has it.

    Reduction: mean over queries. https://arxiv.org/abs/1503.02531
    """
    refuse_not_positive(temperature=temperature, teacher_temperature=teacher_temperature)
    target = without_padding(at_least_float32(teacher_scores) / teacher_temperature, mask).log_softmax(-1)
    logps = without_padding(at_least_float32(scores) / temperature, mask).log_softmax(-1)
    return (target.exp() * (target - logps)).masked_fill(~mask, 0.0).sum(-1)


# --- Shared, with `losses.hard_negatives` too -------------------------------------------------------------------------


def refuse_not_positive(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def refuse_unknown_gain(gain: str) -> None:
    if gain not in ("linear", "exponential"):
        raise ValueError(f"gain must be linear or exponential, got {gain!r}")


def sides(gains: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Relevant and irrelevant documents, both [Q D]."""
    return (gains > 0) & mask, ~(gains > 0) & mask


def pair_losses(scores: Tensor, gains: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softplus(s_j - s_i) and whether i is to be above j, both [Q D D]."""
    scores = scores.masked_fill(~mask, 0.0)
    pairs = (gains.unsqueeze(-1) > gains.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    return F.softplus(scores.unsqueeze(-2) - scores.unsqueeze(-1)), pairs & (gains > 0).unsqueeze(-1)


def ranks_by_score(scores: Tensor, gains: Tensor, mask: Tensor) -> Tensor:
    """Place of each document, from 1, [Q D]; equal scores in the worst order, padding last."""
    return rank_documents(scores, mask, gains, "worst").argsort(-1) + 1


def shares_of_ideal(gains: Tensor, k: int, gain: str, ideal_gains: Tensor | None) -> Tensor:
    """Gain of each document over the ideal DCG of k places, [Q D]; `gains` are neither padding nor below 0."""
    judged = gains if ideal_gains is None else ideal_gains.to(gains).clamp(min=0)
    if gain == "exponential":
        gains, judged = exponential_gain(gains), exponential_gain(judged)
    ideal = ideal_value(judged, "ndcg", k).clamp(min=torch.finfo(gains.dtype).tiny)
    return gains / ideal.unsqueeze(-1)


def apart(values: Tensor) -> Tensor:
    """|v_i - v_j|, [Q D D]."""
    return (values.unsqueeze(-1) - values.unsqueeze(-2)).abs()


def discount(ranks: Tensor) -> Tensor:
    """What DCG divides by at a place: log2(1 + r), in the dtype of the ranks; of integers that is float32."""
    return torch.log2(1.0 + ranks)


RANKING_LOSSES: dict[str, Callable[..., Tensor]] = {
    "pg_rank": pg_rank,
    "infonce": infonce,
    "list_mle": list_mle,
    "p_list_mle": p_list_mle,
    "list_net": list_net,
    "rank_net": rank_net,
    "lambda_rank": lambda_rank,
    "margin_mse": margin_mse,
    "kl_distill": kl_distill,
}
