"""Error rates of verifiers, and Wilson's interval."""

from __future__ import annotations

import math

import pytest

from negtune.metrics.verification import verifier_errors, wilson


def test_rates_worked_by_hand():
    accepted = [True, True, False, None, False, True, None]
    truth = [True, False, True, True, False, False, False]
    errors = verifier_errors(accepted, truth)
    assert (errors.false_positive.count, errors.false_positive.of) == (2, 3)
    assert (errors.false_negative.count, errors.false_negative.of) == (1, 2)
    assert (errors.unscored.count, errors.unscored.of) == (2, 7)
    assert errors.false_positive.value == pytest.approx(2 / 3)


def test_wilson_closed_form():
    """Centre (p + z²/2n) / (1 + z²/n) and half-width, z = 1.959964."""
    z, p, n = 1.959963984540054, 0.1, 50
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    rate = wilson(5, 50)
    assert (rate.low, rate.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_no_error_in_few_cases_is_no_proof():
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0, 1)
    assert math.isnan(wilson(0, 0).value)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="one truth per verdict"):
        verifier_errors([True], [])
