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
from negtune.data.retrieval import RetrievalTask, split_queries, synthetic_retrieval
from negtune.metrics.judgement import judge_audit
from negtune.retrieval.mining import Mined, read_lists, to_rows
from negtune.retrieval.negatives import AbsoluteMargin, MinScore
from negtune.retrieval.relabel import relabel
from negtune.retrieval.retrievers import BM25Retriever
from tests.recipes.test_recipes import ROOT
from tests.retrieval.test_negatives import a_list
from tests.retrieval.tiny_rankers import cross_encoder


@pytest.fixture(autouse=True)
def beside_the_recipe(monkeypatch):
    """Where Python looks when the script is run."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "retrieval"))


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


def test_thresholds_are_fitted_on_half_of_the_queries_and_audited_on_the_other(tmp_path):
    flags = ["--smoke", "--retrievers", "bm25", "--judge_kind", "bi_encoder", "--judge_unjudged", "irrelevant"]
    flags += ["--judge_precision", "0.3", "--pool_depth", "6", "--audit", "1000", "--judge_depth", "40"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "mining.json").read_text())
    fit, judge = said["fit"], said["judge"]
    assert fit["thresholds"]["drop"] <= fit["thresholds"]["positive"]
    assert fit["precision"]["count"] / fit["precision"]["of"] >= 0.3
    assert judge["name"].startswith("tiny@")
    assert judge["failed"] == 0
    assert judge["positive"] + judge["drop"] + judge["negative"] > 0
    task = synthetic_retrieval()
    pooled = task.pooled(BM25Retriever(task.corpus).retrieve(task.queries, 6))
    held = set(split_queries(pooled, 0.5, 0)[1].queries)
    lists = read_lists(tmp_path / "candidates.jsonl")
    assert 0 < len(held) < said["queries"] == len(pooled.queries)
    # of the judged documents only those of the other half are audited
    audited = sum(sum(row.values()) for row in judge["audit"]["table"].values())
    assert audited == sum(len(pooled.qrels[query_id]) for query_id in held)
    # what the pool left out is known to the recipe and not to the lists
    hidden = judge["hidden"]["table"]
    assert sum(hidden["positive"].values()) > 0
    assert all(hidden[side]["failed"] == 0 for side in hidden)
    marked = [mark for one in lists for mark in one.relabelled if mark]
    assert marked
    assert all(mark.partition(":")[2] == judge["name"] for mark in marked)


def test_what_was_hidden_is_compared_with_what_the_judge_said():
    recipe = runpy.run_path(str(ROOT / "recipes" / "retrieval" / "mine.py"), run_name="mine")
    before = Mined([a_list([0.9, 0.8, 0.7, 0.6, 0.5], query_id="1"), a_list([0.9, 0.8], query_id="2")])
    said = {"n1": "positive", "n2": "negative", "n3": "drop", "n4": None}
    after = relabel(
        before, lambda queries, documents: [said[text.split()[-1]] for text in documents], name="j", audit=0
    ).mined
    texts = {
        document_id: text
        for one in before.lists
        for document_id, text in zip(one.document_ids, one.documents, strict=True)
    }
    queries = {one.query_id: one.query for one in before.lists}
    whole = RetrievalTask(texts, queries, {"1": {"p0": 1.0, "n1": 1.0, "n3": 2.0}, "2": {"p0": 1.0}})
    found = recipe["hidden_audit"](before, after, whole, {"1"})
    assert found == judge_audit([True, False, True, False], ["positive", "negative", "drop", None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrievers": ["bm25"], "scorer": "minilm"}, "--scorer minilm is none of the retrievers bm25"),
        ({"select": "hard"}, "--select must be top, random or simans, got 'hard'"),
        ({"n_documents": 1}, "--n_documents must be at least 2, got 1"),
        ({"judge_depth": 8}, "--judge_depth 8 is less than the 16 of --n_documents"),
        ({"judge_engine": "server"}, "--judge_engine server needs --judge_url http://host:port"),
        ({"judge_engine": "tgi"}, "--judge_engine must be hf, vllm or server, got 'tgi'"),
        ({"pool_depth": 0}, "--pool_depth must be at least 1, got 0"),
        ({"audit": -1}, "--audit must be at least 0, got -1"),
        ({"max_positives": 16}, "--max_positives 16 leaves no negative in --n_documents 16"),
        ({"judge_positives": "keep"}, "--judge_positives must be relabel or drop, got 'keep'"),
        ({"threshold": float("nan")}, "--threshold is a score of the cross-encoder, got nan"),
        ({"judge_kind": "yes"}, "--judge_kind must be written, causal_lm, cross_encoder, bi_encoder or multi_vector"),
        ({"judge_kind": "causal_lm"}, "--judge_kind causal_lm needs --judge, the model that scores"),
        (
            {"judge_kind": "causal_lm", "judge": "smollm2", "judge_engine": "vllm"},
            "--judge_engine vllm serves written verdicts; --judge_kind causal_lm runs here, leave it out",
        ),
        (
            {"judge_kind": "bi_encoder", "judge": "minilm", "judge_precision": 90.0},
            "--judge_precision must be above 0 and at most 1, got 90.0",
        ),
        (
            {"judge_kind": "bi_encoder", "judge": "minilm", "judge_kept": 0.0},
            "--judge_kept must be above 0 and at most 1, got 0.0",
        ),
        (
            {"judge_kind": "bi_encoder", "judge": "minilm", "judge_unjudged": "drop"},
            "--judge_unjudged must be leave_out or irrelevant, got 'drop'",
        ),
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
