"""What a run, the ranked documents of each query, is worth by the judgements of those documents (qrels).

The equations are those of `negtune.metrics.ranking`. Tools differ in what they do besides:

| tool                  | equal scores                          | query not in the run | query with nothing relevant |
|-----------------------|---------------------------------------|----------------------|-----------------------------|
| pytrec_eval, BEIR     | docid_desc                            | left out             | 0                           |
| trec_eval             | docid_desc                            | left out; with -c: 0 | 0                           |
| ir_measures           | docid_desc; RR@k, Judged@k: docid_asc | 0                    | 0                           |
| sentence-transformers | docid_asc                             | there is none        | left out                    |
| here                  | `ties`, default docid_desc            | `missing`, default 0 | left out, and named         |

Ids are compared as text: "9" is above "10". trec_eval and pytrec_eval compare scores as float32, in which 1 equals
1 + 1e-8; here it does not: round scores to float32 to get their numbers. A document with the id of its query stays in
the list, where BEIR drops it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from negtune.metrics.ranking import (
    METRICS,
    expected_place_rewards,
    exponential_gain,
    ideal_value,
    place_rewards,
    rank_documents,
    tie_groups,
)

TIES = ("docid_desc", "docid_asc", "worst", "average")

PLACES_AT_ONCE = 2**20
"""Places of padded lists held at a time: 8 MiB a tensor."""

PerDocument = Mapping[str, Mapping[str, float | int]]
"""Query id to document id to a number."""


@dataclass(frozen=True)
class RankingResult:
    """Outcome of `evaluate_run`.

    Args:
        means: metric name to its mean over the queries in `per_query`.
        per_query: metric name to query id to value, in the order of the qrels.
        skipped: queries of the qrels without a relevant document; they are in no mean.
        missing: other queries of the qrels that are not in the run; in the means as 0, or left out, as asked for.
    """

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]


def evaluate_run(
    run: PerDocument,
    qrels: PerDocument,
    metrics: Sequence[str],
    *,
    gain: str = "linear",
    ties: str = "docid_desc",
    missing: str = "zero",
) -> RankingResult:
    """Metrics of a run, per query and on average.

    Args:
        run: query id to document id to score, higher is better. Queries that the qrels do not know are ignored; an
            empty list is an answer worth 0.
        qrels: query id to document id to grade. Above 0 is relevant, 0 or less judged and not relevant, absent not
            judged, which every metric but judged takes as not relevant.
        metrics: `ndcg`, `dcg`, `mrr`, `map`, `recall` of the whole list, or of its first k places as in `ndcg@10`;
            `precision@k` is over k even where fewer were retrieved; `judged@k`: share of the first k documents
            retrieved that were judged, low where nDCG is a guess. map and recall are over all relevant documents.
        gain: of ndcg and dcg. `linear`: the grade; `exponential`: 2^grade - 1.
        ties: among documents of a query with equal scores. `docid_desc`, `docid_asc`: by id; `worst`: less relevant
            first; `average`: the mean over all their orders, exactly, in all metrics.
        missing: queries of the qrels that are not in the run. `zero`: count 0 (trec_eval -c, MS MARCO's MRR); `skip`:
            left out (BEIR), which flatters a run that answers the easy ones only.

    Raises:
        ValueError: an argument has no such value; a score or grade is NaN; no query is left to average over.
    """
    asked = {name: _parse(name) for name in metrics}
    _check("gain", gain, ("linear", "exponential"))
    _check("ties", ties, TIES)
    _check("missing", missing, ("zero", "skip"))
    relevant = {qid for qid, grades in qrels.items() if _has_relevant(qid, grades)}
    absent = tuple(qid for qid in qrels if qid in relevant and qid not in run)
    skipped = tuple(qid for qid in qrels if qid not in relevant)
    qids = [qid for qid in qrels if qid in relevant and (missing == "zero" or qid in run)]
    if not qids:
        raise ValueError(
            f"no query to average over: of {len(qrels)} in the qrels, {len(skipped)} have no relevant document and "
            f"{len(absent)} others are not in the run"
        )
    longest = max(max(len(qrels[qid]), len(run.get(qid, ()))) for qid in qids)
    step = max(1, PLACES_AT_ONCE // longest)
    per_query: dict[str, dict[str, float]] = {name: {} for name in asked}
    for start in range(0, len(qids), step):
        lists = _ranked(qids[start : start + step], run, qrels, gain, ties)
        for name, (metric, k) in asked.items():
            values = lists.judged_share(k) if metric == "judged" else lists.value(metric, k)
            per_query[name].update(zip(qids[start : start + step], values.tolist(), strict=True))
    means = {name: math.fsum(values.values()) / len(qids) for name, values in per_query.items()}
    return RankingResult(means, per_query, skipped, absent)


@dataclass(frozen=True)
class _RankedLists:
    """Ranked documents of some queries.

    Args:
        gains: of the documents in ranked order; padding 0.
        judged: True where the qrels have a document.
        retrieved: documents in each list.
        tied: number of the group of equal scores at each place, or None where their order is settled.
        all_gains: of all judged documents, ranked or not.
    """

    gains: Float[Tensor, "Q D"]
    judged: Bool[Tensor, "Q D"]
    retrieved: Int[Tensor, " Q"]
    tied: Int[Tensor, "Q D"] | None
    all_gains: Float[Tensor, "Q I"]

    def value(self, metric: str, k: int | None) -> Float[Tensor, " Q"]:
        k = k or max(self.gains.shape[-1], self.all_gains.shape[-1])
        return self._sum(self.gains, metric, ideal_value(self.all_gains, metric, k), k)

    def judged_share(self, k: int | None) -> Float[Tensor, " Q"]:
        """The recall of judged documents, where so many could be among the first k."""
        k = k or self.gains.shape[-1]
        return self._sum(self.judged.to(self.gains), "recall", self.retrieved.clamp(max=k).to(self.gains), k)

    def _sum(self, gains: Tensor, metric: str, ideal: Tensor, k: int) -> Tensor:
        if self.tied is not None:
            return expected_place_rewards(gains, self.tied, metric, ideal, k).sum(-1)
        first = F.pad(gains, (0, k - gains.shape[-1]))  # cuts where there are more than k
        return place_rewards(first, metric, ideal).sum(-1)


def _ranked(qids: list[str], run: PerDocument, qrels: PerDocument, gain: str, ties: str) -> _RankedLists:
    answers = [run.get(qid, {}) for qid in qids]
    grades = [qrels[qid] for qid in qids]
    # In the order of ids, so that "first by index" among equal scores is first by id.
    documents = [sorted(answer, reverse=ties != "docid_asc") for answer in answers]
    scores, mask = _padded([[answer[doc] for doc in docs] for answer, docs in zip(answers, documents, strict=True)])
    if scores.isnan().any():
        row, place = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"query {qids[row]!r}: the score of document {documents[row][place]!r} is NaN")
    gains, _ = _padded([[known.get(doc, 0.0) for doc in docs] for known, docs in zip(grades, documents, strict=True)])
    judged, _ = _padded([[doc in known for doc in docs] for known, docs in zip(grades, documents, strict=True)])
    all_gains, _ = _padded([list(known.values()) for known in grades])
    if gain == "exponential":
        gains, all_gains = exponential_gain(gains), exponential_gain(all_gains)
    order = rank_documents(scores, mask, gains, "worst" if ties == "worst" else "first")
    ranked_scores = scores.masked_fill(~mask, math.nan).gather(-1, order)
    return _RankedLists(
        gains=gains.gather(-1, order),
        judged=judged.gather(-1, order).bool(),
        retrieved=mask.sum(-1),
        tied=tie_groups(ranked_scores) if ties == "average" else None,
        all_gains=all_gains,
    )


def _padded(rows: Sequence[Sequence[float | int]]) -> tuple[Float[Tensor, "Q D"], Bool[Tensor, "Q D"]]:
    """Rows as one float64 tensor with 0 behind them, and where they are."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    values = torch.zeros(mask.shape, dtype=torch.float64)
    values[mask] = torch.tensor([float(value) for row in rows for value in row], dtype=torch.float64)
    return values, mask


def _parse(name: str) -> tuple[str, int | None]:
    """Metric and cut-off of a name such as `ndcg@10`."""
    known = (*METRICS, "judged")
    match = re.fullmatch(r"([a-z]+)(?:@(\d+))?", name)
    if match is None or match[1] not in known:
        raise ValueError(f"unknown metric {name!r}; one of {', '.join(known)}, with or without a cut-off as in ndcg@10")
    if match[2] is None and match[1] == "precision":
        raise ValueError("precision needs a cut-off, as in precision@10")
    if match[2] is not None and int(match[2]) < 1:
        raise ValueError(f"{name}: the cut-off must be at least 1")
    return match[1], None if match[2] is None else int(match[2])


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; one of {', '.join(known)}")


def _has_relevant(qid: str, grades: Mapping[str, float | int]) -> bool:
    for document, grade in grades.items():
        if not math.isfinite(grade):
            raise ValueError(f"query {qid!r}: the grade of document {document!r} is {grade}")
    return any(grade > 0 for grade in grades.values())
