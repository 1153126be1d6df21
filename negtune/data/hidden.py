"""Hide known positives: a collection with the holes that real judgements have, and with the truth kept aside.

Which negatives are false can be measured only where somebody knows. So take a collection that is judged well, hide some
of what is relevant from training, and evaluate with everything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from negtune.data.retrieval import RetrievalTask

Chances = Mapping[str, Mapping[str, float]]
"""Query id to {document id: chance}."""


@dataclass(frozen=True)
class HiddenTask:
    """See `hide_positives`.

    Attributes:
        task: what training may know. Hidden documents are unjudged there, judged negatives stay.
        hidden: query id to {document id: gain} of what is hidden; a query of which nothing is has no entry.
        spared: ids of queries that would have lost their last positive.
    """

    task: RetrievalTask
    hidden: dict[str, dict[str, float]]
    spared: list[str]

    @property
    def share(self) -> float:
        """Of all positives those that are hidden."""
        hidden = sum(map(len, self.hidden.values()))
        return hidden / (hidden + sum(len(self.task.positives(query_id)) for query_id in self.task.queries))


def hide_positives(task: RetrievalTask, keep: float | Chances, *, seed: int) -> HiddenTask:
    """Each positive stays with its chance, by a draw of its own, and at least one a query.

    A positive stays where u <= chance, u a number in (0, 1] that seed, query and document decide: no draw depends on
    what else is in the task. Where none would stay the one with the smallest u / chance does, so that documents stay a
    little oftener than their chance says, the more the fewer positives a query has.

    With one seed, what is hidden at a higher chance is hidden at a lower one too: always where all chances are one
    number; where they are numbers in proportion, cut at 1, as well (a floor can break it for a query that is spared).

    Args:
        task: queries without a positive stay as they are.
        keep: one chance for all, or that of every positive; above 0, at most 1.
        seed: of the draws.

    Raises:
        ValueError: a chance that is none or is missing, by query and document.
    """
    qrels: dict[str, dict[str, float]] = {}
    hidden: dict[str, dict[str, float]] = {}
    spared = []
    for query_id, gains in task.qrels.items():
        tries = {d: _draw(seed, query_id, d) / _chance(keep, query_id, d) for d in task.positives(query_id)}
        lost = {document_id for document_id, tried in tries.items() if tried > 1}
        if lost and len(lost) == len(tries):
            lost.discard(min(lost, key=lambda document_id: (tries[document_id], document_id)))
            spared.append(query_id)
        qrels[query_id] = {document_id: gain for document_id, gain in gains.items() if document_id not in lost}
        if lost:
            hidden[query_id] = {document_id: gains[document_id] for document_id in gains if document_id in lost}
    return HiddenTask(RetrievalTask(task.corpus, task.queries, qrels), hidden, spared)


@dataclass(frozen=True)
class RankChances:
    """Chance that a document is selected for judging, by the rank (from 1) that a retriever gave it.

    min(1, max(floor, scale / rank^power)); what was not found has the floor. With power 0 all that is found has one
    chance; the larger, the more a pool is what the retriever has first.

    Args:
        scale: chance at rank 1, before it is cut; see `rank_chances`.
        power: at least 0.
        floor: smallest chance, above 0: what cannot be selected cannot be corrected for.
    """

    scale: float
    power: float = 0.5
    floor: float = 0.02

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and 0 <= self.power < math.inf and 0 < self.floor <= 1):
            raise ValueError(
                f"need finite scale and power of at least 0 and 0 < floor <= 1, got scale={self.scale}, "
                f"power={self.power}, floor={self.floor}"
            )

    def __call__(self, rank: int | None) -> float:
        """Of a document at this rank; None: not found."""
        return self.floor if rank is None else min(1.0, max(self.floor, self.scale * rank**-self.power))


def rank_chances(ranks: Iterable[int | None], share: float, *, power: float = 0.5, floor: float = 0.02) -> RankChances:
    """The chances by rank whose mean over these documents is `share`, by bisection of the scale.

    Args:
        ranks: of the documents that are to be hidden or kept, from 1, None where not found.
        share: wanted mean, to 1e-9.
        power, floor: see `RankChances`.

    Raises:
        ValueError: no document, or a share that no scale gives: below the floor, or above what is found.
    """
    known = list(ranks)
    if not known:
        raise ValueError("there is no rank to fit chances to")
    if any(rank is not None and rank < 1 for rank in known):
        raise ValueError("ranks count from 1")

    def mean(scale: float) -> float:
        chances = RankChances(scale, power, floor)
        return sum(map(chances, known)) / len(known)

    low, high = 0.0, max((rank for rank in known if rank is not None), default=1) ** power
    if not mean(low) - 1e-9 <= share <= mean(high) + 1e-9:
        raise ValueError(
            f"these ranks give mean chances of {mean(low):.3f} to {mean(high):.3f}, and share={share} is not between; "
            "lower the floor, or search deeper"
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < share else (low, middle)
    return RankChances(high, power, floor)


def _draw(seed: int, query_id: str, document_id: str) -> float:
    """In (0, 1]."""
    return 1.0 - random.Random(f"{seed} {query_id!r} {document_id!r}").random()


def _chance(keep: float | Chances, query_id: str, document_id: str) -> float:
    chance = keep if isinstance(keep, int | float) else keep.get(query_id, {}).get(document_id, math.nan)
    if not 0 < chance <= 1:
        raise ValueError(
            f"query {query_id}, document {document_id}: the chance to stay is {chance}; give one above 0 and at most 1 "
            "for every positive"
        )
    return float(chance)
