import math

import pytest

from negtune.metrics.first_error import f1_of_accuracies, processbench_scores


def test_scores_by_hand():
    # erroneous: 1 of 2; correct: 2 of 2; harmonic mean 2 * .5 * 1 / 1.5
    found = processbench_scores([1, 0, 1, 1], [2, 0, -1, -1])
    assert (found["error_accuracy"], found["correct_accuracy"]) == (0.5, 1.0)
    assert found["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("said", [-1, 0])
def test_a_judge_that_always_says_the_same_is_worth_nothing(said):
    labels = [0, 0, -1, -1, -1]
    assert processbench_scores([said == label for label in labels], labels)["f1"] == 0


def test_a_guess_counts_with_its_chance():
    found = processbench_scores([0.25, 0.75, 0.5], [1, 1, -1])
    assert (found["error_accuracy"], found["correct_accuracy"], found["f1"]) == (0.5, 0.5, 0.5)


def test_intervals_come_from_rows_of_both_sides_drawn_apart():
    # two erroneous rows: mean 0, 1/2 or 1; correct rows always hit: F1 0, 2/3 or 1
    found = processbench_scores([0, 1, 1, 1], [0, 0, -1, -1])
    assert (found["f1_low"], found["f1_high"]) == (0.0, 1.0)
    assert (found["correct_accuracy_low"], found["correct_accuracy_high"]) == (1.0, 1.0)


def test_a_side_without_rows_is_not_a_number_and_one_row_has_no_interval():
    found = processbench_scores([1, 0], [3, 3])
    assert math.isnan(found["correct_accuracy"])
    assert math.isnan(found["f1"])
    assert "f1_low" not in found
    assert "error_accuracy_low" not in processbench_scores([1, 0, 1], [3, -1, -1])


def test_f1_of_two_zeros_is_zero_without_a_warning(recwarn):
    assert f1_of_accuracies([0.0, 1.0], [0.0, 1.0]).tolist() == [0.0, 1.0]
    assert not recwarn.list


def test_every_hit_needs_a_label():
    with pytest.raises(ValueError, match="one label per hit, got 2 and 1"):
        processbench_scores([1, 0], [0])
