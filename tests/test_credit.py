"""Credit: exact fractions from counts, pits, baselines, and what is unknown stays unknown."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from negtune.credit import (
    Pit,
    Tally,
    advantages,
    advantages_from_labels,
    best_of,
    first_pit,
    has_signal,
    labels_from_first_error,
    moving_average,
    spurious_steps,
    state_values,
    step_advantages,
)

tallies = st.builds(Tally, st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))


def of(*correct: int, n: int = 4) -> list[Tally]:
    return [Tally(c, n - c) for c in correct]


def test_unknown_rollouts_count_in_neither():
    assert Tally(1, 3, 4).value == Fraction(1, 4)
    assert Tally(0, 0, 8).value is None
    assert Tally(1, 2, 3) + Tally(4, 5, 6) == Tally(5, 7, 9)
    with pytest.raises(ValueError, match="counts cannot be negative"):
        Tally(-1, 2)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.2), (5, 0.6723)])
def test_the_biased_best_of_k_is_one_minus_all_misses(k, expected):
    assert float(best_of(Tally(1, 4), k, unbiased=False)) == pytest.approx(expected, abs=1e-4)  # 1 - .8^5 = .67232


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_unbiased_best_of_k_is_the_share_of_subsets_with_a_success(k):
    """Enumerated: all subsets of k of 7 rollouts, 2 of them correct."""
    rollouts = [1, 1, 0, 0, 0, 0, 0]
    subsets = list(itertools.combinations(rollouts, k))
    assert best_of(Tally(2, 5), k) == Fraction(sum(map(any, subsets)), len(subsets))


@pytest.mark.parametrize("k", [2, 5])
def test_unbiased_means_unbiased(k):
    """Expectation over all outcomes of 6 rollouts that succeed with chance 3/10, exactly."""
    q, n = Fraction(3, 10), 6
    chances = [len(list(itertools.combinations(range(n), s))) * q**s * (1 - q) ** (n - s) for s in range(n + 1)]
    expected = sum(p * best_of(Tally(s, n - s), k) for s, p in enumerate(chances))
    biased = sum(p * best_of(Tally(s, n - s), k, unbiased=False) for s, p in enumerate(chances))
    assert expected == 1 - (1 - q) ** k
    assert biased < expected


def test_best_of_more_than_there_are_is_unknown():
    assert best_of(Tally(1, 2), 4) is None
    assert best_of(Tally(1, 2), 4, unbiased=False) == 1 - Fraction(2, 3) ** 4
    assert best_of(Tally(0, 0, 5), 1) is None
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        best_of(Tally(1, 2), 0)


@given(st.lists(tallies.filter(lambda t: t.scored), min_size=1, max_size=12), st.booleans(), st.integers(1, 3))
def test_advantages_telescope_exactly(states, outcome, k):
    values = state_values(states, outcome, k=k, unbiased=False)
    steps = step_advantages(values)
    assert len(steps) == len(states)
    assert sum(steps) == values[-1] - values[0]
    assert values[-1] == outcome


def test_an_unknown_state_makes_the_steps_beside_it_unknown():
    values = state_values([Tally(2, 2), Tally(0, 0, 4), Tally(1, 3)], outcome=False)
    assert values == [Fraction(1, 2), None, Fraction(1, 4), 0]
    assert step_advantages(values) == [None, None, Fraction(-1, 4)]
    assert step_advantages(state_values(of(2, 4), None)) == [Fraction(1, 2), None]
    with pytest.raises(ValueError, match="need the values of two states"):
        step_advantages([0.5])


def test_monte_carlo_values_have_the_moments_of_a_binomial():
    generator, q, n, runs = torch.Generator().manual_seed(0), 0.3, 8, 20_000
    hits = (torch.rand(runs, n, generator=generator) < q).sum(-1)
    values = torch.tensor([float(Tally(int(h), n - int(h)).value) for h in hits], dtype=torch.float64)
    variance = q * (1 - q) / n
    assert abs(values.mean().item() - q) < 3 * (variance / runs) ** 0.5
    fourth = variance**2 * 2 + variance * (1 - 6 * q * (1 - q)) / n**2  # of the sample variance, about
    assert abs(values.var().item() - variance) < 3 * (fourth / runs) ** 0.5


@pytest.mark.parametrize(
    ("correct", "rule", "step"),
    [
        ((3, 2, 1), "argmin", 3),  # monotone: the last drop, to the wrong end
        ((3, 0, 0), "argmin", 1),  # ties: the earliest
        ((3, 2, 0), "all_fail", 2),
        ((3, 0, 2, 0), "all_fail", 1),
        ((3, 0, 2, 0), "two_consecutive", 3),
        ((3, 0, 2), "two_consecutive", 3),  # the last step has no successor
        ((4 - 1, 0, 2, 1), "largest_drop", 1),
        ((2, 3, 1, 0), "largest_drop", 2),
        ((2, 1), "largest_drop", 1),  # -1/4, -1/4: the earliest
        ((1,), "all_fail", 1),
    ],
)
def test_first_pits(correct, rule, step):
    assert first_pit(of(*correct), False, rule) == Pit(step, "found")


def test_a_lucky_rollout_behind_the_pit_does_not_hide_it():
    states = of(6, 4, 1, 1, n=8)
    assert first_pit(states, False).step == 4
    assert first_pit(states, False, threshold=0.125).step == 2
    assert first_pit(states, False, "two_consecutive", threshold=0.125).step == 2
    assert first_pit(of(1, 1, n=8), False, threshold=0.125).reason == "never solved"


def test_best_of_k_forgives_a_step_that_a_few_tries_repair():
    states = of(6, 2, 1, n=8)
    assert first_pit(states, False, "largest_drop").step == 1
    assert first_pit(states, False, "largest_drop", k=5).step == 3


def test_states_without_rollouts_are_no_candidates():
    states = [Tally(3, 1), Tally(0, 0), Tally(0, 4), Tally(0, 0, 4)]
    assert first_pit(states, False, "all_fail").step == 2
    assert first_pit(states, False, "argmin").step == 2
    assert first_pit(states, False, "largest_drop").step == 2
    assert first_pit(states, False, "two_consecutive").step == 2


def test_no_value_but_that_of_the_end_is_no_drop():
    """Three scored rollouts have no value under best of 5."""
    assert first_pit([Tally(2, 1, 5)], False, "largest_drop", k=5) == Pit(None, "unknown")
    assert first_pit([Tally(2, 1, 5), Tally(1, 1, 6)], False, "largest_drop", k=5) == Pit(None, "unknown")
    assert first_pit([Tally(2, 3, 5), Tally(1, 1, 6)], False, "largest_drop", k=5) == Pit(2, "found")


@pytest.mark.parametrize(
    ("states", "outcome", "reason"),
    [
        (of(2, 1), True, "correct"),
        (of(2, 1), None, "unknown"),
        ([Tally(0, 0, 4), Tally(1, 3)], False, "unknown"),
        (of(0, 1), False, "never solved"),
        (of(4, 4), False, "always solved"),
        ([], False, "unknown"),
    ],
)
def test_samples_that_say_nothing_are_left_out_with_the_reason(states, outcome, reason):
    assert first_pit(states, outcome) == Pit(None, reason)


def test_spurious_steps_are_those_that_hurt_a_correct_solution():
    assert spurious_steps([0.2, -0.3, None, -0.05], 0.1) == [2]
    assert spurious_steps([0.2, -0.3, None, -0.05]) == [2, 4]


def test_labels_become_advantages_up_to_the_first_error():
    assert advantages_from_labels([1, True, 0, 0, 1]) == [1, 1, -1, None, None]
    assert advantages_from_labels([1, 0, -1, 1], neutral=0) == [1, None, -1, None]
    assert advantages_from_labels([None, False, 1], wrong=-2, after_error=0.0) == [None, -2, 0]
    assert advantages_from_labels([False], neutral=0) == [-1]
    with pytest.raises(ValueError, match="a step label is 1, 0, -1"):
        advantages_from_labels([1, 2])


def test_a_first_error_is_one_label_per_step():
    assert labels_from_first_error(-1, 2) == [True, True]
    assert labels_from_first_error(1, 4) == [True, False, None, None]
    with pytest.raises(ValueError, match="one of the 3 steps counted from 0, got 3"):
        labels_from_first_error(3, 3)


NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0, 0.0, NAN], [0.0, 0.0, NAN, NAN], [1.0, NAN, NAN, NAN], [NAN] * 4])
SCORED = ~REWARDS.isnan()


@pytest.mark.parametrize(
    ("settings", "first", "third"),
    [
        ({"baseline": "none"}, [1, 0, 0, 0], 1),
        ({"baseline": "group"}, [2 / 3, -1 / 3, -1 / 3, 0], 0),
        ({"baseline": "leave_one_out"}, [1, -1 / 2, -1 / 2, 0], 0),
        ({"baseline": "batch"}, [2 / 3, -1 / 3, -1 / 3, 0], 2 / 3),  # 2 of 6 are right
        ({"running": 0.25}, [3 / 4, -1 / 4, -1 / 4, 0], 3 / 4),
        ({"baseline": "group", "scale": "group", "epsilon": 0.0}, [1.1547, -0.57735, -0.57735, 0], NAN),  # std .57735
    ],
)
def test_baselines_by_hand(settings, first, third):
    found = advantages(REWARDS, SCORED, **settings)
    assert_close(found[0], torch.tensor(first, dtype=torch.float32), atol=1e-5, rtol=0)
    if third == third:
        assert found[2, 0].item() == pytest.approx(third)
    assert (found[~SCORED] == 0).all()


def test_what_is_unscored_plays_no_part_in_anybody_elses_advantage():
    for settings in itertools.product(("none", "group", "leave_one_out", "batch"), ("none", "group", "batch")):
        baseline, scale = settings
        clean = advantages(REWARDS.nan_to_num(0), SCORED, baseline=baseline, scale=scale)
        dirty = advantages(REWARDS.nan_to_num(-99), SCORED, baseline=baseline, scale=scale)
        assert torch.equal(clean, dirty)
        assert clean.isfinite().all()


def test_leave_one_out_has_expectation_of_the_gradient_and_the_group_mean_too_little():
    """Against the group mean an advantage is (N-1)/N of the one against the others, exactly."""
    rewards, scored = torch.rand(5, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.bool)
    group = advantages(rewards, scored, baseline="group")
    assert_close(group, advantages(rewards, scored, baseline="leave_one_out") * 3 / 4)
    with pytest.raises(ValueError, match="leave_one_out needs at least 2 samples per prompt, got 1"):
        advantages(rewards[:, :1], scored[:, :1])


@pytest.mark.parametrize("reward", [0.1, 0.2, 0.7, -1.0])
@pytest.mark.parametrize("n", [3, 4, 6])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_equal_rewards_have_no_signal_to_the_last_bit(reward, n, baseline):
    rewards, scored = torch.full((2, n), reward, dtype=torch.float64), torch.ones(2, n, dtype=torch.bool)
    rewards[1, 0], scored[1, 0] = 5.0, False
    found = advantages(rewards, scored, baseline=baseline)
    assert not found.any()
    assert not has_signal(found, scored).any()


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("settings", [{"baseline": "none"}, {"baseline": "none", "running": 0.25}])
def test_rewards_that_are_all_alike_are_not_divided_by_their_deviation(scale, settings):
    rewards, scored = torch.full((2, 4), -1.0, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    expected = rewards - settings.get("running", 0.0)
    assert_close(advantages(rewards, scored, scale=scale, **settings), expected)
    rewards[1, 0] = 1.0
    found = advantages(rewards, scored, scale="group", **settings)
    assert_close(found[0], expected[0])
    assert_close(found[1, 0] - found[1, 1], torch.tensor(2.0, dtype=torch.float64) / (1 + 1e-6))


def test_a_group_scale_takes_the_size_of_a_penalty_back():
    scored = torch.ones(1, 4, dtype=torch.bool)
    mild, harsh = torch.tensor([[1.0, 1, -1, 1]]), torch.tensor([[1.0, 1, -9, 1]])
    kwargs = {"baseline": "group", "scale": "group", "epsilon": 0.0}
    assert_close(advantages(mild, scored, **kwargs), advantages(harsh, scored, **kwargs))
    assert not torch.allclose(*(advantages(r, scored, baseline="group") for r in (mild, harsh)))


def test_the_batch_scale_divides_by_the_deviation_of_everything_scored():
    found = advantages(REWARDS, SCORED, baseline="none", scale="batch", epsilon=0.0)
    assert found[0, 0].item() == pytest.approx(1 / torch.tensor([1.0, 0, 0, 0, 0, 1]).std().item())


@pytest.mark.parametrize(("name", "words"), [("baseline", "baseline must be"), ("scale", "scale must be")])
def test_unknown_names_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        advantages(REWARDS, SCORED, **{name: "median"})


def test_the_moving_average_follows_the_scored_rewards():
    first = moving_average(None, REWARDS, SCORED)
    assert first == pytest.approx(1 / 3)
    assert moving_average(0.5, REWARDS, SCORED, decay=0.9) == pytest.approx(0.45 + 0.1 / 3)
    assert moving_average(0.5, REWARDS, torch.zeros_like(SCORED)) == 0.5


def test_groups_without_a_difference_carry_no_signal():
    found = advantages(REWARDS, SCORED, baseline="group")
    assert has_signal(found, SCORED).tolist() == [True, False, False, False]
    assert has_signal(torch.full((1, 2), 9.0), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [False]
