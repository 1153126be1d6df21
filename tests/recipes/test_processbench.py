"""The recipe against marked first errors, on its made-up twin of ProcessBench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from negtune.rollouts.store import RecordStore
from tests.recipes.test_recipes import ROOT

RECIPE = "recipes/step_rl/processbench.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, RECIPE, *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def results(folder: Path) -> dict:
    return json.loads((folder / "processbench.json").read_text())


@pytest.mark.slow
def test_all_four_searches_share_their_rollouts_and_go_on_after_a_kill(tmp_path):
    done = run("--smoke", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path)
    rows, store = found["rows"], tmp_path / "store"
    drawn = {record["key"] for record in RecordStore(store, "continuations")}
    assert len(drawn) <= sum(row["found"]["all"]["num_rollouts"] for row in rows)
    cheaper = [row["found"]["binary"]["num_rollouts"] <= row["found"]["all"]["num_rollouts"] for row in rows]
    assert len(rows) == 12
    assert all(cheaper)
    for row in rows:
        pits = {row["found"][strategy]["pit"] for strategy in ("all", "adaptive", "scan")}
        assert len(pits) == 1
        assert (row["found"]["all"]["reason"] == "correct") == row["final_answer_correct"]
    table = found["tables"]["ProcessBench, rows with a live prompt " + f"({found['counts']['live prompts']})"]
    assert table["rollouts, all"]["f1"] > table["any step or -1"]["f1"]
    for name in ("all", "binary"):
        next(store.glob(f"{name}-*.jsonl")).unlink()
    torn = next(store.glob("continuations-*.jsonl"))
    torn.write_bytes(torn.read_bytes()[:-500])
    again = run("--smoke", "--output_dir", str(tmp_path))
    assert again.returncode == 0, again.stderr[-3000:]
    assert results(tmp_path) == found
    assert {record["key"] for record in RecordStore(store, "continuations")} == drawn
    other = run("--smoke", "--output_dir", str(tmp_path), "--seed", "1")
    assert other.returncode == 1
    assert "is of a run with other settings (seed)" in other.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere"], "error: no data folder /nowhere; --data takes a Hub id"),
        (
            ["--stategy", "all"],
            "error: Some specified arguments are not used by the HfArgumentParser: ['--stategy', 'all']",
        ),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path, flags, message):
    done = run(*flags, "--output_dir", str(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
