"""Batches under a token budget: rows of similar length together, drawn anew every epoch, as many in each.

A *unit* is what may not be torn apart: a row, a pair, or all pairs of one prompt. Units are sorted by size into
buckets; each epoch shuffles the units within every bucket, cuts them into batches, and shuffles the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

SPREAD = 1.1
"""Largest over smallest size in a bucket: the most that padding costs, unless a batch reaches into the next bucket."""


def longest_first(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokenised rows from the longest to the shortest, those with one prompt kept together behind their longest.

    So batches of neighbours are padded little, run out of memory early, and share their prompts.
    """
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    return sorted(range(len(rows)), key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i]))


class TokenBudgetBatches(Sampler[list[int]]):
    """A batch sampler. A draw is a pure function of (seed, epoch), so that a resumed run goes on where it was.

    Args:
        units: row numbers that belong together.
        sizes: tokens each unit costs in a batch.
        budget: most tokens of one batch: number of units times the largest of their sizes. A unit that is larger is a
            batch of its own.
        seed: of the draws.
        processes: the number of batches is made a multiple of it, by halving large ones, so that every process has the
            same number of steps.
    """

    batch_size = None  # accelerate: batches have no fixed size

    def __init__(
        self, units: Sequence[Sequence[int]], sizes: Sequence[int], budget: int, *, seed: int, processes: int = 1
    ) -> None:
        if len(units) != len(sizes) or not units:
            raise ValueError(f"every unit needs a size, got {len(units)} units and {len(sizes)} sizes")
        self.units, self.sizes, self.budget, self.seed, self.epoch = units, sizes, budget, seed, 0
        self.buckets = _buckets(sizes)
        self.cuts = _cuts([sizes[bucket[0]] for bucket in self.buckets for _ in bucket], budget)
        _make_divisible(self.cuts, processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = [unit for bucket in self.buckets for unit in _shuffled(bucket, generator)]
        for number in torch.randperm(len(self.cuts), generator=generator).tolist():
            start, stop = self.cuts[number]
            yield [row for unit in order[start:stop] for row in self.units[unit]]


def _buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Units from the largest to the smallest, in runs whose first is at most `SPREAD` times as large as their last."""
    buckets: list[list[int]] = []
    for unit in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not buckets or sizes[unit] * SPREAD < sizes[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(unit)
    return buckets


def _cuts(largest: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Where batches start and stop among the units in bucket order; `largest` is the size each of them may have."""
    cuts, start = [], 0
    while start < len(largest):
        stop = min(len(largest), start + max(1, budget // largest[start]))
        cuts.append((start, stop))
        start = stop
    return cuts


def _make_divisible(cuts: list[tuple[int, int]], processes: int) -> None:
    """Halve the batches with most units until their number is a multiple of `processes`."""
    while len(cuts) % processes:
        most = max(range(len(cuts)), key=lambda i: cuts[i][1] - cuts[i][0])
        start, stop = cuts[most]
        if stop - start < 2:
            raise ValueError(
                f"{len(cuts)} batches of one unit each cannot be shared by {processes} processes; use fewer processes "
                "or more rows"
            )
        middle = (start + stop) // 2
        cuts[most : most + 1] = [(start, middle), (middle, stop)]


def _shuffled(items: Sequence[int], generator: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
