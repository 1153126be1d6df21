"""The mining recipe, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
pytest.importorskip("bm25s", reason="needs negtune[retrieval]")

from negtune.data.candidates import candidate_rows
from negtune.retrieval.mining import read_lists, to_rows
from tests.recipes.test_recipes import ROOT
from tests.retrieval.tiny_rankers import cross_encoder


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    script = ROOT / "recipes" / "retrieval" / "mine.py"
    command = [sys.executable, str(script), "--config", str(script.with_suffix(".yaml")), "--output_dir", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_lists_are_mined_filtered_denoised_judged_and_written(tmp_path):
    cross_encoder(tmp_path / "model").save_pretrained(str(tmp_path / "model"))
    flags = [
        "--smoke",
        "--retrievers",
        "bm25",
        "tiny",
        "--cross_encoder",
        str(tmp_path / "model"),
        "--threshold",
        "0.9",
    ]
    done = run(tmp_path / "run", *flags, "--select", "simans")
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "run" / "mining.json").read_text())
    lists = read_lists(tmp_path / "run" / "candidates.jsonl")
    assert len(lists) == said["queries"] == said["counts"]["lists"] == 48
    assert all(set(one.scores) == {"bm25", "tiny", "cross_encoder"} and len(one.gains) <= 8 for one in lists)
    unjudged = [(one, i) for one in lists for i, known in enumerate(one.judged) if not known]
    assert unjudged
    assert all(one.scores["cross_encoder"][i] <= 0.9 for one, i in unjudged)
    assert said["counts"]["dropped/relative_margin:tiny"] > 0
    # the tiny judge says nothing, and that is no label
    judge = said["judge"]
    assert judge["failed"] > 0
    assert judge["positive"] == judge["drop"] == judge["negative"] == 0
    assert judge["audit"]["failed"]["count"] == judge["audit"]["failed"]["of"] == 8
    assert said["rules"]["positives"]["of"] > 0
    assert said["rules"]["negatives"]["of"] > 0
    assert "cross_encoder would take out, of judged negatives:" in done.stdout
    assert len(candidate_rows(to_rows(lists))) == 48


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scorer", "minilm", "--retrievers", "bm25"], "error: --scorer minilm is none of the retrievers bm25"),
        (["--judge_engine", "server"], "error: --judge_engine server needs --judge_url"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(tmp_path, flags, message):
    done = run(tmp_path, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
