"""Rollouts, or verdicts on them, in a folder: appended, never rewritten, and on the disk before anyone is told so.

Every writing process has its own files, `<name>-<process>-<number>.jsonl`. A line that a crash cut short is repaired by
the next writer; what is in the store is never drawn or scored again. Except failures: a record with `final: false` is
kept until one with the same key takes its place.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from negtune.records import RecordError, append_jsonl, stream_jsonl


class StoreError(OSError):
    """The store cannot be read or written; the message says why, and what to do."""


class RecordStore:
    """Records with a `key`, in shards.

    Args:
        folder: made if missing.
        name: of the shards, for instance `rollouts` or `verdicts`.
        process_index: of this writer. Two writers of one index are refused.
        shard_records: records after which a new file is begun.
    """

    def __init__(
        self, folder: str | os.PathLike, name: str = "rollouts", *, process_index: int = 0, shard_records: int = 10_000
    ) -> None:
        if shard_records < 1:
            raise ValueError(f"shard_records must be positive, got {shard_records}")
        self.folder, self.name = Path(folder), name
        self._process, self._shard_records = process_index, shard_records
        self._keys: dict[str, bool] | None = None
        self._lock: int | None = None
        self._current: tuple[Path, int] | None = None

    def shards(self) -> list[Path]:
        """Files of the store, in the order in which they are read."""
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, one at a time, one of every key: the final one, or the first of those that are not."""
        final, seen = self._index(), set[str]()
        for path in self.shards():
            for record in stream_jsonl(path):
                key = _key_of(record, path)
                if key not in seen and (_is_final(record) or not final.get(key)):
                    seen.add(key)
                    yield record

    def __contains__(self, key: str) -> bool:
        """Whether there is a final record of this key."""
        return self._index().get(key, False)

    def __len__(self) -> int:
        """How many keys there are, final or not."""
        return len(self._index())

    def keys(self) -> set[str]:
        """All keys, final or not."""
        return set(self._index())

    def _index(self) -> dict[str, bool]:
        """Every key, and whether its record is final. Read from the files once; what others append is not seen."""
        if self._keys is None:
            self._keys = {}
            for path in self.shards():
                for record in stream_jsonl(path):
                    key = _key_of(record, path)
                    self._keys[key] = self._keys.get(key, False) or _is_final(record)
        return self._keys

    def append(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Write those without a final record yet, and wait until they are on the disk. Returns how many those were.

        Raises:
            StoreError: another process writes as this one, or the disk is full. What was there before is unharmed.
        """
        self._become_writer()
        new: dict[str, Mapping[str, Any]] = {}
        for record in records:
            key = _key_of(record, self.folder)
            if key not in self:
                new.setdefault(key, record)
        left = list(new.items())
        while left:
            path, room = self._shard_with_room()
            part, left = left[:room], left[room:]
            self._write(path, [record for _, record in part])
            self._current = (path, room - len(part))
            self._index().update((key, _is_final(record)) for key, record in part)
        return len(new)

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RecordStore:
        """Become the writer before anything is drawn that another one draws as well."""
        self._become_writer()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _become_writer(self) -> None:
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / f".{self.name}-{self._process:05d}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(
                f"{self.folder}: another process writes {self.name} with process index {self._process}; wait for it, "
                "or give each process its own index"
            ) from error
        self._lock, self._keys = lock, None  # another writer may have added to what was read before

    def _shard_with_room(self) -> tuple[Path, int]:
        if self._current is not None and self._current[1] > 0:
            return self._current
        own = sorted(self.folder.glob(f"{self.name}-{self._process:05d}-*.jsonl"))
        if own and self._current is None:
            room = self._shard_records - sum(1 for _ in stream_jsonl(own[-1]))
            if room > 0:
                return own[-1], room
        number = int(own[-1].stem.rpartition("-")[2]) + 1 if own else 0
        return self.folder / f"{self.name}-{self._process:05d}-{number:05d}.jsonl", self._shard_records

    def _write(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        before = path.stat().st_size if path.exists() else 0
        try:
            append_jsonl(path, records, sync=True)
        except OSError as error:
            if path.exists() and path.stat().st_size > before:
                os.truncate(path, before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    error.errno,
                    f"{path}: the disk is full; {len(records)} records were not written, all earlier ones are safe. "
                    "Make room and run the same command again",
                ) from error
            raise


def _is_final(record: Mapping[str, Any]) -> bool:
    return record.get("final", True)


def _key_of(record: Mapping[str, Any], path: Path) -> str:
    key = record.get("key")
    if not isinstance(key, str) or not key:
        raise RecordError(f"{path}: a record without key; this folder was not written by a store")
    return key
