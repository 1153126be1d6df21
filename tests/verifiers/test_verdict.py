"""Verdicts, and TRL's reward functions in both directions."""

from __future__ import annotations

import math

import pytest

from negtune.verifiers.verdict import (
    FromRewardFunction,
    TooManyUnscored,
    Verdict,
    as_reward_function,
    rewards,
    stop_if_unscored,
    text_of,
)


def test_scores_follow_from_outcomes_and_unscored_is_never_zero():
    verdicts = [Verdict("correct"), Verdict("wrong"), Verdict("unscored"), Verdict("wrong", score=0.2)]
    assert rewards(verdicts) == [1.0, 0.0, None, 0.2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outcome": "maybe"}, "correct, wrong or unscored"),
        ({"outcome": "unscored", "score": 0.0}, "has no score"),
        ({"outcome": "wrong", "score": math.nan}, "NaN"),
    ],
)
def test_impossible_verdicts_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Verdict(**arguments)


class Length:
    def verify(self, prompts, completions, limit=None):
        return [
            Verdict("unscored", reason="no limit")
            if allowed is None
            else Verdict("correct" if len(text_of(c)) <= allowed else "wrong")
            for c, allowed in zip(completions, limit, strict=True)
        ]


def test_a_verifier_is_a_trl_reward_function():
    reward = as_reward_function(Length())
    assert reward.__name__ == "Length"
    chat = [{"role": "assistant", "content": "abcdef"}]
    given = {"limit": [3, 3, None], "trainer_state": object(), "log_extra": print}
    assert reward(prompts=["p"] * 3, completions=["ab", chat, "c"], **given) == [1.0, 0.0, None]


def test_a_reward_function_is_a_verifier_and_its_failures_are_unscored():
    def reward(prompts, completions, answer):
        if completions[0] == "boom":
            raise RuntimeError("scorer down")
        return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]

    verifier = FromRewardFunction(reward)
    verdicts = verifier.verify(["p"] * 4, ["1", "boom", "2", "3"], answer=["1", "1", "1", None])
    assert [v.outcome for v in verdicts] == ["correct", "unscored", "wrong", "unscored"]
    assert "RuntimeError: scorer down" in verdicts[1].reason
    all_at_once = FromRewardFunction(reward, one_by_one=False)
    assert [v.outcome for v in all_at_once.verify(["p"] * 2, ["boom", "1"], answer=["1", "1"])] == ["unscored"] * 2


def test_a_reward_function_that_returns_too_few_numbers_or_nan_scores_nothing():
    few = FromRewardFunction(lambda prompts, completions: [1.0], one_by_one=False)
    assert "1 rewards for 2 completions" in few.verify(["p"] * 2, ["a", "b"])[0].reason
    assert FromRewardFunction(lambda prompts, completions: [math.nan]).verify(["p"], ["a"])[0].outcome == "unscored"


def test_too_many_unscored_stop_the_run_with_the_reasons():
    verdicts = [Verdict("wrong")] * 30 + [Verdict("unscored", reason="Traceback\nValueError: no gold")] * 10
    stop_if_unscored(verdicts, 0.25)
    stop_if_unscored(verdicts[-10:], 0.1)  # too few to judge
    with pytest.raises(TooManyUnscored, match=r"10 of 40 .* 10 x ValueError: no gold"):
        stop_if_unscored(verdicts, 0.2)
