"""What a score of pairs is worth by which text is in which: micro-AP both ways, and whether it knows the direction.

Letters: Q queries, D documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from negtune._st_compat import BaseEvaluator
from negtune.data.containment import ContainmentTask
from negtune.losses.asymmetric import contained, containment_score, unit_vectors, vector_norm
from negtune.metrics.ranking import micro_ap, recall_at_precision
from negtune.retrieval.encoder import encode

PRECISION = 0.9
RATIOS = (math.inf, 2.0, 1.5, 1.2, 1.1, 1.0, 0.9, 0.8)
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


def truth(task: ContainmentTask) -> tuple[Bool[Tensor, "Q D"], Bool[Tensor, "Q D"]]:
    """Whether the query is in the document, and whether the document is in the query."""
    place = {document_id: i for i, document_id in enumerate(task.documents)}
    inside, around = (torch.zeros(len(task.queries), len(place), dtype=torch.bool) for _ in range(2))
    for row, query_id in enumerate(task.queries):
        inside[row, [place[d] for d in sorted(task.inside[query_id])]] = True
        around[row, [place[d] for d in sorted(task.around[query_id])]] = True
    return inside, around


@dataclass(frozen=True)
class Compared:
    """A symmetric score of all pairs, and how much each text holds.

    Attributes:
        cosines: or any other symmetric score.
        query_norms, document_norms: norms of vectors, or numbers of words.
    """

    cosines: Float[Tensor, "Q D"]
    query_norms: Float[Tensor, " Q"]
    document_norms: Float[Tensor, " D"]

    @classmethod
    def of_model(cls, model: Any, task: ContainmentTask, batch_size: int = 64) -> Compared:
        """By the vectors of an encoder, before normalisation."""
        texts = (list(task.queries.values()), list(task.documents.values()))
        queries, documents = (encode(model, side, batch_size=batch_size) for side in texts)
        cosines = unit_vectors(queries) @ unit_vectors(documents).T
        return cls(cosines, vector_norm(queries), vector_norm(documents))

    def by_words(self, task: ContainmentTask) -> Compared:
        """The same score with the plainest measure of how much a text holds, its number of words."""
        texts = (task.queries.values(), task.documents.values())
        queries, documents = (torch.tensor([float(len(text.split())) for text in side]) for side in texts)
        return Compared(self.cosines, queries, documents)


def both_ways(
    pairs: Compared, *, weight: float = 0.0, ratio: float | None = None
) -> tuple[Float[Tensor, "Q D"], Float[Tensor, "Q D"]]:
    """Scores that the query is in the document, and that the document is in the query; -inf where discarded.

    Args:
        pairs: scores and how much texts hold.
        weight: of `asymmetric_similarity`.
        ratio: of `containment_filter`; None discards nothing.
    """

    def one_way(smaller: Tensor, larger: Tensor) -> Tensor:
        scores = containment_score(pairs.cosines, smaller, larger, weight=weight)
        return scores if ratio is None else scores.masked_fill(~contained(smaller, larger, ratio=ratio), -math.inf)

    rows, columns = pairs.query_norms[:, None], pairs.document_norms[None, :]
    return one_way(rows, columns), one_way(columns, rows)


def containment_metrics(
    task: ContainmentTask, inside: Float[Tensor, "Q D"], around: Float[Tensor, "Q D"]
) -> dict[str, float]:
    """Of scores of all pairs, both ways.

    Args:
        task: what is true.
        inside, around: scores that the query is in the document, and that the document is in the query; what is -inf
            is discarded, and missing from recall.

    Returns:
        `inside/micro_ap`, `inside/recall@p90`, and the same of `around`; `direction`: share of true pairs whose score
        is higher the right way round than the wrong way, a tie counting half.
    """
    metrics, right = {}, []
    for name, scores, other, true in zip(
        ("inside", "around"), (inside, around), (around, inside), truth(task), strict=True
    ):
        kept, n = scores > -math.inf, int(true.sum())
        metrics[f"{name}/micro_ap"] = micro_ap(scores[kept].tolist(), true[kept].tolist(), n)
        metrics[f"{name}/recall@p90"] = recall_at_precision(scores[kept].tolist(), true[kept].tolist(), PRECISION, n)
        right.append((scores[true] > other[true]).double() + (scores[true] == other[true]).double() / 2)
    metrics["direction"] = float(torch.cat(right).mean())
    return metrics


def fitted(
    task: ContainmentTask, pairs: Compared, *, weights: Sequence[float] = (0.0,), ratios: Sequence[float] = (math.inf,)
) -> dict[str, float]:
    """The `weight` and `ratio` of the best micro-AP, the mean of both ways, on a task that is not the test.

    Of equally good ones the first, in the order given.
    """
    found = {
        (weight, ratio): balanced(containment_metrics(task, *both_ways(pairs, weight=weight, ratio=ratio)))
        for weight, ratio in product(weights, ratios)
    }
    weight, ratio = max(found, key=found.__getitem__)
    return {"weight": weight, "ratio": ratio}


def balanced(metrics: dict[str, float]) -> float:
    """Mean micro-AP of the two ways."""
    return (metrics["inside/micro_ap"] + metrics["around/micro_ap"]) / 2


def micro_ap_draws(
    scores: Float[Tensor, "Q D"],
    true: Bool[Tensor, "Q D"],
    groups: Sequence[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """micro-AP of `resamples` draws of the queries with replacement, those of a group drawn together, [R].

    Pairs of one query, and queries of one passage, are not independent: the passages are drawn. The same seed draws the
    same passages, so that draws of two scores can be subtracted.

    Args:
        scores: of all pairs; -inf is discarded. Of equal scores wrong pairs stand first.
        true: which pairs are.
        groups: of each query. Copies of a pair share one threshold, and so one precision.
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of_query = np.array([places[group] for group in groups])
    generator, n = np.random.default_rng(seed), len(places)
    kept = (scores > -math.inf).numpy()
    rows = np.broadcast_to(np.arange(len(scores))[:, None], kept.shape)[kept]
    score, label = scores.double().numpy()[kept], true.numpy()[kept]
    order = np.lexsort((label, -score))
    rows, label = rows[order], label[order].astype(float)
    per_query, values = true.sum(-1).numpy(), np.empty(resamples)
    for i in range(resamples):
        weight = np.bincount(generator.integers(n, size=n), minlength=n)[of_query].astype(float)
        weights = weight[rows]
        hits, seen = (weights * label).cumsum(), weights.cumsum()
        precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
        total = (weight * per_query).sum()
        values[i] = (precision * weights * label).sum() / total if total else np.nan
    return values


class ContainmentEvaluator(BaseEvaluator):
    """For sentence-transformers' trainers: micro-AP both ways of `asymmetric_similarity` on a task.

    Args:
        task: not the one that figures are reported of.
        weight: of the score.
        batch_size: texts embedded at a time.
    """

    def __init__(self, task: ContainmentTask, *, weight: float = 1.0, batch_size: int = 64) -> None:
        super().__init__()
        self.task, self.weight, self.batch_size = task, weight, batch_size
        self.primary_metric = "inside/micro_ap"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float | int = -1.0, steps: int = -1
    ) -> dict[str, float]:
        pairs = Compared.of_model(model, self.task, self.batch_size)
        return containment_metrics(self.task, *both_ways(pairs, weight=self.weight))
