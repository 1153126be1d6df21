"""Candidate lists for training: a query, documents, and the gain of each; checked before any weight moves.

A row has `query` (text), `documents` (texts) and `gains` (numbers, one for each document; above 0 is relevant). It may
have

- `query_id` and `document_ids`, which messages then name;
- `judged`, one for each document: whether its gain is known, or 0 for want of a judgement;
- `ideal_gains` of all relevant documents of the query, also of those that the list lacks;
- `teacher_scores`, one for each document;
- `positives` that have to be in the list: texts or, beside `document_ids`, ids;
- `known_positives`, all documents known to be relevant to the query, in the list or not: texts or, beside
  `document_ids`, ids, which then have to be those of the whole set. Where the queries of a batch share their documents,
  none of these is a negative of the query;
- how each document came to be in the list: `selection_retriever`, the name of what found them, or one name for each;
  `selection_ranks` there, from 1, None where it was not found; `selection_propensity`, the chance that it is selected,
  above 0 to 1; `selection_features`, a list of numbers for each document, equally many in all rows.

Texts are compared by `retrieval.text_key`: white space makes no difference.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from negtune.data.completions import RowError
from negtune.data.mapping import convert_rows
from negtune.data.retrieval import text_key

logger = logging.getLogger(__name__)

_RULES = 5  # of this file: rows checked by other rules are not read from a cache
COUNTED = "negtune_counted"
"""Column of checked rows: whether the list says something."""
LEFT_OUT = "negtune_left_out"
"""Column of a stream's checked rows: queries that say nothing and were left out between the row before and this one."""
IDS_COMPARED = 100_000
"""Ids whose texts are compared over the rows of a set, before training; in a batch all are."""
PATIENCE = 1000
"""Queries of a stream that are left out one after another before it is told of."""
SELECTION = ("selection_retriever", "selection_ranks", "selection_propensity", "selection_features")
OPTIONAL = ("ideal_gains", "teacher_scores", "known_positives", "document_ids", *SELECTION)
"""Columns that a batch has for all of its lists or for none."""


def candidate_rows(
    data: Any,
    *,
    name: str = "train",
    k: int | None = None,
    teacher: bool = False,
    scored: bool = False,
    in_batch: bool = False,
    keep: bool = False,
    provenance: bool = False,
    in_memory: bool = False,
) -> Any:
    """Checked rows, those that say nothing left out and counted.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable of rows (mappings or dataclasses).
        name: of the set, for messages.
        k: places that count: no list may be shorter. None: any length.
        teacher: whether `teacher_scores` are needed.
        scored: a reward function or a teacher scores, and gains are not read: `gains` may be absent, and lists without
            a relevant document stay.
        in_batch: queries share the documents of a batch: keep `known_positives` and the ids that they name.
        keep: keep the other columns, for a reward function. In a stream they have the types of the first row.
        provenance: keep `judged`, False where it is not given.
        in_memory: keep the rows out of the Arrow cache on disk (private data).

    Returns:
        The same kind of data set with `query`, `documents`, `gains`, and if given `ideal_gains`, `teacher_scores` and
        what says how documents were selected. What is left out is counted in a warning, of a stream in the column
        `LEFT_OUT`.

    Raises:
        RowError: naming the query and the way out; for a stream, when the row is reached.
    """
    import datasets

    settings: dict[str, Any] = {
        "k": k,
        "teacher": teacher,
        "scored": scored,
        "in_batch": in_batch,
        "provenance": provenance,
    }
    alike = _Alike()
    streamed, left_out = isinstance(data, datasets.IterableDataset), 0

    def convert(row: Any, index: int) -> dict[str, Any]:
        row = {field.name: getattr(row, field.name) for field in fields(row)} if is_dataclass(row) else row
        checked = checked_row(row, f"{name} row {index}", **settings)
        alike(checked, f"{name} row {index}")
        others = {key: value for key, value in row.items() if key not in checked} if keep else {}
        counted = scored or any(gain > 0 for gain in checked["gains"])
        found = {**others, **checked, "row": index, COUNTED: counted}
        return {**found, LEFT_OUT: count_left_out(index, counted)} if streamed else found

    def count_left_out(index: int, counted: bool) -> int:
        nonlocal left_out
        before = left_out if index else 0  # a pass may have been broken off
        left_out = 0 if counted else before + 1
        if left_out == PATIENCE:
            logger.warning("%s: the last %d queries of the stream have no relevant document", name, PATIENCE)
        return before

    if data is None:
        raise RowError(f"the {name} set is missing: pass rows with query, documents and gains")
    rows = convert_rows(data, convert, ["candidates", _RULES, name, keep, settings], in_memory)
    if streamed:
        first = next(iter(rows), None)
        if first is None:
            raise RowError(f"the {name} stream is empty; it needs at least one row")
        return rows.cast(datasets.Dataset.from_list([first]).features).filter(lambda row: row[COUNTED])
    if len(rows) == 0:
        raise RowError(f"the {name} set is empty; it needs at least one row")
    kept = [i for i, counted in enumerate(rows[COUNTED]) if counted]
    if len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d queries have no relevant document and are left out", name, len(rows) - len(kept), len(rows)
        )
    if not kept:
        raise RowError(
            f"no {name} query has a relevant document (a gain above 0) in its list; mine with the positives added"
        )
    return rows if len(kept) == len(rows) else rows.select(kept)


class _Alike:
    """What all rows of a set have to agree on."""

    def __init__(self) -> None:
        self._given: dict[str, bool] = {}  # by the first row
        self._width: int | None = None
        self._texts: dict[str, int] = {}

    def __call__(self, row: Mapping[str, Any], where: str) -> None:
        for column in OPTIONAL:
            if self._given.setdefault(column, column in row) != (column in row):
                raise RowError(f"{where}: some rows have {column} and others not; give them in all or none")
        if "selection_features" in row:
            width = len(row["selection_features"][0])
            self._width = width if self._width is None else self._width
            if width != self._width:
                raise RowError(
                    f"{where}: {width} selection_features a document, and {self._width} in the first row; give equally "
                    "many in all rows"
                )
        for document_id, document in zip(row.get("document_ids", ()), row["documents"], strict=False):
            if document_id not in self._texts and len(self._texts) >= IDS_COMPARED:
                continue
            key = hash(text_key(document))
            if self._texts.setdefault(document_id, key) != key:
                raise RowError(
                    f"{where}: document {document_id} had another text before; beside known_positives document_ids "
                    "must be those of the whole set, and not places in a list"
                )


def checked_row(
    row: Mapping[str, Any],
    where: str,
    *,
    k: int | None = None,
    teacher: bool = False,
    scored: bool = False,
    in_batch: bool = False,
    provenance: bool = False,
) -> dict[str, Any]:
    """The columns that training reads.

    Args:
        row: see the top of the file.
        where: its place, for messages; its `query_id` is added.
        k, teacher, scored, in_batch, provenance: see `candidate_rows`.

    Raises:
        RowError: a column is missing, empty, of the wrong length or no number, an id or a text occurs twice, a positive
            is not in the list, a known one has gain 0, `ideal_gains` are not those of all, or the list is shorter than
            `k`.
    """
    where = f"{where} (query {row['query_id']})" if row.get("query_id") is not None else where
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise RowError(f"{where}: query must be a text that is not empty, got {query!r}")
    names, texts = _checked_documents(row, where)
    documents = row["documents"]
    if k is not None and len(documents) < k:
        raise RowError(
            f"{where}: k={k} is larger than its list of {len(documents)} documents; lower k, or give it more candidates"
        )
    found: dict[str, Any] = {"query": query, "documents": list(documents)}
    if row.get("gains") is None and not scored:
        raise RowError(f"{where}: gains are missing; give one number for each document, above 0 where it is relevant")
    found["gains"] = [0.0] * len(documents)
    if row.get("gains") is not None:
        found["gains"] = _gains(row["gains"], "gains", where, names)
    if row.get("ideal_gains") is not None:
        found["ideal_gains"] = _gains(row["ideal_gains"], "ideal_gains", where, None)
        _check_ideal(found["ideal_gains"], found["gains"], where)
    if teacher and row.get("teacher_scores") is None:
        raise RowError(f"{where}: teacher_scores are missing; give one number for each document, or another loss_type")
    if row.get("teacher_scores") is not None:
        found["teacher_scores"] = _numbers(row["teacher_scores"], "teacher_scores", where, names)
    ids = () if row.get("document_ids") is None else names
    _check_positives(row.get("positives") or (), {*ids, *texts}, where)
    if row.get("known_positives") is not None:
        known = _known_positives(row["known_positives"], bool(ids), where)
        if not scored:
            _check_known(known, names, names if ids else texts, found["gains"], where)
        if in_batch:
            found |= {"known_positives": known} | ({"document_ids": names} if ids else {})
    judged = {"judged": _judged(row, names, where)} if provenance else {}
    return found | judged | _selection(row, names, where)


def _known_positives(values: Any, has_ids: bool, where: str) -> list[str]:
    """As they are compared."""
    _check_length(values, "known_positives", where, None)
    return [str(value) if has_ids else text_key(str(value)) for value in values]


def _check_known(
    known: Sequence[str], names: Sequence[str], keys: Sequence[str], gains: Sequence[float], where: str
) -> None:
    """What is relevant in the list is known to be relevant, and nothing else of it; else the two say different things,
    or name documents in different ways."""
    relevant = set(known)
    for name, key, gain in zip(names, keys, gains, strict=True):
        if gain == 0 and key in relevant:
            raise RowError(
                f"{where}: document {name} has gain 0 and is among known_positives; give its gain, take it out of the "
                "list, or out of known_positives"
            )
        if gain > 0 and key not in relevant:
            raise RowError(
                f"{where}: document {name} has a gain and is not among known_positives ({_short(known)}), which are "
                "all that is relevant: ids as in document_ids where there are ids, else texts"
            )


def _selection(row: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """How documents were selected, the columns that there are; rank 0 where there is none."""
    found: dict[str, Any] = {}
    retriever, ranks, propensity, features = (row.get(column) for column in SELECTION)
    if retriever is not None:
        named = [retriever] * len(names) if isinstance(retriever, str) else retriever
        _check_length(named, "selection_retriever", where, len(names))
        for name, value in zip(names, named, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise RowError(f"{where}: selection_retriever of document {name} is {value!r}; give a name")
        found["selection_retriever"] = list(named)
    if ranks is not None:
        _check_length(ranks, "selection_ranks", where, len(names))
        for name, value in zip(names, ranks, strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise RowError(
                    f"{where}: selection_ranks of document {name} is {value!r}; ranks are whole numbers from 1, None "
                    "where it was not found"
                )
        found["selection_ranks"] = [0 if value is None else int(value) for value in ranks]
    if propensity is not None:
        found["selection_propensity"] = _numbers(propensity, "selection_propensity", where, names)
        for name, value in zip(names, found["selection_propensity"], strict=True):
            if not 0 < value <= 1:
                raise RowError(
                    f"{where}: selection_propensity of document {name} is {value:g}; it is a chance, above 0 and at "
                    "most 1: what cannot be selected cannot be corrected for"
                )
    if features is not None:
        _check_length(features, "selection_features", where, len(names))
        found["selection_features"] = [
            _numbers(values, f"selection_features of document {name}", where, None)
            for name, values in zip(names, features, strict=True)
        ]
        widths = [len(values) for values in found["selection_features"]]
        if min(widths) == 0 or min(widths) != max(widths):
            place = next((i for i, width in enumerate(widths) if width != widths[0]), 0)
            raise RowError(
                f"{where}: selection_features of document {names[place]} are {widths[place]} numbers, those of "
                f"document {names[0]} {widths[0]}; give equally many for each, at least one"
            )
    return found


def _checked_documents(row: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """What messages call the documents (by id, else by place from 0), and the texts to compare them by."""
    documents, ids = row.get("documents"), row.get("document_ids")
    if isinstance(documents, str) or not isinstance(documents, Sequence) or not documents:
        raise RowError(f"{where}: documents must be a list of texts, got {_short(documents)}")
    for column in ("document_ids", "judged"):
        if row.get(column) is not None:
            _check_length(row[column], column, where, len(documents))
    names = [str(name) for name in (range(len(documents)) if ids is None else ids)]
    for name, document in zip(names, documents, strict=True):
        if not isinstance(document, str) or not document.strip():
            raise RowError(f"{where}: document {name} is no text or empty ({document!r}); take it out of the list")
    _refuse_twice(names, [f"{place} ({name})" for place, name in enumerate(names)], "have the same id", where)
    texts = [text_key(document) for document in documents]
    _refuse_twice(texts, names, "are the same text and would share its probability", where)
    return names, texts


def _judged(row: Mapping[str, Any], names: Sequence[str], where: str) -> list[bool]:
    judged = [False] * len(names) if row.get("judged") is None else row["judged"]
    for name, known in zip(names, judged, strict=True):
        if known not in (True, False):
            raise RowError(f"{where}: judged of document {name} is {known!r}; say True or False")
    return [bool(known) for known in judged]


def _refuse_twice(values: Sequence[str], names: Sequence[str], problem: str, where: str) -> None:
    first: dict[str, int] = {}
    for place, value in enumerate(values):
        earlier = first.setdefault(value, place)
        if earlier != place:
            raise RowError(f"{where}: documents {names[earlier]} and {names[place]} {problem}; keep one of them")


def _check_ideal(ideal: Sequence[float], gains: Sequence[float], where: str) -> None:
    """A list that is better than the ideal would earn more than the whole reward."""
    best = sorted(ideal, reverse=True)
    for place, gain in enumerate(sorted((gain for gain in gains if gain > 0), reverse=True)):
        if place >= len(best) or best[place] < gain:
            raise RowError(
                f"{where}: its list has a gain of {gain:g} that ideal_gains lack; give those of all relevant "
                "documents, the list's among them, or leave ideal_gains out"
            )


def _check_positives(positives: Sequence[Any], present: set[str], where: str) -> None:
    for positive in positives:
        if str(positive) not in present and text_key(str(positive)) not in present:
            raise RowError(
                f"{where}: its positive {_short(positive)} is not among its documents; add it (mine with "
                "positives='guaranteed'), or drop the query, or give ideal_gains and leave positives out to train on "
                "what was retrieved"
            )


def _gains(values: Any, column: str, where: str, names: Sequence[str] | None) -> list[float]:
    numbers = _numbers(values, column, where, names)
    if any(number < 0 for number in numbers):
        place = next(i for i, number in enumerate(numbers) if number < 0)
        of = "" if names is None else f" for document {names[place]}"
        raise RowError(f"{where}: {column} must not be negative, got {numbers[place]:g}{of}; 0 is not relevant")
    return numbers


def _numbers(values: Any, column: str, where: str, names: Sequence[str] | None) -> list[float]:
    """Finite numbers, one for each of the names if there are any."""
    _check_length(values, column, where, None if names is None else len(names))
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            of = "" if names is None or names[place] == str(place) else f" of document {names[place]}"
            raise RowError(f"{where}: {column}[{place}]{of} is {value!r}, which is no finite number")
    return [float(value) for value in values]


def _check_length(values: Any, column: str, where: str, length: int | None) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RowError(f"{where}: {column} must be a list, got {_short(values)}")
    if length is not None and len(values) != length:
        raise RowError(f"{where}: {length} documents and {len(values)} {column}; give one for each document")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
