"""Which scored answers become pairs: every rule by hand, and what is never a pair."""

from __future__ import annotations

from itertools import combinations

import pytest

from negtune.data.pair_selection import RULES, PairSelection

SCORES = [0.2, 0.9, None, 0.5, 0.1, 0.9]
ANSWERS = "abcdef"


def choose(rule: str, scores=SCORES, answers=ANSWERS, seed=0, **settings) -> list[tuple[int, int]]:
    return PairSelection(rule, **settings).choose(scores, answers, seed=seed)


def test_best_against_worst_then_second_best_against_second_worst():
    assert choose("best_worst") == [(1, 4)]
    assert choose("best_worst", pairs_per_prompt=9) == [(1, 4), (5, 0)]  # five scored: the third has no partner
    assert choose("best_worst", [0.0, 1.0, 0.5, 0.6], "abcd", pairs_per_prompt=2) == [(1, 0), (3, 2)]


def test_all_pairs_are_those_that_differ_each_once_and_in_order():
    expected = {
        (i, j) if SCORES[i] > SCORES[j] else (j, i)
        for i, j in combinations([0, 1, 3, 4, 5], 2)
        if SCORES[i] != SCORES[j]
    }
    found = choose("all", pairs_per_prompt=100)
    assert set(found) == expected
    assert len(found) == 9


def test_a_subset_of_all_pairs_is_drawn_by_seed_and_every_pair_comes_up():
    assert choose("all", seed=3, pairs_per_prompt=2) == choose("all", seed=3, pairs_per_prompt=2)
    seen = {pair for seed in range(200) for pair in choose("all", seed=seed, pairs_per_prompt=2)}
    assert len(seen) == 9


def test_mu_minus_two_sigma_passes_over_the_outlier():
    # mean of 0, 7 x 10, 20: 10; sigma = sqrt(200/9) = 4.71: .57 is nearest to 0
    assert choose("mu_minus_2sigma", [0.0, *[10.0] * 7, 20.0], range(9)) == [(8, 0)]
    # mean 7.9, sigma sqrt((3 x .1^2 x ...)): with -100 among 5s and 10s the target lies between it and the 5s
    scores = [-30.0, *[5.0] * 8, *[10.0] * 8, 11.0]
    mean = sum(scores) / len(scores)
    sigma = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    assert abs(mean - 2 * sigma - 5.0) < abs(mean - 2 * sigma + 30.0)
    assert choose("mu_minus_2sigma", scores, range(len(scores))) == [(17, 1)]
    assert choose("best_worst", scores, range(len(scores))) == [(17, 0)]


def test_random_pairs_use_every_answer_at_most_once():
    for seed in range(20):
        found = choose("random", seed=seed, pairs_per_prompt=9)
        used = [i for pair in found for i in pair]
        assert len(used) == len(set(used)) <= 4
        assert all(SCORES[i] > SCORES[j] for i, j in found)
    assert {pair for seed in range(100) for pair in choose("random", [1.0, 0.0], "ab", seed=seed)} == {(0, 1)}


def test_first_pit_sets_the_best_over_the_worst_ones():
    assert choose("first_pit", pairs_per_prompt=3) == [(1, 4), (1, 0), (1, 3)]


@pytest.mark.parametrize("rule", RULES)
def test_ties_equal_answers_and_unscored_ones_are_no_pair(rule):
    assert choose(rule, [0.5, 0.5, 0.5], "abc") == []
    assert choose(rule, [1.0, 0.0], "aa") == []
    assert choose(rule, [1.0, None], "ab") == []
    assert choose(rule, [None, None], "ab") == []
    assert choose(rule, [], "") == []
    assert choose(rule, [1.0, 0.0], "ab") == [(0, 1)]


@pytest.mark.parametrize("rule", RULES)
def test_gap_and_threshold(rule):
    assert choose(rule, [1.0, 0.5], "ab", min_gap=0.5) == [(0, 1)]
    assert choose(rule, [1.0, 0.5], "ab", min_gap=0.6) == []
    assert choose(rule, [1.0, 0.5], "ab", min_chosen=1.0) == [(0, 1)]
    assert choose(rule, [1.0, 0.5], "ab", min_chosen=1.1) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "best"}, "pair_selection must be one of best_worst, all"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt >= 1"),
        ({"min_gap": -1.0}, "min_gap >= 0"),
        ({"rule": "mu_minus_2sigma", "pairs_per_prompt": 2}, "set pairs_per_prompt to 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        PairSelection(**settings)
