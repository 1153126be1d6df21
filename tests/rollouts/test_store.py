"""A store of records: appended, crash-safe, never twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from negtune.records import RecordError, TornLineWarning
from negtune.rollouts.store import RecordStore, StoreError


def records(*numbers: int) -> list[dict]:
    return [{"key": f"{i:04d}", "text": f"row {i}"} for i in numbers]


def test_records_come_back_in_order_over_several_shards(tmp_path):
    with RecordStore(tmp_path, shard_records=3) as store:
        assert store.append(records(*range(8))) == 8
        assert [len(p.read_text().splitlines()) for p in store.shards()] == [3, 3, 2]
    again = RecordStore(tmp_path, shard_records=3)
    assert list(again) == records(*range(8))
    with again:
        again.append(records(8, 9))
    assert [len(p.read_text().splitlines()) for p in again.shards()] == [3, 3, 3, 1]


def test_what_is_there_is_not_written_again(tmp_path):
    with RecordStore(tmp_path) as store:
        assert store.append(records(1, 2, 2)) == 2
        assert store.append(records(2, 3)) == 1
    with RecordStore(tmp_path, process_index=1) as other:
        assert other.append(records(3, 4)) == 1
        assert "0001" in other
        assert len(other) == 4
    assert [r["key"] for r in RecordStore(tmp_path)] == ["0001", "0002", "0003", "0004"]


def test_a_torn_last_line_is_cut_off_and_drawn_again(tmp_path):
    with RecordStore(tmp_path) as store:
        store.append(records(1, 2))
        path = store.shards()[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    store = RecordStore(tmp_path)
    with pytest.warns(TornLineWarning):
        assert store.keys() == {"0001"}
    with store, pytest.warns(TornLineWarning):
        store.append(records(2))
    assert path.read_bytes() == whole


def test_a_corrupt_line_in_the_middle_is_named(tmp_path):
    with RecordStore(tmp_path) as store:
        store.append(records(1, 2, 3))
        path = store.shards()[0]
    path.write_text(path.read_text().replace('"row 2"', '"row 2'))
    with pytest.raises(RecordError, match=r"rollouts-00000-00000.jsonl, line 2"):
        RecordStore(tmp_path).keys()


def test_a_file_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "rollouts-00000-00000.jsonl").write_text('{"text": "no key"}\n')
    with pytest.raises(RecordError, match="without key"):
        len(RecordStore(tmp_path))


def test_two_writers_of_one_index_are_refused(tmp_path):
    with RecordStore(tmp_path) as first:
        first.append(records(1))
        with pytest.raises(StoreError, match="another process writes"):
            RecordStore(tmp_path).append(records(2))
    RecordStore(tmp_path).append(records(2))


def test_a_failure_is_kept_until_something_final_takes_its_place(tmp_path):
    failed = {"key": "0001", "text": "engine died", "final": False}
    with RecordStore(tmp_path) as store:
        assert store.append([failed, *records(2)]) == 2
        assert "0001" not in store
        assert len(store) == 2
    assert list(RecordStore(tmp_path)) == [failed, *records(2)]
    with RecordStore(tmp_path, process_index=1) as other:
        assert other.append([failed]) == 1  # it failed again
        assert other.append(records(1)) == 1
        assert other.append([failed]) == other.append(records(1)) == 0
        assert "0001" in other
    assert sorted(RecordStore(tmp_path), key=lambda r: r["key"]) == records(1, 2)
    assert len(RecordStore(tmp_path)) == 2


def test_a_second_writer_is_refused_before_it_has_done_anything_and_knows_what_the_first_one_wrote(tmp_path):
    late = RecordStore(tmp_path)
    assert len(late) == 0
    with RecordStore(tmp_path) as first:
        with pytest.raises(StoreError, match="another process writes"), late:
            pass
        first.append(records(1))
    with late:
        assert "0001" in late


FILL_THE_DISK = """
import resource, signal, sys
from negtune.rollouts.store import RecordStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writing on gives EFBIG, as a full disk gives ENOSPC
store = RecordStore(sys.argv[1])
for i in range(100):
    try:
        store.append([{"key": f"{i:04d}", "text": "x" * 100}])
    except OSError as error:
        print(i, type(error).__name__)
        break
"""


def test_a_write_that_fails_half_way_leaves_whole_lines_only(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    written = int(out.stdout.split()[0])
    assert 0 < written < 100
    store = RecordStore(tmp_path)
    assert len(store) == written  # and no warning of a torn line
    with store:
        store.append([{"key": f"{written:04d}"}])
    assert len(RecordStore(tmp_path)) == written + 1


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch):
    with RecordStore(tmp_path) as store:
        store.append(records(1))

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="the disk is full; 1 records were not written"):
            store.append(records(2))
        monkeypatch.undo()
        assert store.append(records(2)) == 1
    assert [r["key"] for r in RecordStore(tmp_path)] == ["0001", "0002"]


KILLED_WRITER = """
import os, sys
from negtune.rollouts.store import RecordStore
store = RecordStore(sys.argv[1], shard_records=50)
for i in range(len(store), 100000):
    store.append([{"key": f"{i:06d}", "text": "x" * (i % 977)}])
    print(i, flush=True)
"""


def test_nothing_reported_as_written_is_lost_to_kill_nine(tmp_path):
    """Killed five times in mid-writing: what it said it had written is there, once."""
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        reported = [int(writer.stdout.readline()) for _ in range(40)]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        keys = [r["key"] for r in RecordStore(tmp_path)]
        assert len(keys) == len(set(keys))
        assert set(range(reported[-1] + 1)) <= set(map(int, keys))


def test_reading_takes_memory_of_one_record_not_of_the_store(tmp_path):
    with RecordStore(tmp_path) as store:
        for start in range(0, 2000, 500):
            store.append([{"key": str(i), "text": "x" * 5000} for i in range(start, start + 500)])
    assert sum(p.stat().st_size for p in Path(tmp_path).glob("*.jsonl")) > 10_000_000
    tracemalloc.start()
    assert sum(len(r["text"]) for r in RecordStore(tmp_path)) == 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
