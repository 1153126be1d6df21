"""Reasoning and answer tags."""

from __future__ import annotations

import re
import time

from hypothesis import given
from hypothesis import strategies as st

from negtune.verifiers.answers import after_thinking, answer_blocks


def test_reasoning_that_does_not_end_is_followed_by_nothing():
    assert after_thinking("<think>a</think>b</think> c") == " c"
    assert after_thinking("a</think>b") == "b"
    assert after_thinking("a") == "a"
    assert after_thinking("a <think> b") == ""


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "</ANSWER>", "a", "\n", "<"])).map("".join))
def test_blocks_are_what_a_regular_expression_finds(text):
    assert answer_blocks(text) == re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)


def test_tags_that_are_never_closed_take_no_time():
    """The expression of the test above is quadratic: 4 s."""
    start = time.process_time()
    assert answer_blocks("<answer>" * 12_500) == []
    assert time.process_time() - start < 0.5
