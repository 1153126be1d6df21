"""Rows with credit to tokens: whose step is whose, what is unknown, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset

from negtune.data.advantages import collate_advantages, tokenize_advantages
from negtune.data.completions import RowError
from negtune.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
CHAT = [{"role": "user", "content": "Start with 4. Add 3."}]
STEPS = ["4 + 3 = 7", "7 * 2 = 15", "#### 15"]
LABELLED = {"prompt": "Add.", "steps": STEPS, "step_labels": [1, 0, 0]}
IDS = {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9, EOS], "step_ends": [2, 4], "step_advantages": [0.5, -1.0]}


def tokenize(rows, max_length=None, overlong="truncate"):
    return tokenize_advantages(rows, TOKENIZER, max_length=max_length, overlong=overlong)


def test_labels_become_advantages_of_the_steps_tokens():
    row = tokenize([LABELLED])[0]
    assert row["step_advantages"] == [1.0, -1.0, None]
    starts = [0, *row["step_ends"][:-1]]
    texts = [TOKENIZER.decode(row["completion_ids"][a:b]) for a, b in zip(starts, row["step_ends"], strict=True)]
    assert texts == ["4 + 3 = 7\n", "7 * 2 = 15\n", "#### 15<|end|>"]


@pytest.mark.parametrize("prompt", ["Add.", CHAT])
def test_a_given_completion_and_its_steps_agree_with_joined_ones(prompt):
    text = "\n".join(STEPS)
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    pieces = [*(step + "\n" for step in STEPS[:-1]), STEPS[-1]]
    row = {**LABELLED, "prompt": prompt}
    whole = {**row, "completion": completion, "steps": pieces}
    assert tokenize([row])[0] == tokenize([whole])[0] == tokenize([{**row, "steps": pieces}])[0]


def test_a_first_error_is_one_label_per_step():
    row = {**LABELLED, "step_labels": None}
    assert tokenize([{**row, "first_error": 1}])[0]["step_advantages"] == [1, -1, None]
    assert tokenize([{**row, "first_error": -1}])[0]["step_advantages"] == [1, 1, 1]


def test_an_unfinished_text_has_no_eos():
    row = {"prompt": "Add.", "completion": "4 + 3 = 7\n", "advantage": -1.0}
    assert tokenize([row])[0]["completion_ids"][-1] == EOS
    assert EOS not in tokenize([{**row, "finished": False}])[0]["completion_ids"]


def test_tokenised_rows_are_taken_as_they_are():
    given = {**IDS, "behaviour_logps": [-0.1, -0.2, -0.3, -0.4]}
    row = tokenize([given])[0]
    assert {name: row[name] for name in given} == given


def test_a_batch_has_the_credit_of_every_token():
    rows = tokenize([IDS, {"prompt_ids": [5], "completion_ids": [7, 8], "advantage": 2.0}])
    batch = collate_advantages(list(rows), 0)
    assert batch["advantages"].tolist() == [[0.5, 0.5, -1, -1], [2, 2, 0, 0]]
    assert batch["known"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["steps"].tolist() == [[0, 0, 1, 1], [0, 0, -1, -1]]
    assert "behaviour_logps" not in batch
    assert batch["rows"].tolist() == [0, 1]


def test_unknown_steps_are_masked_and_zero_is_not_unknown():
    batch = collate_advantages(list(tokenize([{**IDS, "step_advantages": [None, 0.0]}])), 0)
    assert batch["known"].tolist() == [[False, False, True, True]]
    assert batch["advantages"].tolist() == [[0, 0, 0, 0]]


def test_behaviour_logps_reach_the_batch_only_if_every_row_has_them():
    drawn = {**IDS, "behaviour_logps": [-0.5, -0.25, -1.0, -2.0]}
    batch = collate_advantages(list(tokenize([drawn, drawn])), 0)
    assert torch.equal(batch["behaviour_logps"][1], torch.tensor([-0.5, -0.25, -1.0, -2.0]))
    assert "behaviour_logps" not in collate_advantages(list(tokenize([drawn, IDS])), 0)


def test_a_cut_completion_keeps_the_steps_that_fit(caplog):
    with caplog.at_level(logging.WARNING):
        rows = tokenize([{**IDS, "behaviour_logps": [-1.0] * 4}, IDS], max_length=5)
    assert rows[0]["completion_ids"] == [7, 8, 9]
    assert rows[0]["step_ends"] == [2, 3]
    assert rows[0]["step_advantages"] == [0.5, -1.0]
    assert len(rows[0]["behaviour_logps"]) == 3
    assert "2 completions longer than max_length=5 cut" in caplog.text
    short = tokenize([IDS], max_length=4)[0]
    assert (short["step_ends"], short["step_advantages"]) == ([2], [0.5])
    with pytest.raises(RowError, match="6 tokens are more than max_length=5"):
        tokenize([IDS], max_length=5, overlong="error")
    assert len(tokenize([IDS, {**IDS, "completion_ids": [7, EOS], "step_ends": [1, 2]}], 5, "drop")) == 1


def test_rows_without_a_judged_step_are_counted_out(caplog):
    bare = {**IDS, "step_advantages": [None, None]}
    with caplog.at_level(logging.WARNING):
        assert len(tokenize([bare, IDS, bare])) == 1
    assert "2 completions without a judged step left out" in caplog.text
    with pytest.raises(RowError, match="no train completion is left: 0 .* 1 have no judged step"):
        tokenize([bare])


def test_a_completion_whose_advantage_is_none_is_not_judged():
    whole = {"prompt_ids": [5], "completion_ids": [7, EOS], "advantage": 1.0}
    assert [row["row"] for row in tokenize([{**whole, "advantage": None}, whole])] == [1]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_neutral_zero_is_found_though_no_row_has_both(kind):
    """In PRM800K 0 is neutral: a row of 1 and 0 alone would have its neutral step pushed down."""
    rows = [{**IDS, "step_advantages": None, "step_labels": labels} for labels in ([1, 1], [1, 0], [-1, None])]
    with pytest.raises(
        RowError, match="0 in train row 1 and -1 in row 2: where 0 is neutral, as in PRM800K, give None"
    ):
        tokenize(kind(rows))
    assert len(tokenize(kind(rows[:2]))) == 2
    assert len(tokenize(kind(rows[::2]))) == 2


def test_log_probabilities_of_another_temperature_are_no_behaviour_policy():
    drawn = {**IDS, "behaviour_logps": [-0.5, -0.25, -1.0, -2.0], "temperature": 0.7}
    rows = list(tokenize([drawn]))
    assert "behaviour_logps" in collate_advantages(rows, 0, temperature=0.7, ratios=True)
    assert "behaviour_logps" not in collate_advantages(rows, 0, temperature=1.0)
    with pytest.raises(RowError, match="row 0 was drawn at temperature 0.7 and temperature is 1"):
        collate_advantages(rows, 0, temperature=1.0, ratios=True)


def test_lists_data_sets_and_streams_give_the_same_rows():
    rows = [IDS, {**IDS, "step_advantages": [None, None]}, {**IDS, "step_advantages": [None, 1.0]}]
    listed = list(tokenize(rows))
    assert list(tokenize(Dataset.from_list(rows))) == listed
    streamed = list(tokenize(Dataset.from_list(rows).to_iterable_dataset()))
    assert [row["row"] for row in streamed] == [row["row"] for row in listed] == [0, 2]
    assert streamed == listed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"step_advantages": None},
            "a row needs one of step_advantages, step_labels, first_error, advantage, this one has none",
        ),
        ({"advantage": 1.0}, "this one has step_advantages and advantage"),
        ({"step_advantages": [1.0]}, "1 step_advantages for 2 steps; give one per step"),
        ({"step_advantages": [1.0, float("nan")]}, "the advantage of step 2 is nan"),
        ({"step_advantages": ["1", "0"]}, "the advantage of step 1 is '1'; give a finite number"),
        ({"step_ends": [2, 3]}, "step_ends must rise to the number of completion tokens, 4"),
        ({"step_ends": [0, 4]}, "step_ends must rise"),
        ({"step_ends": [3, 2, 4], "step_advantages": [1.0, 1.0, 1.0]}, "step_ends must rise"),
        ({"step_ends": None}, "step_advantages needs steps .* or step_ends"),
        ({"completion_ids": []}, "completion_ids is empty"),
        ({"behaviour_logps": [-1.0] * 4, "temperature": 0}, "a greedy draw .temperature 0. give no ratio"),
        ({"behaviour_logps": [-1.0]}, "1 behaviour_logps for 4 completion tokens"),
        ({"behaviour_logps": [-1.0, 0.5, -1.0, -1.0]}, "finite and at most 0"),
    ],
)
def test_broken_tokenised_rows_are_named(change, words):
    with pytest.raises(RowError, match=f"train row 1: .*{words}"):
        tokenize([IDS, {**IDS, **change}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step_labels": [1, 0]}, "2 step_labels for 3 steps"),
        ({"step_labels": [1, 2, 0]}, "a step label is 1, 0, -1"),
        ({"step_labels": [1, 0, -1]}, "0 beside -1: where 0 is neutral, as in PRM800K, give None"),
        ({"step_labels": None, "first_error": 3}, "the first error must be -1 or one of the 3 steps"),
        ({"completion": "4 + 3 = 7"}, "do not join to the completion"),
        ({"steps": ["4", " ", "7"]}, "step 2 of 3 is blank"),
        ({"behaviour_logps": [-1.0]}, "behaviour_logps belong to tokens"),
        ({"prompt": None}, "column 'prompt' is missing"),
    ],
)
def test_broken_text_rows_are_named(change, words):
    with pytest.raises(RowError, match=f"train row 0: .*{words}"):
        tokenize([{**LABELLED, **change}])


def test_steps_that_share_a_token_are_refused():
    row = {
        "prompt": "x",
        "completion": "What is the capital",
        "steps": ["What is t", "h", "e capital"],
        "step_labels": [1, 1, 1],
    }
    with pytest.raises(RowError, match="3 steps end with 2 different tokens"):
        tokenize([row])


def test_an_empty_set_is_refused():
    with pytest.raises(RowError, match="the train set is empty"):
        tokenize([])
