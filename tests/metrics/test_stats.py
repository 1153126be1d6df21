import itertools

import numpy as np
import pytest
from scipy.stats import t as student_t

from negtune.metrics.stats import (
    bootstrap_interval,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
    permutation_test,
)


def test_interval_of_three_runs_by_hand():
    # mean 2, s = 1, t(.975, 2) = 4.30265 -> half = 4.30265 / sqrt 3
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(2.48414, rel=1e-5)


def test_interval_of_equal_runs_is_a_point():
    assert mean_interval([0.25] * 4) == (0.25, 0.0)


def test_wider_confidence_is_a_wider_interval():
    # t(.75, 1) = 1, s = sqrt(1/2)
    assert mean_interval([0.0, 1.0], confidence=0.5) == (0.5, pytest.approx(0.5))


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values):
    with pytest.raises(ValueError, match="at least 2 runs"):
        mean_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([0.0, 1.0], confidence=confidence)


def test_a_paired_difference_is_ours_minus_theirs_of_the_same_units():
    ours, theirs = [0.9, None, 0.5, 0.7, 1.0], [0.5, 0.0, 0.4, 0.6, None]
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx((0.4 + 0.1 + 0.1) / 3)
    assert (low, high) == pytest.approx(bootstrap_interval([0.4, 0.1, 0.1]))
    assert paired_difference(theirs, ours)[0] == pytest.approx(-difference)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([0.1, 0.2], [0.1])


def test_permutation_test_by_hand():
    # signs of 1, 2, 3: sums +-6, +-4, +-2, 0, 0; at least as far as 6: 2 of 8, as 1 + 2 - 3 = 0: all
    assert permutation_test([1.0, 2.0, 3.0]) == 2 / 8
    assert permutation_test([-1.0, -2.0, -3.0]) == 2 / 8
    assert permutation_test([1.0, 2.0, -3.0]) == 1
    assert permutation_test([-1.0, 2.0, 3.0]) == 4 / 8
    assert permutation_test([0.5]) == 1
    assert permutation_test([0.0] * 20) == 1


@pytest.mark.parametrize("n", [4, 12, 13])
def test_permutation_test_agrees_with_going_through_all_signs(n):
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=n)]
    exact = np.mean([s >= abs(differences.sum()) - 1e-9 for s in sums])
    # 13 units are drawn: 4 standard errors of 10,000 draws at p <= 1/2 are .02
    assert permutation_test(differences) == pytest.approx(exact, abs=1e-12 if n <= 12 else 0.02)


def test_rounding_does_not_split_equal_sums():
    # sums are +-.1, +-.3, +-.5, none nearer to 0 than the one observed; but .1 + .2 - .2 > .1 in floating point
    assert permutation_test([0.1, 0.2, -0.2]) == 1


def test_permutation_test_of_many_units_is_never_zero_and_repeats():
    assert permutation_test([1.0] * 40, resamples=99) == 1 / 100
    differences = np.random.default_rng(0).normal(0.1, 1.0, 50)
    assert permutation_test(differences, seed=1) == permutation_test(differences, seed=1)
    assert permutation_test(differences, seed=1) != permutation_test(differences, seed=2)


@pytest.mark.parametrize("differences", [[], [[1.0, 2.0]], [1.0, float("nan")]])
def test_permutation_test_refuses_what_it_cannot_test(differences):
    with pytest.raises(ValueError, match="a permutation test needs"):
        permutation_test(differences)


def test_permutation_test_draws_as_often_as_asked_where_units_are_many():
    assert permutation_test([0.0] * 5000, resamples=2000) == 1  # 2000 of 2000 are as far as 0, in blocks of 838


# --- What could have been seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [5, 40])
def test_a_difference_that_can_be_detected_is_found_with_its_power(units):
    draws = np.random.default_rng(0).normal(size=(20_000, units))
    difference = detectable_difference(_with_deviation_1(units))
    shifted = draws + difference
    t = shifted.mean(1) / (shifted.std(1, ddof=1) / np.sqrt(units))
    found = (np.abs(t) > student_t.ppf(0.975, units - 1)).mean()
    assert abs(found - 0.8) < 0.012  # four standard deviations


def test_a_detectable_difference_grows_with_the_deviation_and_the_power_and_falls_with_the_units():
    one = detectable_difference([0.0, 1.0, 2.0, 3.0])
    assert detectable_difference([0.0, 3.0, 6.0, 9.0]) == pytest.approx(3 * one)
    assert detectable_difference([5.0, 6.0, 7.0, 8.0]) == pytest.approx(one)
    assert detectable_difference([0.0, 1.0, 2.0, 3.0], power=0.9) > one
    assert detectable_difference([0.0, 1.0, 2.0, 3.0] * 3) < one
    # large samples: (1.960 + .842) sd / sqrt(n)
    many = _with_deviation_1(10_000)
    assert detectable_difference(many) == pytest.approx(2.8016 / 100, rel=1e-3)
    assert detectable_difference([0.5, 0.5, 0.5]) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([1.0],), "at least 2"), (([1.0, 2.0], 0.04, 0.05), "level"), (([1.0, 2.0], 1.0, 0.05), "power")],
)
def test_what_cannot_be_detected_is_refused(arguments, message):
    values, *rest = arguments
    with pytest.raises(ValueError, match=message):
        detectable_difference(values, **dict(zip(("power", "level"), rest, strict=False)))


def test_holm_multiplies_by_what_is_left_and_keeps_the_order():
    # sorted .01 .02 .03 .6: times 4, 3, 2, 1 are .04 .06 .06 .6
    assert holm([0.02, 0.6, 0.01, 0.03]) == pytest.approx([0.06, 0.6, 0.04, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])  # .04 x 1 is not below the smaller one's .06
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


def _with_deviation_1(units: int) -> np.ndarray:
    values = np.arange(units, dtype=float)
    return values / values.std(ddof=1)
