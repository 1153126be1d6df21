"""A judge of relevance made of scores and two thresholds, for `retrieval.relabel`, and how to choose the thresholds.

A small language model hardly writes a verdict that can be read; its logits of yes and no are a score all the same, and
so are those of cross-encoders and bi-encoders.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from negtune.metrics.verification import Rate, wilson
from negtune.models.reference import weights_hash
from negtune.retrieval.mining import CandidateList

PairScore = Callable[[list[tuple[str, str]]], Sequence[float | None]]
"""(query, document) texts to one number each, in any unit; None or NaN where there is none."""


@dataclass(frozen=True)
class Thresholds:
    """Where a score becomes a verdict, in units of the score.

    Args:
        positive: at or above it a document is a positive.
        drop: at or above it, and below `positive`, it is left out; below it is a negative.

    Raises:
        ValueError: not finite, or drop > positive.
    """

    positive: float
    drop: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.positive) and math.isfinite(self.drop) and self.drop <= self.positive):
            raise ValueError(f"need finite drop <= positive, got drop={self.drop} and positive={self.positive}")

    def verdict(self, score: float | None) -> str | None:
        """`positive`, `drop` or `negative`; None for a score that is missing or not finite."""
        if score is None or not math.isfinite(score):
            return None
        if score >= self.positive:
            return "positive"
        return "drop" if score >= self.drop else "negative"


class ScoreJudge:
    """`(queries, documents) -> verdicts`: positive, drop, negative, or None where the ranker gave no finite score.

    What the ranker raises comes out: it is no verdict either.

    Args:
        ranker: what `retrieval.rankers.load_ranker` gives (a cross-encoder, a causal LM by its logits of yes and no, a
            bi-encoder, ...); or a function, see `PairScore`.
        thresholds: for instance of `fit_thresholds`. A cross-encoder's scores are its logits.
        model: what the ranker is called, part of `name`; of a function it has to name the weights, too.
        batch_size: texts or pairs that a ranker reads at a time.

    `asked` and `unscored` count pairs: all, and those without a finite score.
    """

    def __init__(
        self, ranker: nn.Module | PairScore, thresholds: Thresholds, *, model: str, batch_size: int = 16
    ) -> None:
        self.thresholds, self.model = thresholds, model
        self.asked = self.unscored = 0
        if isinstance(ranker, nn.Module):
            from negtune.retrieval.evaluation import scorer  # needs sentence-transformers, a function does not

            self.score, self._weights = scorer(ranker, batch_size), ranker_digest(ranker)
        else:
            self.score, self._weights = ranker, "function"

    @property
    def name(self) -> str:
        """Of the model, its weights, what is put around texts, and the thresholds. Another name is another judge."""
        settings = json.dumps([self.thresholds.positive, self.thresholds.drop])
        return f"{self.model}@{self._weights}/{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> list[str | None]:
        pairs = list(zip(queries, documents, strict=True))
        if not pairs:
            return []
        verdicts = [self.thresholds.verdict(score) for score in self.score(pairs)]
        self.asked += len(pairs)
        self.unscored += verdicts.count(None)
        return verdicts


def ranker_digest(ranker: Any) -> str:
    """12 characters that name the weights of a ranker and what it puts around texts or cuts from them."""
    tokenizer = getattr(ranker, "tokenizer", None)
    settings = [
        weights_hash(ranker),
        getattr(ranker, "prompts", None) or {},
        *(getattr(ranker, name, None) for name in ("default_prompt_name", "max_seq_length", "similarity_fn_name")),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:12]


def known_scores(
    lists: Iterable[CandidateList], score: PairScore, *, queries: Collection[str], unjudged: str = "leave_out"
) -> tuple[list[float | None], list[bool]]:
    """Scores of documents that people judged, and whether those are relevant: what thresholds are fitted on.

    Where nearly all that was judged is relevant, judged documents say little of a score, and a precision among them
    nothing of a precision among all candidates. Counting what nobody judged as irrelevant is the cautious side: hidden
    positives there make thresholds higher than needed.

    Args:
        lists: of `retrieval.mining`. Labels that a judge gave are left out.
        score: see `PairScore`.
        queries: ids of those to look at. An audit of the judge belongs to the others.
        unjudged: `leave_out`, or `irrelevant`: documents without a judgement count as such.
    """
    if unjudged not in ("leave_out", "irrelevant"):
        raise ValueError(f"unjudged={unjudged!r} is neither 'leave_out' nor 'irrelevant'")
    known = [
        (one.query, one.documents[i], one.gains[i] > 0)
        for one in lists
        if one.query_id in queries
        for i, judged in enumerate(one.judged)
        if one.relabelled[i] is None and (judged or unjudged == "irrelevant")
    ]
    scores = list(score([(query, document) for query, document, _ in known])) if known else []
    return scores, [relevant for _, _, relevant in known]


@dataclass(frozen=True)
class FittedThresholds:
    """See `fit_thresholds`. The rates are of the documents it was fitted on, and kinder than those of others.

    Args:
        thresholds: see `Thresholds`.
        precision: of the documents at or above `positive`, the relevant ones.
        recall: of the relevant documents, those at or above `positive`.
        lost: of the relevant documents, those below `drop`.
        unscored: documents without a finite score; they have no part in the fit.
    """

    thresholds: Thresholds
    precision: Rate
    recall: Rate
    lost: Rate
    unscored: int


def fit_thresholds(
    scores: Sequence[float | None], relevant: Sequence[bool], *, precision: float = 0.9, kept: float = 0.9
) -> FittedThresholds:
    """Thresholds for a wanted precision of positives and a share of positives that are not called negatives.

    `positive` is the smallest score at and above which at least `precision` of the documents are relevant; `drop` the
    largest at and above which at least `kept` of the relevant ones are, or `positive` where that is smaller: nothing is
    dropped then. Equal scores are on one side.

    Args:
        scores: of documents whose relevance is known; see `known_scores`.
        relevant: whether they are.
        precision, kept: above 0, at most 1.

    Raises:
        ValueError: no score at which the precision is reached, no relevant document, or settings.
    """
    for name, value in (("precision", precision), ("kept", kept)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    if len(scores) != len(relevant):
        raise ValueError(f"need one score for each document, got {len(scores)} scores and {len(relevant)} documents")
    known = [(s, r) for s, r in zip(scores, relevant, strict=True) if s is not None and math.isfinite(s)]
    known.sort(key=lambda pair: -pair[0])
    positives = sum(is_relevant for _, is_relevant in known)
    if not positives:
        raise ValueError(f"of {len(known)} documents with a score none is relevant; thresholds need known positives")
    found: list[tuple[float, int, int]] = []  # score, relevant and all documents at or above it
    for score, group in groupby(known, key=lambda pair: pair[0]):
        right, seen = found[-1][1:] if found else (0, 0)
        said = [is_relevant for _, is_relevant in group]
        found.append((score, right + sum(said), seen + len(said)))
    reached = [one for one in found if one[1] / one[2] >= precision]
    if not reached:
        best = max(found, key=lambda one: one[1] / one[2])
        raise ValueError(
            f"no threshold reaches a precision of {precision} on {len(known)} documents: the best is "
            f"{best[1] / best[2]:.3f}, for {best[2]} of them; lower the precision, or take another judge"
        )
    positive, right, seen = reached[-1]
    drop = min(positive, next(score for score, above, _ in found if above / positives >= kept))
    lost = sum(is_relevant for score, is_relevant in known if score < drop)
    return FittedThresholds(
        Thresholds(positive, drop),
        precision=wilson(right, seen),
        recall=wilson(right, positives),
        lost=wilson(lost, positives),
        unscored=len(scores) - len(known),
    )
