"""Graded ranking metrics on tensors: one set of equations for the reward of a ranking and for its evaluation.

Shapes: Q queries, D documents of a list, I judged documents of a query, k first places, `*A` anything (samples, say).
A document is relevant where its gain is above 0; a negative gain counts as 0, as in trec_eval. Padding has gain 0.

A metric is a sum over places: what counts of the document at place j, times the weight of the place, over an ideal.

| metric    | counts                                         | weight        | ideal                           |
|-----------|------------------------------------------------|---------------|---------------------------------|
| ndcg      | its gain                                       | 1/log2(1 + j) | DCG@k of the judged, best first |
| dcg       | its gain                                       | 1/log2(1 + j) | 1                               |
| precision | 1 if it is relevant                            | 1/k           | 1                               |
| recall    | 1 if it is relevant                            | 1             | number of relevant documents    |
| mrr       | 1 if it is the first relevant one              | 1/j           | 1                               |
| map       | number of relevant ones up to it, if it is one | 1/j           | number of relevant documents    |

Gains are linear (nDCG of trec_eval, pytrec_eval, BEIR) unless put through `exponential_gain` (LambdaLoss, gdeval).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune.metrics.stats import Numbers

METRICS = ("ndcg", "dcg", "precision", "recall", "mrr", "map")

ADDITIVE = frozenset(METRICS) - {"mrr", "map"}
"""Metrics in which what a document adds depends on its own gain and place only, not on who stands before it."""


def exponential_gain(gains: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """2^g - 1: a document of grade 3 is worth seven of grade 1, not three. Grades 0 and 1 stay as they are.

    Raises:
        ValueError: a gain is NaN or overflows.
    """
    return _finite(torch.exp2(gains) - 1)


def rank_documents(
    scores: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"] | None = None,
    ties: str = "first",
) -> Int[Tensor, "Q D"]:
    """Indices of each list's documents by descending score, padding last.

    Args:
        scores: what a model says of each document; infinite is fine.
        mask: True where there is a document; nothing behind it matters.
        gains: only `ties="worst"` reads them.
        ties: among equal scores, `first`: by index; `worst`: less relevant ones first, so that a model that gives all
            documents one score earns the worst ranking.

    Raises:
        ValueError: a document's score (or gain, where it is read) is NaN; `worst` without gains.
    """
    if ties not in ("first", "worst"):
        raise ValueError(f"unknown tie rule {ties!r}; one of first, worst")
    scores = scores.masked_fill(~mask, 0.0)
    if scores.isnan().any():
        raise ValueError("documents cannot be ranked by scores that are NaN")
    keys = [-scores, (~mask).int()]
    if ties == "worst":
        if gains is None:
            raise ValueError("ties='worst' puts less relevant documents first and needs their gains; pass gains=")
        keys.insert(0, _finite(gains.masked_fill(~mask, 0.0)))
    order = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    for key in keys:  # the last one matters most: the sorts before it are kept among its equals
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order


def place_rewards(
    ranked_gains: Float[Tensor, "*A Q k"], metric: str, ideal: Float[Tensor, " Q"]
) -> Float[Tensor, "*A Q k"]:
    """What each place of a ranking adds: the sum over places is the metric at k.

    Args:
        ranked_gains: gains of the documents in ranked order, first k places; where a list is shorter, 0.
        metric: one of `METRICS`; the table above is what they are.
        ideal: what is divided by, of `ideal_value`. Where it is 0 (no relevant document) all rewards are 0.

    Returns:
        In the dtype of the gains, at least float32.

    Raises:
        ValueError: a gain is NaN or infinite, or the metric is unknown.
    """
    gains = _relevance(ranked_gains, metric)
    return _over(_counted(gains, metric) * _weights(gains, metric), ideal)


def greedy_reward(
    scores: Float[Tensor, "Q D"],
    gains: Float[Tensor, "Q D"],
    mask: Bool[Tensor, "Q D"],
    metric: str,
    ideal: Float[Tensor, " Q"],
    k: int,
) -> Float[Tensor, " Q"]:
    """Metric of the first `k` documents by score, equal scores in the worst order; padding is not read."""
    gains = gains.masked_fill(~mask, 0.0)
    best = rank_documents(scores, mask, gains, "worst")[..., :k]
    return place_rewards(gains.gather(-1, best), metric, ideal).sum(-1)


def expected_place_rewards(
    ranked_gains: Float[Tensor, "Q D"], tied: Int[Tensor, "Q D"], metric: str, ideal: Float[Tensor, " Q"], k: int
) -> Float[Tensor, "Q k"]:
    """`place_rewards` on average over all orders of tied documents, exactly.

    McSherry and Najork 2008, https://doi.org/10.1007/978-3-540-78646-7_38

    Args:
        ranked_gains: of the whole list: a group of ties may reach beyond place k.
        tied: the same number on all documents of a group, rising from place to place: `tie_groups`.
        metric, ideal: as for `place_rewards`.
        k: places asked for, more than D too.
    """
    gains = _relevance(ranked_gains, metric)
    counted = F.pad(_expected(gains, tied, metric), (0, k - gains.shape[-1]))  # cuts where there are more than k
    return _over(counted * _weights(counted, metric), ideal)


def tie_groups(ranked_scores: Float[Tensor, "Q D"]) -> Int[Tensor, "Q D"]:
    """Number of the group of equal scores at each place, from 0. NaN, which marks padding here, equals nothing."""
    changes = ranked_scores[:, 1:] != ranked_scores[:, :-1]
    return F.pad(changes.long().cumsum(-1), (1, 0))


def ideal_value(gains: Float[Tensor, "Q I"], metric: str, k: int) -> Float[Tensor, " Q"]:
    """What `place_rewards` divides by; 0 for a query without a relevant document, of which no metric says anything.

    Args:
        gains: of all judged documents of a query, in any order, also those that no list has; padding 0.
        metric: one of `METRICS`. dcg, precision and mrr have ideal 1.
        k: cut-off; of nDCG only the best k documents are in the ideal.
    """
    if k < 1:
        raise ValueError(f"the cut-off must be at least 1, got {k}")
    gains = _relevance(gains, metric)
    if metric == "ndcg":
        best = gains.sort(-1, descending=True).values[:, :k]
        return (best * _weights(best, metric)).sum(-1)
    relevant = (gains > 0).sum(-1) if metric in ("recall", "map") else (gains > 0).any(-1)
    return relevant.to(gains.dtype)


def micro_ap(scores: Numbers, labels: Numbers, n_positives: int | None = None, *, ties: str = "worst") -> float:
    """µAP: average precision of all (query, reference) pairs in one ranking: sum_i P_i (R_i - R_(i-1)).

    Unlike a mean over queries it asks for scores that are comparable between queries, and a query without a match
    costs what its pairs score. As in the image similarity challenge, https://arxiv.org/abs/2106.09672

    Args:
        scores: one per predicted pair. A pair must not be given twice.
        labels: whether it is a true one.
        n_positives: number of all true pairs, predicted or not, by which recall is divided. Default: the true ones
            among those given, which is right only if none can be missing.
        ties: among equal scores, `worst`: wrong pairs first (the challenge's rule); `first`: as given.

    Raises:
        ValueError: a score is NaN; no true pair; fewer `n_positives` than true labels.
    """
    score, label, n_positives = _checked_pairs(scores, labels, n_positives)
    order = rank_documents(score[None], torch.ones_like(score[None], dtype=torch.bool), label[None], ties)
    return float(place_rewards(label[order], "map", label.new_tensor([n_positives])).sum())


def recall_at_precision(scores: Numbers, labels: Numbers, precision: float, n_positives: int | None = None) -> float:
    """Largest recall of a threshold at which at least `precision` of the pairs above it are true ones; 0 if none is.

    Equal scores are on one side of every threshold. At .9 the second metric of the image similarity challenge,
    https://arxiv.org/abs/2106.09672

    Args:
        scores, labels, n_positives: as in `micro_ap`.
        precision: above 0 and at most 1.

    Raises:
        ValueError: as `micro_ap`.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision is a share, above 0 and at most 1, got {precision}")
    score, label, n_positives = _checked_pairs(scores, labels, n_positives)
    order = score.argsort(descending=True)
    score, label = score[order], label[order]
    last = F.pad(score[1:] != score[:-1], (0, 1), value=True)
    hits = label.cumsum(-1)
    enough = last & (hits >= precision * torch.arange(1, len(hits) + 1))
    return float(hits[enough].max() / n_positives) if bool(enough.any()) else 0.0


def _checked_pairs(scores: Numbers, labels: Numbers, n_positives: int | None) -> tuple[Tensor, Tensor, int]:
    score, label = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.float64)
    if score.shape != label.shape or score.ndim != 1:
        raise ValueError(f"need one label per score, got {tuple(label.shape)} and {tuple(score.shape)}")
    if bool(score.isnan().any()):
        raise ValueError("a score is NaN and has no place in a ranking")
    label = (label > 0).to(label.dtype)
    true = int(label.sum())
    n_positives = true if n_positives is None else n_positives
    if n_positives < max(true, 1):
        raise ValueError(f"recall is over all true pairs, at least {max(true, 1)}; got n_positives={n_positives}")
    return score, label, n_positives


def _relevance(gains: Tensor, metric: str) -> Tensor:
    """Gains as metrics read them: none below 0, in float32 or wider."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; one of {', '.join(METRICS)}")
    return _finite(gains.to(torch.promote_types(gains.dtype, torch.float32))).clamp(min=0)


def _finite(gains: Tensor) -> Tensor:
    finite = gains.isfinite()
    if not finite.all():
        raise ValueError(f"gains must be finite, got {gains[~finite][0].item()}")
    return gains


def _counted(gains: Tensor, metric: str) -> Tensor:
    """What counts of the document at each place."""
    if metric in ("ndcg", "dcg"):
        return gains
    hits = (gains > 0).to(gains.dtype)
    if metric == "mrr":
        return hits * (hits.cumsum(-1) == 1)
    return hits * hits.cumsum(-1) if metric == "map" else hits


def _expected(gains: Tensor, tied: Tensor, metric: str) -> Tensor:
    """`_counted` on average over the orders of ties."""

    def of_group(values: Tensor) -> Tensor:
        return torch.zeros_like(values).scatter_add(-1, tied, values).gather(-1, tied)

    def before_group(values: Tensor) -> Tensor:  # sum of what is not negative over all earlier groups
        starts = F.pad(tied[:, 1:] != tied[:, :-1], (1, 0), value=True)
        return (values.cumsum(-1) - values).masked_fill(~starts, 0.0).cummax(-1).values

    ones, hits = torch.ones_like(gains), (gains > 0).to(gains.dtype)
    size, relevant = of_group(ones), of_group(hits)
    if metric in ADDITIVE:
        return of_group(_counted(gains, metric)) / size
    passed = ones.cumsum(-1) - 1 - before_group(ones)  # places of the same group that stand before
    if metric == "mrr":
        chance = relevant / (size - passed)  # that it is relevant if none before was; above 1 only where one was
        return chance * F.pad((1 - chance).cumprod(-1), (1, -1), value=1.0)
    others = (relevant - 1) / (size - 1).clamp(min=1)  # chance of any other of a relevant one's group
    return relevant / size * (1 + before_group(hits) + passed * others)


def _weights(places: Tensor, metric: str) -> Tensor:
    """Weight `[k]` of each place."""
    k = places.shape[-1]
    place = torch.arange(1, k + 1, dtype=places.dtype, device=places.device)
    if metric in ("ndcg", "dcg"):
        return 1 / torch.log2(1 + place)
    if metric in ("mrr", "map"):
        return 1 / place
    return torch.full_like(place, 1 / k if metric == "precision" and k else 1.0)


def _over(rewards: Tensor, ideal: Tensor) -> Tensor:
    return (rewards / ideal[:, None]).masked_fill(~(ideal > 0)[:, None], 0.0)
