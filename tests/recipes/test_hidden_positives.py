"""The recipe that hides positives: as users run it, and what its arms are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
pytest.importorskip("bm25s", reason="needs negtune[retrieval]")

from negtune.data.retrieval import split_queries, synthetic_retrieval
from negtune.records import read_jsonl
from tests.recipes.test_recipes import ROOT

FOLDER = ROOT / "recipes" / "retrieval"
SCRIPT = FOLDER / "hidden_positives.py"
GRID = SCRIPT.with_suffix(".yaml")


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import hidden_positives
    import hidden_task

    return hidden_positives, hidden_task


@pytest.fixture
def collection(modules, tmp_path):
    made_up = {"n_topics": 4, "documents_per_topic": 9}
    return modules[1].Collection("made up", made_up, "tiny", 30, tmp_path)


def part(modules, collection, way: str, hidden: float, seed: int = 1, *, inner: bool = False):
    settings = {"test_share": 0.5, "n_documents": 8, "max_positives": 4, "depth": 30, "static_depth": 20}
    return modules[1].Part(collection, modules[1].Cell("made up", way, hidden), seed=seed, inner=inner, **settings)


@pytest.mark.slow
def test_all_arms_run_go_on_where_they_were_and_are_drawn(tmp_path):
    done = run(tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    runs = read_jsonl(tmp_path / "runs.jsonl")
    arms = yaml.safe_load(GRID.read_text())["arms"]
    # two seeds: nothing and every arm in each of three cells, but the oracle not where nothing is hidden, and true
    # chances only where they differ
    cells = {(run["settings"]["way"], run["settings"]["hidden"]): set() for run in runs}
    for one in runs:
        cells[one["settings"]["way"], one["settings"]["hidden"]].add(one["arm"])
    by_rank = {name for name, arm in arms.items() if arm.get("ways") == ["by rank"]}
    assert len(by_rank) == 2
    assert cells["by rank", 0.5] == {"do nothing", *arms}
    assert cells["uniform", 0.5] == {"do nothing", *arms} - by_rank
    assert cells["whole", 0.0] == {"do nothing", *arms} - by_rank - {"mined, oracle relabels"}
    assert len(runs) == 2 * sum(map(len, cells.values()))
    assert "mined, nothing hidden" in done.stdout
    assert (tmp_path / "hidden_positives.png").stat().st_size > 20_000
    again = run(tmp_path, "--smoke")
    assert again.returncode == 0, again.stderr[-3000:]
    assert read_jsonl(tmp_path / "runs.jsonl") == runs
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"baseline": "none"}, [], "baseline 'none' is no arm"),
        ({"max_positives": 8}, [], "leaves no negative"),
        ({"data": {"cranfield": {"hidden": [1.5]}}}, [], "between 0 and 1"),
        ({"data": {"cranfield": {"ways": ["dense"]}}}, [], "ways are 'uniform' and 'by rank'"),
        ({"what": 1}, [], "'what', which a grid does not have"),
        ({"arms": {"mined": {"train": "lists", "loss_type": "mnrl"}}}, [], "arm 'mined': unknown"),
        ({"arms": {"mined": {"train": "lists", "judge": "none"}}}, [], "no judge 'none'; there are oracle"),
        ({"arms": {"mined": {"train": "cet", "mode": "ips"}}}, [], "chances differ in by rank cells only"),
        ({"arms": {"mined": {"train": "lists", "ways": ["by rank"]}}}, [], "tuned_as names an arm"),
        ({"arms": {"mined": {"train": "lists", "rule": "relative"}}}, [], "needs margin and against"),
        ({"arms": {"mined": {"train": "pairs", "loss_type": "star"}}}, [], "have no setting 'loss_type'"),
        ({}, ["--only", "cranfeld"], "the file has no data 'cranfeld'"),
        ({}, ["--arms", "STARS"], "the file has no arms 'STARS'"),
        ({}, [], "is no folder in --data_dir None"),
    ],
)
def test_wrong_settings_are_one_line_before_the_first_run(modules, tmp_path, monkeypatch, change, flags, message):
    grid = yaml.safe_load(GRID.read_text()) | {"drawn": []} | change
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    args = modules[0].parser.parse_args(
        ["--grid", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "run"), *flags]
    )
    with pytest.raises(ValueError, match=message) as error:
        modules[0].read_grid(args)
    assert "\n" not in str(error.value)


def test_a_cell_hides_training_labels_and_no_test_label(modules, collection):
    one = part(modules, collection, "by rank", 0.5)
    train, test = split_queries(synthetic_retrieval(n_topics=4, documents_per_topic=9), 0.5, 1)
    assert one.test == test
    assert one.truth == train
    assert 0.3 < one.hidden.share < 0.7
    for query_id, found in one.hidden.hidden.items():
        assert found.keys().isdisjoint(one.train.qrels[query_id])
        assert one.train.qrels[query_id] | found == train.qrels[query_id]
    # documents that BM25 has first are kept more often
    chances = {q: {d: one.chance(q, d) for d in train.positives(q)} for q in train.queries}
    kept = [chances[q][d] for q in train.queries for d in one.train.positives(q)]
    lost = [chances[q][d] for q in train.queries for d in one.hidden.hidden.get(q, {})]
    assert sum(kept) / len(kept) > sum(lost) / len(lost) + 0.1


def test_the_sweep_has_training_queries_only_with_all_their_labels(modules, collection):
    inner, outer = part(modules, collection, "uniform", 0.5, inner=True), part(modules, collection, "uniform", 0.5)
    assert inner.test.queries.keys() < outer.train.queries.keys()
    assert not inner.test.queries.keys() & outer.test.queries.keys()
    assert inner.test.qrels == {q: outer.truth.qrels[q] for q in inner.test.queries}


def test_lists_have_visible_positives_and_false_negatives_are_counted(modules, collection):
    one = part(modules, collection, "uniform", 0.5)
    for negatives in ("mined", "static", "random", "none"):
        found = one.lists({"negatives": negatives}, {})
        counted = []
        for candidates in found.lists:
            hidden = one.hidden.hidden.get(candidates.query_id, {})
            for document_id, gain in zip(candidates.document_ids, candidates.gains, strict=True):
                assert gain == one.train.qrels[candidates.query_id].get(document_id, 0.0)
                counted += [document_id in hidden] if gain <= 0 else []
        assert found.facts["lists/false_negatives"] == (sum(counted) / len(counted) if counted else 0.0)
        assert bool(counted) == (negatives != "none")
    mined, drawn = (one.lists({"negatives": n}, {}).facts["lists/false_negatives"] for n in ("mined", "random"))
    assert mined > 0
    assert drawn > 0


def test_an_oracle_leaves_no_false_negative_and_finds_all_candidates(modules, collection):
    one = part(modules, collection, "uniform", 0.5)
    found = one.lists({"judge": "oracle"}, {})
    assert found.facts == {"lists/false_negatives": 0.0, "lists/found": 1.0, "lists/found_right": 1.0}
    new = sum(said is not None for candidates in found.lists for said in candidates.relabelled)
    assert new > 0


def test_a_judge_by_scores_is_held_to_the_truth(modules, collection, monkeypatch):
    one = part(modules, collection, "uniform", 0.5)
    truth = {
        (one.truth.queries[q], one.truth.corpus[d]): 1.0 for q in one.truth.queries for d in one.truth.positives(q)
    }
    judging = modules[1].Judging("bi_encoder", "tiny", precision=0.3)
    monkeypatch.setattr(
        collection, "judge_scores", lambda name, judging: lambda pairs: [truth.get(p, 0.0) for p in pairs]
    )
    found = one.lists({"judge": "perfect"}, {"perfect": judging})
    assert found.facts == {"lists/false_negatives": 0.0, "lists/found": 1.0, "lists/found_right": 1.0}


def test_a_rule_on_scores_takes_negatives_out(modules, collection):
    one = part(modules, collection, "uniform", 0.5)
    rule = {"rule": "relative", "margin": 0.05}
    strict, mild, none = (
        one.lists(arm, {}).lists for arm in ({**rule, "against": "min"}, {**rule, "against": "max"}, {})
    )
    for one in strict:
        scores = one.scores["dense"]
        limit = min(score for score, gain in zip(scores, one.gains, strict=True) if gain > 0)
        unjudged = [score for score, known in zip(scores, one.judged, strict=True) if not known]
        assert all(score <= limit - 0.05 * abs(limit) for score in unjudged)
    negatives = [sum(g <= 0 for c in lists for g in c.gains) for lists in (strict, mild, none)]
    assert negatives[0] <= negatives[1] <= negatives[2]


def test_triplets_pair_each_positive_with_a_negative_of_its_list(modules, collection):
    lists = part(modules, collection, "uniform", 0.5).lists({}, {}).lists
    rows = modules[0].triplets(lists)
    assert len(rows) == sum(gain > 0 for one in lists for gain in one.gains)
    gains = {(one.query, d): gain for one in lists for d, gain in zip(one.documents, one.gains, strict=True)}
    assert all(gains[row["anchor"], row["positive"]] > 0 >= gains[row["anchor"], row["negative"]] for row in rows)
