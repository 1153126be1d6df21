"""A pairwise judge as a verifier: scores are chances to win, position cancels, silence is not a loss."""

from __future__ import annotations

import pytest

from negtune.verifiers.judge import JudgeVerifier
from negtune.verifiers.verdict import verdicts_of


def longer(prompts, completions, **columns):
    return [0.5 if len(a) == len(b) else float(len(b) > len(a)) for a, b in completions]


def scores(judge, prompts, completions, both_orders=True, **columns):
    verdicts = JudgeVerifier(judge, both_orders=both_orders).verify(prompts, completions, **columns)
    return [verdict.score for verdict in verdicts]


def test_score_is_the_share_of_wins_within_the_prompt():
    # of a, bbb, cc: bbb beats both, cc beats a; of dddd, e: the one beats the other, whatever the first prompt has
    assert scores(longer, list("pppqq"), ["a", "bbb", "cc", "dddd", "e"]) == [0.0, 1.0, 0.5, 1.0, 0.0]


def test_a_judge_that_prefers_what_stands_first_tells_nothing_in_both_orders():
    def first(prompts, completions, **columns):
        return [0] * len(completions)

    assert scores(first, list("ppp"), ["a", "b", "c"]) == [0.5, 0.5, 0.5]
    assert scores(first, list("ppp"), ["a", "b", "c"], both_orders=False) == [1.0, 0.5, 0.0]


def test_chances_ties_and_trls_minus_one():
    assert scores(lambda prompts, completions: [0.25, 0.75], "pp", ["a", "b"]) == [0.75, 0.25]
    assert scores(longer, "pp", ["a", "b"]) == [0.5, 0.5]
    assert scores(lambda prompts, completions: [-1, None], "pp", ["a", "b"]) == [None, None]
    assert scores(lambda prompts, completions: [-1, 0], "pp", ["a", "b"]) == [0.0, 1.0]  # the other order: b first


def test_a_completion_that_is_alone_is_neither_good_nor_bad():
    assert scores(longer, ["p", "q", "q"], ["a", "b", "cc"]) == [0.5, 0.0, 1.0]
    assert scores(longer, [], []) == []


def test_columns_come_along():
    seen = []

    def judge(prompts, completions, topic):
        seen.extend(topic)
        return [0] * len(completions)

    scores(judge, ["p", "p", "q", "q"], ["a", "b", "c", "d"], topic=["x", "x", "y", "y"])
    assert seen == ["x", "y", "x", "y"]


def test_token_ids_of_one_answer_are_not_handed_on():
    """A judge may take prompts and completions alone, as TRL's do."""
    verifier = JudgeVerifier(lambda prompts, completions: [0] * len(completions), both_orders=False)
    verdicts = verdicts_of(verifier, ["p", "p"], ["a", "b"], [[1], [2]], {})
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


@pytest.mark.parametrize(("found", "message"), [([0], "gave 1 answers to 2"), (1, "gave 1 answers"), ([0, 7], "got 7")])
def test_nonsense_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        scores(lambda prompts, completions: found, "pp", ["a", "b"])
