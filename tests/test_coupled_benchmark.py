"""The benchmark of CET's step, at a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads private memory from /proc")
def test_every_arm_is_timed_and_compared_with_as_many_plain_steps(tmp_path):
    flags = ["--encoder", "tiny", "--words", "8", "--rounds", "2", "--steps", "2", "--dropout", "0.1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "coupled.py"), *flags, "--folder", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = json.loads((tmp_path / "coupled.json").read_text())["rows"]
    assert [one["unit"] for one in rows] == ["s", "MiB"] * 4
    ranking, official, em, features = rows[::2]
    assert all(one["low"] <= one["ratio"] <= one["high"] and one["steps"] == 4 for one in rows[::2])
    # two models are compared with two plain steps
    assert official["peer"] == em["peer"] == 2 * features["peer"] == 2 * ranking["ours"]
    assert all("dropout 0.1" in one["case"] for one in rows)
