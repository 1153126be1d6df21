"""Pairs to tokens: boundaries, ties, lengths, implicit prompts."""

import logging

import pytest

from negtune.data.completions import RowError
from negtune.data.preference import collate_pairs, tokenize_pairs
from negtune.models.tiny import tiny_tokenizer

PAIR = {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome, of course."}


def tokenize(rows, max_length=None, overlong="truncate"):
    return tokenize_pairs(rows, tiny_tokenizer(), max_length=max_length, overlong=overlong)


def test_both_answers_end_with_eos_and_share_their_prompt():
    tokenizer = tiny_tokenizer()
    row = tokenize([PAIR])[0]
    assert row["prompt_ids"] == tokenizer(PAIR["prompt"])["input_ids"]
    for side in ("chosen", "rejected"):
        assert tokenizer.decode(row[f"{side}_ids"]).startswith(PAIR[side])
        assert row[f"{side}_ids"][-1] == tokenizer.eos_token_id


def test_an_implicit_prompt_is_what_both_chats_begin_with():
    explicit = {
        "prompt": [{"role": "user", "content": "Capital of France?"}],
        "chosen": [{"role": "assistant", "content": "Paris"}],
        "rejected": [{"role": "assistant", "content": "Rome"}],
    }
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    assert tokenize([implicit])[0] == tokenize([explicit])[0]


def test_answers_without_a_common_beginning_need_a_prompt():
    with pytest.raises(RowError, match="preference row 0: chosen and rejected share no beginning"):
        tokenize([{"chosen": "Paris", "rejected": "Rome"}])


def test_ties_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        rows = tokenize([PAIR, {**PAIR, "rejected": PAIR["chosen"]}])
    assert rows["row"] == [0]
    assert "1 pairs with two equal answers left out" in caplog.text
    with pytest.raises(RowError, match="no preference pair is left: 0 are longer than max_length=None, 1 are ties"):
        tokenize([{**PAIR, "rejected": PAIR["chosen"]}])


def test_each_way_to_treat_long_pairs(caplog):
    row = tokenize([PAIR])[0]
    prompt, longer = len(row["prompt_ids"]), max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    limit = prompt + longer - 1
    cut = tokenize([PAIR], limit)[0]
    assert cut["rejected_ids"] == row["rejected_ids"][: longer - 1]
    assert cut["chosen_ids"] == row["chosen_ids"]
    with pytest.raises(RowError, match=f"preference row 0: {limit + 1} tokens are more than max_length={limit}"):
        tokenize([PAIR], limit, "error")
    with pytest.raises(RowError, match="1 are longer than"):
        tokenize([PAIR], limit, "drop")
    with caplog.at_level(logging.WARNING), pytest.raises(RowError, match="1 are longer than"):
        tokenize([PAIR], prompt)
    assert f"0 pairs longer than max_length={prompt} cut, 1 dropped" in caplog.text


def test_cutting_that_makes_two_answers_equal_is_a_tie():
    same_start = {**PAIR, "rejected": PAIR["chosen"] + " It is known to everyone."}
    start = len(tokenize([PAIR])[0]["prompt_ids"]) + 1
    with pytest.raises(RowError, match="1 are ties"):
        tokenize([same_start], start)


def test_a_batch_holds_all_chosen_answers_above_all_rejected_ones():
    rows = tokenize([PAIR, {**PAIR, "chosen": " Lima."}])
    batch = collate_pairs(list(rows), 0)
    lengths = [len(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    assert batch["completion_lengths"].tolist() == lengths
    assert batch["rows"].tolist() == [0, 1]


def test_a_text_prompt_beside_two_chats_is_implicit():
    question, answers = {"role": "user", "content": "Capital of France?"}, ("Paris", "Rome")
    chats = [[question, {"role": "assistant", "content": text}] for text in answers]
    row = {"prompt": question["content"], "chosen": chats[0], "rejected": chats[1]}
    explicit = {"prompt": [question], "chosen": chats[0][1:], "rejected": chats[1][1:]}
    assert tokenize([row])[0] == tokenize([explicit])[0]


def test_a_bad_side_is_named():
    with pytest.raises(RowError, match="preference row 0: rejected: the completion is empty"):
        tokenize([{**PAIR, "rejected": " "}])
    with pytest.raises(RowError, match="chosen and rejected must both be text"):
        tokenize([{**PAIR, "rejected": [{"role": "assistant", "content": "Rome"}]}])
    with pytest.raises(RowError, match="chosen or rejected is empty"):
        tokenize([{"chosen": "", "rejected": "Rome"}])


IDS = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 11]}
STEPS = {"chosen_step": [0, 2], "rejected_step": [0, 2]}


def test_tokenised_pairs_are_taken_as_they_are_and_get_no_eos():
    row = tokenize([{**IDS, **STEPS}])[0]
    assert {name: row[name] for name in (*IDS, *STEPS)} == {**IDS, **STEPS}
    assert tiny_tokenizer().eos_token_id not in row["rejected_ids"]


def test_a_batch_says_which_step_it_is_about_if_every_row_does():
    items = [{**IDS, **STEPS}, {**IDS, "chosen_step": [1, 2], "rejected_step": [0, 1]}]
    mask = collate_pairs(items, 0)["step_mask"]
    assert mask.int().tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert "step_mask" not in collate_pairs([items[0], IDS], 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected_ids": []}, "rejected_ids is empty"),
        ({"rejected_step": None}, "the row has chosen_step alone"),
        ({"rejected_step": [0, 3]}, r"rejected_step must be \[start, end\) within the 2 tokens"),
        ({"chosen_step": [2, 2]}, "chosen_step must be"),
    ],
)
def test_broken_tokenised_pairs_are_named(change, words):
    with pytest.raises(RowError, match=f"preference row 1: {words}"):
        tokenize([IDS, {**IDS, **STEPS, **change}])


def test_a_step_must_fit():
    with pytest.raises(RowError, match="a step does not fit max_length=4"):
        tokenize([{**IDS, **STEPS}], max_length=4)
