"""Steps: texts that join to the completion, tokens that a prefix can end with."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from negtune.data.steps import (
    StepError,
    TokenSteps,
    encoded_steps,
    joined_with,
    split_lines,
    split_sentences,
    split_steps,
    token_steps,
)
from negtune.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("4 + 3 = 7\n7 * 2 = 14\n#### 14", ["4 + 3 = 7\n", "7 * 2 = 14\n", "#### 14"]),
        ("a\n\n\nb\n", ["a\n\n\n", "b\n"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("one line", ["one line"]),
        ("a\n  \nb", ["a\n  \n", "b"]),
    ],
)
def test_lines(text, steps):
    assert split_lines(text) == steps


LONG = "We add the two numbers first. Then we multiply what we have by three. So it is 3.5 in the end."


def test_few_lines_are_cut_into_sentences():
    assert split_sentences(LONG) == [
        "We add the two numbers first.",
        " Then we multiply what we have by three.",
        " So it is 3.5 in the end.",
    ]


def test_many_lines_stay_lines():
    text = "".join(f"Line number {i} is here. It has two sentences.\n" for i in range(4))
    assert len(split_sentences(text)) == 4
    assert len(split_sentences(text, few=4)) == 8


def test_short_pieces_join_their_neighbour():
    text = "Yes. We add the two numbers first and get seven. So? Then we multiply the seven by three."
    assert split_sentences(text) == [
        "Yes. We add the two numbers first and get seven. So?",
        " Then we multiply the seven by three.",
    ]
    assert split_sentences("a\nb\nc\nd\n") == ["a\nb\nc\nd\n"]
    long = "x" * 200
    assert split_sentences(f"{long}\n{long}\n{long}\n{'y' * 40}\n", shortest=20) == [
        f"{long}\n",
        f"{long}\n",
        f"{long}\n{'y' * 40}\n",
    ]


@settings(deadline=None)
@given(st.text(alphabet="ab .!?\n\t3é", max_size=80))
@example("?\n\n.")
def test_nothing_is_lost_and_no_step_is_blank(text):
    for splitter in (split_lines, split_sentences):
        assert "".join(split_steps(text, splitter)) == (text if text.strip() else "")


def test_a_splitter_that_loses_characters_is_refused():
    with pytest.raises(StepError, match=r"the 2 steps do not join .* at character 1 they have 'b', it has '\\nb'"):
        split_steps("a\nb", lambda text: text.split("\n"))
    with pytest.raises(StepError, match="step 2 of 3 is blank"):
        split_steps("a\n\nb", lambda text: ["a\n", "\n", "b"])
    with pytest.raises(StepError, match=r"at character 3 they have '', it has '\\nb'"):
        split_steps("a\n \nb", lambda text: ["a\n "])


def test_given_steps_get_their_separator():
    assert joined_with(["a", "b", "c"], "\n\n") == ["a\n\n", "b\n\n", "c"]
    assert joined_with([], "\n") == []


def test_the_last_step_ends_with_the_eos_and_no_prefix_does():
    ids = [*ids_of("4 + 3 = 7\n7 * 2 = 14\n"), EOS]
    steps = token_steps(ids, TOKENIZER, split_lines)
    assert steps.texts == ["4 + 3 = 7\n", "7 * 2 = 14\n"]
    assert steps.ends[-1] == len(ids)
    assert steps.prefix(ids, 0) == []
    assert TOKENIZER.decode(steps.prefix(ids, 1)) == "4 + 3 = 7\n"
    assert EOS not in steps.prefix(ids, 1)
    assert steps.numbers() == [0] * steps.ends[0] + [1] * (len(ids) - steps.ends[0])
    with pytest.raises(ValueError, match="a prefix has 0 to 1 of 2 steps, got 2"):
        steps.prefix(ids, 2)


TEXT = st.lists(
    st.text(alphabet="The answer is 7+=.é🙂", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=200)
@given(TEXT, st.sampled_from(["\n", "\n\n", ". "]))
def test_prefixes_survive_tokenisation_and_steps_cover_every_token(lines, separator):
    text = "".join(joined_with(lines, separator))
    ids = ids_of(text)
    splitter = split_lines if "\n" in separator else split_sentences
    steps = token_steps(ids, TOKENIZER, splitter)
    assert steps.ends == sorted(set(steps.ends))
    assert steps.ends[-1] == len(ids)
    assert "".join(steps.texts) == text
    assert len(steps.numbers()) == len(ids)
    for i in range(1, len(steps)):
        prefix = steps.prefix(ids, i)
        assert prefix + ids[len(prefix) :] == ids_of(text)
        assert TOKENIZER.decode(prefix) == "".join(steps.texts[:i])


def test_a_boundary_within_a_token_moves_behind_it():
    """' the' is one token: cut before its last two letters the step takes it whole."""
    ids = ids_of("What is the capital")
    assert " the" in [TOKENIZER.decode([i]) for i in ids]
    steps = token_steps(ids, TOKENIZER, ["What is t", "he capital"])
    assert steps.texts == ["What is the", " capital"]
    within = token_steps(ids, TOKENIZER, ["What is t", "h", "e capital"])
    assert within.texts == ["What is the", " capital"]


def test_no_step_ends_within_a_character():
    """An emoji is four byte tokens."""
    ids = ids_of("a🙂\nb")
    assert len(ids) == 7
    assert token_steps(ids, TOKENIZER, split_lines).texts == ["a🙂\n", "b"]
    assert token_steps(ids, TOKENIZER, ["a🙂", "\nb"]) == TokenSteps([5, 7], ["a🙂", "\nb"])


def test_ids_that_no_tokenizer_would_give_are_kept():
    """A model may spell 'the' letter by letter; its own ids are the truth."""
    letters = [i for letter in "the the\n" for i in ids_of(letter)]
    ids = [*letters, *ids_of("end")]
    assert ids_of("the the\nend") != ids
    steps = token_steps(ids, TOKENIZER, split_lines)
    assert steps.prefix(ids, 1) == letters


def test_given_steps_must_be_the_completion():
    ids = [*ids_of("a\nb"), EOS]
    assert token_steps(ids, TOKENIZER, ["a\n", "b"]).texts == ["a\n", "b"]
    assert token_steps(ids, TOKENIZER, [" a\n", "b\n"]).texts == ["a\n", "b"]  # a chat template stripped the turn
    with pytest.raises(StepError, match="at character 2 they have 'c', it has 'b'"):
        token_steps(ids, TOKENIZER, ["a\n", "c"])


def test_completions_without_text_have_one_step_or_none():
    assert token_steps([], TOKENIZER, split_lines) == TokenSteps([], [])
    assert token_steps([EOS], TOKENIZER, split_lines) == TokenSteps([1], [""])


def test_given_steps_are_encoded_one_by_one_and_only_the_last_has_the_eos():
    texts = joined_with(["one step", "and two", "end"], "\n")
    ids, steps = encoded_steps(texts, TOKENIZER)
    assert [TOKENIZER.decode(steps.prefix(ids, i)) for i in range(3)] == ["", "one step\n", "one step\nand two\n"]
    assert ids[-1] == EOS
    assert EOS not in ids[:-1]
    assert steps.ends[-1] == len(ids)
    assert steps.texts == texts
