"""JSON that survives a crash: append-only lines, atomic whole files, strict numbers.

Whoever reads a run folder may do so while it is being written, or after the writer was killed. A line counts once its
newline is on disk; a torn last line is dropped with a `TornLineWarning` on reading and cut off before the next append.
NaN and infinity, which JSON does not have, are written as null.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A file that is not the JSON it should be; the message names the file and the line."""


class TornLineWarning(UserWarning):
    """The last line of a file was cut short by a crash and is left out."""


def append_jsonl(path: str | Path, records: Iterable[Any], *, sync: bool = False) -> None:
    """Append one line per record, all in one write; the file is created if missing.

    Args:
        path: file to extend. A torn last line is cut off first.
        records: mappings or dataclasses.
        sync: wait until the lines are on the disk, so that they survive a power cut and not only a killed process.
    """
    lines = "".join(_line(record) for record in records).encode()
    new = not Path(path).exists()
    with open(path, "a+b") as file:
        _cut_torn_line(file, Path(path))
        file.write(lines)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    if sync and new:  # or the file itself may be missing after a power cut
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_jsonl(path: str | Path, records: Iterable[Any]) -> None:
    """Write one line per record, atomically: readers see the old file or the new one, never half of it."""
    _replace(Path(path), "".join(_line(record) for record in records))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All records of a JSONL file (also `.gz`), in order.

    Returns:
        one mapping per line; blank lines are skipped, a torn last line is dropped with a `TornLineWarning`.

    Raises:
        RecordError: a line that ends with a newline is not a JSON object.
    """
    return list(stream_jsonl(path))


def stream_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of `read_jsonl` one at a time, so that memory does not grow with the file."""
    path = Path(path)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _object(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise RecordError(f"{path}, line {number}: {error}; repair or delete that line") from error
                warnings.warn(
                    f"{path}, line {number}: the last line is torn and was left out", TornLineWarning, stacklevel=2
                )


def write_text(path: str | Path, text: str) -> None:
    """Write one text file, atomically."""
    _replace(Path(path), text)


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON file, atomically."""
    _replace(Path(path), json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON file. Raises `RecordError` naming the file and the place if it is not JSON."""
    try:
        return _loads(Path(path).read_bytes())
    except ValueError as error:
        raise RecordError(f"{path}: {error}; restore or delete the file") from error


def strict(value: Any) -> Any:
    """`value` in the types of strict JSON.

    NaN and infinity become None; numpy and torch numbers and arrays become numbers and lists; dataclasses become
    mappings; tuples become lists; paths become text. Anything else is left for `json` to refuse.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return strict(asdict(value))
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    return value


def _line(record: Any) -> str:
    return json.dumps(strict(record), ensure_ascii=False, allow_nan=False) + "\n"


def _loads(data: bytes) -> Any:
    return json.loads(data, parse_constant=lambda name: None)  # files of other tools may hold NaN


def _object(line: bytes) -> dict[str, Any]:
    value = _loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _cut_torn_line(file: Any, path: Path) -> None:
    """Leave the end of `file` just behind a newline: finish a whole last line, cut off a torn one."""
    end = file.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and b"\n" not in tail:
        step = min(start, 2**16)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return
    try:
        _object(tail)
    except ValueError:
        warnings.warn(f"{path}: the last line was torn and is cut off", TornLineWarning, stacklevel=3)
        file.truncate(end - len(tail))
    else:
        file.write(b"\n")


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, flush to disk, then rename over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
