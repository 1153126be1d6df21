"""The mining recipe, as users run it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
pytest.importorskip("bm25s", reason="needs negtune[retrieval]")

from negtune.data.candidates import candidate_rows
from negtune.retrieval.mining import read_lists, to_rows
from negtune.retrieval.negatives import AbsoluteMargin, MinScore
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
    ("settings", "message"),
    [
        ({"retrievers": ["bm25"], "scorer": "minilm"}, "--scorer minilm is none of the retrievers bm25"),
        ({"select": "hard"}, "--select must be top, random or simans, got 'hard'"),
        ({"n_documents": 1}, "--n_documents must be at least 2, got 1"),
        ({"judge_depth": 8}, "--judge_depth 8 is less than the 16 of --n_documents"),
        ({"judge_engine": "server"}, "--judge_engine server needs --judge_url http://host:port"),
        ({"judge_engine": "tgi"}, "--judge_engine must be hf, vllm or server, got 'tgi'"),
        ({"percent_of_positive": 95.0}, "share must be above 0 and at most 1, got 95"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_before_anything_is_loaded(settings, message):
    recipe = runpy.run_path(str(ROOT / "recipes" / "retrieval" / "mine.py"), run_name="mine")
    with pytest.raises(ValueError, match=message):
        recipe["checked"](recipe["MineArguments"](**settings))


def test_rules_read_the_scores_of_the_last_retriever_unless_another_is_named():
    recipe = runpy.run_path(str(ROOT / "recipes" / "retrieval" / "mine.py"), run_name="mine")
    flags = {"absolute_margin": 0.1, "min_score": 0.2, "against": "max", "retrievers": ["bm25", "a/folder/e5"]}
    for settings, name in (({}, "e5"), ({"scorer": "bm25"}, "bm25")):
        rules, select, _ = recipe["checked"](recipe["MineArguments"](**flags, **settings))
        assert rules == [AbsoluteMargin(name, 0.1, against="max"), MinScore(name, 0.2)]
        assert select == "top"
