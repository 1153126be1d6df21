"""Rewards on the shape of a completion, by hand."""

import pytest

from negtune.verifiers.shape import MinLength, ModeLength, OneSentence

IDS = [[1], [1, 2, 3, 4], [1] * 8]


def test_lengths_are_those_of_the_tokens():
    texts = ["", "", ""]
    assert MinLength(8)(texts, texts, completion_ids=IDS) == [-1 / 8, -0.5, -1.0]
    assert ModeLength(4, 8)(texts, texts, completion_ids=IDS) == [-3 / 8, 0.0, -0.5]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is a boat.", 1.0),
        (" Is it? ", 1.0),
        ("It is a boat", 0.0),
        ("it is a boat.", 0.0),
        ("It is. A boat.", 0.0),
        ("It is\na boat.", 0.0),
        ("", 0.0),
    ],
)
def test_one_sentence(text, score):
    assert OneSentence()([""], [text], completion_ids=[[1]]) == [score]
    assert OneSentence()([[]], [[{"role": "assistant", "content": text}]]) == [score]
