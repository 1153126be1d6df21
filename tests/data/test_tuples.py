"""Training data of sentence-transformers: every form, what is known over all rows, what is refused."""

import json

import numpy as np
import pytest
from datasets import Dataset

from negtune.data.candidates import candidate_rows
from negtune.data.completions import RowError
from negtune.data.tuples import load_tuples, relevance_map, tuple_rows

PAIR = {"anchor": "q", "positive": "x"}
TRIPLET = PAIR | {"negative": "y"}
LISTS = {"query": "q", "docs": ["y", "x", "z"], "labels": [0, 2, 0]}


def row(documents, gains, known=("x",), query="q"):
    return {
        "query": query,
        "documents": documents,
        "gains": gains,
        "judged": [gain > 0 for gain in gains],
        "known_positives": list(known),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PAIR, row(["x"], [1.0])),
        (("q", "x"), row(["x"], [1.0])),
        (["q", "x", "y"], row(["x", "y"], [1.0, 0.0])),
        (TRIPLET | {"negative_2": "z"}, row(["x", "y", "z"], [1.0, 0.0, 0.0])),
        (TRIPLET | {"negative_2": None, "negative_3": "z"}, row(["x", "y", "z"], [1.0, 0.0, 0.0])),
        (LISTS, row(["y", "x", "z"], [0.0, 2.0, 0.0])),
        (("q", ["x"], [1]), row(["x"], [1.0])),
    ],
)
def test_every_form_becomes_a_row(given, expected):
    assert tuple_rows([given]) == [expected]
    assert candidate_rows([expected], in_batch=True)["documents"][0] == expected["documents"]


def test_negatives_are_judged_only_if_somebody_says_so():
    assert tuple_rows([TRIPLET])[0]["judged"] == [True, False]
    assert tuple_rows([TRIPLET], negatives_judged=True)[0]["judged"] == [True, True]


def test_a_data_set_is_read_by_the_order_of_its_columns():
    data = Dataset.from_list([TRIPLET, {"anchor": "r", "positive": "y", "negative": "x"}])
    assert tuple_rows(data) == [row(["x", "y"], [1.0, 0.0]), row(["y", "x"], [1.0, 0.0], ["y"], "r")]


def test_what_one_row_calls_relevant_is_no_negative_in_another(caplog):
    rows = tuple_rows([("q", "x", "y"), ("q ", "z", "x", "w"), ("r", "y", "x"), ("q", ["z  ", "v"], [0, 0])])
    known = ["x", "z"]
    expected = [row(["x", "y"], [1.0, 0.0], known), row(["z", "w"], [1.0, 0.0], known, "q ")]
    expected += [row(["y", "x"], [1.0, 0.0], ["y"], "r")]
    assert rows == expected
    assert "train: 2 negatives are relevant to their query by other rows and are left out" in caplog.text
    assert relevance_map(rows) == {"q": ["x", "z"], "r": ["y"]}


def test_rows_with_nothing_relevant_are_left_out_and_counted(caplog):
    assert len(tuple_rows([("q", ["x"], [0]), TRIPLET | {"anchor": "r"}], name="dev")) == 1
    assert "dev: 1 of 2 rows have nothing relevant and are left out" in caplog.text
    with pytest.raises(RowError, match="no query of dev has a relevant document; give positives, or labels above 0"):
        tuple_rows([("q", ["x"], [0])], name="dev")


def test_negatives_that_say_nothing_are_none():
    assert tuple_rows([("q", "x", None, " ", "x ", "y", "y")]) == [row(["x", "y"], [1.0, 0.0], ["x"])]
    assert tuple_rows([("q", ["x", "y"], [True, False])]) == [row(["x", "y"], [1.0, 0.0], ["x"])]
    assert tuple_rows([("q", np.array(["x", "y"]), np.array([1, 0]))]) == [row(["x", "y"], [1.0, 0.0], ["x"])]


def test_a_file_holds_objects_or_lists(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n".join(json.dumps(one) for one in (TRIPLET, ["r", "y"], LISTS)))
    assert load_tuples(path) == tuple_rows([TRIPLET, ["r", "y"], LISTS])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "train.jsonl line 2 is not JSON"),
        (
            '"q"',
            "train.jsonl line 2 is str; a row is (anchor, positive), (anchor, positive, negative_1, ...) or (query",
        ),
        ('["q"]', "train.jsonl line 2 has (str); a row is (anchor, positive)"),
        ("[]", "train.jsonl line 2 has (); a row is (anchor, positive)"),
        ('{"a": "q", "b": "x", "score": 0.5}', "train.jsonl line 2 has (str, str, float); a row is"),
        ('["q", null, "y"]', "train.jsonl line 2 has (str, NoneType, str); a row is"),
        ('["", "x"]', "train.jsonl line 2: query must be a text that is not empty, got ''"),
        ('["q", ["x", "x "], [1, 0]]', "train.jsonl line 2: documents 0 and 1 are the same text"),
        (
            '{"anchor": "q", "negative": "y", "positive": "x"}',
            "train.jsonl line 2: column 'negative' stands in place 2 of",
        ),
        (
            '{"positive": "x", "query": "q"}',
            "train.jsonl line 2: column 'positive' stands in place 1 of positive, query;",
        ),
        (
            '{"x": "y", "anchor": "q"}',
            "train.jsonl line 2: column 'anchor' stands in place 2 of x, anchor; a row is (an",
        ),
        ('{"anchor": "q", "text": "y", "positive": "x"}', "train.jsonl line 2: column 'positive' stands in place 3 of"),
        (
            '{"qid": "1", "query": "q", "positive": "x"}',
            "train.jsonl line 2: column 'qid' is no text to train on; remov",
        ),
        (
            '{"query": "q", "pos": ["x"], "neg": ["y"]}',
            "train.jsonl line 2 has columns query, pos, neg; lists of posit",
        ),
        ('["q", ["x", "y"], [1]]', "train.jsonl line 2: 2 documents and 1 gains; give one for each document"),
        ('["q", ["x", "y"], [1, -1]]', "train.jsonl line 2: gains must not be negative, got -1 for document 1"),
        ('["q", ["x", 3], [1, 0]]', "train.jsonl line 2: document 1 is no text or empty (3)"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_text(f'["q", "x", "y"]\n{line}\n')
    with pytest.raises(RowError) as raised:
        load_tuples(tmp_path / "train.jsonl")
    assert str(raised.value).replace(f"{tmp_path}/", "").startswith(message)


def test_nothing_is_said_to_be_nothing(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(RowError, match=r"train\.jsonl is empty; it needs at least one row"):
        load_tuples(tmp_path / "train.jsonl")
