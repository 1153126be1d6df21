"""Fill a store with rollouts, and another with verdicts on them: in parts, each on the disk before the next begins.

Whatever is killed in between goes on where it was: what the store has is neither drawn nor scored again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from negtune.records import strict
from negtune.rollouts.sampler import Rollout, Sampler, SamplingParams, requests_for, share_of
from negtune.rollouts.store import RecordStore
from negtune.verifiers.verdict import Verdict, Verifier, stop_if_unscored, verdicts_of

Item = TypeVar("Item")
RECENT = 1000
"""Verdicts from which the share of unscored ones is taken."""
Progress = Callable[[int, int, int], None]
"""Told after every part: completions done, of how many, and the tokens that were drawn for this part."""


def generate(
    store: RecordStore,
    sampler: Sampler,
    rows: Sequence[Mapping[str, Any]],
    n: int,
    params: SamplingParams,
    *,
    part: int = 64,
    process_index: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> int:
    """Draw `n` completions for the `prompt` of every row, except those that the store has; returns how many were drawn.

    A completion that the engine failed to give is kept as such, and drawn again by the next call.

    Args:
        store: gets one record per rollout, the row's other columns under `columns`.
        sampler: draws.
        rows: `prompt`, optionally `prefix`, and any columns that a verifier will want.
        n: completions of each row.
        params: of the draw.
        part: completions between two writes.
        process_index, processes: this process draws its share.
        progress: see `Progress`.

    Raises:
        ValueError: a row's other columns are not what they were when its completions were drawn; names the row.
    """
    prefixes = [row.get("prefix") or "" for row in rows]
    requests = requests_for([row["prompt"] for row in rows], n, prefixes)
    owners = [row for row in rows for _ in range(n)]
    if len(store):
        _refuse_changed_columns(store, {r.key(params, sampler.policy): i // n for i, r in enumerate(requests)}, rows)
    mine = share_of(list(zip(requests, owners, strict=True)), process_index, processes)
    missing = [pair for pair in mine if pair[0].key(params, sampler.policy) not in store]
    done, drawn = len(mine) - len(missing), 0
    for some in in_parts(missing, part):
        rollouts = sampler.draw([request for request, _ in some], params)
        store.append([rollout_record(rollout, row) for rollout, (_, row) in zip(rollouts, some, strict=True)])
        done, drawn = done + len(some), drawn + len(some)
        if progress is not None:
            progress(done, len(mine), sum(len(r.completion_ids) for r in rollouts))
    return drawn


def verify(
    rollouts: RecordStore,
    verdicts: RecordStore,
    verifier: Verifier,
    *,
    name: str,
    part: int = 64,
    max_unscored: float = 0.2,
    as_chat: bool = False,
    process_index: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> int:
    """Score every rollout that has no verdict of `name` yet; returns how many were scored.

    Completions that were cut at their length, or that an engine failed to draw, are unscored: whether they would have
    been right is not known. What the verifier failed on is unscored too, and scored again by the next call.

    Args:
        rollouts, verdicts: read from, written to.
        verifier: scores.
        name: of the verifier with its settings; part of the verdicts' keys, so that another one scores again.
        part: completions between two writes.
        max_unscored: share of completions that the verifier may fail on, before `TooManyUnscored` is raised. Cut ones
            do not count.
        as_chat: hand completions over as chat messages.
        process_index, processes: this process scores its share of what all have drawn; wait for them before.
        progress: see `Progress`.

    Raises:
        ValueError: the verifier cannot use a row, for instance its gold answer; names the prompt.
        TooManyUnscored: see `max_unscored`.
    """
    total = len(range(process_index, len(rollouts), processes))
    done = scored = 0
    seen: list[Verdict] = []
    for some in in_parts(islice(rollouts, process_index, None, processes), part):
        new = [record for record in some if f"{record['key']}:{name}" not in verdicts]
        records, found = score(new, verifier, name=name, as_chat=as_chat)
        seen = [*seen, *found][-RECENT:]
        verdicts.append(records)
        done, scored = done + len(some), scored + len(new)
        if progress is not None:
            progress(done, total, 0)
        stop_if_unscored(seen, max_unscored)
    return scored


def score(
    rollouts: Sequence[Mapping[str, Any]], verifier: Verifier, *, name: str, as_chat: bool = False
) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """One verdict record per rollout record, and the verdicts that the verifier gave: cut ones it never sees."""
    fit = [record for record in rollouts if record["finish_reason"] == "stop"]
    found = _verify(verifier, fit, as_chat)
    by_key = dict(zip((record["key"] for record in fit), found, strict=True))
    return [_verdict_record(record, name, by_key.get(record["key"])) for record in rollouts], found


def _ids(records: Sequence[Mapping[str, Any]]) -> list[list[int]] | None:
    """Of whole completions; None where a prefix was given as text."""
    if any("completion_ids" not in r or (r["prefix"] and isinstance(r["prefix"], str)) for r in records):
        return None
    return [[*(record["prefix"] or ()), *record["completion_ids"]] for record in records]


def _verify(verifier: Verifier, records: Sequence[Mapping[str, Any]], as_chat: bool) -> list[Verdict]:
    if not records:
        return []
    texts = [record.get("prefix_text", record["prefix"]) + record["text"] for record in records]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if as_chat else texts
    names = dict.fromkeys(name for record in records for name in record.get("columns") or ())
    columns = {name: [(record.get("columns") or {}).get(name) for record in records] for name in names}
    try:
        return verdicts_of(verifier, [record["prompt"] for record in records], completions, _ids(records), columns)
    except ValueError as error:
        if len(records) == 1:
            raise ValueError(f"rollout {records[0]['key']} of {str(records[0]['prompt'])[:200]!r}: {error}") from error
        for record in records:  # which of them it is
            _verify(verifier, [record], as_chat)
        raise


def rollout_record(rollout: Rollout, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a store keeps: the rollout, the other columns of its row, and whether it need not be drawn again."""
    return {**vars(rollout), "columns": rollout_columns(row), "final": rollout.finish_reason != "error"}


def rollout_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what a request is made of: what a verifier may want to know."""
    return {name: strict(value) for name, value in row.items() if name not in ("prompt", "prefix")}


def _refuse_changed_columns(store: RecordStore, row_of: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    for record in store:
        row = row_of.get(record["key"])
        if row is None:
            continue
        now, then = rollout_columns(rows[row]), record.get("columns", {})
        changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"row {row + 1}: {name} is {now.get(name)!r}, but was {then.get(name)!r} when {store.folder} was "
                "filled, and its verdicts are on that; draw into another store"
            )


def _verdict_record(rollout: Mapping[str, Any], name: str, verdict: Verdict | None) -> dict[str, Any]:
    """`verdict` None: not given to the verifier."""
    cut = rollout["finish_reason"] == "length"
    if verdict is None:
        verdict = Verdict("unscored", reason="cut at its length" if cut else rollout.get("error", ""))
    final = cut or verdict.outcome != "unscored"
    key = f"{rollout['key']}:{name}"
    return {"key": key, "rollout": rollout["key"], "verifier": name, **vars(verdict), "final": final}


def launched_processes() -> tuple[int, int]:
    """This process's index, and how many there are, as `accelerate launch` and `torchrun` say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`, the last one shorter."""
    if size < 1:
        raise ValueError(f"need at least 1 item at a time, got {size}")
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
