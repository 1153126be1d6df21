import pytest

from negtune.eval.first_error import (
    NO_ANSWER,
    NO_ERROR,
    agreement,
    any_answer,
    benchmark,
    cost,
    first_dead,
    first_pit,
    hits,
    live,
    markdown,
    searches,
)


def record(*tallies, outcome=False, pit=None, reason="found", rollouts=24, threshold=0.0):
    """Three rollouts from each state: `tallies` says how many of them ended well, None that all were cut."""
    known = [[0, 0, 3] if good is None else [good, 3 - good, 0] for good in tallies]
    return {
        **{"tallies": known, "steps": ["a"] * len(tallies), "outcome": outcome, "pit": pit, "reason": reason},
        **{"num_rollouts": rollouts, "tokens": 10 * rollouts, "search": {"threshold": threshold}},
    }


def test_the_step_before_the_first_dead_state_is_the_wrong_one():
    assert first_dead(record(2, 1, 0, 1)) == {1: 1.0}
    assert first_dead(record(2, 1, 0, 1, outcome=True)) == {1: 1.0}


def test_without_a_dead_state_the_end_decides():
    assert first_dead(record(2, 1, 3, outcome=True)) == NO_ERROR
    assert first_dead(record(2, 1, 3, outcome=False)) == {2: 1.0}


def test_a_state_of_which_nothing_is_known_is_not_blamed():
    assert first_dead(record(2, None, 0)) == {1: 1.0}


@pytest.mark.parametrize("start", [0, None])
def test_a_dead_or_unknown_prompt_gets_no_answer(start):
    assert first_dead(record(start, 1, 0)) == NO_ANSWER
    assert not live(record(start, 1, 0))


def test_a_threshold_makes_more_states_dead():
    assert first_dead(record(3, 1, 3, outcome=True, threshold=0.4)) == {0: 1.0}
    assert not live(record(1, 3, threshold=0.4))


def test_the_locator_says_minus_one_where_the_final_answer_is_right():
    assert first_pit(record(2, 0, outcome=True, reason="correct")) == NO_ERROR
    assert first_pit(record(2, 0, pit=2)) == {1: 1.0}
    assert first_pit(record(0, 0, reason="never solved")) == NO_ANSWER


def test_a_hit_is_the_chance_of_the_label_and_minus_one_is_next_to_no_step():
    answers = [{0: 1.0}, {1: 1.0}, NO_ERROR, NO_ANSWER, any_answer(record(3, 3, 3))]
    labels = [-1, 0, 0, 0, 1]
    assert hits(answers, labels) == [0, 0, 0, 0, 0.25]
    assert hits(answers, labels, within=1) == [0, 1, 0, 0, 0.75]


def test_agreement_counts_rows_without_an_answer_as_wrong():
    found = agreement([{0: 1.0}, NO_ANSWER, {2: 1.0}, {1: 1.0}], [0, 0, 1, 3])
    assert (found["answered"], found["exact"], found["within_one"]) == (0.75, 0.25, 0.5)


def test_cost_is_per_solution_and_against_the_full_search():
    found = cost([record(rollouts=6), record(rollouts=12)], [record(rollouts=24), record(rollouts=12)])
    assert found == {"rollouts": 9, "rollouts_ratio": 0.5, "tokens": 90, "tokens_ratio": 0.5}


def test_tables_of_one_erroneous_and_one_correct_solution():
    full = [record(3, 1, 0, pit=2), record(3, 0, 2, outcome=True, reason="correct")]
    halved = [record(3, 1, 0, pit=2, rollouts=12), record(outcome=True, reason="correct", rollouts=0)]
    table = benchmark({"all": full, "binary": halved}, [1, -1])
    assert table["rollouts, all"]["error_accuracy"] == 1
    assert table["rollouts, all"]["correct_accuracy"] == 0  # the dead state in the middle
    assert table["rollouts, all, told the outcome"]["f1"] == table["rollouts, binary, told the outcome"]["f1"] == 1
    assert table["any step, told the outcome"]["error_accuracy"] == pytest.approx(1 / 3)
    assert "rollouts, binary" not in table
    costs = searches({"all": full[:1], "binary": halved[:1]}, [1])
    assert costs["binary"]["rollouts_ratio"] == 0.5
    assert "| binary | 1.00 | 1.00 | 1.00 | 12.0 | .50 | 120.0 | .50 |" in markdown(costs)
