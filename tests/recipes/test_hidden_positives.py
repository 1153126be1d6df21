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
from negtune.eval.compare import DO_NOTHING, Comparison, Finished
from negtune.records import read_jsonl, write_json
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
    import hidden_report
    import hidden_task

    return hidden_positives, hidden_task, hidden_report


@pytest.fixture
def collection(modules, tmp_path):
    made_up = {"n_topics": 4, "documents_per_topic": 9}
    return modules[1].Collection("made up", made_up, "tiny", 30, tmp_path)


def part(modules, collection, way: str, hidden: float, seed: int = 1, *, fold: int | None = None):
    settings = {"test_share": 0.5, "n_documents": 8, "max_positives": 4, "depth": 30, "static_depth": 20, "folds": 3}
    return modules[1].Part(collection, modules[1].Cell("made up", way, hidden), seed=seed, fold=fold, **settings)


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
    assert cells["whole", 0.0] == {"do nothing", *arms} - by_rank - {"mined, oracle relabels", "mined, oracle drops"}
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
        ({}, ["--arms", "mined", "ADORE after STAR"], "goes on from 'STAR', which is no arm here"),
        ({}, ["--only", "cranfeld"], "the file has no data 'cranfeld'"),
        ({}, ["--arms", "STARS"], "the file has no arms 'STARS'"),
        ({}, ["--shares", "0.5", "1.5"], "no data set of the file hides 1.5 of its positives"),
        ({}, ["--ways", "by rnk"], "--ways are 'uniform' and 'by rank', got 'by rnk'"),
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


@pytest.mark.parametrize(("text", "message"), [("", "is no grid: it needs data and arms"), ("a: [1", "is no YAML")])
def test_a_file_that_is_no_grid_is_told_of(modules, tmp_path, text, message):
    (tmp_path / "grid.yaml").write_text(text)
    args = modules[0].parser.parse_args(["--grid", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        modules[0].read_grid(args)


def test_arms_that_are_asked_for_are_drawn(modules, tmp_path):
    args = modules[0].parser.parse_args(["--output_dir", str(tmp_path), "--only", "made up", "--arms", "mined", "STAR"])
    assert modules[0].read_grid(args).drawn == ["mined", "STAR"]


def test_a_collection_that_the_file_does_not_know_is_a_folder(modules, tmp_path):
    (tmp_path / "data" / "ours").mkdir(parents=True)
    flags = ["--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data"), "--only", "ours"]
    grid = modules[0].read_grid(modules[0].parser.parse_args([*flags, "--shares", "0.3", "0.7"]))
    assert grid.data == {"ours": {"hidden": [0.3, 0.7]}}
    with pytest.raises(ValueError, match="the file has no data 'theirs'"):
        modules[0].read_grid(modules[0].parser.parse_args([*flags, "theirs"]))


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
    outer = part(modules, collection, "uniform", 0.5)
    folds = [part(modules, collection, "uniform", 0.5, fold=fold) for fold in range(3)]
    tested = [query_id for inner in folds for query_id in inner.test.queries]
    assert sorted(tested) == sorted(outer.train.queries)  # each once
    for inner in folds:
        assert not inner.train.queries.keys() & inner.test.queries.keys()
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
    dropped = one.lists({"judge": "oracle", "found": "drop"}, {})
    assert dropped.facts == {"lists/false_negatives": 0.0}
    for candidates in dropped.lists:
        gains = dict(zip(candidates.document_ids, candidates.gains, strict=True))
        assert not gains.keys() & one.hidden.hidden.get(candidates.query_id, {}).keys()
        assert all(gain == one.train.qrels[candidates.query_id].get(d, 0.0) for d, gain in gains.items())


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


# --- Tables and plot --------------------------------------------------------------------------------------------------

GAINS = {"mined": 0.0, "in batch": 0.1, "GIST": 0.04, DO_NOTHING: -0.1}
"""Of each arm over `mined`, in all queries alike."""


def finished(modules, folder: Path, cell, drop: float = 0.0) -> Comparison:
    """Two seeds, each of ten queries of its own; every query of an arm gains the same, seed 2 a tenth more."""
    runs = []
    for arm, gain in GAINS.items():
        for seed in (1, 2):
            rate, option = (0.0, {}) if arm == DO_NOTHING else (0.01, {"scale": 7.0})
            values = {f"q{seed}{i}": 0.3 + i / 100 - drop + gain * (1 + (seed - 1) / 10) for i in range(10)}
            name = modules[2].file_name(arm, rate, seed, option)
            (folder / "per_query" / cell.name).mkdir(parents=True, exist_ok=True)
            write_json(folder / "per_query" / cell.name / f"{name}.json", values)
            facts = {"hidden": 0.5} if arm == DO_NOTHING else {"lists/false_negatives": 0.2}
            metrics = {"ndcg@10": sum(values.values()) / 10, **facts}
            runs.append(Finished(arm, "confirm", rate, seed, {}, metrics, 1.0, option))
    arms = [arm for arm in GAINS if arm != DO_NOTHING]
    options = {arm: {"scale": 7.0} for arm in arms}
    return Comparison("ndcg@10", "higher", "mined", dict.fromkeys(arms, 0.01), [], runs, None, 0.95, options=options)


def grid_of(modules):
    arms = {
        "mined": {"train": "lists"},
        "in batch": {"train": "lists", "negatives": "none"},
        "GIST": {"train": "gist", "control": "in batch"},
    }
    return modules[0].Grid(data={"made up": {"hidden": [0.5]}}, arms=arms, drawn=[DO_NOTHING, "mined"], seeds=[1, 2])


def test_tables_pair_by_seed_and_by_query_and_show_what_nothing_hidden_gives(modules, tmp_path):
    grid, Cell = grid_of(modules), modules[1].Cell
    cells = {cell: finished(modules, tmp_path, cell, cell.hidden / 10) for cell in grid.cells("made up")}
    text = modules[2].summary(grid, cells, tmp_path)
    cell = text.partition("## made up, uniform, 50% hidden")[2].partition("## ")[0]
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in cell.splitlines() if "|" in line}
    # .1 and .11 by seed: mean .105, t(.975, 1) = 12.7 times .00707 over the root of 2 is .0635
    assert rows["in batch"][2] == "+0.1050 ± 0.0635"
    assert rows["in batch"][3].startswith("+0.1050 (+0.10")
    # the table has four rows beside the baseline, and 20 differences of one sign are never that far by chance
    assert float(rows["in batch"][4]) == pytest.approx(4 / 10_001, abs=1e-4)
    assert rows["in batch"][5] == "20.0%"
    assert rows["mined"][2:5] == ["", "", ""]
    assert rows["mined, nothing hidden"][2] == "+0.0500 ± 0.0000"
    assert rows["do nothing"][2] == "-0.1050 ± 0.0635"
    assert "Hidden: 50.0% of the training" in cell
    control = cell.partition("minus its control")[2]
    assert "| GIST | in batch | -0.0630 ± 0.0381 |" in control
    assert Cell("made up") in cells
    costs = text.partition("what hiding costs")[2]
    assert "| mined | +0.0500 |" in costs  # .5 / 10
    assert "| in batch | +0.0500 (1.000) |" in costs
    modules[2].draw(grid, cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_legend_is_there_if_only_one_way_was_run(modules, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    legends, left = [], []

    def legend(figure, handles, labels, **kwargs):
        legends.append(labels)
        left.extend(ax for ax in figure.axes if ax.get_visible() and ax.get_ylabel())

    monkeypatch.setattr(Figure, "legend", legend)
    Cell = modules[1].Cell
    cells = [Cell("made up"), Cell("made up", "by rank", 0.5)]
    found = {cell: finished(modules, tmp_path, cell, cell.hidden / 10) for cell in cells}
    modules[2].draw(grid_of(modules), found, tmp_path / "plot.png")
    assert legends == [[DO_NOTHING, "mined"]]
    assert [ax.yaxis.get_tick_params()["labelleft"] for ax in left] == [True]


def test_lines_start_where_nothing_is_hidden(modules, tmp_path):
    grid = grid_of(modules)
    cells = {cell: finished(modules, tmp_path, cell, cell.hidden / 10) for cell in grid.cells("made up")}
    points = modules[2]._points
    assert points(cells, "made up", "uniform", "mined") == [(0.0, pytest.approx(0.345)), (0.5, pytest.approx(0.295))]
    assert points(cells, "made up", "uniform", "mined, oracle relabels") == []
