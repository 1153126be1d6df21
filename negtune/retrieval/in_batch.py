"""Documents that the queries of a batch share: which of them are the same, and which are no negatives of a query.

A document that is known to be relevant to a query is none of its negatives, whoever brought it into the batch. What is
known: the row's `known_positives`, its own documents with a gain, and those of rows with the same query. Batches are
those of one process: documents of other processes are not seen.

Shapes: B queries, D documents of the longest list, M documents of the batch, n document columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from negtune.data.completions import RowError
from negtune.data.retrieval import text_key
from negtune.retrieval.lists import Lists


@dataclass(frozen=True)
class SharedTexts:
    """Documents of a batch of rows.

    Attributes:
        texts: distinct ones, each as it came first.
        places: which of them each document is, lists one after another.
        known: which of them are known to be relevant to each query `[B M]`.
    """

    texts: list[str]
    places: list[int]
    known: Tensor


def share_texts(rows: Sequence[Mapping[str, Any]]) -> SharedTexts:
    """Documents with the same text, whatever its white space, are one, and so are their ids.

    Raises:
        RowError: an id has two texts: it is then the name of a place in a list and not of a document.
    """
    documents = [document for row in rows for document in row["documents"]]
    keys = [text_key(document) for document in documents]
    named = rows[0].get("document_ids") is not None
    # in a data set they may have been cast back to the numbers that they were
    ids = [str(name) for row in rows for name in row["document_ids"]] if named else keys
    first, by_id = _first_places(keys, ids)
    column = {place: i for i, place in enumerate(dict.fromkeys(first))}
    places = [column[place] for place in first]
    relevant = torch.zeros(len(rows), len(column), dtype=torch.bool)
    rest = iter(places)
    for i, row in enumerate(rows):
        for gain, place in zip(row["gains"], rest, strict=False):
            relevant[i, place] = gain > 0
        found = (by_id.get(str(name)) for name in row.get("known_positives") or ())
        relevant[i, [column[place] for place in found if place is not None]] = True
    queries = [text_key(row["query"]) for row in rows]
    return SharedTexts([documents[place] for place in column], places, _of_equal_queries(queries, relevant))


def share_columns(lists: Lists, features: Sequence[Mapping[str, Any]] | None, labels: Tensor | None = None) -> Lists:
    """The same for sentence-transformers' columns: documents of the same tokens are one, and where labels have ids
    those of the same id. Each column is embedded all the same; of equal documents the first one counts.

    Args:
        lists: of `Lists.of_labels`, document columns one after another.
        features: of the query column and of the document columns; None: not known, ids alone say what is the same.
        labels: ids `[B n+R]`, see `split_ids`.

    Raises:
        RowError: as in `share_texts`.
    """
    n_queries, n_columns = lists.documents.shape
    device = lists.documents.device
    ids: list[Any] = [None] * lists.documents.numel()
    known: list[list[int]] = [[] for _ in range(n_queries)]
    if labels is not None:
        ids = [id_ if id_ >= 0 else None for id_ in labels[:, :n_columns].T.flatten().tolist()]
        known = labels[:, n_columns:].tolist()
    columns = [None if features is None else _token_keys(column) for column in features or [None] * (n_columns + 1)]
    queries = range(n_queries) if columns[0] is None else columns[0]
    padding = (~lists.mask).T.flatten().tolist()
    keys: list[Hashable] = []
    for place, (id_, padded) in enumerate(zip(ids, padding, strict=True)):
        column, row = divmod(place, n_queries)
        tokens = columns[column + 1]
        alone = place if id_ is None else ("id", id_)
        keys.append(place if padded else alone if tokens is None else tokens[row])
    first, by_id = _first_places(keys, ids)
    documents = torch.tensor(first).view(n_columns, n_queries).T
    relevant = torch.zeros(n_queries, len(first) + 1, dtype=torch.bool)
    relevant.scatter_(-1, documents.masked_fill(~lists.relevant.cpu(), len(first)), True)
    for i, names in enumerate(known):
        relevant[i, [by_id[name] for name in names if name in by_id]] = True
    relevant = _of_equal_queries(list(queries), relevant[:, :-1])
    return replace(lists, documents=documents.to(device), known=relevant.to(device))


def split_ids(labels: Any, n_queries: int, n_columns: int) -> Tensor:
    """Gains `[B n]` of labels that hold ids `[B n+R]`: of the n documents, then of all that are known to be relevant to
    the query, -1 where there is none. The first document is the relevant one."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 2 or len(labels) != n_queries:
        raise ValueError(
            "label must be a list of whole numbers: the ids of the documents, then those of the relevant documents; "
            "negtune.retrieval.in_batch.to_columns makes them"
        )
    if labels.shape[1] < n_columns:
        raise ValueError(f"label has {labels.shape[1]} ids for {n_columns} documents; give one for each, then others")
    gains = torch.zeros(n_queries, n_columns, device=labels.device)
    gains[:, 0] = 1
    return gains.masked_fill(labels[:, :n_columns] < 0, -1)


def pooled(lists: Lists) -> Lists:
    """All documents of the batch as candidates of each query, those of others with gain 0, but for what is known to be
    relevant: that is a candidate only with a gain."""
    n_documents = int(lists.documents[lists.mask].max()) + 1 if bool(lists.mask.any()) else 1
    device = lists.gains.device
    gains = torch.zeros(len(lists.gains), n_documents + 1, device=device)
    places = lists.documents.masked_fill(~lists.mask, n_documents)
    gains.scatter_reduce_(-1, places, lists.gains.float(), "amax")  # of one document that stands twice in a list
    own = torch.zeros(gains.shape, dtype=torch.bool, device=device).scatter_(-1, places, True)[:, :-1]
    gains, present = gains[:, :-1], own.any(0).expand(own.shape)
    present = present & lists.mask.any(-1, keepdim=True)  # a row that is masked as a whole stays so
    mask = present if lists.known is None else present & ~(lists.known[:, :n_documents] & (gains <= 0))
    everywhere = torch.arange(n_documents, device=device).expand(gains.shape)
    withheld = (present & ~mask).sum(-1)
    alone = {"teacher": None, "start": None, "more": {}}
    return replace(lists, gains=gains, mask=mask, documents=everywhere, own=own & mask, withheld=withheld, **alone)


def to_columns(rows: Iterable[Mapping[str, Any]], n_negatives: int | None = None) -> list[dict[str, Any]]:
    """Rows of `data.candidates` for sentence-transformers' trainer and `RankingLoss(..., label_ids=True)`.

    Args:
        rows: each relevant document makes a record of its own, with the row's irrelevant ones.
        n_negatives: of a record, the first ones. Default: as many as the row with the most has.

    Returns:
        `query`, `positive`, `negative_1`, ..., and `label`: ids, whole numbers from 0, as `split_ids` describes them.
        What a row lacks is its positive once more, with the id -1: a copy is left out, and costs less than a sampler
        without duplicates that sees the same empty text in many rows.

    Raises:
        RowError: no row has a relevant document.
    """
    if n_negatives is not None and n_negatives < 0:
        raise ValueError(f"n_negatives must not be negative, got {n_negatives}")
    numbers: dict[str, int] = {}
    texts: dict[int, str] = {}  # as they came first: other white space may be other tokens
    records, width = [], 0

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    for row in rows:
        named = row.get("document_ids") is not None
        names = [str(name) for name in row["document_ids"]] if named else [text_key(d) for d in row["documents"]]
        sides: tuple[list, list] = ([], [])
        for name, document, gain in zip(names, row["documents"], row["gains"], strict=True):
            sides[gain > 0].append((number(name), texts.setdefault(number(name), document)))
        negatives, positives = sides
        more = [str(name) if named else text_key(name) for name in row.get("known_positives") or ()]
        known = dict.fromkeys([id_ for id_, _ in positives] + [number(name) for name in more])
        records += [(row["query"], positive, negatives, list(known)) for positive in positives]
        width = max(width, len(negatives))
    if not records:
        raise RowError("no query has a relevant document (a gain above 0) in its list; there is nothing to train on")
    width = width if n_negatives is None else n_negatives
    most = max(len(known) for *_, known in records)
    found = []
    for query, positive, negatives, known in records:
        documents = [positive, *negatives[:width], *[(-1, positive[1])] * (width - len(negatives))]
        names = ["positive", *(f"negative_{i}" for i in range(1, width + 1))]
        columns = {name: text for name, (_, text) in zip(names, documents, strict=True)}
        label = [*(id_ for id_, _ in documents), *known, *[-1] * (most - len(known))]
        found.append({"query": query, **columns, "label": label})
    return found


def _first_places(keys: Sequence[Hashable], ids: Sequence[Any]) -> tuple[list[int], dict[Any, int]]:
    """Place of the first document with the same key, for each; and of each id."""
    seen: dict[Hashable, int] = {}
    by_id: dict[Any, int] = {}
    first = [seen.setdefault(key, place) for place, key in enumerate(keys)]
    for place, id_ in zip(first, ids, strict=True):
        if id_ is not None and by_id.setdefault(id_, place) != place:
            raise RowError(
                f"in one batch, document {id_} has two texts; an id must be that of a document in the whole set, and "
                "not its place in a list, and prompts must be the same for all columns of documents"
            )
    return first, by_id


def _of_equal_queries(queries: Sequence[Hashable], relevant: Tensor) -> Tensor:
    """What is relevant to a query is so wherever the query stands."""
    numbers: dict[Hashable, int] = {}
    same = torch.tensor([numbers.setdefault(query, len(numbers)) for query in queries])
    union = torch.zeros(len(numbers), relevant.shape[1]).index_add_(0, same, relevant.float())
    return union[same] > 0


def _token_keys(features: Mapping[str, Any]) -> list[bytes] | None:
    """Tokens of each text, as bytes; None where they are laid out in another way."""
    ids, mask, offsets = (features.get(name) for name in ("input_ids", "attention_mask", "offsets"))
    if not isinstance(ids, Tensor):
        return None
    if ids.ndim == 1 and isinstance(offsets, Tensor):
        ends = [*offsets.tolist()[1:], len(ids)]
        tokens = ids.cpu().numpy()
        return [tokens[start:end].tobytes() for start, end in zip(offsets.tolist(), ends, strict=True)]
    if ids.ndim != 2 or not isinstance(mask, Tensor) or set(features) & IMAGES:
        return None
    kept = zip(ids.cpu().numpy(), mask.bool().cpu().numpy(), strict=True)
    return [tokens[keep].tobytes() for tokens, keep in kept]


IMAGES = {"pixel_values", "pixel_values_videos", "input_features"}
"""What says more than the tokens."""
