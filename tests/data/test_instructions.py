"""Instructions from files, in either layout, and made-up ones."""

from __future__ import annotations

import json

import pytest

from negtune.data.completions import RowError
from negtune.data.instructions import load_instructions, synthetic


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_instructions_come_with_their_input_once_and_in_order(tmp_path):
    rows = [
        {"instruction": " Add them. ", "instances": [{"input": "1 2", "output": "3"}]},
        {"instruction": "Say hello.", "instances": [{"input": "", "output": "hello"}]},
        {"prompt": "Say hello."},
        {"prompt": "x" * 301},
        {"instruction": "Sum.", "input": "4"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    assert load_instructions(file) == ["Add them.\n1 2", "Say hello.", "Sum.\n4"]
    assert len(load_instructions(file, longest=None)) == 4
    write(tmp_path / "b.jsonl", [{"prompt": "Another one."}])
    assert load_instructions(tmp_path)[-1] == "Another one."


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(RowError, match=r"row 1 has no instruction; it needs a text column instruction or prompt"):
        load_instructions(write(tmp_path / "a.jsonl", [{"prompt": "ok"}, {"text": "no"}]))
    with pytest.raises(RowError, match="no instruction of at most 1 characters among 1 rows"):
        load_instructions(write(tmp_path / "b.jsonl", [{"prompt": "ok"}]), longest=1)
    with pytest.raises(FileNotFoundError, match="no data folder /nowhere; give a file or folder of JSON lines"):
        load_instructions("/nowhere")


def test_made_up_instructions_are_all_different_and_follow_from_the_seed():
    rows = synthetic(50, seed=3)
    assert len({row["prompt"] for row in rows}) == 50
    assert rows == synthetic(50, seed=3) != synthetic(50, seed=4)
    assert len({len(row["completion"].split()) for row in rows}) > 3
