import gzip
import json

import pytest

from negtune.data.arithmetic import first_wrong_step
from negtune.data.completions import RowError
from negtune.data.gsm8k import load_gsm8k
from negtune.data.processbench import load_processbench, synthetic_processbench, with_answers

ROW = {
    "id": "gsm8k-0",
    "generator": "a model",
    "problem": "Two and two?",
    "steps": ["2 + 2 = 5", "The answer is 5."],
    "final_answer_correct": False,
    "label": 0,
}


def write(folder, *rows, name="gsm8k.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_come_plain_and_compressed(tmp_path):
    (read,) = load_processbench(write(tmp_path, ROW))
    assert read == {name: value for name, value in ROW.items() if name != "generator"}
    (tmp_path / "gsm8k.jsonl").unlink()
    (tmp_path / "gsm8k.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode() + b"\n"))
    assert load_processbench(tmp_path) == [read]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, r"row 1 \(gsm8k-0\): label must be -1 or one of the 2 steps counted from 0, got 2"),
        ({"label": None}, "got None; mend or drop the row"),
        ({"label": True}, "got True"),
        ({"steps": ["a", " "]}, "none of them blank"),
        ({"steps": []}, "at least one text"),
        ({"final_answer_correct": 1}, "must be true or false, got 1"),
        ({"problem": ""}, r"row 1 \(gsm8k-0\): problem must be text"),
        ({"id": None}, "row 1: id must be text"),
    ],
)
def test_a_broken_row_is_named(tmp_path, change, message):
    with pytest.raises(RowError, match=message):
        load_processbench(write(tmp_path, {**ROW, **change}))


def test_an_id_that_stands_there_twice_is_refused(tmp_path):
    with pytest.raises(RowError, match="row 2: the id gsm8k-0 stands there twice"):
        load_processbench(write(tmp_path, ROW, ROW))


def test_a_missing_folder_or_file_names_the_flag_and_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder .*gone; --data takes a Hub id \(Qwen/ProcessBench\)"):
        load_processbench(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"has no train.jsonl or train.jsonl.gz; --gsm8k"):
        load_gsm8k(tmp_path, "train")
    with pytest.raises(RowError, match="is empty"):
        load_processbench(write(tmp_path))


def test_gsm8k_loses_its_calculator_marks(tmp_path):
    solved = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    assert load_gsm8k(write(tmp_path, solved, name="test.jsonl"), "test") == [
        {"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}
    ]


def test_answers_are_joined_by_the_words_of_the_problem():
    solved = [{"question": "Two  and\ntwo? ", "answer": "#### 4"}]
    rows = [ROW, {**ROW, "id": "gsm8k-1", "problem": "Two and three?"}]
    assert with_answers(rows, solved) == [{**ROW, "answer": "#### 4"}]
    with pytest.raises(RowError, match="none of the 1 problems has an answer"):
        with_answers(rows[1:], solved)


def test_the_twin_goes_wrong_where_its_label_says():
    rows = synthetic_processbench(20, seed=3)
    for row in rows:
        wrong = first_wrong_step({"question": row["problem"]}, "\n".join(row["steps"]))
        assert (-1 if wrong is None else wrong) == row["label"]
        assert row["final_answer_correct"] == (row["label"] == -1)
    assert sum(row["label"] >= 0 for row in rows) == 10
    assert rows == synthetic_processbench(20, seed=3)
