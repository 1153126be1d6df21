"""Data sets to tokenised rows, with a cache that is named by content."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

Overlong = Literal["truncate", "drop", "error"]
"""What to do with a row that is longer than max_length: cut its completion, leave the row out, or refuse."""


def convert_rows(
    data: Any, convert: Callable[[Mapping[str, Any], int], dict[str, Any]], settings: list[Any], in_memory: bool
) -> Any:
    """`convert(row, index)` of every row, whatever holds the rows.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable (the result is then a `Dataset`).
        convert: to the new columns; the old ones are left out.
        settings: everything that decides the result, for the name of the cache.
        in_memory: keep a `Dataset`'s result out of the Arrow cache on disk.
    """
    import datasets

    if isinstance(data, datasets.IterableDataset):
        columns = list(data.column_names or next(iter(data), ()))
        return data.map(convert, with_indices=True, remove_columns=columns)
    if isinstance(data, datasets.Dataset):
        return _map_cached(data, convert, settings, in_memory)
    return datasets.Dataset.from_list([convert(row, index) for index, row in enumerate(data)])


def _map_cached(data: Any, convert: Callable[..., Any], settings: list[Any], in_memory: bool) -> Any:
    """`data.map`, its cache named by content: left alone, `datasets` pickles the function and all that it reaches."""
    name = hashlib.sha256(repr([data._fingerprint, *settings]).encode()).hexdigest()[:16]
    return data.map(
        convert,
        with_indices=True,
        remove_columns=data.column_names,
        new_fingerprint=name,
        keep_in_memory=in_memory,
        load_from_cache_file=not in_memory,
        desc="Tokenizing",
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Everything that decides token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content}|{tokenizer.chat_template}|{tokenizer.eos_token_id}".encode()).hexdigest()


def room(row: Mapping[str, Any], max_length: int | None) -> int:
    """Completion tokens that fit behind this prompt."""
    return sys.maxsize if max_length is None else max_length - len(row["prompt_ids"])
