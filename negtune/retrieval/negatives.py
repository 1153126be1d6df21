"""Which mined documents may be negatives: rules that know false negatives by their scores.

A document that nobody judged may be relevant, and the higher it scores the likelier that is. Each step takes what
`mining.mine` gave and gives the same kind of thing, so that they follow each other in any order, on all queries of a
task or on some: no list depends on another.

    pool = mine(task, [bm25, dense], n_documents=EVERYTHING, positives="guaranteed")
    pool = add_scores(pool, scorer(model), name="dense")
    pool = drop_negatives(pool, [RelativeMargin("dense", 0.05)])
    mined = choose(pool, 16)  # retrieval.choice, which also has all of this in one call

A rule reads the scores of one scorer, by name: a retriever's, or those that `add_scores` gave. It keeps a document for
which that score is missing, and a list of which a positive has none, and both are counted. Judged negatives are known
to be negatives, and are kept.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from negtune.metrics.verification import Rate, wilson
from negtune.retrieval.mining import CandidateList, Mined, picked

EVERYTHING = sys.maxsize
"""`n_documents` of `mine` for lists that are cut later."""
SAME = 0.02
"""Two computations of one score differ by no more than this, or by this share of it: half precision, other batches."""

PairScorer = Callable[[list[tuple[str, str]]], Sequence[float]]
"""(query, document) texts to one number each."""


@runtime_checkable
class Rule(Protocol):
    """Whether a document may stay a negative.

    Attributes:
        scorer: whose scores (or ranks) it reads.
        name: of the rule and the scorer, for counts.
        relative: whether it compares with the positives.
        ranked: whether it reads ranks.
    """

    @property
    def scorer(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def relative(self) -> bool: ...

    @property
    def ranked(self) -> bool: ...

    def positive(self, scores: Sequence[float]) -> float:
        """What it compares with, from the scores of at least one positive."""
        ...

    def keeps(self, value: float, positive: float) -> bool:
        """Of a document's score or rank (infinite where it was not ranked), and what it is compared with."""
        ...


def one_of(scores: Sequence[float], against: str) -> float:
    """The `min`, `max` or `mean` of the positives' scores.

    Raises:
        ValueError: `against` is none of these.
    """
    if against not in ("min", "max", "mean"):
        raise ValueError(f"against={against!r} is none of 'min', 'max', 'mean'")
    return {"min": min(scores), "max": max(scores), "mean": sum(scores) / len(scores)}[against]


@dataclass(frozen=True)
class _Rule:
    scorer: str
    kind: ClassVar[str]
    relative: ClassVar[bool] = False
    ranked: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.scorer}"

    def positive(self, scores: Sequence[float]) -> float:
        return 0.0


@dataclass(frozen=True)
class MaxScore(_Rule):
    """Keep s_n <= score. On a cross-encoder's scores: the denoising of RocketQA, see `denoise`.

    Args:
        scorer: see `Rule`.
        score: in the scorer's units.
    """

    score: float
    kind: ClassVar[str] = "max_score"

    def __post_init__(self) -> None:
        _refuse_nan(self.score)

    def keeps(self, value: float, positive: float) -> bool:
        return value <= self.score


@dataclass(frozen=True)
class MinScore(_Rule):
    """Keep s_n >= score: lower ones are too easy to teach anything.

    Args:
        scorer: see `Rule`.
        score: in the scorer's units.
    """

    score: float
    kind: ClassVar[str] = "min_score"

    def __post_init__(self) -> None:
        _refuse_nan(self.score)

    def keeps(self, value: float, positive: float) -> bool:
        return value >= self.score


@dataclass(frozen=True)
class RankWindow(_Rule):
    """Keep skip < rank <= depth, ranks counted from 1 over all documents, positives among them.

    What the retriever did not find is behind all ranks. `mine` has `skip` and `depth` for all retrievers together;
    this is for one of them. sentence-transformers' `range_min` counts among the negatives that are left instead.

    Args:
        scorer: a retriever.
        skip: first ranks left out.
        depth: last rank kept; None: any.
    """

    skip: int = 0
    depth: int | None = None
    kind: ClassVar[str] = "rank_window"
    ranked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.skip < 0 or (self.depth is not None and self.depth <= self.skip):
            raise ValueError(f"need 0 <= skip < depth, got skip={self.skip}, depth={self.depth}")

    def keeps(self, value: float, positive: float) -> bool:
        return self.skip < value and (self.depth is None or value <= self.depth)


@dataclass(frozen=True)
class _Relative(_Rule):
    """Keeps scores up to a limit that the positives' scores set."""

    against: str = field(default="min", kw_only=True)
    relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of([0.0], self.against)

    def positive(self, scores: Sequence[float]) -> float:
        return one_of(scores, self.against)

    def keeps(self, value: float, positive: float) -> bool:
        return value <= self.limit(positive)

    def limit(self, positive: float) -> float:
        """Highest score of a negative."""
        raise NotImplementedError


@dataclass(frozen=True)
class AbsoluteMargin(_Relative):
    """Keep s_n <= s_p - margin (TopK-MarginPos of NV-Retriever, https://arxiv.org/abs/2407.15831).

    Args:
        scorer: see `Rule`.
        margin: in the scorer's units, at least 0.
        against: which s_p counts if there are several positives: `min`, as in sentence-transformers, `max` or `mean`.
    """

    margin: float
    kind: ClassVar[str] = "absolute_margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin >= 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}")

    def limit(self, positive: float) -> float:
        return positive - self.margin


@dataclass(frozen=True)
class RelativeMargin(_Relative):
    """Keep s_n <= s_p - |s_p| · margin, sentence-transformers' convention.

    Where s_p > 0 that is (1 - margin) · s_p, NV-Retriever's TopK-PercPos. The absolute value keeps the limit below the
    positive where its score is negative, while (1 - margin) · s_p would be above it.

    Args:
        scorer: see `Rule`.
        margin: share, at least 0.
        against: see `AbsoluteMargin`.
    """

    margin: float = 0.05
    kind: ClassVar[str] = "relative_margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin >= 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}")

    def limit(self, positive: float) -> float:
        return positive - abs(positive) * self.margin


@dataclass(frozen=True)
class PercentOfPositive(_Relative):
    """Keep s_n + shift <= share · (s_p + shift): TopK-PercPos of NV-Retriever, https://arxiv.org/abs/2407.15831.

    A percentage says something only of scores with a zero that means "nothing": BM25, probabilities, cosines that do
    not go below 0. Scores below 0 (cosines of opposite texts, logits) are an error, unless `shift` lifts them.

    Args:
        scorer: see `Rule`.
        share: above 0, at most 1; the paper's .95.
        shift: added to all scores first: 1 for cosines. It makes the rule much stricter: .95 of .6 is .57, but with a
            shift of 1 the limit is .52.
        against: see `AbsoluteMargin`.
    """

    share: float = 0.95
    shift: float = 0.0
    kind: ClassVar[str] = "percent_of_positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")

    def limit(self, positive: float) -> float:
        return self.share * (positive + self.shift) - self.shift

    def keeps(self, value: float, positive: float) -> bool:
        lowest = min(value, positive)
        if lowest + self.shift < 0:
            raise ValueError(
                f"{self.scorer} has the score {lowest:g}: a percentage of the positive says nothing of scores below 0; "
                "use RelativeMargin or AbsoluteMargin, or a shift that lifts them (1 for cosines)"
            )
        return super().keeps(value, positive)


def drop_negatives(mined: Mined, rules: Sequence[Rule], *, keep_judged: bool = True) -> Mined:
    """Take out negatives that a rule does not keep; the first such rule is named in `dropped`.

    Positives are never taken out, nor lists: one may be left without a negative, which `counts` tells.

    Args:
        mined: see `mine`.
        rules: all have to keep a document.
        keep_judged: a judged negative stays, whatever its score.

    Raises:
        ValueError: a list has no scores of a rule's scorer at all, or scores that the rule cannot read, by query.
    """
    lists, dropped = [], {query_id: dict(documents) for query_id, documents in mined.dropped.items()}
    unfiltered = {rule: list(ids) for rule, ids in mined.unfiltered.items()}
    unscored = Counter(mined.unscored)
    for one in mined.lists:
        limits = [(rule, reference(one, rule)) for rule in rules]
        able = [(rule, positive) for rule, positive in limits if positive is not None]
        for rule, positive in limits:
            if positive is None:
                unfiltered.setdefault(rule.name, []).append(one.query_id)
        reasons = {}
        for i, gain in enumerate(one.gains):
            if gain > 0 or (one.judged[i] and keep_judged):
                continue
            kept = {rule.name: _keeps(rule, one, i, positive) for rule, positive in able}
            if False in kept.values():
                reasons[i] = next(name for name, keeps in kept.items() if keeps is False)
            else:
                unscored.update(name for name, keeps in kept.items() if keeps is None)
        if reasons:
            taken = {one.document_ids[i]: reason for i, reason in reasons.items()}
            dropped[one.query_id] = dropped.get(one.query_id, {}) | taken
        lists.append(picked(one, [i for i in range(len(one.gains)) if i not in reasons]))
    return replace(mined, lists=lists, dropped=dropped, unfiltered=unfiltered, unscored=dict(unscored))


def add_scores(mined: Mined, score: Any, *, name: str, part: int = 4096) -> Mined:
    """Fill in the scores that are missing under `name`: all for a new name, else those of what was not retrieved.

    A positive that a retriever did not find has no score of it, and a rule that compares with it cannot be used: give
    the retriever's own function of pairs here (`retrieval.evaluation.scorer` of its model).

    Args:
        mined: see `mine`.
        score: (query, document) texts to one number each; or a model with such a `predict`, like a `CrossEncoder`.
        name: of the scorer.
        part: pairs of a call.

    Raises:
        ValueError: an answer that is not one finite number a pair, or scores that are not those already there.
    """
    call: PairScorer = score.predict if hasattr(score, "predict") else score
    filled = [dict(one.scores) | {name: list(one.scores.get(name, [None] * len(one.gains)))} for one in mined.lists]
    known = [(i, j) for i, scores in enumerate(filled) for j, value in enumerate(scores[name]) if value is not None]
    missing = [(i, j) for i, scores in enumerate(filled) for j, value in enumerate(scores[name]) if value is None]
    if known and missing:
        _check_same(mined, known[:8], [filled[i][name][j] for i, j in known[:8]], call, name)
    for start in range(0, len(missing), part):
        some = missing[start : start + part]
        for (i, j), value in zip(some, _scored(mined, some, call, name), strict=True):
            filled[i][name][j] = value
    return replace(mined, lists=[replace(one, scores=s) for one, s in zip(mined.lists, filled, strict=True)])


def denoise(mined: Mined, score: Any, *, threshold: float, name: str = "cross_encoder") -> Mined:
    """Take out unjudged negatives that a cross-encoder finds relevant: s > threshold.

    RocketQA (https://arxiv.org/abs/2010.08191). Its scores stay in the lists under `name`, also as teacher scores.

    Args:
        mined: see `mine`.
        score: see `add_scores`.
        threshold: in units of the scores: `CrossEncoder.predict` gives probabilities for models of one label (RocketQA
            takes as negatives what is below .1), `retrieval.evaluation.scorer` logits.
        name: of the scores.
    """
    return drop_negatives(add_scores(mined, score, name=name), [MaxScore(name, threshold)])


@dataclass(frozen=True)
class RuleAudit:
    """What rules do to documents whose relevance is known, as if it were not.

    Args:
        positives: retrieved positives that would be taken out; the more, the better the rules know false negatives.
        negatives: judged negatives that would be taken out: the price.
    """

    positives: Rate
    negatives: Rate


def audit_rules(mined: Mined, rules: Sequence[Rule]) -> RuleAudit:
    """Hide one judgement at a time and see what the rules would do, with Wilson intervals.

    A hidden positive is compared with the other positives of its list, so that a list with only one says nothing of
    rules that compare. Positives that no retriever found could not have become false negatives, and are left out; so
    are documents that were relabelled. Queries with many positives weigh more, and documents of a query are not
    independent: the intervals are too narrow by that. Use lists on which the rules were not used yet.

    Raises:
        ValueError: as `drop_negatives`.
    """
    taken: dict[bool, list[bool]] = {True: [], False: []}
    for one in mined.lists:
        for i in _known(one):
            relevant = one.gains[i] > 0
            others = sum(gain > 0 for gain in one.gains) - 1
            if relevant and (one.added[i] or (others < 1 and any(rule.relative for rule in rules))):
                continue
            found = [(rule, reference(one, rule, without=i if relevant else None)) for rule in rules]
            kept = [_keeps(rule, one, i, positive) for rule, positive in found if positive is not None]
            taken[relevant].append(False in kept)
    return RuleAudit(*(wilson(sum(taken[side]), len(taken[side])) for side in (True, False)))


def reference(one: CandidateList, rule: Rule, *, without: int | None = None) -> float | None:
    """The positives' score that a rule compares with; None where one has none, 0 where the rule does not compare.

    Args:
        one: a list.
        rule: what it is for.
        without: place of a positive that is left out.

    Raises:
        ValueError: the list has no scores (or ranks) of the scorer.
    """
    columns = one.ranks if rule.ranked else one.scores
    if rule.scorer not in columns:
        raise ValueError(
            f"query {one.query_id} has no {'ranks' if rule.ranked else 'scores'} of {rule.scorer!r}, only of "
            f"{', '.join(map(repr, columns)) or 'nothing'}; name one of them, or use add_scores"
        )
    if not rule.relative:
        return 0.0
    scores = [one.scores[rule.scorer][i] for i, gain in enumerate(one.gains) if gain > 0 and i != without]
    known = [score for score in scores if score is not None]
    if not known or len(known) < len(scores):
        return None
    return rule.positive(known)


def _refuse_nan(score: float) -> None:
    if math.isnan(score):
        raise ValueError("score is a limit that scores are compared with, got nan")


def _keeps(rule: Rule, one: CandidateList, place: int, positive: float) -> bool | None:
    """None where the score is missing."""
    value: float | None = (one.ranks if rule.ranked else one.scores)[rule.scorer][place]
    if value is None and not rule.ranked:
        return None
    try:
        return rule.keeps(math.inf if value is None else float(value), positive)
    except ValueError as error:
        raise ValueError(f"query {one.query_id}, document {one.document_ids[place]}: {error}") from None


def _known(one: CandidateList) -> Iterator[int]:
    """Places of documents that were judged, and by no model."""
    return (i for i, judged in enumerate(one.judged) if judged and one.relabelled[i] is None)


def _scored(mined: Mined, places: list[tuple[int, int]], call: PairScorer, name: str) -> list[float]:
    found = [(mined.lists[i], j) for i, j in places]
    scores = [float(value) for value in call([(one.query, one.documents[j]) for one, j in found])]
    if len(scores) != len(places):
        raise ValueError(f"{name} gave {len(scores)} scores for {len(places)} pairs; it must give one for each")
    for (one, j), value in zip(found, scores, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"query {one.query_id}, document {one.document_ids[j]}: {name} gave the score {value}")
    return scores


def _check_same(mined: Mined, places: list[tuple[int, int]], known: Sequence[Any], call: PairScorer, name: str) -> None:
    for (i, j), old, new in zip(places, known, _scored(mined, places, call, name), strict=True):
        if abs(old - new) > SAME * max(1.0, abs(old)):
            one = mined.lists[i]
            raise ValueError(
                f"query {one.query_id}, document {one.document_ids[j]}: {name} scored it {old:g}, and this function "
                f"{new:g}; give the function of that retriever, or another name"
            )
