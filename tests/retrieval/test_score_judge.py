"""A judge made of scores: verdicts and thresholds by hand and by brute force, and what its name stands for."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from hypothesis import given, settings
from hypothesis import strategies as st

from negtune.models.tiny import save_tiny
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import Mined
from negtune.retrieval.rankers import causal_reranker
from negtune.retrieval.relabel import relabel
from negtune.retrieval.score_judge import ScoreJudge, Thresholds, fit_thresholds, known_scores
from tests.retrieval.test_negatives import a_list
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder

NAN, INF = float("nan"), float("inf")
BETWEEN = Thresholds(positive=2.0, drop=1.0)


def said_by(numbers):
    """Scores by the document's text."""
    return lambda pairs: [numbers[document] for _, document in pairs]


def test_scores_on_both_sides_of_two_thresholds():
    scores = {"a": 3.0, "b": 2.0, "c": 1.999, "d": 1.0, "e": 0.999, "f": -5.0}
    judge = ScoreJudge(said_by(scores), BETWEEN, model="m")
    assert judge(["q"] * 6, list(scores)) == ["positive", "positive", "drop", "drop", "negative", "negative"]
    assert (judge.asked, judge.unscored) == (6, 0)
    assert judge([], []) == []


def test_a_score_that_is_missing_or_not_finite_is_no_verdict_and_no_negative():
    judge = ScoreJudge(said_by({"a": NAN, "b": None, "c": -INF, "d": INF, "e": 0.0}), BETWEEN, model="m")
    assert judge(["q"] * 5, list("abcde")) == [None, None, None, None, "negative"]
    assert (judge.asked, judge.unscored) == (5, 4)
    mined = Mined([a_list([0.9, 0.8, 0.7])])
    nothing = ScoreJudge(lambda pairs: [NAN] * len(pairs), BETWEEN, model="m")
    found = relabel(mined, nothing, name=nothing.name)
    assert found.mined == mined
    assert found.counts["failed"] == 2


def test_what_the_ranker_raises_comes_out():
    def broken(pairs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ScoreJudge(broken, BETWEEN, model="m")(["q"], ["d"])


@pytest.mark.parametrize(("positive", "drop"), [(1.0, 2.0), (NAN, 0.0), (INF, 0.0), (1.0, -INF)])
def test_thresholds_are_checked(positive, drop):
    with pytest.raises(ValueError, match="need finite drop <= positive"):
        Thresholds(positive, drop)


def test_thresholds_by_hand():
    scores = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    relevant = [True, True, False, True, True, False, True, False]
    # precision from there on up: 1, 1, 2/3, 3/4, 4/5, 4/6, 5/7, 5/8; share of the five positives: .2 .4 .4 .6 .8 .8 1 1
    found = fit_thresholds(scores, relevant, precision=0.8, kept=0.9)
    assert found.thresholds == Thresholds(5.0, 3.0)
    assert (found.precision.count, found.precision.of) == (4, 5)
    assert (found.recall.count, found.recall.of) == (4, 5)
    assert (found.lost.count, found.lost.of) == (0, 5)
    assert fit_thresholds(scores, relevant, precision=0.81, kept=0.6).thresholds == Thresholds(8.0, 6.0)
    # where fewer positives are to be kept than are called positive, nothing is dropped
    assert fit_thresholds(scores, relevant, precision=0.8, kept=0.2).thresholds == Thresholds(5.0, 5.0)
    assert fit_thresholds(scores, relevant, precision=0.6, kept=1.0).lost.count == 0


def test_equal_scores_are_on_one_side():
    # at 1.0 half is relevant; the positive among them cannot be had alone
    found = fit_thresholds([2.0, 1.0, 1.0], [True, True, False], precision=0.9, kept=1.0)
    assert found.thresholds == Thresholds(2.0, 1.0)
    with pytest.raises(ValueError, match=r"no threshold reaches a precision of 0\.9 on 2 .*the best is 0\.500"):
        fit_thresholds([1.0, 1.0], [True, False], precision=0.9)


def test_a_share_that_is_a_decimal_is_reached_exactly():
    scores = [float(-i) for i in range(100)]
    relevant = [i < 7 for i in range(100)]
    assert fit_thresholds(scores, relevant, precision=0.07).thresholds.positive == -99.0  # .07 * 100 > 7


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=20),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([0.2, 0.5, 0.9, 1.0]),
)
def test_thresholds_are_those_of_a_search_through_all_scores(pairs, precision, kept):
    scores, relevant = [float(s) for s, _ in pairs], [r for _, r in pairs]

    def above(threshold):
        return [r for s, r in zip(scores, relevant, strict=True) if s >= threshold]

    good = [t for t in scores if sum(above(t)) / len(above(t)) >= precision]
    if not any(relevant) or not good:
        with pytest.raises(ValueError, match="none is relevant|no threshold reaches"):
            fit_thresholds(scores, relevant, precision=precision, kept=kept)
        return
    positive = min(good)
    drop = min(positive, max(t for t in scores if sum(above(t)) / sum(relevant) >= kept))
    found = fit_thresholds(scores, relevant, precision=precision, kept=kept)
    assert found.thresholds == Thresholds(positive, drop)
    assert found.lost.count == sum(relevant) - sum(above(drop))


def test_documents_without_a_score_have_no_part_in_the_fit():
    scores, relevant = [3.0, NAN, 2.0, None, INF, -INF], [True, False, True, False, False, True]
    found = fit_thresholds(scores, relevant, precision=1.0, kept=1.0)
    assert found.thresholds == Thresholds(2.0, 2.0)
    assert (found.unscored, found.recall.of) == (4, 2)
    with pytest.raises(ValueError, match="of 0 documents with a score none is relevant"):
        fit_thresholds([NAN], [True])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": 0.0}, "precision must be above 0 and at most 1, got 0.0"),
        ({"kept": 1.5}, "kept must be above 0 and at most 1, got 1.5"),
        ({"scores": [1.0]}, "need one score for each document, got 1 scores and 2 documents"),
        ({"relevant": [False, False]}, "of 2 documents with a score none is relevant"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments, message):
    given = {"scores": [1.0, 0.0], "relevant": [True, False], **arguments}
    with pytest.raises(ValueError, match=message):
        fit_thresholds(given.pop("scores"), given.pop("relevant"), **given)


def test_known_scores_are_of_peoples_labels_and_of_the_queries_asked_for():
    first = a_list([0.9, 0.8, 0.7], judged=[True, True, False], query_id="1")
    lists = [first, a_list([0.5, 0.4], judged=[True, True], query_id="2")]
    numbers = {f"text {q} {d}": 10.0 * q + place for q in (1, 2) for place, d in enumerate(("p0", "n1", "n2"))}
    score = said_by(numbers)
    assert known_scores(lists, score, queries={"1"}) == ([10.0, 11.0], [True, False])
    assert known_scores(lists, score, queries=["1", "2"]) == ([10.0, 11.0, 20.0, 21.0], [True, False, True, False])
    assert known_scores(lists, score, queries={"1"}, unjudged="irrelevant") == (
        [10.0, 11.0, 12.0],
        [True, False, False],
    )
    # what a judge said is no truth to fit the next one on
    judged = relabel(Mined([first]), lambda queries, documents: ["positive"] * len(queries), name="j", audit=0).mined
    assert known_scores(judged.lists, score, queries={"1"}, unjudged="irrelevant") == ([10.0, 11.0], [True, False])
    assert known_scores(lists, lambda pairs: 1 / 0, queries=()) == ([], [])  # nothing is asked
    with pytest.raises(ValueError, match="unjudged='drop' is neither"):
        known_scores(lists, score, queries={"1"}, unjudged="drop")


def test_the_audit_can_be_of_queries_that_the_judge_was_not_fitted_on():
    mined = Mined([a_list([0.9, 0.8, 0.7], judged=[True, True, False], query_id=q) for q in ("1", "2", "3")])
    asked = []

    def judge(queries, documents):
        asked.extend(zip(queries, documents, strict=True))
        return ["positive"] * len(queries)

    found = relabel(mined, judge, name="j", audit=None, audit_queries={"2"})
    assert found.audit is not None
    assert found.audit.failed.of == 2
    assert {pair for pair in asked if pair[1].endswith(("p0", "n1"))} == {
        ("query 2", "text 2 p0"),
        ("query 2", "text 2 n1"),
    }
    assert found.counts["positive"] == 3  # of all queries


@pytest.fixture(params=["bi_encoder", "cross_encoder", "causal_lm"])
def ranker(request, tmp_path):
    if request.param == "causal_lm":
        save_tiny(tmp_path)
        return causal_reranker(tmp_path, yes="a", no="b")
    return {"bi_encoder": bi_encoder, "cross_encoder": cross_encoder}[request.param](tmp_path)


def test_a_ranker_judges_by_its_own_scores_and_its_name_stands_for_its_weights_and_thresholds(ranker):
    queries, documents = ["w1 w2", "w1 w2", "w7"], ["w1 w3", "w9 w4", "w7 w8"]
    scores = scorer(ranker)(list(zip(queries, documents, strict=True)))
    low, middle, high = sorted(scores)
    assert low < middle < high
    thresholds = Thresholds((middle + high) / 2, (low + middle) / 2)
    judge = ScoreJudge(ranker, thresholds, model="r")
    expected = {high: "positive", middle: "drop", low: "negative"}
    assert judge(queries, documents) == [expected[score] for score in scores]
    name = judge.name
    assert name.startswith("r@")
    assert ScoreJudge(ranker, thresholds, model="r").name == name
    assert ScoreJudge(ranker, thresholds, model="s").name != name
    assert ScoreJudge(ranker, Thresholds(thresholds.positive, low), model="r").name != name
    limit, ranker.max_seq_length = ranker.max_seq_length, 17
    assert ScoreJudge(ranker, thresholds, model="r").name != name
    ranker.max_seq_length = limit
    assert ScoreJudge(ranker, thresholds, model="r").name == name
    with torch.no_grad():
        next(p for p in ranker.parameters() if p.dim() > 1).flatten()[0] += 0.5
    assert ScoreJudge(ranker, thresholds, model="r").name.split("/")[0] != name.split("/")[0]


def test_another_question_is_another_judge(tmp_path):
    save_tiny(tmp_path)
    one, other = (causal_reranker(tmp_path, yes="a", no="b", instruction=text) for text in ("Is it?", "Is it not?"))
    assert ScoreJudge(one, BETWEEN, model="m").name != ScoreJudge(other, BETWEEN, model="m").name


def test_a_diverged_ranker_gives_no_verdict(tmp_path):
    model = cross_encoder(tmp_path)
    with torch.no_grad():
        next(model.parameters()).fill_(NAN)
    judge = ScoreJudge(model, BETWEEN, model="m")
    assert judge(["w1"], ["w2"]) == [None]
    assert math.isnan(scorer(model)([("w1", "w2")])[0])
