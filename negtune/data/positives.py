"""Queries and what answers them in an index: rows for training the query side alone; checked before any weight moves.

A row has `query` (text) and `positives`, the documents that answer it: ids of the index (texts) or positions in it
(numbers). It may have `gains`, one above 0 for each of them (default: 1), `excluded`, documents that are never to be
found for the query (ids that the index lacks are not anyway), and `query_id`, which messages then name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

from negtune.data.candidates import COUNTED, LEFT_OUT
from negtune.data.completions import RowError
from negtune.data.mapping import convert_rows
from negtune.data.retrieval import RetrievalTask, duplicate_documents

_RULES = 1  # of this file: rows checked by other rules are not read from a cache


def task_rows(task: RetrievalTask, *, drop_same_id: bool = False) -> list[dict[str, Any]]:
    """Rows of all queries of a task: its relevant documents and their gains.

    A document with the text of a relevant one, itself not judged relevant, would be a false negative: it is `excluded`.

    Args:
        task: queries, judgements and texts.
        drop_same_id: exclude the document that has the query's id too, as collections whose queries are documents need.
    """
    twins = {document_id: set(group) for group in duplicate_documents(task) for document_id in group}
    rows = []
    for query_id, query in task.queries.items():
        gains = task.positives(query_id)
        excluded = set().union(*(twins.get(document_id, ()) for document_id in gains))
        if drop_same_id:
            gains.pop(query_id, None)
            excluded |= {query_id} & task.corpus.keys()
        row = {"query_id": query_id, "query": query, "positives": list(gains), "gains": list(gains.values())}
        rows.append({**row, "excluded": sorted(excluded - gains.keys())})
    return rows


def positive_rows(
    data: Any, places: Mapping[str, int], *, name: str = "train", index: str = "", in_memory: bool = False
) -> Any:
    """Checked rows.

    Args:
        data: a `RetrievalTask`, a `datasets.Dataset`, a `datasets.IterableDataset`, or an iterable of rows (mappings or
            dataclasses).
        places: document id to position in the index, which has no other documents.
        name: of the set, for messages.
        index: what tells the index from another, for the name of the Arrow cache.
        in_memory: keep the rows out of that cache (private data).

    Returns:
        The same kind of data set with `query`, `documents` (positions in the index), `gains` (0: excluded), `row`.

    Raises:
        RowError: naming the query and the way out; for a stream, when the row is reached.
    """
    import datasets

    streamed = isinstance(data, datasets.IterableDataset)

    def convert(row: Any, number: int) -> dict[str, Any]:
        row = {field.name: getattr(row, field.name) for field in fields(row)} if is_dataclass(row) else row
        checked = checked_positives(row, f"{name} row {number}", places)
        return {**checked, "row": number, COUNTED: True, **({LEFT_OUT: 0} if streamed else {})}

    if data is None:
        raise RowError(f"the {name} set is missing: pass a RetrievalTask, or rows with query and positives")
    data = task_rows(data) if isinstance(data, RetrievalTask) else data
    rows = convert_rows(data, convert, ["positives", _RULES, name, index], in_memory)
    if streamed:
        first = next(iter(rows), None)
        if first is None:
            raise RowError(f"the {name} stream is empty; it needs at least one row")
        return rows.cast(datasets.Dataset.from_list([first]).features)
    if len(rows) == 0:
        raise RowError(f"the {name} set is empty; it needs at least one row")
    return rows


def checked_positives(row: Mapping[str, Any], where: str, places: Mapping[str, int]) -> dict[str, Any]:
    """`query`, `documents` and `gains` of one row.

    Args:
        row: see the top of the file.
        where: its place, for messages; its `query_id` is added.
        places: see `positive_rows`.

    Raises:
        RowError: no query or no positive, a document that the index lacks, one that comes twice, a gain that is not
            above 0, or as many gains as there are not positives.
    """
    where = f"{where} (query {row['query_id']})" if row.get("query_id") is not None else where
    query, positives = row.get("query"), row.get("positives")
    if not isinstance(query, str) or not query.strip():
        raise RowError(f"{where}: query must be a text that is not empty, got {query!r}")
    if isinstance(positives, str) or (positives is not None and not isinstance(positives, Sequence)):
        raise RowError(f"{where}: positives must be a list of ids or positions, got {positives!r}")
    if positives is None and "documents" in row:
        raise RowError(
            f"{where} is a candidate list; here documents are searched for: give query and positives, their ids or "
            "positions in the index, or a RetrievalTask"
        )
    if not positives:
        raise RowError(f"{where} has no positive: nothing says what its search should find; drop the query")
    gains = [1.0] * len(positives) if row.get("gains") is None else list(row["gains"])
    if len(gains) != len(positives):
        raise RowError(f"{where}: {len(positives)} positives and {len(gains)} gains; give one for each")
    for document, gain in zip(positives, gains, strict=True):
        if isinstance(gain, bool) or not isinstance(gain, Real) or not 0 < gain < math.inf:
            raise RowError(
                f"{where}: the gain of its positive {document!r} is {gain!r}; it must be above 0 and finite, or the "
                "document is no positive"
            )
    excluded = [one for one in row.get("excluded") or [] if not isinstance(one, str) or one in places]
    documents = [_place(document, where, places) for document in [*positives, *excluded]]
    for number, document in enumerate(documents):
        if document in documents[:number]:
            name = [*positives, *excluded][number]
            raise RowError(f"{where}: document {name!r} comes twice in positives and excluded; keep one of them")
    return {"query": query, "documents": documents, "gains": [*map(float, gains), *[0.0] * len(excluded)]}


def _place(document: Any, where: str, places: Mapping[str, int]) -> int:
    if isinstance(document, str):
        if document not in places:
            raise RowError(f"{where}: document {document!r} is not in the index; add its vector, or drop the document")
        return places[document]
    if isinstance(document, bool) or not isinstance(document, int) or not 0 <= document < len(places):
        raise RowError(
            f"{where}: {document!r} is no document; give an id (a text), or a position from 0 to {len(places) - 1}"
        )
    return document
