"""Prompts for on-policy training: a place in an endless stream names the same row everywhere, also after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class PromptSource(Protocol):
    def take(self, cursor: int, n: int) -> list[Mapping[str, Any]]:
        """`n` rows from place `cursor` on; after the last comes the first of the next pass."""
        ...


class ShuffledPrompts:
    """A data set of prompts, in another order at every pass.

    Args:
        rows: with a length.
        seed: of the orders.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self._rows, self._seed, self._order = rows, seed, (-1, torch.empty(0))

    def take(self, cursor: int, n: int) -> list[Mapping[str, Any]]:
        return [self._row(i) for i in range(cursor, cursor + n)]

    def _row(self, place: int) -> Mapping[str, Any]:
        epoch, i = divmod(place, len(self._rows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._rows), generator=generator)
        return self._rows[int(self._order[1][i])]


class StreamedPrompts:
    """A stream of prompts in its own order; it is begun again at its end.

    Args:
        rows: `datasets.IterableDataset` or another iterable that can be iterated anew.
    """

    def __init__(self, rows: Any) -> None:
        self._rows, self._place = rows, 0
        self._iterator: Iterator[Mapping[str, Any]] = iter(rows)

    def take(self, cursor: int, n: int) -> list[Mapping[str, Any]]:
        if cursor < self._place:
            self._iterator, self._place = iter(self._rows), 0
        while self._place < cursor:
            self._next()
        return [self._next() for _ in range(n)]

    def _next(self) -> Mapping[str, Any]:
        self._place += 1
        row = next(self._iterator, None)
        if row is None:
            self._iterator = iter(self._rows)
            row = next(self._iterator, None)
        if row is None:
            raise ValueError("the stream of prompts is empty")
        return row
