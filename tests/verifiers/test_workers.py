"""A function that raises, hangs, crashes or allocates 10 GB costs its own item and no other."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from negtune.verifiers.workers import Failed, WorkerPool


@pytest.fixture
def misbehave(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # workers inherit sys.path
    import misbehaving

    return misbehaving.misbehave


FAULTS = {
    "raise": "RuntimeError: out of order",
    "hang": "time limit: 1 s",
    "spin": "time limit: 1 s",
    "memory": "MemoryError",
    "exit": "exit code 3",
    "crash": "killed by SIGABRT",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_own_item_only(misbehave, fault):
    with WorkerPool(misbehave, seconds=1, workers=2) as pool:
        before, failed, after = pool.map(["a", fault, "b"])
        last = pool.map(["c"] * 4)
    assert before.startswith("a by")
    assert after.startswith("b by")
    assert isinstance(failed, Failed)
    assert FAULTS[fault] in failed.reason
    assert all(answer.startswith("c by") for answer in last)


def test_workers_are_reused_and_end_with_the_pool(misbehave):
    with WorkerPool(misbehave, workers=2) as pool:
        pids = {int(answer.rpartition(" ")[2]) for answer in pool.map(["x"] * 20)}
        assert len(pids) <= 2
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_workers_die_with_a_killed_parent(misbehave, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from misbehaving import misbehave
from negtune.verifiers.workers import WorkerPool
pool = WorkerPool(misbehave, seconds=60, workers=1)
print(pool.map(["x"])[0].rpartition(" ")[2], flush=True)
pool.map(["spin"])
"""
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert os.getpid() != pid


def test_functions_that_workers_cannot_import_are_refused(misbehave):
    with pytest.raises(ValueError, match="define it at the top of a module"):
        WorkerPool(lambda item: item)
    with pytest.raises(ValueError, match="seconds must be positive"):
        WorkerPool(misbehave, seconds=0)
