"""Objectives over negatives that are found, not given: documents of other queries, and what a search returns.

Shapes: B queries of a batch, P documents whose columns they share (positives of all of them), M hard negatives that
they share; Q queries, K documents that a search returns, D documents of the longest list. `relevant` is True where a
document answers a query, by the judgements and not by what is on the diagonal: it is no negative of that query then.
Every objective returns one value per query; a query without a pair yields 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune.losses.ranking import (
    RANKING_LOSSES,
    apart,
    discount,
    infonce,
    pair_losses,
    ranks_by_score,
    refuse_not_positive,
    refuse_unknown_gain,
    shares_of_ideal,
    sides,
)
from negtune.ops import at_least_float32

# --- Negatives of the batch -------------------------------------------------------------------------------------------


def star(
    scores: Float[Tensor, "B P"],
    hard_scores: Float[Tensor, "B M"],
    positives: Int[Tensor, " B"],
    relevant: Bool[Tensor, "B P"],
    hard_relevant: Bool[Tensor, "B M"],
    own: Bool[Tensor, "B M"],
    *,
    hard_mask: Bool[Tensor, "#B M"] | None = None,
    alpha: float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " B"]:
    """STAR, stable training for dense retrieval: softplus(s_in - s_i+) over all negatives n that queries i share,
    [sum_ij M_ij softplus(s_ij - s_i+) + sum_im H_im softplus(s_im - s_i+)] / (sum M + sum H).

    M and H are 0 where the document is relevant to the query. Each negative is pushed down with weight
    sigma(s_in - s_i+), and the query's positive up with the sum of these: a negative that is far below is left alone,
    however many share it. Static negatives alone go stale while they are pushed; the random ones hold the rest of the
    corpus down.

    Without `alpha` all pairs count the same: at 256 queries with a hard negative each, 256 own pairs among 130,816.
    With it the loss is L_static + alpha L_random (equation 13): the mean over N_s pairs with a query's own hard
    negatives, plus alpha times the mean over N_r other pairs. With alpha = N_r/N_s, which is (B - 1)(1 + h)/h with h
    hard negatives a query and nothing masked, this is (1 + alpha) times the loss without.

    Args:
        scores, hard_scores: of every query with every document. A document with two columns counts twice.
        positives: column of `scores` that is the query's own positive.
        relevant, hard_relevant: by the judgements. A query's own positive is relevant, said or not; another column of
            the same document must be said.
        own: which hard negatives were drawn for the query; only `alpha` reads it.
        hard_mask: True where a hard negative is no padding. Default: everywhere.
        alpha: weight of random negatives. 0: own hard negatives only; large: random ones only.
        temperature: scores are divided by it. Cosines need .02 to .1.

    Reduction: mean over queries, which is the sum over pairs over the number of pairs *of this batch*: each value
    holds the factor B over that number. https://arxiv.org/abs/2104.08051
    """
    refuse_not_positive(temperature=temperature)
    _refuse_alpha(alpha)
    pool, negatives = _pool(scores, hard_scores, positives, relevant, hard_relevant, hard_mask)
    pool = at_least_float32(pool) / temperature
    gaps = (pool - pool.gather(-1, positives.unsqueeze(-1))).masked_fill(~negatives, 0.0)
    losses = F.softplus(gaps).masked_fill(~negatives, 0.0)
    return len(losses) * _over_pairs(losses, negatives, F.pad(own, (scores.shape[1], 0)), alpha)


def masked_infonce(
    scores: Float[Tensor, "B P"],
    hard_scores: Float[Tensor, "B M"],
    positives: Int[Tensor, " B"],
    relevant: Bool[Tensor, "B P"],
    hard_relevant: Bool[Tensor, "B M"],
    *,
    hard_mask: Bool[Tensor, "#B M"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " B"]:
    """InfoNCE with the batch's documents, without false negatives: -log e^{s_i+/t} / (e^{s_i+/t} + sum_n e^{s_in/t}).

    n runs over the documents of the batch and the hard negatives that are not relevant to query i. Each is pushed down
    in proportion to its probability: the closest take nearly all of it, where `star` pushes every one that is not far
    below. A query's other positives are in no denominator, so they are not pushed away.

    Arguments as in `star`. With nothing relevant but the own positives it is the usual loss with in-batch negatives
    (MultipleNegativesRankingLoss of sentence-transformers, scale = 1/temperature).

    Reduction: mean over queries. https://arxiv.org/abs/1807.03748, equation 4; masks: https://arxiv.org/abs/2104.08051
    """
    pool, negatives = _pool(scores, hard_scores, positives, relevant, hard_relevant, hard_mask)
    positive = torch.zeros_like(negatives).scatter(-1, positives.unsqueeze(-1), True)
    return infonce(pool, positive.to(pool.dtype), negatives | positive, temperature=temperature)


def star_lists(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    own: Bool[Tensor, "Q D"] | None = None,
    alpha: float | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """`star` over lists: each relevant document of a query against all that are not. A pair of a query with P relevant
    documents weighs 1/P, so that each negative of a query counts once, however many positives it stands beside.

    Args:
        scores, gains, mask: lists of documents, as in `losses.ranking`; here all documents of a batch, masked where
            they are known to be relevant to the query and have no gain.
        own: the query's own documents, of which the irrelevant ones were drawn for it. Default: all.
        alpha, temperature: see `star`.

    With one relevant document a query it is `star`.

    Reduction: mean over the queries that have a relevant document, as `star`.
    """
    refuse_not_positive(temperature=temperature)
    _refuse_alpha(alpha)
    relevant, irrelevant = sides(gains, mask)
    negatives = irrelevant & relevant.any(-1, keepdim=True)
    rows, columns = relevant.nonzero(as_tuple=True)
    scores = at_least_float32(scores).masked_fill(~mask, 0.0) / temperature
    pairs = F.softplus(scores[rows] - scores[rows, columns].unsqueeze(-1))
    losses = torch.zeros_like(scores).index_add(0, rows, pairs) / relevant.sum(-1, keepdim=True).clamp(min=1)
    shares = _over_pairs(losses, negatives, negatives if own is None else own, alpha)
    return relevant.any(-1).sum() * shares


def _over_pairs(losses: Tensor, negatives: Tensor, own: Tensor, alpha: float | None) -> Tensor:
    """What each query adds to the mean over all pairs, or to that over static ones and alpha times that over others."""
    if alpha is None:
        return _share_of_mean(losses, negatives)
    static = negatives & own
    return _share_of_mean(losses, static) + alpha * _share_of_mean(losses, negatives & ~static)


def _refuse_alpha(alpha: float | None) -> None:
    if alpha is not None and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha weighs random negatives and must be 0 or more and finite, got {alpha}")


def _pool(
    scores: Tensor,
    hard_scores: Tensor,
    positives: Tensor,
    relevant: Tensor,
    hard_relevant: Tensor,
    hard_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores of all documents, and which are negatives of which query, both [B P+M]."""
    in_batch = ~relevant.scatter(-1, positives.unsqueeze(-1), True)
    hard = ~hard_relevant if hard_mask is None else ~hard_relevant & hard_mask
    return torch.cat([scores, hard_scores], -1), torch.cat([in_batch, hard], -1)


def _share_of_mean(losses: Tensor, pairs: Tensor) -> Tensor:
    """What each query adds to the mean over all pairs of the batch, [B]."""
    return losses.masked_fill(~pairs, 0.0).sum(-1) / pairs.sum().clamp(min=1)


# --- Negatives of a search --------------------------------------------------------------------------------------------


def adore(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    *,
    ranks: Int[Tensor, "Q D"] | None = None,
    metric: str = "mrr",
    metric_cut: int | None = None,
    gain: str = "linear",
    ideal_gains: Float[Tensor, "Q I"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " Q"]:
    """ADORE, algorithm for directly optimising ranking performance: (1/|P|) sum over pairs of relevant i, irrelevant j
    of |1/r_i - 1/r_j| softplus(s_j - s_i), over what the query finds as it is encoded at this step.

    With 1/r = 0 beyond the cut. What stands first is pushed down hardest, if it is irrelevant; what stands beside the
    positive hardly at all. Where the positive is beyond the cut, each document is pushed by its own 1/r.

    With ranks by score it is `lambda_rank` over |P|, but for the cut: that one keeps 1/r of a document beyond it if
    the other is within. `mrr` reads gains as relevant or not; with `ndcg` a pair weighs |G_i - G_j| |1/D_i - 1/D_j|,
    G gain over the ideal DCG, D = log2(1 + r), which is what exchanging the two does to nDCG, and grades make pairs
    too. Pairs of weight 0 count in |P|.

    Args:
        scores, gains, mask: lists of documents, as in `losses.ranking`; `append_missed` makes them.
        ranks: places from 1; what stands behind the mask is not read. The released code takes places in the list,
            `torch.arange(1, D + 1).expand(Q, D)`: a positive that the search missed has K + 1, however far down it is,
            and of equal scores the first is first. Default: by score within the list, equal scores in the worst order.
        metric: mrr or ndcg.
        metric_cut: places that count. Default: the whole list. The published runs take 200 of 200 found: with places
            in the list, an appended positive has 1/r = 0 then.
        gain: for `ndcg`, of a grade g, g or 2^g - 1.
        ideal_gains: for `ndcg`, of *all* judged documents; the list's own by default.
        temperature: scores are divided by it.

    Reduction: mean over queries of means over pairs. https://arxiv.org/abs/2104.08051
    """
    if metric not in ("mrr", "ndcg"):
        raise ValueError(f"unknown metric {metric!r}; choose one of mrr, ndcg")
    if metric_cut is not None and metric_cut < 1:
        raise ValueError(
            f"metric_cut counts places and must be at least 1, got {metric_cut}; leave it out for the whole list"
        )
    refuse_not_positive(temperature=temperature)
    refuse_unknown_gain(gain)
    scores = at_least_float32(scores) / temperature
    gains = gains.to(scores).masked_fill(~mask, 0.0).clamp(min=0)
    if metric == "mrr":
        gains = (gains > 0).to(scores)
    with torch.no_grad():
        places = ranks_by_score(scores, gains, mask) if ranks is None else _checked(ranks, mask)
        places = places.to(scores)
        values = 1 / (places if metric == "mrr" else discount(places))
        if metric_cut is not None:
            values = values.masked_fill(places > metric_cut, 0.0)
        weights = apart(values)
        if metric == "ndcg":
            weights = weights * apart(shares_of_ideal(gains, metric_cut or gains.shape[-1], gain, ideal_gains))
    losses, pairs = pair_losses(scores, gains, mask)
    return (losses * weights).masked_fill(~pairs, 0.0).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)


def append_missed(
    positions: Int[Tensor, "Q K"], relevant: Sequence[Collection[int]]
) -> tuple[Int[Tensor, "Q D"], Float[Tensor, "Q D"], Bool[Tensor, "Q D"]]:
    """Lists to train on from what a search found, with something relevant in each.

    Where none of a query's positives is among the K found, all of them are put behind, in ascending order: places
    K + 1 and on. Where one is, the others are left out.

    Args:
        positions: of documents in the index, best first, as from `ExactIndex.search`; -1 where nothing was found.
        relevant: positions of each query's positives.

    Returns:
        positions, padded with -1; gains, 1 where relevant, else 0; mask, True where there is a document. D is K where
        no positive is missed.
    """
    if len(relevant) != len(positions):
        raise ValueError(f"need the positives of each of {len(positions)} queries, got {len(relevant)} lists")
    wanted = _table([sorted(set(documents)) for documents in relevant], positions)
    found = ((positions.unsqueeze(-1) == wanted.unsqueeze(-2)) & (wanted >= 0).unsqueeze(-2)).any(-1)
    missed = wanted.masked_fill(found.any(-1, keepdim=True), -1)
    missed = missed[:, (missed >= 0).any(0)]
    positions, gains = torch.cat([positions, missed], -1), torch.cat([found, missed >= 0], -1).float()
    return positions, gains, positions >= 0


def _checked(ranks: Tensor, mask: Tensor) -> Tensor:
    ranks = ranks.masked_fill(~mask, 1)
    if bool((ranks < 1).any()):
        raise ValueError(f"ranks are places from 1, got {int(ranks.min())}")
    return ranks


def _table(rows: list[list[int]], like: Tensor) -> Tensor:
    """[Q R], padded with -1."""
    if any(row and row[0] < 0 for row in rows):
        raise ValueError(f"positions of positives are at least 0, got {min(row[0] for row in rows if row)}")
    width = max(map(len, rows), default=0)
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=like.dtype, device=like.device).view(len(rows), width)


# --- By name ----------------------------------------------------------------------------------------------------------

IN_BATCH_LOSSES: dict[str, Callable[..., Tensor]] = {"star": star_lists, "masked_infonce": infonce}
"""`(scores, gains, mask) -> [Q]` over all documents of a batch. `masked_infonce` is `infonce` then: what is known to be
relevant is behind the mask."""
SEARCH_LOSSES: dict[str, Callable[..., Tensor]] = {
    "adore": adore,
    **{name: loss for name, loss in RANKING_LOSSES.items() if name not in ("margin_mse", "kl_distill")},
}
"""What can train on the lists of a search: nobody has a teacher's scores for documents that are found as one goes."""
