"""Which of the candidates that are left make a list: the first, random ones, or those as hard as the positives."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from negtune.data.retrieval import RetrievalTask
from negtune.retrieval.mining import CandidateList, Mined, mine, picked
from negtune.retrieval.negatives import EVERYTHING, Rule, add_scores, drop_negatives, one_of
from negtune.retrieval.retrievers import Retriever


@dataclass(frozen=True)
class SimANS:
    """Draw negatives with p ∝ exp(-a (s_n - s_p - b)^2): neither too easy nor suspiciously good.

    https://arxiv.org/abs/2210.11773. Drawn one after another without replacement. At a = 0 all are alike; the larger a,
    the nearer to s_p + b. The paper's values were not found, and both are in units of the scores: for cosines whose
    negatives spread over .1 an `a` of 100 draws mostly within .1 of s_p + b.

    Args:
        scorer: whose scores s are; every candidate of a list needs one, see `negatives.add_scores`.
        a: at least 0.
        b: distance from the positives that is best; below 0 for negatives that score less.
        against: which positive is s_p if there are several: `min`, `max` or `mean` of their scores.
    """

    scorer: str
    a: float
    b: float = 0.0
    against: str = "min"

    def __post_init__(self) -> None:
        if self.a < 0 or not math.isfinite(self.a):
            raise ValueError(f"a must be a number of at least 0, got {self.a}")
        one_of([0.0], self.against)

    def log_weight(self, score: float, positive: float) -> float:
        """-a (s_n - s_p - b)^2, the logarithm of p up to a constant."""
        return -self.a * (score - positive - self.b) ** 2


def choose(
    mined: Mined,
    n_documents: int,
    *,
    max_positives: int | None = None,
    select: str | SimANS = "top",
    by: str | None = None,
    seed: int = 0,
) -> Mined:
    """Cut lists to `n_documents`: the positives with the highest gains, then negatives, in an order that tells nothing.

    On lists of `mine(..., n_documents=EVERYTHING)` it chooses as `mine` itself does with the same settings and seed.

    Args:
        mined: see `mine`.
        n_documents: length of a list; what is shorter is named in `short`.
        max_positives: at most so many, by default all but one place. Of equal gains those come first that no judge
            relabelled, then those that were ranked higher. Positives that do not fit are named in `missing`.
        select: `top`, `random`, or `SimANS`.
        by: the scorer by whose scores `top` goes; by default the retrievers take turns by rank.
        seed: of draws and order; no list depends on others.

    Raises:
        ValueError: settings that contradict each other, or a score that is missing, by query and document.
    """
    if n_documents < 2 or (max_positives is not None and not 1 <= max_positives < n_documents):
        raise ValueError(
            f"a list needs a positive and a negative: 1 <= max_positives < n_documents, got max_positives="
            f"{max_positives}, n_documents={n_documents}"
        )
    if not isinstance(select, SimANS) and select not in ("top", "random"):
        raise ValueError(f"select={select!r} is neither 'top', 'random' nor a SimANS")
    if by is not None and select != "top":
        raise ValueError(f"by={by!r} orders select='top' only, got select={select!r}")
    lists, short, missing = [], [], {query_id: list(ids) for query_id, ids in mined.missing.items()}
    for one in mined.lists:
        order = _pool_order(one)
        positives = sorted(
            (i for i in order if one.gains[i] > 0), key=lambda i: (-one.gains[i], one.relabelled[i] is not None)
        )
        kept = positives[: max_positives or n_documents - 1]
        if len(kept) < len(positives):
            missing.setdefault(one.query_id, []).extend(one.document_ids[i] for i in positives[len(kept) :])
        negatives, wanted = [i for i in order if one.gains[i] <= 0], n_documents - len(kept)
        draw = random.Random(f"{seed} {one.query_id}")
        if isinstance(select, SimANS):
            negatives = _drawn(one, negatives, select, draw)
        elif select == "random":
            negatives = draw.sample(negatives, min(wanted, len(negatives)))
        elif by is not None:
            scores = [_score(one, i, by) for i in negatives]
            negatives = [i for _, i in sorted(zip(scores, negatives, strict=True), key=lambda pair: -pair[0])]
        places = kept + negatives[:wanted]
        draw.shuffle(places)
        if len(places) < n_documents:
            short.append(one.query_id)
        lists.append(picked(one, places))
    return replace(mined, lists=lists, short=short, missing=missing)


def mine_negatives(
    task: RetrievalTask,
    retrievers: Sequence[Retriever],
    *,
    rules: Sequence[Rule] = (),
    score: Any = None,
    scorer: str | None = None,
    n_documents: int = 16,
    max_positives: int | None = None,
    select: str | SimANS = "top",
    by: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Mined:
    """Lists whose negatives follow rules: `mine`, `add_scores`, `drop_negatives` and `choose` in one call.

    To mine again as a model changes, call it with retrievers of the new one; of a large task with parts,
    `task.only(...)`: the lists are the same.

    Args:
        task, retrievers: of `mine`.
        rules: of `drop_negatives`.
        score, scorer: function of pairs and the name under which it fills in missing scores, see `add_scores`; give
            both or none.
        n_documents, max_positives, select, by, seed: of `choose`.
        settings: others of `mine`: depth, skip, positives, drop_same_id.

    Raises:
        ValueError: as those do.
    """
    if (score is None) != (scorer is None):
        raise ValueError("score and scorer belong together: a function of pairs and the name of its scores")
    mined = mine(task, retrievers, n_documents=EVERYTHING, seed=seed, **settings)
    if scorer is not None:
        mined = add_scores(mined, score, name=scorer)
    mined = drop_negatives(mined, rules)
    return choose(mined, n_documents, max_positives=max_positives, select=select, by=by, seed=seed)


def _pool_order(one: CandidateList) -> list[int]:
    """Places in the order of `mine`: first ranks of all retrievers in turn, and so on; the rest by id."""

    def turn(place: int) -> tuple[float | int, int, str]:
        ranks = [(rank, j) for j, ranks in enumerate(one.ranks.values()) if (rank := ranks[place]) is not None]
        return (*min(ranks, default=(math.inf, 0)), one.document_ids[place])

    return sorted(range(len(one.document_ids)), key=turn)


def _drawn(one: CandidateList, negatives: Sequence[int], simans: SimANS, draw: random.Random) -> list[int]:
    """All negatives in the order drawn: log-weights plus Gumbel noise, highest first, draw without replacement."""
    scores = [_score(one, i, simans.scorer) for i, gain in enumerate(one.gains) if gain > 0]
    positive = one_of(scores, simans.against)
    keys = []
    for i in negatives:
        noise = -math.log(max(draw.expovariate(1.0), sys.float_info.min))
        keys.append((-simans.log_weight(_score(one, i, simans.scorer), positive) - noise, i))
    return [i for _, i in sorted(keys)]


def _score(one: CandidateList, place: int, scorer: str) -> float:
    value = one.scores.get(scorer, [None] * len(one.gains))[place]
    if value is None:
        raise ValueError(
            f"query {one.query_id}: document {one.document_ids[place]} has no score of {scorer!r}, and choosing by "
            "it needs all; fill them in with add_scores"
        )
    return value
