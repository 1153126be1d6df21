"""Answers: where they stand, when they are equal, and which gold answers are refused."""

from __future__ import annotations

import pytest

from negtune.verifiers.answers import find_answer
from negtune.verifiers.math import MathVerifier


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify", reason="needs negtune[verify]")
    with MathVerifier(workers=1, seconds=10) as one:
        yield one


FOUND = {
    r"So we get \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
    r"\boxed{3} and again \boxed{3}": "3",
    "She has 5 + 3 = 8 apples.\n#### 8": "8",
    "Therefore, the answer is 1,250 dollars.": "1,250 dollars",
    "The final answer is: $x = 4$": "x = 4",
    "<think>It may be 7 or 8.</think>The answer is 9.": "9",
    "We get **17**.": "17",
    "12": "12",
    "First 3 boxes. Then 4 more make 7 in all.": "7",
    "<think>a</think><answer>5</answer>": "5",
    "The answer is 3.5.": "3.5",
    "The answer is 42, not 43.": "42",
    "**Answer:** 42": "42",
}
NOT_FOUND = [
    "",
    r"\boxed{1} or maybe \boxed{2}",
    "<think>The answer is 5, I am sure",
    "It is not 42.",
    "Is it 42?",
    "<answer>4</answer> <answer>5</answer>",
    "The answer is 4 or 5.",
    "I do not know.",
]


@pytest.mark.parametrize("text", FOUND)
def test_the_answer_is_what_the_completion_commits_to(text):
    assert find_answer(text) == FOUND[text]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_hedges_denials_and_unfinished_thoughts_are_no_answer(text):
    assert find_answer(text) is None


def test_modes_look_in_one_place_only():
    text = r"First 3, then \boxed{4}, then 5"
    assert find_answer(text, "boxed") == "4"
    assert find_answer(text, "last_number") == "5"
    assert find_answer("Only 5", "boxed") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        (r"\boxed{B}", "B"),
        (r"\boxed{B}, that is \boxed{(B)}", "B"),
        (r"\boxed{B} or else \boxed{C}", None),
        (r"\boxed{(B)} or else \boxed{C}", None),
        ("b", "B"),
        ("A is too small, so the correct option is D", "D"),
        ("It could be A or B", None),
        ("The answer is A, B, C, or D.", None),
        ("I have no idea", None),
    ],
)
def test_a_choice_is_one_letter(text, letter):
    assert find_answer(text, "choice") == letter


EQUAL = [
    ("0.5", "1/2"),
    (r"\frac{3}{4}", "0.75"),
    ("1,250", "1250"),
    ("1250 dollars", "1250"),
    ("5%", "0.05"),
    (r"\text{no}", "No."),
    ("(1, 2)", "(1,2)"),
    (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("0.66666667", "2/3"),
    ("B", "B"),
    ("½", "0.5"),
    ("x²", "x^2"),
    ("[0, 1)", "[0,1)"),
    ("x = 5", "5"),
    ("18", "She sells 9 eggs for 2 dollars, 9*2 = <<9*2=18>>18.\n#### 18"),
]
DIFFERENT = [
    ("0.05", "0.5"),
    ("-3", "3"),
    ("3 feet", "3 meters"),
    ("0.66", "2/3"),
    ("(2, 1)", "(1,2)"),
    ("x^2+1", "(x+1)^2"),
    ("no", "yes"),
    ("C", "B"),
    ("[0, 1]", "(0, 1)"),
    ("1e999999999", "5"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_are_correct(verifier, answer, gold):
    found = verifier.verify(["p"], [rf"\boxed{{{answer}}}"], answer=[gold])[0]
    assert found.outcome == "correct", found.reason


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_are_wrong(verifier, answer, gold):
    found = verifier.verify(["p"], [rf"\boxed{{{answer}}}"], answer=[gold])[0]
    assert found.outcome == "wrong", found.reason


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("Yes, because 7 is prime.", "correct"),
        ("Yes and no.", "wrong"),
        ("The answer is no, yes?", "wrong"),
        ("7", "wrong"),
    ],
)
def test_yes_or_no_is_one_of_two_words(verifier, text, outcome):
    assert verifier.verify(["p"], [text], answer=["yes"])[0].outcome == outcome


def test_a_comparison_that_takes_for_ever_is_unscored():
    pytest.importorskip("math_verify", reason="needs negtune[verify]")
    with MathVerifier(seconds=0.01, workers=1) as verifier:
        verifier._golds["x+1"] = "x+1"  # as if it had been read in time
        found = verifier.verify(["p"], [r"\boxed{(x^{99}-1)/(x-1)+y}"], answer=["x+1"])[0]
    assert (found.outcome, found.score) == ("unscored", None)
    assert "time limit" in found.reason


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        (None, "row 1: the gold answer is None"),
        ("  ", "row 1: the gold answer"),
        (r"\frac{1}{", "cannot be read as math"),
    ],
)
def test_gold_answers_that_nothing_could_equal_are_refused(verifier, gold, words):
    with pytest.raises(ValueError, match=words):
        verifier.verify(["p"] * 2, ["1", "2"], answer=["1", gold])


def test_modes_refuse_gold_answers_they_cannot_use():
    pytest.importorskip("math_verify", reason="needs negtune[verify]")
    with MathVerifier("last_number", workers=1) as one, pytest.raises(ValueError, match="'yes' is no number"):
        one.check_gold(["3", "yes"])
    with MathVerifier("choice", workers=1) as one, pytest.raises(ValueError, match="'12' is no letter"):
        one.check_gold(["A", "12"])
    with pytest.raises(ValueError, match="mode must be auto"):
        MathVerifier("boxes")


def test_the_column_has_to_be_there(verifier):
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        verifier.verify(["p"], ["1"], gold=["1"])
