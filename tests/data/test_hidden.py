"""Hiding positives: shares, at least one, nested draws, and chances by rank."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negtune.data.hidden import RankChances, hide_positives, rank_chances
from negtune.data.retrieval import RetrievalTask, synthetic_retrieval


def many(queries: int = 60, positives: int = 10, extra: int = 3) -> RetrievalTask:
    """Each query with so many positives and some judged negatives."""
    corpus = {f"d{i}": f"text {i}" for i in range(positives + extra)}
    qrels = {
        f"q{j}": {f"d{i}": float(i < positives) * (1 + i % 2) for i in range(positives + extra)} for j in range(queries)
    }
    return RetrievalTask(corpus, {query_id: f"query {query_id}" for query_id in qrels}, qrels)


def pairs(found) -> set[tuple[str, str]]:
    return {(query_id, document_id) for query_id, documents in found.hidden.items() for document_id in documents}


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_a_share_is_hidden_and_the_rest_is_what_it_was(keep):
    task = many()
    found = hide_positives(task, keep, seed=0)
    assert found.share == len(pairs(found)) / 600
    # 600 draws: five standard deviations are .1; queries of ten positives are spared with chance keep' = .7^10 = .03
    assert abs(found.share - (1 - keep)) < 0.1
    assert found.task.queries == task.queries
    assert found.task.corpus == task.corpus
    for query_id, gains in task.qrels.items():
        left, gone = found.task.qrels[query_id], found.hidden.get(query_id, {})
        assert {**left, **gone} == gains
        assert not left.keys() & gone.keys()
        assert all(gain > 0 for gain in gone.values())  # judged negatives stay judged
        assert found.task.positives(query_id)


def test_the_same_seed_hides_the_same_and_another_does_not():
    task = many()
    assert pairs(hide_positives(task, 0.5, seed=3)) == pairs(hide_positives(task, 0.5, seed=3))
    assert pairs(hide_positives(task, 0.5, seed=3)) != pairs(hide_positives(task, 0.5, seed=4))


def test_a_draw_does_not_depend_on_the_other_queries_or_their_order():
    task = synthetic_retrieval()
    whole = hide_positives(task, 0.4, seed=1)
    some = list(task.queries)[::-2]
    assert hide_positives(task.only(some), 0.4, seed=1).hidden == {
        query_id: documents for query_id, documents in whole.hidden.items() if query_id in some
    }


def test_one_positive_stays_where_all_would_be_hidden():
    task = many(positives=2)
    found = hide_positives(task, 1e-6, seed=0)
    assert len(found.spared) == 60  # the chance of anything else is 1e-4
    assert all(len(found.task.positives(query_id)) == 1 for query_id in task.queries)
    kept = [next(iter(found.task.positives(query_id))) for query_id in task.queries]
    assert 15 < kept.count("d0") < 45  # each of the two in about half of the queries
    lone = many(positives=1)
    assert hide_positives(lone, 0.1, seed=0).hidden == {}


def test_a_chance_of_1_hides_nothing_and_spares_nobody():
    found = hide_positives(many(), 1.0, seed=0)
    assert (found.hidden, found.spared, found.share) == ({}, [], 0.0)


@pytest.mark.parametrize("positives", [2, 4, 10])
def test_what_is_hidden_at_a_higher_chance_is_hidden_at_a_lower_one(positives):
    task = many(queries=200, positives=positives)
    hidden = [pairs(hide_positives(task, keep, seed=7)) for keep in (0.95, 0.7, 0.5, 0.3, 0.05)]
    assert all(fewer < more for fewer, more in itertools.pairwise(hidden))


def test_hidden_sets_are_nested_for_chances_by_rank_too():
    task = many(queries=200, positives=4)
    ranks = {d: 1 + 7 * i for i, d in enumerate(task.corpus)}
    positives = [ranks[d] for query_id in task.queries for d in task.positives(query_id)]
    hidden = []
    for share in (0.7, 0.5, 0.3):
        chances = rank_chances(positives, share, floor=1e-6)
        keep = {query_id: {d: chances(ranks[d]) for d in task.corpus} for query_id in task.queries}
        hidden.append(pairs(hide_positives(task, keep, seed=2)))
    assert hidden[0] < hidden[1] < hidden[2]


def test_over_seeds_documents_stay_as_often_as_their_chances_say():
    task = many(queries=1, positives=6)
    keep = {"q0": {f"d{i}": chance for i, chance in enumerate((1.0, 0.9, 0.7, 0.5, 0.3, 0.1))}}
    seeds = 2_000
    kept = [hide_positives(task, keep, seed=seed).task.positives("q0") for seed in range(seeds)]
    for document_id, chance in keep["q0"].items():
        found = sum(document_id in one for one in kept) / seeds
        assert abs(found - chance) <= 4 * math.sqrt(chance * (1 - chance) / seeds), document_id


def test_over_seeds_the_last_positive_is_kept_by_the_rule():
    # two positives at .5 and .25. Both are lost with chance .375; then u/.5 in (1, 2] is uniform, u/.25 in (1, 4] too,
    # and the first is smaller with chance (1 + 2 + 2)/6: if the second is above 2 (2/3) surely, else half of the times
    task = many(queries=1, positives=2)
    seeds = 4_000
    kept = [hide_positives(task, {"q0": {"d0": 0.5, "d1": 0.25}}, seed=s).task.positives("q0") for s in range(seeds)]
    first, second = (sum(d in one for one in kept) / seeds for d in ("d0", "d1"))
    assert abs(first - (0.5 + 0.375 * 5 / 6)) < 0.03  # four standard deviations
    assert abs(second - (0.25 + 0.375 / 6)) < 0.03


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan, {}, {"q0": {"d0": 0.5}}, {"q0": {"d0": 0.0}}])
def test_a_chance_that_is_none_is_refused_by_query_and_document(keep):
    with pytest.raises(ValueError, match="query q0, document d[01]: the chance to stay is"):
        hide_positives(many(positives=2), keep, seed=0)


# --- Chances by rank --------------------------------------------------------------------------------------------------


def test_chances_fall_with_the_root_of_the_rank_between_floor_and_1():
    chances = RankChances(2.0, 0.5, 0.1)
    # 2/sqrt(1) = 2, cut at 1; 2/sqrt(16) = .5; 2/sqrt(10_000) = .02, raised to .1
    assert [chances(rank) for rank in (1, 4, 16, 10_000, None)] == [1.0, 1.0, 0.5, 0.1, 0.1]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 1400)), min_size=3, max_size=40),
    st.floats(0.01, 0.99),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_mean_over_the_documents_is_the_wanted_share(ranks, share, power):
    found = [rank for rank in ranks if rank is not None]
    most = (len(found) + 0.01 * (len(ranks) - len(found))) / len(ranks)
    if not 0.01 < share < most:
        with pytest.raises(ValueError, match="there is no rank|share"):
            rank_chances(ranks, share, power=power, floor=0.01) if share > most + 1e-6 else rank_chances([], share)
        return
    chances = rank_chances(ranks, share, power=power, floor=0.01)
    assert sum(map(chances, ranks)) / len(ranks) == pytest.approx(share, abs=1e-9)
    assert all(chances(a) >= chances(b) for a, b in itertools.pairwise(sorted(found)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_chances([1, 2], 0.01, floor=0.1), "mean chances of 0.100 to 1.000, and share=0.01"),
        (lambda: rank_chances([1, None], 0.9, floor=0.1), "0.100 to 0.550"),
        (lambda: rank_chances([0, 2], 0.5), "count from 1"),
        (lambda: rank_chances([], 0.5), "no rank"),
        (lambda: RankChances(1.0, floor=0.0), "floor"),
        (lambda: RankChances(-1.0), "scale"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
