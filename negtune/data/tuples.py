"""Training data of sentence-transformers to rows of `data.candidates`: pairs, triplets, n-tuples and labelled lists.

A row is (anchor, positive), (anchor, positive, negative_1, ..., negative_n), or (query, documents, labels) with a list
of texts and one of numbers. Columns count by their order, as in sentence-transformers; a name that says that the order
is another one is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from negtune.data.candidates import checked_row
from negtune.data.completions import RowError
from negtune.data.retrieval import json_lines, text_key

logger = logging.getLogger(__name__)

FORMATS = "(anchor, positive), (anchor, positive, negative_1, ...) or (query, [documents], [labels])"


def load_tuples(path: str | Path, *, negatives_judged: bool = False) -> list[dict[str, Any]]:
    """`tuple_rows` of a file of JSON lines (also `.gz`), each an object or a list.

    Raises:
        OSError: no such file.
        RowError: by file and line.
    """
    return _rows(json_lines(Path(path).expanduser()), str(path), negatives_judged)


def tuple_rows(data: Iterable[Any], *, name: str = "train", negatives_judged: bool = False) -> list[dict[str, Any]]:
    """Rows with `query`, `documents`, `gains`, `judged` and `known_positives`.

    What any row says is relevant to a query is relevant to it in all rows (`relevance_map`): it is in their
    `known_positives`, and left out, with a warning, where it is a negative. Rows without anything relevant of their own
    are left out too.

    Args:
        data: `datasets.Dataset` or an iterable of mappings or sequences, as the top of the file describes them. None
            or an empty text in place of a negative: there is none.
        name: of the set, for messages.
        negatives_judged: somebody looked at the negatives; mined ones are only unjudged.

    Raises:
        RowError: of no known form, or a text that is empty or twice in a row, by place.
    """
    return _rows(((f"{name} row {index}", row) for index, row in enumerate(data)), name, negatives_judged)


def relevance_map(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Query to relevant documents, over all rows with `query`, `documents` and `gains`; texts by `text_key`."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        relevant = found.setdefault(text_key(row["query"]), {})
        relevant |= {text_key(d): None for d, gain in zip(row["documents"], row["gains"], strict=True) if gain > 0}
    return {query: list(documents) for query, documents in found.items()}


def _rows(records: Iterator[tuple[str, Any]], name: str, negatives_judged: bool) -> list[dict[str, Any]]:
    rows = [(where, checked_row(_lists(record, where), where)) for where, record in records]
    if not rows:
        raise RowError(f"{name} is empty; it needs at least one row")
    known = {query: sorted(found) for query, found in relevance_map(row for _, row in rows).items()}
    relevant = {query: set(found) for query, found in known.items()}
    found, withheld = [], 0
    for _, row in rows:
        query = text_key(row["query"])
        pairs = list(zip(row["documents"], row["gains"], strict=True))
        kept = [(document, gain) for document, gain in pairs if gain > 0 or text_key(document) not in relevant[query]]
        withheld += len(pairs) - len(kept)
        if not any(gain > 0 for _, gain in kept):
            continue
        documents, gains = (list(side) for side in zip(*kept, strict=True))
        judged = [gain > 0 or negatives_judged for gain in gains]
        found.append({"query": row["query"], "documents": documents, "gains": gains, "judged": judged})
        found[-1]["known_positives"] = known[query]
    if withheld:
        logger.warning("%s: %d negatives are relevant to their query by other rows and are left out", name, withheld)
    if len(found) < len(rows):
        logger.warning(
            "%s: %d of %d rows have nothing relevant and are left out", name, len(rows) - len(found), len(rows)
        )
    if not found:
        raise RowError(f"no query of {name} has a relevant document; give positives, or labels above 0")
    return found


def _lists(record: Any, where: str) -> dict[str, Any]:
    """Query, documents and gains."""
    if isinstance(record, Mapping):
        _check_names(list(record), where)
    values = list(record.values()) if isinstance(record, Mapping) else record
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise RowError(f"{where} is {type(record).__name__}; a row is {FORMATS}")
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if len(values) == 3 and all(isinstance(v, Sequence) and not isinstance(v, str) for v in values[1:]):
        query, documents, labels = values
        gains = [float(label) if isinstance(label, bool) else label for label in labels]
        return {"query": query, "documents": documents, "gains": gains}
    anchor, *texts = values or [None]
    negatives = [text for text in texts[1:] if text is not None]
    if not texts or not all(isinstance(text, str) for text in (anchor, texts[0], *negatives)):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise RowError(f"{where} has ({kinds}); a row is {FORMATS}")
    seen = {text_key(texts[0]): texts[0]}  # a negative that is the positive, or there twice, says nothing
    seen |= {key: text for text in negatives if (key := text_key(text)) and key not in seen}
    return {"query": anchor, "documents": list(seen.values()), "gains": [1.0] + [0.0] * (len(seen) - 1)}


def _check_names(names: Sequence[str], where: str) -> None:
    """Where columns are called what they are, they stand where they are read."""
    for place, name in enumerate(map(str.lower, map(str, names))):
        if name == "id" or name.endswith("_id") or name in ("qid", "docid", "pid"):
            raise RowError(f"{where}: column {names[place]!r} is no text to train on; remove it. A row is {FORMATS}")
        if len(names) == 3 and {"pos", "neg"} <= set(names):
            raise RowError(
                f"{where} has columns {', '.join(names)}; lists of positives and of negatives are given as (query, "
                "[documents], [labels])"
            )
        wrong = (place < 2 and name.startswith("neg")) or (place != 1 and name.startswith("pos"))
        if wrong or (place > 0 and name in ("anchor", "query")):
            raise RowError(
                f"{where}: column {names[place]!r} stands in place {place + 1} of {', '.join(names)}; a row is "
                f"{FORMATS}, in this order"
            )
