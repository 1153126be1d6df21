"""Reasoning and answer tags, boxes, and that no text takes long to read."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from negtune.verifiers.answers import (
    _CONTRAST,
    after_thinking,
    answer_blocks,
    boxes,
    find_answer,
    find_gold,
    find_word,
)


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


def test_boxes_are_those_that_are_closed_in_the_order_they_open():
    text = "\\boxed{\t1{2} \n} \\fbox{} \\boxed {\\boxed{3}} } \\boxed{ \\boxed{4}"
    assert [text[box] for box in boxes(text)] == ["1{2}", r"\boxed{3}", "3", "4"]


def boxed_one_by_one(text):
    """From the start of each box to its end: quadratic, and plain to see."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                found.append(text[match.end() : i].strip())
                break
    return [content for content in found if content]


pieces = st.sampled_from([r"\boxed", r"\boxed{", r"\fbox {", "{", "}", "}", " ", "\n", "1", r"\{", "\x1c"])


@given(st.lists(pieces, max_size=30).map("".join))
def test_boxes_are_what_is_found_from_the_start_of_each(text):
    assert [text[box] for box in boxes(text)] == boxed_one_by_one(text)


marked = st.lists(st.sampled_from(["####", "#### ", " ", "\t", "\n", "\r", "a", "5", "#", "\x85"]), max_size=20)


@given(marked.map("".join))
def test_an_answer_behind_hashes_is_what_the_plain_expression_finds(text):
    found = [one for one in re.findall(r"^####\s*(.+?)\s*$", text, re.MULTILINE) if one.strip()]
    assert find_gold(text) == (found[-1] if found else text.strip())


parts = st.sampled_from([",", " ", "  ", "\t", "not", "and not", "rather than", "instead of", "5", "or", "a"])


@given(st.lists(parts, max_size=20).map("".join))
def test_what_is_contrasted_is_where_the_plain_expression_finds_it(text):
    plain = re.compile(r",?\s+(?:not|rather than|instead of|and not)\s")
    assert _CONTRAST.split(text, maxsplit=1) == plain.split(text, maxsplit=1)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 12_500,
        r"\boxed{" * 12_500 + "1" + "}" * 12_500,
        "#### a" + " " * 100_000 + "b",
        "#### " + "\n" * 100_000,
        "The answer is 5" + " " * 100_000 + "x",
        "The answer is $5" + ", " * 50_000 + "x",
    ],
    ids=["unclosed", "nested", "hashes", "hashes and lines", "spaces", "commas"],
)
def test_no_text_of_a_hundred_thousand_characters_takes_long(text):
    """What is quadratic takes most of a minute."""
    start = time.process_time()
    for mode in ("auto", "boxed", "last_number"):
        find_answer(text, mode)
    find_word(text, ("yes", "no"))
    find_gold(text)
    assert time.process_time() - start < 1
