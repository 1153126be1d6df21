import pytest

from negtune.metrics.stats import bootstrap_interval, mean_interval, paired_difference


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
