"""Equal data: on a line in log N the answer is known; off the curve nothing is made up."""

from __future__ import annotations

import math

import pytest

from negtune.eval.efficiency import efficiency, equal_data

CURVE = {n: 0.1 * math.log2(n) for n in (2, 8, 64)}


@pytest.mark.parametrize("n", [2, 3, 8, 20, 64])
def test_on_a_line_in_log_n_it_is_exact(n):
    assert equal_data(CURVE, 0.1 * math.log2(n)) == pytest.approx(n)


def test_the_factor_is_over_the_data_that_was_used():
    assert efficiency(CURVE, 4, 0.1 * math.log2(32)) == pytest.approx(8)
    assert efficiency(CURVE, 8, CURVE[8]) == pytest.approx(1)


def test_off_the_curve_nothing_is_extrapolated():
    assert equal_data(CURVE, 0.61) == math.inf
    assert math.isnan(equal_data(CURVE, 0.09))


def test_a_curve_that_dips_or_stays_level_is_reached_where_it_first_was():
    assert equal_data({1: 0.1, 2: 0.5, 4: 0.3, 8: 0.5, 16: 0.7}, 0.5) == 2
    assert equal_data({1: 0.1, 2: 0.5, 4: 0.3, 8: 0.5, 16: 0.7}, 0.6) == pytest.approx(8 * math.sqrt(2))
    assert equal_data({1: 0.5, 2: 0.5}, 0.5) == 1


@pytest.mark.parametrize("curve", [{}, {3: 0.5}, {0: 0.1, 2: 0.3}])
def test_a_curve_of_one_point_is_refused(curve):
    with pytest.raises(ValueError, match="two numbers of examples above 0"):
        equal_data(curve, 0.5)
