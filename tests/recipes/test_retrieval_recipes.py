"""The retrieval recipes, as users run them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
pytest.importorskip("bm25s", reason="needs negtune[retrieval]")

from negtune.records import read_jsonl
from negtune.retrieval.mining import read_lists
from tests.recipes.mistakes import mistake
from tests.recipes.test_recipes import ROOT, launch
from tests.retrieval.tiny_rankers import bert_folder, needs_adapters

COMPARE = ROOT / "recipes" / "retrieval" / "compare.py"


def compare(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(COMPARE), "--output_dir", str(folder), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_a_retriever_is_warmed_up_trained_searched_and_reported(tmp_path):
    done = launch("retrieval/pg_rank.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["start", "InfoNCE", "pg_rank"]
    assert metrics["better"]["ndcg@10"] == metrics["better"]["guaranteed/ndcg@10"] == "higher"
    assert "minus start_low" in metrics["arms"]["pg_rank"]
    history = read_jsonl(tmp_path / "history.jsonl")
    assert [row["step"] for row in history if "eval/ndcg@10" in row] == [2, 4]
    assert {one.query_id for one in read_lists(tmp_path / "candidates.jsonl")}
    report = (tmp_path / "report.html").read_text()
    assert "ndcg@10 on held-out queries" in report
    assert (tmp_path / "plots" / "ranking.png").stat().st_size > 5_000
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_train_a_retriever(tmp_path):
    done = launch("retrieval/pg_rank.py", tmp_path, "--smoke", "--per_device_train_batch_size", "2", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads((tmp_path / "metrics.json").read_text())["arms"]) == ["start", "InfoNCE", "pg_rank"]


def test_queries_are_trained_against_a_frozen_index_and_reported(tmp_path):
    done = launch("retrieval/adore.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["start", "adore"]
    assert "minus start_low" in metrics["arms"]["adore"]
    history = read_jsonl(tmp_path / "history.jsonl")
    assert [row["step"] for row in history if "eval/ndcg@10" in row] == [2, 4]
    assert all("search/missed" in row for row in history if "loss" in row)
    assert (tmp_path / "router_config.json").exists()
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@needs_adapters
def test_two_processes_train_an_adapter_for_queries_by_policy_gradient(tmp_path):
    flags = ["--smoke", "--loss_type", "pg_rank", "--use_peft", "--per_device_train_batch_size", "2"]
    done = launch("retrieval/adore.py", tmp_path, *flags, "--lora_target_modules", "query", "value", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads((tmp_path / "metrics.json").read_text())["arms"]) == ["start", "pg_rank"]
    assert (tmp_path / "router_config.json").exists()


@pytest.mark.parametrize("flags", [[], pytest.param(["--loss_type", "masked_infonce"], marks=pytest.mark.slow)])
def test_a_retriever_is_trained_on_static_hard_negatives(tmp_path, flags):
    done = launch("retrieval/star.py", tmp_path, "--smoke", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    arms = json.loads((tmp_path / "metrics.json").read_text())["arms"]
    assert list(arms) == ["start", "warm-up", "masked_infonce" if flags else "star"]
    history = read_jsonl(tmp_path / "history.jsonl")
    assert any(row.get("in_batch/withheld", 0) > 0 for row in history)
    lists = read_lists(tmp_path / "candidates.jsonl")
    negatives = [
        (rank, one.query_id)
        for one in lists
        for rank, gain in zip(one.ranks["dense"], one.gains, strict=True)
        if gain == 0
    ]
    assert len({query_id for _, query_id in negatives}) > 10
    assert 20 < max(rank for rank, _ in negatives) <= 40
    assert (tmp_path / "report.html").stat().st_size > 5_000
    assert (tmp_path / "model.safetensors").exists()


@needs_adapters
def test_a_language_model_is_trained_to_rerank(tmp_path):
    done = launch("retrieval/llm_reranker.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["BM25", "start", "pg_rank"]
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_retriever_is_rewarded_by_a_generator(tmp_path):
    done = launch("retrieval/rag_reward.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(json.loads((tmp_path / "metrics.json").read_text())["arms"]) == ["start", "pg_rank"]
    assert "answers drawn, 0 of them unscored" in done.stdout


def test_a_retriever_is_trained_on_judgements_of_a_pool(tmp_path):
    done = launch("retrieval/cet.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["start", "labels as they are", "CET em"]
    assert "minus labels as they are_low" in metrics["arms"]["CET em"]
    history = read_jsonl(tmp_path / "history.jsonl")
    assert [row["step"] for row in history if "selection/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in history if "eval/ndcg@10" in row] == [2, 4]
    assert {path.name for path in (tmp_path / "selection").iterdir()} == {"selection.json", "selection.safetensors"}
    assert (tmp_path / "level.safetensors").exists()
    lists = read_lists(tmp_path / "candidates.jsonl")
    ranks = [r for one in lists for r, known in zip(one.ranks["bm25"], one.judged, strict=True) if known]
    assert max(ranks) <= 20, "nothing else was judged"
    arguments = json.loads((tmp_path / "run.json").read_text())["arguments"]
    assert arguments["selection_learning_rate"] == 1e-2, "of features"


@pytest.mark.slow
def test_figures_of_two_cross_encoders_are_those_of_reranking(tmp_path):
    folder = str(bert_folder(tmp_path / "bert", labels=1))
    flags = ["--model_kind", "cross_encoder", "--model_name_or_path", folder, "--selection_model", folder]
    done = launch("retrieval/cet.py", tmp_path / "run", "--smoke", "--mode", "official", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"rerank/ndcg@10", "rerank/ndcg@10_low", "rerank/mrr@10"} <= set(metrics["arms"]["CET official"])
    assert "ndcg@10" not in metrics["primary"]
    assert "rerank ndcg@10 on held-out queries" in (tmp_path / "run" / "report.md").read_text()


def test_an_encoder_learns_which_text_is_in_which(tmp_path):
    done = launch("retrieval/asymmetric.py", tmp_path, "--smoke", "--max_length", "48")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    arms = metrics["arms"]
    assert next(iter(arms)) == "start, cosine"
    assert arms["shingles"]["minus start, cosine_low"] > 0
    assert list(arms)[-1] == "trained, soft"
    assert arms["start, cosine"]["direction"] == 0.5 < arms["start, soft"]["direction"]
    assert arms["start, soft"]["fit"] >= arms["start, cosine"]["fit"]
    assert metrics["better"]["micro_ap"] == metrics["better"]["inside/recall@p90"] == "higher"
    assert "2_MagnitudeHead" in {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report.html").stat().st_size > 5_000


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was_stopped_and_tests_over_queries(tmp_path):
    flags = ["--smoke", "--arms", "InfoNCE, mined + in batch", "LambdaRank, list", "PG PL-Rank LOO"]
    done = compare(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = read_jsonl(tmp_path / "runs.jsonl")
    assert len(runs) == 2 + 3 * (2 + 2)
    table = (tmp_path / "compare.md").read_text()
    assert "| PG PL-Rank LOO | " in table.split("Permutation test")[0].split("ndcg@10 minus that of")[1]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    again = compare(tmp_path, *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = [{k: v for k, v in run.items() if k != "seconds"} for run in read_jsonl(tmp_path / "runs.jsonl")]
    assert repeated == [{k: v for k, v in run.items() if k != "seconds"} for run in runs]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("{trainer: ranking, k: 30}", "arm 'last': k=30 is larger than n_documents=10"),
        ("{trainer: ranking, estimator: pl_rank, metric: mrr}", "arm 'last': .*use rtg_loo"),
        ("{trainer: mnrl, k: 3}", "arm 'last': mnrl has no setting 'k'"),
    ],
)
def test_an_arm_of_the_comparison_is_refused_before_the_first_run(tmp_path, monkeypatch, capsys, arm, message):
    grid = tmp_path / "grid.yaml"
    grid.write_text(COMPARE.with_suffix(".yaml").read_text() + f"  last: {arm}\n")
    flags = ["--smoke", "--grid", str(grid), "--output_dir", str(tmp_path / "out")]
    assert re.search(message, mistake(main_of("compare", monkeypatch), monkeypatch, capsys, flags))
    assert not (tmp_path / "out" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("pg_rank", ["--loss_type", "npo"], "unknown loss_type 'npo'"),
        ("pg_rank", ["--data", "nowhere/at/all"], "no folder nowhere/at/all"),
        ("pg_rank", ["--estimator", "pl_rank", "--metric", "mrr"], "use rtg_loo"),
        ("adore", ["--metric_cut", "0"], "metric_cut counts places and must be at least 1, got 0"),
        ("star", ["--loss_type", "pg_rank"], "take star or masked_infonce, or --in_batch true with another objective"),
        ("cet", ["--uniform_steps", "4"], "--uniform_steps 4 of --max_steps 4 leaves no step with weights"),
        ("cet", ["--pool_depth", "-1"], "--pool_depth must be at least 1, got -1"),
        ("rag_reward", ["--estimator", "pl_rank"], "a black-box reward needs loss_type pg_rank with estimator loo"),
        ("llm_reranker", ["--yes", "certainly not one token"], "choose one that is a single token"),
        ("asymmetric", ["--model_name_or_path", "wordllama"], "which StaticEmbedding does not give"),
        ("asymmetric", ["--text", str(ROOT / "README.md"), "--test_passages", "1000"], "passages, fewer than"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, recipe, flags, message):
    config = ROOT / "recipes" / "retrieval" / f"{recipe}.yaml"
    flags = ["--config", str(config), "--smoke", *flags, "--output_dir", str(tmp_path)]
    said = mistake(main_of(recipe, monkeypatch), monkeypatch, capsys, flags)
    assert said.startswith("error: ")
    assert message in said


def main_of(recipe: str, monkeypatch) -> Callable[[], None]:
    """Of a script of this folder."""
    monkeypatch.syspath_prepend(str(COMPARE.parent))
    return importlib.import_module(recipe).main
