import itertools
import random

import pytest

from negtune.data.arithmetic import (
    ANSWER_PATTERN,
    Difficulty,
    chains,
    corrupt,
    first_wrong_step,
    parse_question,
    prompt_row,
    solution_text,
    split_of,
)
from negtune.records import read_jsonl
from negtune.verifiers.exact import ExactVerifier
from negtune.verifiers.math import MathVerifier

ROW = {"question": "Start with 4. Add 3. Multiply by 2. Subtract 5. What is the result?", "answer": "9", "n_steps": 3}
RIGHT = "4 + 3 = 7\n7 * 2 = 14\n14 - 5 = 9\n#### 9"


def questions(*args, **kwargs):
    return [row["question"] for row in chains(*args, **kwargs)]


def corrupted(n, seed=0):
    rng = random.Random(seed)
    return [corrupt(row, rng=rng) for row in chains(n, seed=seed)]


# --- problems ---------------------------------------------------------------------------------------------------------


def test_steps_are_what_the_question_says_by_pythons_own_arithmetic():
    for row in chains(300):
        words = row["question"].removesuffix(" What is the result?").removesuffix(".").split(". ")
        value = int(words[0].removeprefix("Start with "))
        for clause, step in zip(words[1:], row["steps"], strict=True):
            verb, number = clause.rsplit(" ", 1)
            sign = {"Add": "+", "Subtract": "-", "Multiply by": "*"}[verb]
            expression = f"{value} {sign} {number}"
            value = eval(expression)
            assert step == f"{expression} = {value}"
        assert (row["answer"], row["n_steps"]) == (str(value), len(row["steps"]))


def test_no_question_is_drawn_twice_or_in_two_splits():
    short = Difficulty(min_steps=1, max_steps=2)  # few enough that all splits meet the same chains again and again
    train, validation, test = (
        questions(n, seed=seed, split=split, difficulty=short)
        for seed, (split, n) in enumerate({"train": 2500, "validation": 400, "test": 400}.items())
    )
    assert len(set(train + validation + test)) == 3300
    assert {split_of(question) for question in test} == {"test"}


def test_splits_have_the_documented_shares():
    drawn = [split_of(f"question {i}") for i in range(8000)]  # standard deviations 39 and 30 rows
    assert drawn.count("train") == pytest.approx(6000, abs=120)
    assert drawn.count("test") == pytest.approx(1000, abs=90)


def test_a_list_is_a_function_of_its_seed_and_the_beginning_of_a_longer_one():
    assert chains(50, seed=3) == chains(80, seed=3)[:50]
    assert questions(50, seed=3) != questions(50, seed=4)


def test_difficulty_is_kept_and_all_of_it_is_used():
    difficulty = Difficulty(min_steps=3, max_steps=5, largest=20, limit=60, operations="+*")
    rows = chains(500, difficulty=difficulty)
    parts = [parse_question(row["question"]) for row in rows]
    assert {row["n_steps"] for row in rows} == {3, 4, 5}
    assert {sign for _, operations in parts for sign, _ in operations} == {"+", "*"}
    assert {first for first, _ in parts} == set(range(1, 21))
    assert {number for _, operations in parts for _, number in operations} == set(range(1, 21))
    results = [int(step.split()[-1]) for row in rows for step in row["steps"]]
    assert max(results) == 60


def test_lengths_are_drawn_equally_often():
    counts = [row["n_steps"] for row in chains(3000)]
    assert all(counts.count(length) == pytest.approx(1000, abs=130) for length in (2, 3, 4))


def test_a_chain_that_cannot_go_on_is_drawn_again_not_for_ever():
    # from 1 on by subtracting 1 or 2: 1-1=0, 2-1=1, 2-2=0 in one step, 2-1-1=0 in two
    only = Difficulty(min_steps=2, max_steps=2, largest=2, operations="-")
    assert split_of("Start with 2. Subtract 1. Subtract 1. What is the result?") == "train"
    assert questions(1, difficulty=only) == ["Start with 2. Subtract 1. Subtract 1. What is the result?"]
    with pytest.raises(ValueError, match="gives about 1 different train questions, 2 were asked for"):
        chains(2, difficulty=only)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 3, "max_steps": 2}, "min_steps <= max_steps, got 3 and 2"),
        ({"min_steps": 0}, "1 <= min_steps"),
        ({"largest": 0}, "got largest=0"),
        ({"largest": 9, "limit": 8}, "limit=8"),
        ({"operations": "+/"}, r"got '\+/'"),
        ({"operations": ""}, "got ''"),
    ],
)
def test_impossible_difficulty_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Difficulty(**settings)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        chains(1, split="dev")


@pytest.mark.parametrize("text", ["What is 7 + 5?", "Start with 4. What is the result?", RIGHT])
def test_a_text_that_is_no_chain_is_refused(text):
    with pytest.raises(ValueError, match="is no chain"):
        parse_question(text)


# --- solutions --------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_by_hand():
    row = prompt_row({**ROW, "steps": RIGHT.split("\n")[:3]})
    assert row["prompt"] == "Start with 4. Add 3. Multiply by 2. Subtract 5. What is the result?\n"
    assert row["completion"] == RIGHT


def test_both_verifiers_of_answers_read_the_solutions():
    rows = chains(40)
    wrong = corrupted(40)
    texts = [solution_text(row["steps"]) for row in rows + wrong]
    golds = [row["answer"] for row in rows] * 2
    with ExactVerifier(pattern=ANSWER_PATTERN) as exact, MathVerifier(workers=1) as math:
        for verifier in (exact, math):
            verdicts = verifier.verify([""] * 80, texts, answer=golds)
            assert [verdict.outcome for verdict in verdicts] == ["correct"] * 40 + ["wrong"] * 40


def test_a_corrupted_solution_has_one_wrong_equation_and_goes_on_from_its_result():
    for row in corrupted(300):
        equations = [step.split(" = ") for step in row["steps"]]
        true = [eval(left) == int(right) for left, right in equations]
        assert [i for i, holds in enumerate(true) if not holds] == [row["first_error"]]
        assert row["labels"] == [int(i < row["first_error"]) for i in range(row["n_steps"])]
        left, right = equations[row["first_error"]]
        assert 1 <= abs(int(right) - eval(left)) <= 5
        assert int(right) >= 0
        for (_, result), (then, _) in itertools.pairwise(equations):
            assert then.split()[0] == result
        assert equations[-1][1] != row["answer"]
        assert row["final_correct"] is False


def test_errors_fall_on_all_steps_and_go_both_ways():
    rows = [row for row in corrupted(600) if row["n_steps"] == 3]
    places = [row["first_error"] for row in rows]
    assert all(places.count(place) == pytest.approx(len(rows) / 3, rel=0.3) for place in range(3))
    wrong = [row["steps"][row["first_error"]].split(" = ") for row in rows]
    assert {int(right) - eval(left) for left, right in wrong} == set(range(-5, 6)) - {0}


def test_corruption_is_a_function_of_its_generator():
    assert corrupted(20, seed=1) == corrupted(20, seed=1)
    row = chains(1)[0]
    rng = random.Random(0)
    assert len({solution_text(corrupt(row, rng=rng)["steps"]) for _ in range(30)}) > 10


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "first"),
    [
        (RIGHT, None),
        (f"\n{RIGHT}\n\n", None),
        ("4+3=7\n 7 * 2 = 14 \n14 - 5 = 9\n####9", None),
        ("3 + 4 = 7\n2 * 7 = 14\n14 - 5 = 9\n#### 9", None),
        ("4 + 3 = 8\n8 * 2 = 16\n16 - 5 = 11\n#### 11", 0),  # wrong arithmetic, carried on
        ("4 + 3 = 7\n7 * 2 = 15\n15 - 5 = 10\n#### 10", 1),
        ("4 + 3 = 7\n7 * 3 = 21\n21 - 5 = 16\n#### 16", 1),  # true, but another number
        ("4 + 3 = 7\n7 + 2 = 9\n9 - 5 = 4\n#### 4", 1),  # true, but another operation
        ("4 + 3 = 7\n8 * 2 = 16\n16 - 5 = 11\n#### 11", 1),  # true, but not from the result before
        ("7 * 2 = 14\n14 - 5 = 9\n#### 9", 0),  # a step left out
        ("4 + 3 = 7\n7 * 2 = 14\n5 - 14 = 9\n#### 9", 2),  # a difference does not commute
        ("4 + 3 = 7\n7 * 2 = 14\n5 - 14 = -9\n#### -9", 2),
        ("4 + 3 = 7\n7 * 2 is 14\n14 - 5 = 9\n#### 9", 1),  # unreadable
        ("4 + 3 = 7\n7 * 2 = 14", 2),  # ends too early
        ("4 + 3 = 7\n#### 9", 1),  # a lucky answer
        ("4 + 3 = 8\n7 * 2 = 14\n14 - 5 = 9\n#### 9", 0),  # wrong step, right answer
        ("4 + 3 = 7\n7 * 2 = 14\n14 - 5 = 9", 3),
        ("4 + 3 = 7\n7 * 2 = 14\n14 - 5 = 9\n#### 14", 3),
        ("4 + 3 = 7\n7 * 2 = 14\n14 - 5 = 9\n9 + 1 = 10\n#### 10", 3),
        (f"{RIGHT}\n9 + 1 = 10", 4),
        ("", 0),
        (f"4 + 3 = {'7' * 5000}\n", 0),
        ("۴ + 3 = 7\n7 * 2 = 14\n14 - 5 = 9\n#### 9", 0),
    ],
)
def test_first_wrong_line_by_hand(completion, first):
    assert first_wrong_step(ROW, completion) == first


def test_the_judge_finds_every_planted_error():
    for row in corrupted(300):
        assert first_wrong_step(row, solution_text(row["steps"])) == row["first_error"]
    for row in chains(300):
        assert first_wrong_step(row, solution_text(row["steps"])) is None


def test_the_judge_agrees_with_step_labels_that_others_wrote(data_dir):
    rows = read_jsonl(data_dir / "arith" / "chain_steplabels.jsonl.gz")
    assert len(rows) == 1000
    for row in rows:
        first = first_wrong_step(row, solution_text(row["steps"]))
        assert (-1 if first is None else first) == row["first_error"]
