"""Choosing from a pool: as `mine` does, by a score, or as SimANS draws; and all steps in one call."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy.stats import chisquare

from negtune.data.retrieval import synthetic_retrieval
from negtune.retrieval.choice import SimANS, choose, mine_negatives
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import Mined, mine
from negtune.retrieval.negatives import EVERYTHING, AbsoluteMargin, RankWindow
from negtune.retrieval.retrievers import DenseRetriever, RunRetriever
from tests.retrieval.test_mining import BOTH, TASK
from tests.retrieval.test_negatives import a_list, hidden_task
from tests.retrieval.tiny_rankers import static_encoder


@pytest.mark.parametrize("select", ["top", "random"])
@pytest.mark.parametrize(
    "settings",
    [
        {"n_documents": 4},
        {"n_documents": 6, "max_positives": 1},
        {"n_documents": 3, "positives": "guaranteed", "skip": 1},
        {"n_documents": 50},
    ],
)
def test_without_rules_the_lists_are_those_of_mine(settings, select):
    for seed in range(5):
        found = mine_negatives(TASK, BOTH, select=select, seed=seed, **settings)
        expected = mine(TASK, BOTH, select=select, seed=seed, **settings)
        assert found == expected
        assert found.counts() == expected.counts()
    task = synthetic_retrieval(n_topics=4)
    retriever = RunRetriever({q: {d: -float(i) for i, d in enumerate(task.corpus)} for q in task.queries}, "x")
    assert (
        mine_negatives(task, [retriever], select=select, **settings).lists
        == mine(task, [retriever], select=select, **settings).lists
    )


def test_lists_do_not_depend_on_the_other_queries_of_a_task():
    task, model = hidden_task(), static_encoder()
    settings = {
        "rules": [AbsoluteMargin("dense", 0.05)],
        "score": scorer(model),
        "scorer": "dense",
        "select": SimANS("dense", 5.0),
        **{"n_documents": 6, "depth": 20, "seed": 3, "positives": "guaranteed"},
    }
    retriever = DenseRetriever(model, task.corpus, similarity="cosine")
    whole = mine_negatives(task, [retriever], **settings)
    parts = [mine_negatives(task.only(some), [retriever], **settings) for some in (["q3", "q7"], ["q0"])]
    found = {one.query_id: one for part in parts for one in part.lists}
    expected = {one.query_id: one for one in whole.lists if one.query_id in found}
    assert len(whole.lists) == len(task.queries)
    assert {q: one.document_ids for q, one in found.items()} == {q: one.document_ids for q, one in expected.items()}
    for query_id, one in found.items():
        assert one.scores["dense"] == pytest.approx(expected[query_id].scores["dense"], abs=1e-5)
        assert {q: parts[0].dropped.get(q, {}) for q in ("q3", "q7")} == {
            q: whole.dropped.get(q, {}) for q in ("q3", "q7")
        }


def test_rules_let_the_next_documents_in():
    # words: b a d e f for query 1, of which a is relevant and b judged; a is second
    found = mine_negatives(TASK, BOTH[:1], n_documents=3, rules=[RankWindow("words", skip=3)])
    assert sorted(found.lists[0].document_ids) == ["a", "b", "e"]
    assert found.dropped == {"1": {"d": "rank_window:words"}}
    assert found.short == []
    found = mine_negatives(TASK, BOTH[:1], n_documents=4, rules=[RankWindow("words", skip=4)])
    assert sorted(found.lists[0].document_ids) == ["a", "b", "f"]
    assert found.short == ["1"]


def test_top_can_go_by_a_scorer():
    one = a_list([0.5, 0.1, 0.9, 0.3])
    one.scores["y"] = [0.0, 3.0, 1.0, 2.0]
    (found,) = choose(Mined([one]), 3, by="y").lists
    assert sorted(found.document_ids) == ["n1", "n3", "p0"]
    (found,) = choose(Mined([one]), 3, by="x").lists
    assert sorted(found.document_ids) == ["n2", "n3", "p0"]


def test_a_human_positive_comes_before_a_relabelled_one_of_the_same_gain():
    one = a_list([0.5, 0.9, 0.4, 0.3], [1.0, 1.0, 1.0, 0.0])
    one.relabelled[1] = "positive:judge"
    for most, expected in ((1, ["p0"]), (2, ["p0", "p2"]), (3, ["p0", "p1", "p2"])):
        mined = choose(Mined([one], missing={"1": ["far"]}), 4, max_positives=most)
        assert sorted(d for d in mined.lists[0].document_ids if d[0] == "p") == expected
        assert sorted(mined.missing["1"]) == sorted({"far", "p0", "p1", "p2"} - {*expected})


SIMANS_SCORES = [0.8, 0.9, 0.7, 0.5, 0.1]
"""Of p0 and n1 to n4."""


def weights(a, b):
    return [math.exp(-a * (score - SIMANS_SCORES[0] - b) ** 2) for score in SIMANS_SCORES[1:]]


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (8.0, 0.0), (8.0, -0.2), (3.0, 0.3)])
def test_simans_draws_in_proportion_to_its_weights(a, b):
    mined = Mined([a_list(SIMANS_SCORES)])
    draws = [choose(mined, 2, select=SimANS("x", a, b), seed=seed).lists[0].document_ids for seed in range(1500)]
    drawn = [next(d for d in ids if d != "p0") for ids in draws]
    p = [w / sum(weights(a, b)) for w in weights(a, b)]
    assert chisquare([drawn.count(f"n{i}") for i in range(1, 5)], [1500 * x for x in p]).pvalue > 1e-3


def test_simans_draws_two_without_replacement():
    mined = Mined([a_list(SIMANS_SCORES)])
    draws = [choose(mined, 3, select=SimANS("x", 8.0, -0.2), seed=seed).lists[0].document_ids for seed in range(1500)]
    sets = [frozenset(ids) - {"p0"} for ids in draws]
    w = dict(zip(["n1", "n2", "n3", "n4"], weights(8.0, -0.2), strict=True))
    total = sum(w.values())
    pairs = {
        frozenset(pair): sum(w[i] / total * w[j] / (total - w[i]) for i, j in itertools.permutations(pair))
        for pair in itertools.combinations(w, 2)
    }
    assert sum(pairs.values()) == pytest.approx(1)
    assert chisquare([sets.count(pair) for pair in pairs], [1500 * p for p in pairs.values()]).pvalue > 1e-3


def test_simans_at_its_extremes():
    # up to 50 apart at a = 1e6 the weights underflow, and the order of their logarithms does not
    mined = Mined([a_list([10.0, 60.0, 9.0, -40.0, 13.0])])
    for b, nearest in ((0.0, "n2"), (3.5, "n4"), (1e6, "n1"), (-1e6, "n3")):
        for seed in range(5):
            assert nearest in choose(mined, 2, select=SimANS("x", 1e6, b), seed=seed).lists[0].document_ids
    several = Mined([a_list([1.0, 3.0, 1.1, 2.1, 3.1], [1.0, 1.0, 0.0, 0.0, 0.0])])
    for against, nearest in (("min", "n2"), ("mean", "n3"), ("max", "n4")):
        found = choose(several, 3, max_positives=2, select=SimANS("x", 1e6, against=against))
        assert nearest in found.lists[0].document_ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: choose(m, 1), "1 <= max_positives < n_documents, got max_positives=None, n_documents=1"),
        (lambda m: choose(m, 4, max_positives=4), "got max_positives=4, n_documents=4"),
        (lambda m: choose(m, 4, select="hard"), "select='hard' is neither 'top', 'random' nor a SimANS"),
        (lambda m: choose(m, 4, select="random", by="x"), "by='x' orders select='top' only, got select='random'"),
        (lambda m: choose(m, 4, by="y"), "query 1: document n1 has no score of 'y', and choosing by it needs all"),
        (lambda m: choose(m, 4, select=SimANS("x", 1.0)), "query 1: document n2 has no score of 'x'"),
        (lambda m: SimANS("x", -1.0), "a must be a number of at least 0, got -1.0"),
        (lambda m: SimANS("x", 1.0, against="best"), "against='best' is none of 'min', 'max', 'mean'"),
        (lambda m: mine_negatives(TASK, BOTH, scorer="dense"), "score and scorer belong together"),
    ],
)
def test_what_cannot_be_chosen_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Mined([a_list([0.5, 0.6, None, 0.2])]))


def test_a_positive_without_a_score_stops_simans():
    mined = mine(TASK, BOTH[:1], n_documents=EVERYTHING, positives="guaranteed")
    with pytest.raises(ValueError, match=r"query 1: document j has no score of 'words'"):
        choose(mined, 4, select=SimANS("words", 1.0))
