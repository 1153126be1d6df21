"""Lists of candidate documents to train a ranker on, from the ranks of any retrievers.

A list holds positives and negatives in an order that tells nothing. Of every document it says whether it was judged,
since most negatives are only unjudged; where each retriever ranked it; and whether it is there only because it is
relevant, as no retriever found it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from negtune.data.retrieval import RetrievalTask, duplicate_documents, text_key
from negtune.records import RecordError, read_jsonl, write_jsonl
from negtune.retrieval.retrievers import Retriever


@dataclass(frozen=True)
class CandidateList:
    """One query and its candidates; every list below has one entry for each document.

    Attributes:
        query_id, query: of the task.
        document_ids, documents: ids and texts.
        gains: of the judgements, 0 where there is none.
        judged: False where the gain is 0 for want of a judgement.
        ranks: retriever name to ranks from 1, None where it did not find the document.
        scores: the same for its scores, and for those of `retrieval.negatives.add_scores`, which have no ranks.
        added: positives that no retriever found.
        ideal_gains: of all relevant documents of the query, in the list or not, highest first.
        relabelled: `verdict:judge` where gain and judgement are those of `retrieval.relabel`, else None.
    """

    query_id: str
    query: str
    document_ids: list[str]
    documents: list[str]
    gains: list[float]
    judged: list[bool]
    ranks: dict[str, list[int | None]]
    scores: dict[str, list[float | None]]
    added: list[bool]
    ideal_gains: list[float]
    relabelled: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.relabelled:
            object.__setattr__(self, "relabelled", [None] * len(self.document_ids))

    @property
    def guaranteed(self) -> bool:
        """Whether a positive was put in that no retriever found: figures on such lists are not those of a search."""
        return any(self.added)


@dataclass(frozen=True)
class Mined:
    """The lists, and what did not get into them.

    Attributes:
        lists: in the order of the task's queries.
        without_positive: ids of queries that have no list, since it would hold no positive.
        missing: query id to positives that are in no list: not retrieved, without text, or beyond `max_positives`.
        duplicates: query id to documents left out because a positive or an earlier candidate has the same text.
        short: ids of queries whose list has fewer than `n_documents`.
        dropped: query id to {document: what took it out}, by the steps after `mine` (`retrieval.negatives`,
            `retrieval.relabel`).
        unfiltered: rule to ids of queries whose list it left as it was, since a positive's score was missing.
        unscored: rule to how many negatives it left in, since their scores were missing.
    """

    lists: list[CandidateList]
    without_positive: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)
    unfiltered: dict[str, list[str]] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many there are of each, for a log; what only later steps do is there where they did it."""
        reasons = Counter(reason for documents in self.dropped.values() for reason in documents.values())
        verdicts = Counter(said for one in self.lists for said in one.relabelled if said is not None)
        later = {
            **{f"dropped/{reason}": number for reason, number in sorted(reasons.items())},
            **{f"unfiltered_lists/{rule}": len(ids) for rule, ids in self.unfiltered.items()},
            **{f"unscored_negatives/{rule}": number for rule, number in self.unscored.items()},
            **{f"relabelled/{said}": number for said, number in sorted(verdicts.items())},
        }
        without = sum(all(gain > 0 for gain in one.gains) for one in self.lists)
        return {
            "lists": len(self.lists),
            "lists_with_added_positives": sum(one.guaranteed for one in self.lists),
            "queries_without_positive": len(self.without_positive),
            "positives_missing": sum(map(len, self.missing.values())),
            "duplicates_left_out": sum(map(len, self.duplicates.values())),
            "short_lists": len(self.short),
            "negatives": sum(gain == 0 for one in self.lists for gain in one.gains),
            "negatives_judged": sum(
                gain == 0 and known for one in self.lists for gain, known in zip(one.gains, one.judged, strict=True)
            ),
            **({"lists_without_negative": without} if without else {}),
            **later,
        }


def mine(
    task: RetrievalTask,
    retrievers: Sequence[Retriever],
    *,
    depth: int = 100,
    skip: int = 0,
    n_documents: int = 16,
    positives: str = "retrieved",
    max_positives: int | None = None,
    select: str = "top",
    drop_same_id: bool = False,
    seed: int = 0,
) -> Mined:
    """A list of candidates for every query.

    The retrievers' documents are pooled: all first ranks, all second ranks, and so on. Equal texts are in a list once,
    and never as a negative if they are a positive's. The order in a list is random, so that places tell nothing.

    All ranks are held at a time. Of a large task mine parts, `task.only(...)`: no list depends on the other queries.

    Args:
        task: queries, judgements and texts.
        retrievers: at least one, with different names.
        depth: ranks asked of each.
        skip: documents that a retriever has among its first so many are no negatives; positives are.
        n_documents: length of a list; what positives leave is filled with negatives, as far as there are any.
        positives: `retrieved`, those in the pool only; or `guaranteed`, the others too, marked as added.
        max_positives: at most so many in a list, highest gains first; by default all but one place.
        select: `top`, the first negatives of the pool; or `random` ones.
        drop_same_id: leave out the document that has the query's id, as collections whose queries are documents need.
        seed: of random negatives and of the order.

    Raises:
        ValueError: settings that contradict each other, or a retriever that found a document which the task lacks.
    """
    _check_settings(retrievers, depth, skip, n_documents, positives, max_positives, select)
    found = [_ranked(retriever, task, depth) for retriever in retrievers]
    mined = Mined([])
    for query_id in task.queries:
        pool = _pool([ranked.get(query_id, {}) for ranked in found])
        if drop_same_id:
            pool.pop(query_id, None)
        texts = _Texts(task.corpus)
        relevant = _positives(task, query_id, pool, texts, guaranteed=positives == "guaranteed", drop=drop_same_id)
        chosen = relevant[: max_positives or n_documents - 1]
        negatives = [
            document_id
            for document_id, hits in pool.items()
            if task.qrels[query_id].get(document_id, 0) <= 0
            and min(rank for rank, _ in hits.values()) > skip
            and texts.new(document_id)
        ]
        if absent := [d for d in task.positives(query_id) if d not in chosen and d not in texts.duplicates]:
            mined.missing[query_id] = absent
        if texts.duplicates:
            mined.duplicates[query_id] = texts.duplicates
        if not chosen:
            mined.without_positive.append(query_id)
            continue
        draw, wanted = random.Random(f"{seed} {query_id}"), n_documents - len(chosen)
        if select == "random":
            negatives = draw.sample(negatives, min(wanted, len(negatives)))
        document_ids = chosen + negatives[:wanted]
        draw.shuffle(document_ids)
        if len(document_ids) < n_documents:
            mined.short.append(query_id)
        mined.lists.append(_candidate_list(task, query_id, document_ids, pool, [one.name for one in retrievers]))
    return mined


def picked(one: CandidateList, places: Sequence[int]) -> CandidateList:
    """The list with the documents at these places (from 0) only, in the order given."""
    columns = ("document_ids", "documents", "gains", "judged", "added", "relabelled")
    return replace(
        one,
        **{name: [getattr(one, name)[i] for i in places] for name in columns},
        ranks={name: [values[i] for i in places] for name, values in one.ranks.items()},
        scores={name: [values[i] for i in places] for name, values in one.scores.items()},
    )


def write_lists(path: str | Path, lists: Iterable[CandidateList]) -> None:
    """One JSON line a list, atomically: a reader sees the old file or the new one."""
    write_jsonl(path, lists)


def read_lists(path: str | Path) -> list[CandidateList]:
    """What `write_lists` wrote. Raises `RecordError` for a line that is no candidate list, by file and place."""
    lists = []
    for number, record in enumerate(read_jsonl(path), 1):
        try:
            lists.append(CandidateList(**record))
        except TypeError as error:
            raise RecordError(f"{path}, list {number} is no candidate list ({error}); mine it again") from None
    return lists


def to_rows(
    lists: Mined | Iterable[CandidateList], *, task: RetrievalTask | None = None, selected_by: str | None = None
) -> list[dict[str, Any]]:
    """Rows to train on, as `data.candidates` describes and checks them.

    Args:
        lists: from `mine` and the steps behind it.
        task: gives each row `known_positives`, which are no negatives where documents of a batch are shared: all
            relevant documents of the query, also those in no list, but for what a judge has found irrelevant; of a
            `Mined` also what a rule or a judge took out; and documents with the text of any of these.
        selected_by: name of the retriever whose ranks become `selection_ranks`. Default: none.

    Raises:
        ValueError: a list was not mined with that retriever, or is of a query or a document that the task lacks.
    """
    names = ("query_id", "query", "document_ids", "documents", "gains", "judged", "ideal_gains")
    twins = {} if task is None else {d: group for group in duplicate_documents(task) for d in group}
    dropped, lists = (lists.dropped, lists.lists) if isinstance(lists, Mined) else ({}, lists)
    rows = []
    for one in lists:
        row = {name: getattr(one, name) for name in names}
        if task is not None:
            row["known_positives"] = _known_positives(one, task, twins, dropped.get(one.query_id, ()))
        if selected_by is not None:
            if selected_by not in one.ranks:
                raise ValueError(
                    f"the list of query {one.query_id} has no ranks of {selected_by}; it was mined with "
                    f"{', '.join(one.ranks)}"
                )
            row |= {"selection_retriever": selected_by, "selection_ranks": one.ranks[selected_by]}
        rows.append(row)
    return rows


def _known_positives(
    one: CandidateList, task: RetrievalTask, twins: Mapping[str, Sequence[str]], dropped: Iterable[str]
) -> list[str]:
    if one.query_id not in task.queries:
        raise ValueError(f"the task lacks query {one.query_id} of the lists; give the task they were mined for")
    listed = dict(zip(one.document_ids, one.gains, strict=True))
    relevant = [d for d in task.positives(one.query_id) if listed.get(d, 1.0) > 0]
    relevant += [d for d, gain in listed.items() if gain > 0]
    known = dict.fromkeys(twin for d in [*relevant, *dropped] for twin in twins.get(d, [d]))
    return [d for d in known if listed.get(d, 1.0) > 0]


Hits = dict[int, tuple[int, float]]
"""Place of the retriever to (rank from 1, score)."""


class _Texts:
    """Remembers which texts were seen, and which documents came too late."""

    def __init__(self, corpus: Mapping[str, str]) -> None:
        self._corpus, self._seen = corpus, set[str]()
        self.duplicates: list[str] = []

    def new(self, document_id: str) -> bool:
        """Whether the document has a text, and one that was not there yet."""
        key = text_key(self._corpus[document_id])
        if key in self._seen:
            self.duplicates.append(document_id)
        if not key or key in self._seen:
            return False
        self._seen.add(key)
        return True


def _check_settings(
    retrievers: Sequence[Retriever],
    depth: int,
    skip: int,
    n_documents: int,
    positives: str,
    max_positives: int | None,
    select: str,
) -> None:
    names = [retriever.name for retriever in retrievers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"mine needs at least one retriever, each with its own name, got {names}")
    if not 0 <= skip < depth:
        raise ValueError(f"need 0 <= skip < depth, got skip={skip}, depth={depth}")
    if n_documents < 2 or (max_positives is not None and not 1 <= max_positives < n_documents):
        raise ValueError(
            f"a list needs a positive and a negative: 1 <= max_positives < n_documents, got max_positives="
            f"{max_positives}, n_documents={n_documents}"
        )
    if positives not in ("retrieved", "guaranteed"):
        raise ValueError(f"positives={positives!r} is neither 'retrieved' nor 'guaranteed'")
    if select not in ("top", "random"):
        raise ValueError(f"select={select!r} is neither 'top' nor 'random'")


def _ranked(retriever: Retriever, task: RetrievalTask, depth: int) -> dict[str, dict[str, tuple[int, float]]]:
    run = retriever.retrieve(task.queries, depth)
    for query_id, documents in run.items():
        for document_id in documents:
            if document_id not in task.corpus:
                raise ValueError(
                    f"{retriever.name} found document {document_id} for query {query_id}, which the corpus lacks; "
                    "give both the same corpus"
                )
    return {
        query_id: {d: (rank, score) for rank, (d, score) in enumerate(list(documents.items())[:depth], 1)}
        for query_id, documents in run.items()
    }


def _pool(found: Sequence[Mapping[str, tuple[int, float]]]) -> dict[str, Hits]:
    """Documents in turn: rank 1 of each retriever, rank 2 of each, and so on."""
    turns = sorted(
        (hit[0], place, document_id) for place, hits in enumerate(found) for document_id, hit in hits.items()
    )
    ordered = dict.fromkeys(document_id for _, _, document_id in turns)
    return {d: {place: hits[d] for place, hits in enumerate(found) if d in hits} for d in ordered}


def _positives(
    task: RetrievalTask, query_id: str, pool: Mapping[str, Hits], texts: _Texts, *, guaranteed: bool, drop: bool
) -> list[str]:
    """Positives that may enter the list, highest gains first, then retrieved ones in the order of the pool.

    All texts of positives are taken from here on, also of those that stay out: none may come in as a negative.
    """
    gains, places = task.positives(query_id), {document_id: i for i, document_id in enumerate(pool)}
    ordered = sorted(gains, key=lambda d: (-gains[d], places.get(d, len(places))))
    allowed = [d for d in ordered if (guaranteed or d in pool) and not (drop and d == query_id)]
    kept = [document_id for document_id in allowed if texts.new(document_id)]
    for document_id in ordered:
        if document_id not in allowed:
            texts.new(document_id)
    return kept


def _candidate_list(
    task: RetrievalTask, query_id: str, document_ids: list[str], pool: Mapping[str, Hits], names: Sequence[str]
) -> CandidateList:
    qrels, nowhere = task.qrels[query_id], (None, None)
    hits = {
        name: [pool.get(document_id, {}).get(place, nowhere) for document_id in document_ids]
        for place, name in enumerate(names)
    }
    return CandidateList(
        query_id=query_id,
        query=task.queries[query_id],
        document_ids=document_ids,
        documents=[task.corpus[document_id] for document_id in document_ids],
        gains=[qrels.get(document_id, 0.0) for document_id in document_ids],
        judged=[document_id in qrels for document_id in document_ids],
        ranks={name: [rank for rank, _ in found] for name, found in hits.items()},
        scores={name: [score for _, score in found] for name, found in hits.items()},
        added=[document_id not in pool for document_id in document_ids],
        ideal_gains=sorted(task.positives(query_id).values(), reverse=True),
    )
