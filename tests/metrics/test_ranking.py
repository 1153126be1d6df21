import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from negtune.metrics.ranking import (
    ADDITIVE,
    METRICS,
    expected_place_rewards,
    exponential_gain,
    ideal_value,
    micro_ap,
    place_rewards,
    rank_documents,
    recall_at_precision,
    tie_groups,
)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def everywhere(scores):
    return torch.ones_like(scores, dtype=torch.bool)


# --- what each place adds ------------------------------------------------------------------------------------------

LOG3 = math.log2(3)

# Ranked gains 0, 2, 1 at k = 3; judged are 2, 1, 1 and 0, so that the best DCG@3 is 2 + 1/log2(3) + 1/2.
BEST = 2 + 1 / LOG3 + 1 / 2
BY_HAND = {
    "dcg": (1, [0, 2 / LOG3, 1 / 2]),
    "ndcg": (BEST, [0, 2 / LOG3 / BEST, 1 / 2 / BEST]),
    "precision": (1, [0, 1 / 3, 1 / 3]),
    "recall": (3, [0, 1 / 3, 1 / 3]),
    "mrr": (1, [0, 1 / 2, 0]),
    "map": (3, [0, 1 / 2 / 3, 2 / 3 / 3]),
}


@pytest.mark.parametrize("metric", METRICS)
def test_ideal_and_places_by_hand(metric):
    ideal, places = BY_HAND[metric]
    found = ideal_value(rows([1, 0, 2, 1, 0]), metric, 3)
    assert_close(found, rows(ideal))
    assert_close(place_rewards(rows([0, 2, 1]), metric, found), rows(places))


def test_the_ideal_is_cut_at_k_for_ndcg_only():
    gains = rows([1, 3, 1])
    assert ideal_value(gains, "ndcg", 1).item() == 3
    assert ideal_value(gains, "ndcg", 9).item() == pytest.approx(3 + 1 / LOG3 + 1 / 2)
    assert ideal_value(gains, "recall", 1).item() == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ideal_value(gains, "recall", 0)


@pytest.mark.parametrize("metric", METRICS)
def test_a_query_without_a_relevant_document_earns_nothing_and_does_not_hurt_its_neighbours(metric):
    gains = rows([0, 0], [1, 0])
    ideal = ideal_value(gains, metric, 2)
    rewards = place_rewards(torch.stack([gains, gains.flip(-1)]), metric, ideal)  # two samples
    assert ideal[0] == 0
    assert (rewards[:, 0] == 0).all()
    assert (rewards[:, 1].sum(-1) > 0).all()
    assert (place_rewards(rows([1, 1]), metric, rows(0.0)) == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_negative_gains_count_as_zero(metric):
    gains, clamped = rows([-2, 3, -1, 1]), rows([0, 3, 0, 1])
    assert_close(ideal_value(gains, metric, 4), ideal_value(clamped, metric, 4))
    assert_close(place_rewards(gains, metric, rows(2.0)), place_rewards(clamped, metric, rows(2.0)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_precision_is_that_of_the_gains_and_float32_at_least(metric, given, computed):
    gains, ideal = rows([0, 2, 1]).to(given), ideal_value(rows([1, 0, 2, 1, 0]).to(given), metric, 3)
    assert ideal.dtype == computed
    assert place_rewards(gains, metric, ideal).dtype == computed
    assert_close(place_rewards(gains, metric, ideal).double(), rows(BY_HAND[metric][1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_document_earns_the_same_whoever_stands_before_it_where_the_metric_is_additive(metric):
    # the gain 1 at place 3 after each of: 2 2, 2 0, 0 2, 0 0
    before = [list(pair) for pair in itertools.product([2, 0], repeat=2)]
    third = place_rewards(rows(*[[*pair, 1] for pair in before]), metric, torch.ones(4).double())[:, 2]
    assert third[3] > 0
    assert bool((third == third[3]).all()) == (metric in ADDITIVE)


def test_exponential_gain_by_hand():
    assert exponential_gain(rows([0, 1, 2, 3])).tolist() == [[0, 1, 3, 7]]
    # grades 1, 3 ranked in this order: (1 + 7/log2 3) / (7 + 1/log2 3), where linear gains give (1 + 3/log2 3) / ...
    gains = exponential_gain(rows([1, 3]))
    value = place_rewards(gains, "ndcg", ideal_value(gains, "ndcg", 2)).sum()
    assert value.item() == pytest.approx((1 + 7 / LOG3) / (7 + 1 / LOG3))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_gains_that_are_no_numbers_are_refused(broken):
    gains, one = rows([1, broken]), rows(1.0)
    for call in (
        lambda: place_rewards(gains, "ndcg", one),
        lambda: expected_place_rewards(gains, tie_groups(gains), "ndcg", one, 2),
        lambda: ideal_value(gains, "ndcg", 2),
        lambda: exponential_gain(gains),
        lambda: rank_documents(rows([1, 2]), everywhere(gains), gains, "worst"),
    ):
        with pytest.raises(ValueError, match=f"gains must be finite, got {broken}"):
            call()


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'ndgc'; one of ndcg, dcg"):
        place_rewards(rows([1]), "ndgc", rows(1.0))
    with pytest.raises(ValueError, match="unknown metric 'ndgc'"):
        ideal_value(rows([1]), "ndgc", 1)


# --- order ---------------------------------------------------------------------------------------------------------


def test_documents_rank_by_score_ties_by_index_padding_last():
    scores = rows([1, 3, -math.inf, 3, 9], [0, 0, 0, 0, 0])
    mask = torch.tensor([[True, True, True, True, False], [True, False, True, False, True]])
    assert rank_documents(scores, mask).tolist() == [[1, 3, 0, 2, 4], [0, 2, 4, 1, 3]]


def test_worst_puts_less_relevant_ones_first_among_ties_only():
    scores, gains = rows([1, 1, 1, 2, 0, 0]), rows([3, 0, 1, 2, 9, 0])
    assert rank_documents(scores, everywhere(scores), gains, "worst").tolist() == [[3, 1, 2, 0, 5, 4]]


@pytest.mark.parametrize("ties", ["first", "worst"])
@pytest.mark.parametrize("nonsense", [99.0, -99.0, math.nan, math.inf])
def test_nothing_behind_the_mask_reaches_the_order(ties, nonsense):
    scores, gains = rows([2, 1, 1, 3]), rows([0, 1, 0, 0])
    mask = torch.tensor([[True, True, True, False]])
    expected = [[0, 1, 2, 3]] if ties == "first" else [[0, 2, 1, 3]]
    broken = [values.masked_fill(~mask, nonsense) for values in (scores, gains)]
    assert rank_documents(broken[0], mask, broken[1], ties).tolist() == expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_that_scores_all_alike_earns_the_worst_order(metric):
    gains = rows([3, 1, 0, 2])
    ideal = ideal_value(gains, metric, 3)
    order = rank_documents(torch.zeros_like(gains), everywhere(gains), gains, "worst")
    value = place_rewards(gains.gather(-1, order)[:, :3], metric, ideal).sum().item()
    every = [place_rewards(rows(p[:3]), metric, ideal).sum().item() for p in itertools.permutations([3, 1, 0, 2])]
    assert value == pytest.approx(min(every))
    assert value < max(every)


def test_orders_that_cannot_be_are_refused():
    scores = rows([1, math.nan])
    with pytest.raises(ValueError, match="NaN"):
        rank_documents(scores, everywhere(scores))
    with pytest.raises(ValueError, match="pass gains="):
        rank_documents(rows([1, 1]), everywhere(scores), ties="worst")
    with pytest.raises(ValueError, match="unknown tie rule 'best'; one of first, worst"):
        rank_documents(rows([1, 1]), everywhere(scores), ties="best")


# --- ties on average -----------------------------------------------------------------------------------------------


def test_equal_scores_are_a_group_and_padding_is_in_none():
    assert tie_groups(rows([5, 5, 2, 1, 1], [3, 3, math.nan, math.nan, math.nan])).tolist() == [
        [0, 0, 1, 2, 2],
        [0, 0, 1, 2, 3],
    ]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scores", [[4, 4, 4, 3, 2, 2], [4, 3, 3, 3, 3, 1], [1, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 1]])
@pytest.mark.parametrize("gains", [[0, 2, 0, 1, 1, 3], [0, 0, 1, 0, 2, 0], [2, 1, 1, 3, 1, 1], [0, 0, 0, 0, 1, 1]])
def test_ties_on_average_are_the_mean_over_all_orders(metric, scores, gains):
    order = [p for p in itertools.permutations(range(6)) if [scores[i] for i in p] == scores]
    for k in (1, 3, 6, 8):
        ideal = ideal_value(rows(gains), metric, k)
        every = rows(*[[gains[i] for i in p] + [0, 0] for p in order])[:, :k]
        places = place_rewards(every[:, None], metric, ideal)[:, 0].mean(0, keepdim=True)
        assert_close(expected_place_rewards(rows(gains), tie_groups(rows(scores)), metric, ideal, k), places)


# --- pooled pairs --------------------------------------------------------------------------------------------------


def test_micro_ap_by_hand():
    scores, labels = [0.7, 0.9, 0.8, 0.7], [1, 1, 0, 0]
    # right, wrong, wrong, right: precision 1 and 2/4 where recall rises, over 2 true pairs
    assert micro_ap(scores, labels) == pytest.approx((1 + 2 / 4) / 2)
    assert micro_ap(scores, labels, 4) == pytest.approx((1 + 2 / 4) / 4)
    # right, wrong, right, wrong
    assert micro_ap(scores, labels, ties="first") == pytest.approx((1 + 2 / 3) / 2)
    assert micro_ap(np.zeros(4), np.array(labels, bool)) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_micro_ap_sums_precision_over_steps_of_recall():
    rng = np.random.default_rng(0)
    scores, labels = rng.permutation(50).astype(float), rng.random(50) < 0.3
    hits = labels[np.argsort(-scores)]
    precision, recall = hits.cumsum() / np.arange(1, 51), hits.cumsum() / 40
    steps = np.diff(recall, prepend=0.0)
    assert micro_ap(scores, labels, 40) == pytest.approx((precision * steps).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], [1, 0]), r"one label per score, got \(2,\) and \(1,\)"),
        (([0.1, 0.2], [0, 0]), "at least 1; got n_positives=0"),
        (([0.1, 0.2], [1, 1], 1), "at least 2; got n_positives=1"),
        (([0.1, math.nan], [1, 0]), "NaN"),
    ],
)
def test_micro_ap_refuses_what_has_no_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_ap(*arguments)


# --- Recall at a precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "labels", "precision", "n", "expected"),
    [
        ([4, 3, 2, 1], [1, 0, 1, 1], 0.75, None, 1.0),
        ([4, 3, 2, 1], [1, 0, 1, 1], 0.9, None, 1 / 3),
        ([4, 3, 2, 1], [1, 0, 1, 1], 0.9, 10, 1 / 10),
        ([4, 3, 2, 1], [0, 1, 1, 1], 0.8, None, 0.0),
        ([3, 3, 2, 1], [1, 0, 1, 1], 0.9, None, 0.0),  # no threshold parts the equal ones
        ([3, 2, 2, 1], [1, 1, 0, 0], 0.6, None, 1.0),
        ([-1, -2], [1, 1], 1.0, None, 1.0),
    ],
)
def test_recall_at_a_precision_by_hand(scores, labels, precision, n, expected):
    assert recall_at_precision(scores, labels, precision, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, math.nan], [1, 0], 0.9), "NaN"),
        (([0.1], [1, 0], 0.9), "one label per score"),
        (([0.1], [0], 0.9), "at least 1"),
        (([0.1], [1], 0.0), "precision"),
        (([0.1], [1], 1.1), "precision"),
    ],
)
def test_recall_at_a_precision_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        recall_at_precision(*arguments)
