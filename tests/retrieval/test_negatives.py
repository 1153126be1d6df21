"""Rules against false negatives: by hand, by their properties, and beside sentence-transformers' own mining."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negtune.data.candidates import candidate_rows
from negtune.data.retrieval import RetrievalTask
from negtune.metrics.verification import wilson
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import CandidateList, Mined, mine, read_lists, write_lists
from negtune.retrieval.negatives import (
    EVERYTHING,
    AbsoluteMargin,
    MaxScore,
    MinScore,
    PercentOfPositive,
    RankWindow,
    RelativeMargin,
    add_scores,
    audit_rules,
    denoise,
    drop_negatives,
)
from negtune.retrieval.retrievers import DenseRetriever, RunRetriever
from tests.retrieval.tiny_rankers import WORDS, static_encoder


def a_list(scores, gains=None, judged=None, query_id="1", name="x"):
    """Documents p, n1, n2, ... with these scores of `name`, ranked by them; the first is the positive by default."""
    gains = gains or [1.0, *[0.0] * (len(scores) - 1)]
    judged = judged or [gain > 0 for gain in gains]
    ids = [f"{'p' if gain > 0 else 'n'}{i}" for i, gain in enumerate(gains)]
    order = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: -scores[i])
    ranks = [order.index(i) + 1 if s is not None else None for i, s in enumerate(scores)]
    texts = [f"text {query_id} {document_id}" for document_id in ids]
    added = [s is None and gain > 0 for s, gain in zip(scores, gains, strict=True)]
    ideal = sorted((gain for gain in gains if gain > 0), reverse=True)
    return CandidateList(
        query_id, f"query {query_id}", ids, texts, gains, judged, {name: ranks}, {name: scores}, added, ideal
    )


def kept(rule, scores, **more):
    (one,) = drop_negatives(Mined([a_list(scores, **more)]), [rule]).lists
    return one.document_ids


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        # the positive's .8 and a margin of .25: up to .55
        (AbsoluteMargin("x", 0.25), [0.8, 0.75, 0.55, 0.5625, -1.0], ["p0", "n2", "n4"]),
        (AbsoluteMargin("x", 0.0), [0.5, 0.5, 0.625, 0.25], ["p0", "n1", "n3"]),
        # .8 - .25 · .8 = .6
        (RelativeMargin("x", 0.25), [0.8, 0.6, 0.61, 0.3], ["p0", "n1", "n3"]),
        # -.8 - .25 · .8 = -1: below the positive, where (1 - .25) · -.8 = -.6 would keep n1, which is above it
        (RelativeMargin("x", 0.25), [-0.8, -0.7, -0.9, -1.0, -1.2], ["p0", "n3", "n4"]),
        (RelativeMargin("x"), [1.0, 0.96, 0.94], ["p0", "n2"]),
        # .95 · 20 = 19
        (PercentOfPositive("x"), [20.0, 19.5, 19.0, 0.0], ["p0", "n2", "n3"]),
        # .5 · (.6 + 1) - 1 = -.2
        (PercentOfPositive("x", 0.5, shift=1.0), [0.6, 0.0, -0.1, -0.25, -1.0], ["p0", "n3", "n4"]),
        (MaxScore("x", 0.5), [0.9, 0.5, 0.51], ["p0", "n1"]),
        (MinScore("x", 0.5), [0.1, 0.5, 0.49], ["p0", "n1"]),
        # ranks: p 2, n1 1, n2 3, n3 4, n4 5
        (RankWindow("x", skip=2), [8.0, 9.0, 7.0, 6.0, 5.0], ["p0", "n2", "n3", "n4"]),
        (RankWindow("x", skip=2, depth=4), [8.0, 9.0, 7.0, 6.0, 5.0], ["p0", "n2", "n3"]),
    ],
)
def test_what_a_rule_keeps_by_hand(rule, scores, expected):
    assert kept(rule, scores) == expected


@pytest.mark.parametrize(("against", "limit"), [("min", 0.25), ("max", 0.75), ("mean", 0.5)])
def test_of_several_positives_the_lowest_counts_unless_another_is_asked_for(against, limit):
    scores, gains = [0.25, 0.75, 0.3, 0.5, 0.6, 0.76, 0.2], [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = kept(AbsoluteMargin("x", 0.0, against=against), scores, gains=gains)
    assert found == ["p0", "p1", *[f"n{i}" for i in range(2, 7) if scores[i] <= limit]]
    assert kept(RelativeMargin("x", 0.0), scores, gains=gains) == ["p0", "p1", "n6"]


def test_what_was_dropped_is_named_with_the_first_rule_against_it():
    rules = [MaxScore("x", 0.9), AbsoluteMargin("x", 0.1)]
    mined = drop_negatives(Mined([a_list([0.8, 0.95, 0.75, 0.5])]), rules)
    assert mined.dropped == {"1": {"n1": "max_score:x", "n2": "absolute_margin:x"}}
    later = drop_negatives(mined, [MinScore("x", 0.6)])
    assert later.dropped == {"1": {"n1": "max_score:x", "n2": "absolute_margin:x", "n3": "min_score:x"}}
    assert mined.dropped["1"].keys() == {"n1", "n2"}  # what was there is not changed
    assert later.counts()["dropped/absolute_margin:x"] == later.counts()["dropped/min_score:x"] == 1
    assert later.counts()["lists_without_negative"] == 1
    assert "lists_without_negative" not in mined.counts()


def test_all_columns_of_a_list_lose_the_same_documents():
    one = replace(
        a_list([0.8, 0.9, 0.5]),
        ranks={"x": [2, 1, 3], "y": [None, 7, 8]},
        scores={"x": [0.8, 0.9, 0.5], "y": [None, 5.0, 4.0]},
        added=[False, True, False],
        relabelled=["positive:j", None, "negative:j"],
    )
    (left,) = drop_negatives(Mined([one]), [AbsoluteMargin("x", 0.1)]).lists
    assert (left.document_ids, left.documents) == (["p0", "n2"], ["text 1 p0", "text 1 n2"])
    assert (left.gains, left.judged, left.added) == ([1.0, 0.0], [True, False], [False, False])
    assert left.ranks == {"x": [2, 3], "y": [None, 8]}
    assert left.scores == {"x": [0.8, 0.5], "y": [None, 4.0]}
    assert left.relabelled == ["positive:j", "negative:j"]


def test_judged_negatives_stay_unless_they_are_asked_for():
    more = {"judged": [True, True, False]}
    assert kept(MaxScore("x", 0.1), [0.8, 0.9, 0.9], **more) == ["p0", "n1"]
    mined = Mined([a_list([0.8, 0.9, 0.9], **more)])
    assert drop_negatives(mined, [MaxScore("x", 0.1)], keep_judged=False).lists[0].document_ids == ["p0"]


def test_a_list_with_an_unscored_positive_is_left_as_it_was_and_counted():
    gains = [1.0, 1.0, 0.0]
    lists = [a_list([0.5, None, 0.9], gains), a_list([0.5, 0.6, 0.9], gains, query_id="2")]
    mined = drop_negatives(Mined(lists), [AbsoluteMargin("x", 0.1), MaxScore("x", 2.0)])
    assert [len(one.document_ids) for one in mined.lists] == [3, 2]
    assert mined.unfiltered == {"absolute_margin:x": ["1"]}
    assert mined.counts()["unfiltered_lists/absolute_margin:x"] == 1
    # rules that do not compare with positives need no score of theirs
    assert drop_negatives(Mined(lists), [MaxScore("x", 0.8)]).lists[0].document_ids == ["p0", "p1"]


def test_an_unscored_negative_stays_and_is_counted_but_has_no_rank_in_a_window():
    mined = drop_negatives(Mined([a_list([0.5, None, 0.9])]), [AbsoluteMargin("x", 0.1)])
    assert mined.lists[0].document_ids == ["p0", "n1"]
    assert mined.unscored == {"absolute_margin:x": 1}
    assert mined.counts()["unscored_negatives/absolute_margin:x"] == 1
    assert kept(RankWindow("x", depth=9), [0.5, None, 0.9]) == ["p0", "n2"]
    assert kept(RankWindow("x", skip=1), [0.5, None, 0.9]) == ["p0", "n1"]


def test_a_percentage_of_scores_below_0_is_refused_with_the_way_out():
    for scores in ([0.6, -0.1], [-0.6, 0.1]):
        with pytest.raises(ValueError, match=r"query 1, document n1: x has the score -0\.\d: a percentage.*Relative"):
            kept(PercentOfPositive("x"), scores)
        assert kept(PercentOfPositive("x", shift=1.0), scores)
    with pytest.raises(ValueError, match=r"score -1\.5"):
        kept(PercentOfPositive("x", shift=1.0), [0.6, -1.5])


def test_settings_and_names_are_checked():
    for make, message in [
        (lambda: AbsoluteMargin("x", -0.1), "margin must be at least 0, got -0.1"),
        (lambda: RelativeMargin("x", float("nan")), "margin must be at least 0, got nan"),
        (lambda: MaxScore("x", float("nan")), "score is a limit that scores are compared with, got nan"),
        (lambda: MinScore("x", float("nan")), "score is a limit that scores are compared with, got nan"),
        (lambda: PercentOfPositive("x", 95.0), "share must be above 0 and at most 1, got 95"),
        (lambda: RankWindow("x", skip=5, depth=5), "need 0 <= skip < depth, got skip=5, depth=5"),
        (lambda: AbsoluteMargin("x", 0.1, against="median"), "against='median' is none of 'min', 'max', 'mean'"),
        (lambda: kept(MaxScore("y", 0.1), [0.8, 0.9]), "query 1 has no scores of 'y', only of 'x'; name one of them"),
        (lambda: kept(RankWindow("y"), [0.8, 0.9]), "query 1 has no ranks of 'y', only of 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


SCORES = st.lists(st.integers(-8, 8), min_size=3, max_size=9)


@settings(max_examples=60, deadline=None)
@given(SCORES, st.integers(1, 2), st.sampled_from(["min", "max", "mean"]), st.randoms(use_true_random=False))
def test_rules_never_touch_positives_and_are_monotone(scores, n_positives, against, draw):
    gains = [1.0] * n_positives + [0.0] * (len(scores) - n_positives)
    judged = [gain > 0 or draw.random() < 0.3 for gain in gains]
    mined = Mined([a_list([value / 8 for value in scores], gains, judged)])
    positives = {d for d, gain in zip(mined.lists[0].document_ids, gains, strict=True) if gain > 0}
    margins = sorted(draw.choices([0.0, 0.05, 0.25, 0.5, 1.0, 3.0], k=3))
    for make in (AbsoluteMargin, RelativeMargin):
        left = [
            set(drop_negatives(mined, [make("x", margin, against=against)]).lists[0].document_ids) for margin in margins
        ]
        assert all(positives <= ids for ids in left)
        assert all(larger <= smaller for smaller, larger in pairwise(left))
    for share, less in pairwise([1.0, 0.9, 0.5]):
        (one,), (two,) = (drop_negatives(mined, [PercentOfPositive("x", s, 1.0)]).lists for s in (share, less))
        assert positives <= set(two.document_ids) <= set(one.document_ids)


@settings(max_examples=30, deadline=None)
@given(SCORES, st.randoms(use_true_random=False))
def test_rules_together_keep_what_each_keeps_in_any_order(scores, draw):
    mined = Mined([a_list([value / 8 for value in scores])])
    rules = [AbsoluteMargin("x", 0.1), MinScore("x", -0.5), RankWindow("x", skip=1)]
    each = [set(drop_negatives(mined, [rule]).lists[0].document_ids) for rule in rules]
    together = drop_negatives(mined, draw.sample(rules, 3)).lists[0].document_ids
    assert set(together) == set.intersection(*each)


def hidden_task(n_queries=12, n_documents=40, seed=0):
    draw = random.Random(seed)
    corpus = {f"d{i}": " ".join(draw.sample(WORDS, 6)) for i in range(n_documents)}
    queries, qrels = {}, {}
    for i in range(n_queries):
        relevant = draw.sample(sorted(corpus), 2)
        words = [word for d in relevant for word in draw.sample(corpus[d].split(), 3)]
        queries[f"q{i}"], qrels[f"q{i}"] = " ".join(words), dict.fromkeys(relevant, 1.0)
    return RetrievalTask(corpus, queries, qrels)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"absolute_margin": 0.3}, lambda: [AbsoluteMargin("dense", 0.3)]),
        ({"relative_margin": 0.5}, lambda: [RelativeMargin("dense", 0.5)]),
        ({"max_score": 0.1}, lambda: [MaxScore("dense", 0.1)]),
        ({"min_score": 0.1}, lambda: [MinScore("dense", 0.1)]),
        (
            {"relative_margin": 0.2, "max_score": 0.3, "min_score": -0.1},
            lambda: [RelativeMargin("dense", 0.2), MaxScore("dense", 0.3), MinScore("dense", -0.1)],
        ),
    ],
)
def test_rules_keep_what_sentence_transformers_keeps(theirs, ours):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    task, model = hidden_task(), static_encoder()
    pairs = [(task.queries[q], task.corpus[d]) for q in task.queries for d in task.positives(q)]
    data = datasets.Dataset.from_list([{"query": query, "positive": document} for query, document in pairs])
    n = len(task.corpus) - 2
    settings = {"num_negatives": n, "range_max": n, "output_format": "labeled-list", "verbose": False}
    found = mine_hard_negatives(data, model, corpus=list(task.corpus.values()), **settings, **theirs)
    expected = {row["query"]: set(row["positive"][1:]) for row in found}
    retriever = DenseRetriever(model, task.corpus, similarity="cosine")
    pool = mine(task, [retriever], n_documents=EVERYTHING, depth=len(task.corpus))
    mined = drop_negatives(pool, ours())
    negatives = {one.query: {t for t, g in zip(one.documents, one.gains, strict=True) if g == 0} for one in mined.lists}
    assert {query: texts for query, texts in negatives.items() if texts} == expected
    assert 0 < sum(map(len, expected.values())) < n * len(task.queries)


def test_missing_scores_are_computed_and_are_those_of_the_retriever():
    task, model = hidden_task(), static_encoder()
    retrievers = [
        DenseRetriever(model, task.corpus, similarity="cosine"),
        RunRetriever({q: {"d1": 2.0} for q in task.queries}, "run"),
    ]
    settings = {"n_documents": EVERYTHING, "positives": "guaranteed"}
    shallow = mine(task, retrievers, depth=3, **settings)
    whole = {one.query_id: one for one in mine(task, retrievers[:1], depth=len(task.corpus), **settings).lists}
    assert any(value is None for one in shallow.lists for value in one.scores["dense"])
    filled = add_scores(shallow, scorer(model), name="dense", part=5)
    for before, one in zip(shallow.lists, filled.lists, strict=True):
        known = dict(zip(whole[one.query_id].document_ids, whole[one.query_id].scores["dense"], strict=True))
        assert one.scores["dense"] == pytest.approx([known[d] for d in one.document_ids], abs=1e-5)
        assert one.ranks == before.ranks
        assert one.scores["run"] == before.scores["run"]
    rules = [RelativeMargin("dense", 0.1)]
    assert len(drop_negatives(shallow, rules).unfiltered["relative_margin:dense"]) > 0
    assert drop_negatives(filled, rules).unfiltered == {}


def test_a_new_scorer_scores_everything_and_has_no_ranks(tmp_path):
    class Model:
        def predict(self, pairs):
            return [float(document[-1]) for _, document in pairs]

    mined = add_scores(Mined([a_list([0.8, 0.9, None])]), Model(), name="y")
    (one,) = mined.lists
    assert one.scores == {"x": [0.8, 0.9, None], "y": [0.0, 1.0, 2.0]}
    assert set(one.ranks) == {"x"}
    write_lists(tmp_path / "lists.jsonl", mined.lists)
    assert read_lists(tmp_path / "lists.jsonl") == mined.lists
    with pytest.raises(ValueError, match="query 1 has no ranks of 'y', only of 'x'"):
        drop_negatives(mined, [RankWindow("y")])


def test_scores_that_are_wrong_are_refused_with_their_place():
    mined = Mined([a_list([0.8, 0.9, None])])
    for answer, message in [
        ([1.0], "y gave 1 scores for 3 pairs"),
        ([1.0, float("nan"), 0.0], "query 1, document n1: y gave the score nan"),
        ([1.0, 0.0, float("inf")], "query 1, document n2: y gave the score inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_scores(mined, lambda pairs, answer=answer: answer, name="y")
    with pytest.raises(ValueError, match=r"query 1, document p0: x scored it 0\.8, and this function 5; give"):
        add_scores(mined, lambda pairs: [5.0] * len(pairs), name="x")
    half = {"p0": 0.81, "n1": 0.889, "n2": 0.4}  # half precision
    filled = add_scores(mined, lambda pairs: [half[d.split()[-1]] for _, d in pairs], name="x")
    assert filled.lists[0].scores == {"x": [0.8, 0.9, 0.4]}


def test_denoising_drops_unjudged_documents_that_a_cross_encoder_finds_relevant():
    judged = [True, True, False, False, False]
    said = {"p0": 0.05, "n1": 0.99, "n2": 0.98, "n3": 0.1, "n4": 0.11}
    mined = denoise(
        Mined([a_list([5.0, 4.0, 3.0, 2.0, 1.0], judged=judged)]),
        lambda pairs: [said[document.split()[-1]] for _, document in pairs],
        threshold=0.1,
    )
    assert mined.lists[0].document_ids == ["p0", "n1", "n3"]
    assert mined.lists[0].scores["cross_encoder"] == [0.05, 0.99, 0.1]
    assert mined.dropped == {"1": {"n2": "max_score:cross_encoder", "n4": "max_score:cross_encoder"}}
    assert len(candidate_rows(mined.lists, k=3)) == 1


def test_a_real_cross_encoder_denoises(tmp_path):
    from tests.retrieval.tiny_rankers import cross_encoder

    task, model = hidden_task(4), cross_encoder(tmp_path)
    run = RunRetriever({q: {f"d{i}": -float(i) for i in range(40)} for q in task.queries}, "x")
    pool = mine(task, [run], n_documents=EVERYTHING, depth=40)
    middle = sorted(model.predict([(one.query, d) for one in pool.lists for d in one.documents]).tolist())[76]
    mined = denoise(pool, model, threshold=middle)
    scores = [value for one in mined.lists for value, gain in zip(one.scores["cross_encoder"], one.gains, strict=True)
              if gain == 0]  # fmt: skip
    dropped = sum(map(len, mined.dropped.values()))
    assert max(scores) <= middle
    assert len(scores) + dropped == 4 * 38
    assert 40 < dropped < 110


def test_the_audit_hides_one_judgement_at_a_time():
    # p0 hidden: p1's .5 - .1 = .4 < .9, it would go; p1 hidden: .9 - .1 = .8 >= .5, it would stay
    # judged n2 of .45 > .4 would go, n3 of .3 would stay; n4 is not judged
    one = a_list([0.9, 0.5, 0.45, 0.3, 0.99], [1.0, 1.0, 0.0, 0.0, 0.0], [True, True, True, True, False])
    rules = [AbsoluteMargin("x", 0.1)]
    found = audit_rules(Mined([one]), rules)
    assert (found.positives, found.negatives) == (wilson(1, 2), wilson(1, 2))
    # a list with one positive says nothing of positives to a rule that compares, and something to others
    single = a_list([0.9, 0.85, 0.3], judged=[True, True, True], query_id="2")
    found = audit_rules(Mined([one, single]), rules)
    assert (found.positives, found.negatives) == (wilson(1, 2), wilson(2, 4))
    assert audit_rules(Mined([single]), [MaxScore("x", 0.5)]).positives == wilson(1, 1)
    # nor do positives that no retriever found, or labels of a judge
    assert audit_rules(Mined([replace(one, added=[True, False, False, False, False])]), rules).positives == wilson(0, 1)
    relabelled = replace(one, relabelled=["positive:j", None, "negative:j", None, None])
    found = audit_rules(Mined([relabelled]), rules)
    assert (found.positives, found.negatives) == (wilson(0, 1), wilson(0, 1))
