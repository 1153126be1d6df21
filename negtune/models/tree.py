"""Rows that share a prefix, packed so that each shared token is computed once, with exact values and gradients.

Sorted rows share their longest common prefix with the row before them, so the prefix trie needs no pointers: a row
adds the tokens behind that prefix, in depth-first order. A token's descendants then lie directly behind it, up to
`ends`, and "attends to its ancestors" is one comparison: query q sees key k where `k <= q < ends[k]`. Positions are
depths, so that a packed token sees what it would see in its own row.

Shapes: B rows, T tokens of the longest row, P packed sequences, L their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ATTENTION_WEIGHT = 1.25
"""Seconds of one attention FLOP over seconds of one FLOP of a linear layer (SmolLM2-135M on a CPU, widths to 2048)."""


@dataclass(frozen=True)
class Cost:
    """Estimated work of a forward pass: `sequences * width * (per_token + per_pair * width)`.

    Args:
        per_token: FLOPs of the linear layers for one token.
        per_pair: FLOPs of attention for one query and one key, weighted with `ATTENTION_WEIGHT`.
    """

    per_token: float
    per_pair: float

    def of(self, sequences: int, width: int) -> float:
        return sequences * width * (self.per_token + self.per_pair * width)


@dataclass(frozen=True)
class PackedTrees:
    """Prefix trees of a batch, one after the other in `P` sequences.

    Args:
        input_ids: tokens, each shared one once; 0 where a sequence is shorter than `L`.
        position_ids: depth of each token in its tree.
        ends: index behind the last descendant of each token, in its own sequence.
        sequences: the packed sequence in which each original row lies.
        places: where token t of row b lies in that sequence; -1 behind the row's end.
        tokens: packed tokens, fillers not counted.
    """

    input_ids: Int[Tensor, "P L"]
    position_ids: Int[Tensor, "P L"]
    ends: Int[Tensor, "P L"]
    sequences: Int[Tensor, " B"]
    places: Int[Tensor, "B T"]
    tokens: int

    def mask(self) -> Bool[Tensor, "P 1 L L"]:
        """True where query (third axis) may attend to key (fourth axis). Fillers attend to themselves."""
        index = torch.arange(self.input_ids.shape[1], device=self.ends.device)
        key_before_query = index[None, :] <= index[:, None]
        query_below_key = index[:, None] < self.ends[:, None, None, :]
        return key_before_query & query_below_key

    def block_mask(self) -> Any:
        """The same as a FlexAttention `BlockMask`, never written out."""
        from torch.nn.attention.flex_attention import create_block_mask

        ends, (sequences, width) = self.ends, self.input_ids.shape

        # a lambda, which no import hook wraps: torch counts its arguments
        attends = lambda batch, head, query, key: (key <= query) & (query < ends[batch, key])  # noqa: E731

        return create_block_mask(attends, sequences, None, width, width, device=str(ends.device))

    def to(self, device: torch.device) -> PackedTrees:
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "ends")}
        moved |= {name: getattr(self, name).to(device) for name in ("sequences", "places")}
        return PackedTrees(**moved, tokens=self.tokens)


def pack_trees(rows: Sequence[Sequence[int]], cost: Cost, *, budget: int | None = None) -> PackedTrees:
    """Pack token rows; prefixes are shared on token ids, up to the whole row.

    Args:
        rows: token ids, at least one each.
        cost: decides into how many sequences the sorted rows are cut: fewer keep more prefixes together, more keep
            attention short.
        budget: most tokens of one packed sequence (`L`); at least the longest row is always allowed. None: no limit.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    lengths = [len(rows[i]) for i in order]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for at, i in enumerate(order):
        tokens[at, : lengths[at]] = torch.as_tensor(rows[i], dtype=torch.long)
    shared = _shared_prefixes(tokens, lengths)
    cuts, width = _cheapest_cuts(lengths, shared, cost, budget)
    packed = torch.zeros(3, len(cuts), width, dtype=torch.long)
    sequences = torch.empty(len(rows), dtype=torch.long)
    places = torch.full(tokens.shape, -1)
    total = 0
    for number, (start, stop) in enumerate(cuts):
        inside = slice(start, stop)
        first_alone = [0, *shared[start + 1 : stop]]
        *columns, where = _lay_out(tokens[inside], lengths[inside], first_alone)
        used = len(columns[0])
        packed[:, number, :used] = torch.stack(columns)
        packed[2, number, used:] = torch.arange(used + 1, width + 1)
        original = torch.tensor(order[inside])
        sequences[original], places[original] = number, where
        total += used
    return PackedTrees(packed[0], packed[1], packed[2], sequences, places, total)


def _shared_prefixes(tokens: Tensor, lengths: Sequence[int]) -> list[int]:
    """Length of the prefix that each sorted row shares with the one before it; 0 for the first."""
    same = (tokens[1:] == tokens[:-1]).long().cumprod(-1).sum(-1).tolist()
    return [0, *(min(n, a, b) for n, a, b in zip(same, lengths[:-1], lengths[1:], strict=True))]


def _lay_out(tokens: Tensor, lengths: Sequence[int], shared: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, positions and ends of one packed sequence, and the places `[rows T]` of each row's tokens in it."""
    size = sum(length - prefix for length, prefix in zip(lengths, shared, strict=True))
    ids, positions, ends = (torch.empty(size, dtype=torch.long) for _ in range(3))
    places = torch.full(tokens.shape, -1)
    path, offset = torch.empty(0, dtype=torch.long), 0
    for row, (length, prefix) in enumerate(zip(lengths, shared, strict=True)):
        ends[path[prefix:]] = offset
        own = slice(offset, offset + length - prefix)
        ids[own] = tokens[row, prefix:length]
        positions[own] = torch.arange(prefix, length)
        path = torch.cat([path[:prefix], torch.arange(own.start, own.stop)])
        places[row, :length] = path
        offset = own.stop
    ends[path] = offset
    return ids, positions, ends, places


def _cheapest_cuts(
    lengths: Sequence[int], shared: Sequence[int], cost: Cost, budget: int | None
) -> tuple[list[tuple[int, int]], int]:
    """Runs of sorted rows that become one packed sequence each, and the width of the widest.

    Every width that some run of rows fills exactly is worth trying; a few, spread over the possible ones, are tried.
    """
    longest, total = max(lengths), sum(n - s for n, s in zip(lengths, shared, strict=True))
    most = total if budget is None else max(longest, min(total, budget))
    widths = sorted({round(longest * (most / longest) ** (step / 24)) for step in range(25)})
    best: tuple[float, list[tuple[int, int]], int] | None = None
    for limit in widths:
        cuts, width = _cut(lengths, shared, limit)
        work = cost.of(len(cuts), width)
        if best is None or work < best[0]:
            best = (work, cuts, width)
    assert best is not None
    return best[1], best[2]


def _cut(lengths: Sequence[int], shared: Sequence[int], limit: int) -> tuple[list[tuple[int, int]], int]:
    """As few runs as possible of at most `limit` packed tokens, and the width of the widest."""
    cuts, start, size, width = [], 0, 0, 0
    for row, (length, prefix) in enumerate(zip(lengths, shared, strict=True)):
        if row > start and size + length - prefix > limit:
            cuts.append((start, row))
            start, size = row, 0
        size += length - (prefix if row > start else 0)
        width = max(width, size)
    return [*cuts, (start, len(lengths))], width


def row_tokens(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Token ids of each row of a collated batch without its padding."""
    starts = batch["attention_mask"].argmax(-1).tolist()
    lengths = (batch["prompt_lengths"] + batch["completion_lengths"]).tolist()
    ids = batch["input_ids"].tolist()
    return [row[start : start + length] for row, start, length in zip(ids, starts, lengths, strict=True)]
