"""The bandit's recipe runs end to end, goes on where it was, and refuses what no interval can come of."""

import os
import subprocess
import sys
from pathlib import Path

from negtune.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "recipes" / "preference" / "bandit.py"), "--output_dir", str(folder), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_recipe_writes_tables_and_a_plot_and_goes_on_after_a_kill(tmp_path):
    done = run(tmp_path, "--smoke", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("| do nothing |") == 9  # and the four targets of the table on mode seeking
    assert tables.count(", do nothing |") == 4
    assert (tmp_path / "bandit.png").stat().st_size > 10_000
    results = read_jsonl(tmp_path / "results.jsonl")
    assert {line["method"] for line in results if "method" in line} >= {"do nothing", "Pref-FT", "RWR tau 0.03"}
    assert all(len(line["outcomes"]["reward"]) == 2 for line in results if "method" in line)
    runs = tmp_path / "runs.jsonl"
    lines = runs.read_bytes().splitlines(keepends=True)
    runs.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])  # killed while writing the last but one
    again = run(tmp_path, "--smoke", "--seeds", "0", "1", "--workers", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "2/2 " in again.stdout
    assert (tmp_path / "tables.md").read_text() == tables
    assert read_jsonl(tmp_path / "results.jsonl") == results


def test_recipe_refuses_one_seed(tmp_path):
    done = run(tmp_path, "--smoke", "--seeds", "3")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: need two seeds or more")
