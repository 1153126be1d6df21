"""Rollouts, or verdicts on them, in a folder: appended, never rewritten, and on the disk before anyone is told so.

Every writing process has its own files, `<name>-<process>-<number>.jsonl`. A line that a crash cut short is repaired by
the next writer; what is in the store is never drawn or scored again.
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
        self._keys: set[str] | None = None
        self._lock: int | None = None
        self._current: tuple[Path, int] | None = None

    def shards(self) -> list[Path]:
        """Files of the store, in the order in which they are read."""
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, one at a time; a key that occurs twice is given once."""
        seen: set[str] = set()
        for path in self.shards():
            for record in stream_jsonl(path):
                key = _key_of(record, path)
                if key not in seen:
                    seen.add(key)
                    yield record

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> set[str]:
        """Keys of all records. Read from the files once; what others append afterwards is not seen."""
        if self._keys is None:
            self._keys = {_key_of(record, path) for path in self.shards() for record in stream_jsonl(path)}
        return self._keys

    def append(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Write those whose key is new, and wait until they are on the disk. Returns how many were new.

        Raises:
            StoreError: another process writes as this one, or the disk is full. What was there before is unharmed.
        """
        new: dict[str, Mapping[str, Any]] = {}
        for record in records:
            key = _key_of(record, self.folder)
            if key not in self.keys():
                new.setdefault(key, record)
        if not new:
            return 0
        self._become_writer()
        left = list(new.items())
        while left:
            path, room = self._shard_with_room()
            part, left = left[:room], left[room:]
            self._write(path, [record for _, record in part])
            self._current = (path, room - len(part))
            self.keys().update(key for key, _ in part)
        return len(new)

    def close(self) -> None:
        """Let another process write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RecordStore:
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
        self._lock = lock

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


def _key_of(record: Mapping[str, Any], path: Path) -> str:
    key = record.get("key")
    if not isinstance(key, str) or not key:
        raise RecordError(f"{path}: a record without key; this folder was not written by a store")
    return key
