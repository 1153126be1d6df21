import itertools
import math

import numpy as np
import pytest
import torch

from negtune.metrics import runs
from negtune.metrics.ranking import METRICS, ideal_value, place_rewards
from negtune.metrics.runs import TIES, evaluate_run

LOG3 = math.log2(3)
NAMES = ["ndcg@3", "dcg@3", "precision@3", "recall@3", "mrr@3", "map@3", "judged@3", "ndcg", "map", "mrr", "recall"]


def random_data(seed, queries=30, grades=(-1, 4)):
    """Many ties (8 scores for up to 40 documents, all exact in float32), some queries with few or unjudged ones."""
    rng = np.random.default_rng(seed)
    run, qrels = {}, {}
    for q in range(queries):
        judged = rng.choice(60, rng.integers(1, 20), replace=False)
        qrels[f"q{q}"] = {f"d{d}": int(g) for d, g in zip(judged, rng.integers(*grades, len(judged)), strict=True)}
        qrels[f"q{q}"][f"d{judged[0]}"] = 1  # at least one that is relevant
        found = rng.choice(60, rng.integers(1, 40), replace=False)
        run[f"q{q}"] = {f"d{d}": int(s) / 8 for d, s in zip(found, rng.integers(0, 8, len(found)), strict=True)}
    return run, qrels


# --- by hand -------------------------------------------------------------------------------------------------------


def test_a_run_by_hand():
    run = {"q": {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}}
    qrels = {"q": {"b": 2, "c": 0, "d": 1, "elsewhere": 1}}
    # ranked grades: - 2 0 1 with a not judged; best order 2 1 1
    values = evaluate_run(run, qrels, [*NAMES, "recall@9", "precision@9", "judged@9", "judged"]).means
    best = 2 + 1 / LOG3 + 1 / 2
    assert values == pytest.approx(
        {
            "ndcg@3": 2 / LOG3 / best,
            "dcg@3": 2 / LOG3,
            "precision@3": 1 / 3,
            "recall@3": 1 / 3,
            "mrr@3": 1 / 2,
            "map@3": 1 / 2 / 3,
            "judged@3": 2 / 3,
            "ndcg": (2 / LOG3 + 1 / math.log2(5)) / best,
            "map": (1 / 2 + 2 / 4) / 3,
            "mrr": 1 / 2,
            "recall": 2 / 3,
            "recall@9": 2 / 3,
            "precision@9": 2 / 9,
            "judged@9": 3 / 4,
            "judged": 3 / 4,
        }
    )
    assert evaluate_run(run, qrels, ["mrr@1"]).means == {"mrr@1": 0}


def test_exponential_gain_by_hand():
    # grades 1, 3: (1 + 7/log2 3) / (7 + 1/log2 3)
    result = evaluate_run({"q": {"a": 2, "b": 1}}, {"q": {"a": 1, "b": 3}}, ["ndcg@5", "map"], gain="exponential")
    assert result.means == pytest.approx({"ndcg@5": (1 + 7 / LOG3) / (7 + 1 / LOG3), "map": 1})


def test_reward_of_places_and_evaluation_are_the_same_number():
    grades = [0, 2, 1, 0, 3]
    run = {"q": {f"d{i}": float(-i) for i in range(5)}}
    qrels = {"q": {f"d{i}": grade for i, grade in enumerate(grades)}}
    gains = torch.tensor([grades], dtype=torch.float64)
    for metric in METRICS:
        ideal = ideal_value(gains, metric, 4)
        reward = place_rewards(gains[:, :4], metric, ideal).sum().item()
        assert evaluate_run(run, qrels, [f"{metric}@4"]).means[f"{metric}@4"] == reward


# --- other tools ---------------------------------------------------------------------------------------------------

TREC = {
    **{"ndcg@1": "ndcg_cut_1", "ndcg@10": "ndcg_cut_10", "ndcg": "ndcg", "map": "map", "map@5": "map_cut_5"},
    **{"mrr": "recip_rank", "recall@5": "recall_5", "recall": "set_recall", "precision@10": "P_10"},
}


def trec(run, qrels):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="compares with pytrec-eval-terrier")
    names = {"ndcg", "ndcg_cut.1,10", "map", "map_cut.5", "recip_rank", "recall.5", "set_recall", "P.10"}
    return pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)


@pytest.mark.parametrize("seed", range(5))
def test_values_of_each_query_are_those_of_trec_eval(seed):
    run, qrels = random_data(seed)
    theirs, ours = trec(run, qrels), evaluate_run(run, qrels, list(TREC))
    for name, trec_name in TREC.items():
        expected = {qid: values[trec_name] for qid, values in theirs.items()}
        assert ours.per_query[name] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_ir_measures(seed):
    ir_measures = pytest.importorskip("ir_measures", reason="compares with ir-measures")
    run, qrels = random_data(seed, grades=(0, 4))
    exponential = {grade: 2**grade - 1 for grade in range(4)}
    for ties, gain, names in [
        ("docid_desc", "linear", {"ndcg@5": "nDCG@5", "map@7": "AP@7", "recall@3": "R@3", "precision@4": "P@4"}),
        ("docid_desc", "exponential", {"ndcg@5": f"nDCG(gains={exponential})@5"}),
        ("docid_asc", "linear", {"mrr@2": "RR@2", "mrr@10": "RR@10", "judged@5": "Judged@5", "judged": "Judged"}),
    ]:
        ours = evaluate_run(run, qrels, list(names), ties=ties, gain=gain)
        for name, theirs in names.items():
            measure = ir_measures.parse_measure(theirs)
            expected = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
            assert ours.per_query[name] == pytest.approx(expected, abs=1e-9)


def test_scores_that_differ_in_float64_only_tie_in_trec_eval_and_not_here():
    qrels, run = {"q": {"b": 1}}, {"q": {"a": 1 + 1e-8, "b": 1.0}}
    assert trec(run, qrels)["q"]["recip_rank"] == 1
    assert evaluate_run(run, qrels, ["mrr"]).means["mrr"] == 0.5
    rounded = {"q": {document: float(np.float32(score)) for document, score in run["q"].items()}}
    assert evaluate_run(rounded, qrels, ["mrr"]).means["mrr"] == 1


def test_ids_are_compared_as_text():
    run, qrels = {"q": {"10": 1.0, "9": 1.0}}, {"q": {"9": 1}}
    assert evaluate_run(run, qrels, ["mrr"]).means["mrr"] == trec(run, qrels)["q"]["recip_rank"] == 1
    assert evaluate_run(run, qrels, ["mrr"], ties="docid_asc").means["mrr"] == 0.5


# --- ties ----------------------------------------------------------------------------------------------------------


def test_one_score_for_all_documents_earns_what_the_names_say_unless_ties_are_worst():
    best = 1 + 1 / LOG3 + 1 / 2 + 1 / math.log2(5)
    worst = (1 / LOG3 + 1 / 2 + 1 / math.log2(5)) / best  # 0 1 1 1, of the first four
    run = {"q": dict.fromkeys(["a", "b", "c", "x", "z"], 0.5)}
    named_low = {"q": dict.fromkeys(["a", "b", "c", "x"], 1)}
    named_high = {"q": dict.fromkeys(["z", "x", "c", "b"], 1)}

    def ndcg(qrels, ties):
        return evaluate_run(run, qrels, ["ndcg@4"], ties=ties).means["ndcg@4"]

    assert ndcg(named_low, "docid_desc") == pytest.approx(worst)
    assert ndcg(named_high, "docid_desc") == 1  # the trap
    assert ndcg(named_high, "docid_asc") == pytest.approx(worst)
    for qrels in (named_low, named_high):
        assert ndcg(qrels, "worst") == pytest.approx(worst)
        assert ndcg(qrels, "average") == pytest.approx(4 / 5)  # each place holds a relevant one with chance 4/5


def test_average_is_the_mean_over_all_orders_of_ties_in_every_metric():
    scores = {"a": 2, "b": 1, "c": 1, "d": 1, "e": 1, "f": 0, "g": 0}
    qrels = {"q": {"a": 0, "b": 3, "d": 1, "e": -1, "g": 2, "h": 1}}
    orders = [
        evaluate_run({"q": {doc: -place for place, doc in enumerate("a" + "".join(first + last))}}, qrels, NAMES).means
        for first in itertools.permutations("bcde")
        for last in itertools.permutations("fg")
    ]
    means = {name: np.mean([values[name] for values in orders]) for name in NAMES}
    assert evaluate_run({"q": scores}, qrels, NAMES, ties="average").means == pytest.approx(means)
    least = {name: min(values[name] for values in orders) for name in NAMES if not name.startswith("judged")}
    worst = evaluate_run({"q": scores}, qrels, list(least), ties="worst").means
    assert worst == pytest.approx(least)


@pytest.mark.parametrize("ties", TIES)
def test_lists_of_other_queries_do_not_change_a_value(ties, monkeypatch):
    run, qrels = random_data(7, queries=12)
    together = evaluate_run(run, qrels, NAMES, ties=ties)
    for qid in qrels:  # alone there is no padding
        alone = evaluate_run({qid: run[qid]}, {qid: qrels[qid]}, NAMES, ties=ties).means
        assert {name: together.per_query[name][qid] for name in NAMES} == pytest.approx(alone)
    monkeypatch.setattr(runs, "PLACES_AT_ONCE", 100)  # two or three queries at a time
    few_at_a_time = evaluate_run(run, qrels, NAMES, ties=ties)
    assert few_at_a_time.means == pytest.approx(together.means)
    assert list(few_at_a_time.per_query["map"]) == list(qrels)


# --- queries that lack something -----------------------------------------------------------------------------------

RUN = {"all": {"a": 1.0}, "half": {"b": 2.0, "a": 1.0}, "nothing": {}, "irrelevant": {"a": 1.0}, "unknown": {"a": 1.0}}
QRELS = {"all": {"a": 1}, "half": {"a": 1}, "gone": {"a": 1}, "nothing": {"a": 1}, "irrelevant": {"a": 0}, "none": {}}


@pytest.mark.parametrize("ties", TIES)
def test_missing_queries_count_zero_or_are_skipped(ties):
    zero = evaluate_run(RUN, QRELS, ["mrr", "judged@2"], ties=ties)
    assert zero.per_query["mrr"] == {"all": 1, "half": 0.5, "gone": 0, "nothing": 0}
    assert zero.per_query["judged@2"] == {"all": 1, "half": 0.5, "gone": 0, "nothing": 0}
    assert zero.means == {"mrr": 1.5 / 4, "judged@2": 1.5 / 4}
    skip = evaluate_run(RUN, QRELS, ["mrr"], ties=ties, missing="skip")
    assert skip.per_query["mrr"] == {"all": 1, "half": 0.5, "nothing": 0}
    assert skip.means == {"mrr": 1.5 / 3}
    for result in (zero, skip):
        assert result.missing == ("gone",)
        assert result.skipped == ("irrelevant", "none")


def test_trec_eval_counts_queries_without_a_relevant_document_as_zero():
    theirs = trec(RUN, QRELS)
    assert theirs["irrelevant"]["recip_rank"] == 0
    assert set(theirs) == {"all", "half", "nothing", "irrelevant"}  # neither gone nor unknown
    ours = evaluate_run(RUN, QRELS, ["mrr"], missing="skip").per_query["mrr"]
    assert ours == {qid: values["recip_rank"] for qid, values in theirs.items() if qid != "irrelevant"}


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ndgc@10", "unknown metric 'ndgc@10'; one of ndcg, dcg, precision, recall, mrr, map, judged, with or without"),
        ("ndcg_cut_10", "unknown metric 'ndcg_cut_10'"),
        ("ndcg@", "unknown metric 'ndcg@'"),
        ("ndcg@-1", "unknown metric 'ndcg@-1'"),
        ("mrr@0", "mrr@0: the cut-off must be at least 1"),
        ("precision", "precision needs a cut-off, as in precision@10"),
    ],
)
def test_metrics_that_do_not_exist_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        evaluate_run(RUN, QRELS, ["map", metric])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"gain": "log"}, "unknown gain 'log'; one of linear, exponential"),
        ({"ties": "random"}, "unknown ties 'random'; one of docid_desc, docid_asc, worst, average"),
        ({"missing": "drop"}, "unknown missing 'drop'; one of zero, skip"),
    ],
)
def test_rules_that_do_not_exist_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        evaluate_run(RUN, QRELS, ["map"], **argument)


def test_numbers_that_are_none_name_their_query():
    with pytest.raises(ValueError, match="query 'half': the score of document 'b' is NaN"):
        evaluate_run({**RUN, "half": {"a": 1.0, "b": math.nan}}, QRELS, ["map"])
    with pytest.raises(ValueError, match="query 'half': the grade of document 'c' is nan"):
        evaluate_run(RUN, {**QRELS, "half": {"a": 1, "c": math.nan}}, ["map"])


@pytest.mark.parametrize(
    ("run", "qrels", "missing", "message"),
    [
        (RUN, {}, "zero", "of 0 in the qrels, 0 have no relevant document and 0 others are not in the run"),
        (RUN, {"all": {"a": 0}, "b": {"a": 1}}, "skip", "of 2 in the qrels, 1 have no .* and 1 others are not"),
    ],
)
def test_no_query_has_no_average(run, qrels, missing, message):
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, qrels, ["map"], missing=missing)
