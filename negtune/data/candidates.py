"""Candidate lists for training: a query, documents, and the gain of each; checked before any weight moves.

A row has `query` (text), `documents` (texts) and `gains` (numbers, one for each document; above 0 is relevant). It may
have `query_id` (for messages), `ideal_gains` (of all judged documents, also those the list lacks), `teacher_scores` (one
for each document), `positives` (texts or, beside `document_ids`, ids that have to be in the list).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from negtune.data.completions import RowError
from negtune.data.mapping import convert_rows

logger = logging.getLogger(__name__)


def candidate_rows(
    data: Any,
    *,
    name: str = "train",
    k: int | None = None,
    teacher: bool = False,
    scored: bool = False,
    keep: bool = False,
) -> Any:
    """Checked rows, those that say nothing left out and counted.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable of rows (mappings or dataclasses).
        name: of the set, for messages.
        k: places that count: no list may be shorter. None: any length.
        teacher: whether `teacher_scores` are needed.
        scored: a reward function scores rankings: `gains` may be absent, and lists without a relevant document stay.
        keep: keep the other columns, for a reward function.

    Returns:
        The same kind of data set with `query`, `documents`, `gains`, and `ideal_gains` and `teacher_scores` if given.

    Raises:
        RowError: naming the query and the way out; for a stream, when the row is reached.
    """
    import datasets

    def convert(row: Any, index: int) -> dict[str, Any]:
        row = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
        checked = checked_row(row, f"{name} row {index}", k=k, teacher=teacher, scored=scored)
        others = {key: value for key, value in row.items() if key not in checked} if keep else {}
        counted = scored or any(gain > 0 for gain in checked["gains"])
        return {**others, **checked, "row": index, "counted": counted}

    if data is None:
        raise RowError(f"the {name} set is missing: pass rows with query, documents and gains")
    rows = convert_rows(data, convert, ["candidates", name, k, teacher, scored, keep], False)
    if isinstance(rows, datasets.IterableDataset):
        first = next(iter(rows), None)
        if first is None:
            raise RowError(f"the {name} stream is empty; it needs at least one row")
        return rows.cast(datasets.Dataset.from_list([first]).features).filter(lambda row: row["counted"])
    if len(rows) == 0:
        raise RowError(f"the {name} set is empty; it needs at least one row")
    kept = [i for i, counted in enumerate(rows["counted"]) if counted]
    if len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d queries have no relevant document and are left out", name, len(rows) - len(kept), len(rows)
        )
    if not kept:
        raise RowError(
            f"no {name} query has a relevant document (a gain above 0) in its list; mine with the positives added"
        )
    return rows if len(kept) == len(rows) else rows.select(kept)


def checked_row(
    row: Mapping[str, Any], where: str, *, k: int | None = None, teacher: bool = False, scored: bool = False
) -> dict[str, Any]:
    """The columns that training reads.

    Args:
        row: see the top of the file.
        where: its place, for messages; its `query_id` is added.
        k, teacher, scored: see `candidate_rows`.

    Raises:
        RowError: a column is missing, empty, of the wrong length or no number, a document occurs twice, a positive is
            not in the list, or the list is shorter than `k`.
    """
    where = f"{where} (query {row['query_id']})" if row.get("query_id") is not None else where
    query, documents = row.get("query"), row.get("documents")
    if not isinstance(query, str) or not query.strip():
        raise RowError(f"{where}: query must be a text that is not empty, got {query!r}")
    if isinstance(documents, str) or not isinstance(documents, Sequence) or not documents:
        raise RowError(f"{where}: documents must be a list of texts, got {_short(documents)}")
    for place, document in enumerate(documents):
        if not isinstance(document, str) or not document.strip():
            raise RowError(f"{where}: document {place} is no text or empty ({document!r}); take it out of the list")
    _refuse_twice(documents, where)
    if k is not None and len(documents) < k:
        raise RowError(
            f"{where}: k={k} is larger than its list of {len(documents)} documents; lower k, or give it more candidates"
        )
    found: dict[str, Any] = {"query": query, "documents": list(documents)}
    if row.get("gains") is None and not scored:
        raise RowError(f"{where}: gains are missing; give one number for each document, above 0 where it is relevant")
    found["gains"] = _numbers(row.get("gains") or [0.0] * len(documents), "gains", where, len(documents))
    if any(gain < 0 for gain in found["gains"]):
        raise RowError(f"{where}: gains must not be negative, got {min(found['gains']):g}; 0 is not relevant")
    if row.get("ideal_gains") is not None:
        found["ideal_gains"] = _numbers(row["ideal_gains"], "ideal_gains", where, None)
    if teacher and row.get("teacher_scores") is None:
        raise RowError(f"{where}: teacher_scores are missing; give one number for each document, or another loss_type")
    if row.get("teacher_scores") is not None:
        found["teacher_scores"] = _numbers(row["teacher_scores"], "teacher_scores", where, len(documents))
    _check_positives(row, documents, where)
    return found


def _refuse_twice(documents: Sequence[str], where: str) -> None:
    first: dict[str, int] = {}
    for place, document in enumerate(documents):
        if document in first:
            raise RowError(
                f"{where}: documents {first[document]} and {place} are the same text and would share its probability; "
                "keep one of them"
            )
        first[document] = place


def _check_positives(row: Mapping[str, Any], documents: Sequence[str], where: str) -> None:
    present = {*documents, *(row.get("document_ids") or ())}
    for positive in row.get("positives") or ():
        if positive not in present:
            raise RowError(
                f"{where}: its positive {_short(positive)} is not among its documents; add it, or drop the query, or "
                "give ideal_gains and leave positives out to train on what was retrieved"
            )


def _numbers(values: Any, column: str, where: str, length: int | None) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RowError(f"{where}: {column} must be a list of numbers, got {_short(values)}")
    if length is not None and len(values) != length:
        raise RowError(f"{where}: {length} documents and {len(values)} {column}; give one for each document")
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RowError(f"{where}: {column}[{place}] is {value!r}, which is no finite number")
    return [float(value) for value in values]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
