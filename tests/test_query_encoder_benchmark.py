"""The benchmark of query-side training, at a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads private memory from /proc")
def test_steps_search_and_memory_are_measured_for_each_corpus(tmp_path):
    flags = ["--corpus", "300", "3000", "--encoder", "tiny", "--depth", "20", "--batch", "4", "--steps", "2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "query_encoder.py"), *flags, "--folder", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = json.loads((tmp_path / "query_encoder.json").read_text())["rows"]
    assert [one["unit"] for one in rows] == ["s", "s", "MiB"] * 2
    assert all("of 300 x 32" in one["case"] for one in rows[:3])
    for step, search, memory in (rows[:3], rows[3:]):
        assert step["ours"] > search["ours"] > 0
        assert memory["ours"] >= 0
