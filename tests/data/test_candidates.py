"""Candidate lists: what is refused and how it is named, what is left out, and what comes through from any source."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from negtune.data import candidates
from negtune.data.candidates import COUNTED, LEFT_OUT, candidate_rows, checked_row
from negtune.data.completions import RowError

PLAIN = {"query": "q", "documents": ["x", "y"], "gains": [1, 0]}
FULL = {
    "query_id": "7",
    "query": "q",
    "document_ids": ["a", "b"],
    "documents": ["x", "y"],
    "gains": [2.0, 0.0],
    "judged": [True, False],
    "ideal_gains": [3.0, 2.0],
    "teacher_scores": [0.5, -1.5],
    "positives": ["a"],
}


def stream(*rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_what_training_reads_comes_through_unchanged():
    assert checked_row(PLAIN, "row 0") == {"query": "q", "documents": ["x", "y"], "gains": [1.0, 0.0]}
    assert checked_row(FULL, "row 0", k=2, teacher=True) == {
        name: FULL[name] for name in ("query", "documents", "gains", "ideal_gains", "teacher_scores")
    }
    assert checked_row(PLAIN | {"documents": [" x", "y  z"]}, "row 0")["documents"] == [" x", "y  z"]
    numbers = checked_row(PLAIN | {"gains": [np.float32(0.5), np.int64(0)]}, "row 0")["gains"]
    assert numbers == [0.5, 0.0]
    assert {type(number) for number in numbers} == {float}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": " "}, "query must be a text that is not empty, got ' '"),
        ({"query": None}, "query must be a text that is not empty, got None"),
        ({"documents": []}, "documents must be a list of texts, got []"),
        ({"documents": "x y"}, "documents must be a list of texts, got 'x y'"),
        ({"documents": ["x", " \n"]}, r"document b is no text or empty (' \n'); take it out of the list"),
        ({"documents": ["x", None]}, "document b is no text or empty (None)"),
        ({"documents": ["x", " x\n"]}, "documents a and b are the same text and would share its probability; keep one"),
        ({"document_ids": ["a", "a"]}, "documents 0 (a) and 1 (a) have the same id; keep one of them"),
        ({"document_ids": ["a"]}, "2 documents and 1 document_ids; give one for each document"),
        ({"judged": [True]}, "2 documents and 1 judged; give one for each document"),
        ({"judged": True}, "judged must be a list, got True"),
        ({"gains": [1.0]}, "2 documents and 1 gains; give one for each document"),
        ({"gains": []}, "2 documents and 0 gains"),
        ({"gains": "10"}, "gains must be a list, got '10'"),
        ({"gains": None}, "gains are missing; give one number for each document"),
        ({"gains": [1.0, math.nan]}, "gains[1] of document b is nan, which is no finite number"),
        ({"gains": [math.inf, 0.0]}, "gains[0] of document a is inf, which is no finite number"),
        ({"gains": [1.0, None]}, "gains[1] of document b is None, which is no finite number"),
        ({"gains": [True, False]}, "gains[0] of document a is True, which is no finite number"),
        ({"gains": [1.0, -1.0]}, "gains must not be negative, got -1 for document b; 0 is not relevant"),
        ({"ideal_gains": [3.0, math.nan]}, "ideal_gains[1] is nan, which is no finite number"),
        ({"ideal_gains": [2.0, -1.0]}, "ideal_gains must not be negative, got -1; 0 is not relevant"),
        ({"teacher_scores": [1.0]}, "2 documents and 1 teacher_scores"),
        ({"teacher_scores": [1.0, math.nan]}, "teacher_scores[1] of document b is nan"),
        ({"teacher_scores": None}, "teacher_scores are missing; give one number for each document, or another loss"),
        ({"positives": ["a", "z"]}, "its positive 'z' is not among its documents; add it (mine with positives='guar"),
    ],
)
def test_a_list_that_cannot_be_trained_on_is_named_by_query_and_document(changed, message):
    checked_row(FULL, "row 3", teacher=True)
    with pytest.raises(RowError) as raised:
        checked_row(FULL | changed, "row 3", teacher=True)
    assert str(raised.value).startswith(f"row 3 (query 7): {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"documents": ["x", "x"]}, "row 3: documents 0 and 1 are the same text"),
        ({"documents": ["x", ""]}, "row 3: document 1 is no text or empty ('')"),
        ({"gains": [1, math.nan]}, "row 3: gains[1] is nan"),
        ({"gains": [-1, 1]}, "row 3: gains must not be negative, got -1 for document 0"),
        ({"query_id": 0, "query": ""}, "row 3 (query 0): query must be a text"),
    ],
)
def test_without_ids_places_are_named(changed, message):
    with pytest.raises(RowError) as raised:
        checked_row(PLAIN | changed, "row 3")
    assert str(raised.value).startswith(message)


def test_no_list_may_be_shorter_than_k():
    checked_row(PLAIN, "row 0", k=2)
    with pytest.raises(RowError, match="row 0: k=3 is larger than its list of 2 documents; lower k, or give it more"):
        checked_row(PLAIN, "row 0", k=3)


def test_positives_are_found_by_text_whatever_its_white_space_or_by_id():
    checked_row(PLAIN | {"documents": ["x  1", "y"], "positives": ["x 1", " y "]}, "row 0")
    checked_row(PLAIN | {"document_ids": [11, 12], "positives": [12, "x"]}, "row 0")
    with pytest.raises(RowError, match="its positive 'x 2' is not among its documents"):
        checked_row(PLAIN | {"documents": ["x 1", "y"], "positives": ["x 2"]}, "row 0")
    with pytest.raises(RowError, match="its positive 13 is not among its documents"):
        checked_row(PLAIN | {"document_ids": [11, 12], "positives": [13]}, "row 0")
    with pytest.raises(RowError, match="its positive '0' is not among its documents"):
        checked_row(PLAIN | {"positives": ["0"]}, "row 0")  # places are no ids


@pytest.mark.parametrize("ideal", [[], [1.0, 1.0], [2.0], [2.0, 0.0]])
def test_the_ideal_is_no_less_than_the_list(ideal):
    row = PLAIN | {"gains": [1.0, 2.0]}
    for enough in ([2.0, 1.0], [0.0, 1.0, 2.0], [3.0, 1.0, 1.0]):
        assert checked_row(row | {"ideal_gains": enough}, "row 0")["ideal_gains"] == enough
    with pytest.raises(RowError, match=r"row 0: its list has a gain of \d that ideal_gains lack; give those of all"):
        checked_row(row | {"ideal_gains": ideal}, "row 0")


# --- Sets -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    query: str
    documents: list[str]
    gains: list[float]
    ranks: dict = field(default_factory=dict)


@pytest.mark.parametrize(
    "source",
    [
        [PLAIN, PLAIN | {"query": "r"}],
        Dataset.from_list([PLAIN, PLAIN | {"query": "r"}]),
        stream(PLAIN, PLAIN | {"query": "r"}),
        [Listed("q", ["x", "y"], [1.0, 0.0]), Listed("r", ["x", "y"], [1.0, 0.0])],
        (row for row in [PLAIN, PLAIN | {"query": "r"}]),
    ],
    ids=["list", "Dataset", "IterableDataset", "dataclasses", "generator"],
)
def test_all_sources_give_the_same_rows(source):
    rows = candidate_rows(source)
    assert isinstance(rows, IterableDataset if isinstance(source, IterableDataset) else Dataset)
    wanted = {"documents": ["x", "y"], "gains": [1.0, 0.0], COUNTED: True}
    found = [{name: value for name, value in row.items() if name != LEFT_OUT} for row in rows]
    assert found == [{"query": "q", **wanted, "row": 0}, {"query": "r", **wanted, "row": 1}]


@pytest.mark.parametrize("keep", [False, True])
def test_other_columns_are_kept_only_when_asked_for(keep):
    for source in ([FULL], Dataset.from_list([FULL]), stream(FULL)):
        (row,) = candidate_rows(source, keep=keep)
        read = {"query", "documents", "gains", "ideal_gains", "teacher_scores", "row", COUNTED}
        read |= {LEFT_OUT} if isinstance(source, IterableDataset) else set()
        assert set(row) == (read | set(FULL) if keep else read)
        assert not keep or row["document_ids"] == ["a", "b"]


def test_rows_without_a_relevant_document_are_left_out_and_counted(caplog):
    rows = [PLAIN, PLAIN | {"gains": [0, 0]}, PLAIN | {"query": "r"}]
    for source in (rows, Dataset.from_list(rows)):
        kept = candidate_rows(source, name="eval")
        assert kept["row"] == [0, 2]  # their places in what was given
        assert "eval: 1 of 3 queries have no relevant document and are left out" in caplog.text
        caplog.clear()
    assert [row["row"] for row in candidate_rows(stream(*rows))] == [0, 2]
    assert [row["row"] for row in candidate_rows(stream(*reversed(rows)))] == [0, 2]


def test_a_row_of_a_stream_says_how_many_were_left_out_before_it():
    """The same in every pass, whatever the one before it left behind."""
    nothing = PLAIN | {"gains": [0, 0]}
    rows = candidate_rows(stream(nothing, nothing, PLAIN, PLAIN, nothing, PLAIN, nothing))
    for _ in range(2):
        assert [(row["row"], row[LEFT_OUT]) for row in rows] == [(2, 2), (3, 0), (5, 1)]


def test_a_stream_in_which_nothing_says_something_is_told_of(caplog, monkeypatch):
    monkeypatch.setattr(candidates, "PATIENCE", 3)
    rows = candidate_rows(stream(*[PLAIN | {"gains": [0, 0]}] * 8), name="eval")
    assert list(rows) == []
    assert caplog.text.count("eval: the last 3 queries of the stream have no relevant document") == 1


def test_where_a_function_scores_all_rows_stay_and_need_no_gains():
    rows = [{"query": "q", "documents": ["x", "y"]}, PLAIN | {"gains": [0.0, 0.0]}]
    for source in (rows, stream(*rows)):
        found = list(candidate_rows(source, scored=True))
        assert [row["gains"] for row in found] == [[0.0, 0.0], [0.0, 0.0]]
        assert all(row[COUNTED] for row in found)
    with pytest.raises(RowError, match="gains are missing"):
        candidate_rows(rows)


def test_a_teacher_is_asked_for_only_where_it_is_read():
    rows = [PLAIN | {"teacher_scores": [3, 1]}]
    assert candidate_rows(rows, teacher=True)["teacher_scores"] == [[3.0, 1.0]]
    assert candidate_rows([PLAIN]).column_names == ["query", "documents", "gains", "row", COUNTED]
    with pytest.raises(RowError, match="train row 0: teacher_scores are missing"):
        candidate_rows([PLAIN], teacher=True)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("ideal_gains", [2.0, 1.0]),
        ("teacher_scores", [2.0, 1.0]),
        ("known_positives", ["x", "z"]),
        ("selection_ranks", [1, 2]),
        ("selection_retriever", ["bm25", "dense"]),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_column_that_batches_are_made_of_is_in_all_rows_or_in_none(column, value, first):
    rows = [PLAIN | {column: value}, PLAIN]
    rows = rows if first else rows[::-1]
    for source in (rows, Dataset.from_list([{column: None, **row} for row in rows])):
        with pytest.raises(RowError, match=f"train row 1: some rows have {column} and others not; give them in all"):
            candidate_rows(source, in_batch=True)


# --- What is known to be relevant, and how documents were selected --------------------------------------------------

SELECTED = {
    "selection_retriever": ["bm25", "dense"],
    "selection_ranks": [1, None],
    "selection_propensity": [1.0, 0.25],
    "selection_features": [[1, 0.5], [0, -2.0]],
}


def test_how_documents_were_selected_comes_through():
    found = checked_row(FULL | SELECTED, "row 0")
    assert {name: found[name] for name in SELECTED} == SELECTED | {"selection_ranks": [1, 0]}
    assert checked_row(PLAIN | {"selection_retriever": "bm25"}, "row 0")["selection_retriever"] == ["bm25", "bm25"]
    assert not set(SELECTED) & set(checked_row(FULL, "row 0"))
    as_set = candidate_rows(Dataset.from_list([PLAIN | SELECTED, PLAIN | SELECTED | {"selection_ranks": [None, 9]}]))
    assert as_set["selection_ranks"][:] == [[1, 0], [0, 9]]
    unfound = PLAIN | SELECTED | {"selection_ranks": [None, None]}
    assert [row["selection_ranks"] for row in candidate_rows(stream(unfound, PLAIN | SELECTED))] == [[0, 0], [1, 0]]


def test_known_positives_are_kept_where_documents_are_shared():
    row = FULL | {"known_positives": ["a", 9]}
    found = checked_row(row, "row 0", in_batch=True)
    assert (found["known_positives"], found["document_ids"]) == (["a", "9"], ["a", "b"])
    assert not {"known_positives", "document_ids"} & set(checked_row(row, "row 0"))
    found = checked_row(PLAIN | {"known_positives": ["z  z\n", "x"]}, "row 0", in_batch=True)
    assert found["known_positives"] == ["z z", "x"]
    assert "document_ids" not in found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"selection_retriever": ["bm25"]}, "2 documents and 1 selection_retriever; give one for each document"),
        ({"selection_retriever": ["bm25", " "]}, "selection_retriever of document b is ' '; give a name"),
        ({"selection_ranks": [1]}, "2 documents and 1 selection_ranks"),
        ({"selection_ranks": [1, 0]}, "selection_ranks of document b is 0; ranks are whole numbers from 1, None where"),
        ({"selection_ranks": [True, 1]}, "selection_ranks of document a is True; ranks are whole numbers"),
        ({"selection_ranks": [1, 1.5]}, "selection_ranks of document b is 1.5; ranks are whole numbers"),
        ({"selection_propensity": [1.0]}, "2 documents and 1 selection_propensity"),
        ({"selection_propensity": [0.0, 1.0]}, "selection_propensity of document a is 0; it is a chance, above 0 and"),
        ({"selection_propensity": [1.0, 1.01]}, "selection_propensity of document b is 1.01; it is a chance"),
        ({"selection_propensity": [1.0, math.nan]}, "selection_propensity[1] of document b is nan"),
        ({"selection_features": [[1.0]]}, "2 documents and 1 selection_features"),
        ({"selection_features": [1.0, 2.0]}, "selection_features of document a must be a list, got 1.0"),
        ({"selection_features": [[1.0], [math.inf]]}, "selection_features of document b[0] is inf"),
        ({"selection_features": [[1.0], [1.0, 2.0]]}, "selection_features of document b are 2 numbers, those of docum"),
        ({"selection_features": [[], []]}, "selection_features of document a are 0 numbers"),
        ({"known_positives": []}, "document a has a gain and is not among known_positives ([]), which are all that is"),
        ({"known_positives": ["x", "zz"]}, "document a has a gain and is not among known_positives (['x', 'zz']), wh"),
        ({"known_positives": [1.0]}, "document a has a gain and is not among known_positives (['1.0'])"),
        ({"known_positives": "a"}, "known_positives must be a list, got 'a'"),
        ({"known_positives": ["a", "b"]}, "document b has gain 0 and is among known_positives; give its gain, take it"),
    ],
)
def test_selection_and_known_positives_that_cannot_be_are_named(changed, message):
    checked_row(FULL | SELECTED | {"known_positives": ["a"]}, "row 3")
    with pytest.raises(RowError) as raised:
        checked_row(FULL | SELECTED | changed, "row 3")
    assert str(raised.value).startswith(f"row 3 (query 7): {message}")


def test_features_are_equally_many_in_all_rows():
    rows = [PLAIN | {"selection_features": [[1.0], [2.0]]}, PLAIN | {"selection_features": [[1.0, 0.0], [2.0, 0.0]]}]
    with pytest.raises(RowError, match="train row 1: 2 selection_features a document, and 1 in the first row; give"):
        candidate_rows(rows)


@pytest.mark.parametrize("as_set", [list, Dataset.from_list])
def test_places_in_a_list_are_no_ids_of_documents(as_set):
    rows = [
        {"query": f"q{i}", "documents": [f"x{i}", "y"], "gains": [1, 0], "document_ids": ["0", "1"]} for i in range(2)
    ]
    assert len(candidate_rows(as_set(rows), in_batch=True)) == 2
    rows = [row | {"known_positives": ["0"]} for row in rows]
    with pytest.raises(RowError, match="train row 1: document 0 had another text before; beside known_positives docum"):
        candidate_rows(as_set(rows), in_batch=True)
    assert len(candidate_rows(as_set(rows))) == 2
    spaced = [{**rows[0], "documents": ["x0 ", " y"]}, rows[0]]
    assert len(candidate_rows(as_set(spaced), in_batch=True)) == 2


def test_the_first_row_of_a_stream_is_read_at_once_and_the_others_when_they_are_reached():
    reached = []

    def made():
        for number in range(4):
            reached.append(number)
            yield PLAIN | {"gains": [1.0, math.nan if number == 2 else 0.0]}

    rows = candidate_rows(IterableDataset.from_generator(made))
    assert max(reached) < 2
    got = iter(rows)
    assert [next(got)["row"], next(got)["row"]] == [0, 1]
    with pytest.raises(RowError, match=r"train row 2: gains\[1\] is nan"):
        next(got)
    with pytest.raises(RowError, match="eval row 0: query must be a text"):
        candidate_rows(stream(PLAIN | {"query": ""}, PLAIN), name="eval")


def test_nothing_to_train_on_is_said_to_be_so():
    for source, message in (
        (None, "the train set is missing: pass rows with query, documents and gains"),
        ([], "the train set is empty; it needs at least one row"),
        (stream(), "the train stream is empty"),
        ([PLAIN | {"gains": [0, 0]}], "no train query has a relevant document"),
    ):
        with pytest.raises(RowError, match=message):
            candidate_rows(source)


@pytest.mark.parametrize("as_set", [list, Dataset.from_list])
def test_a_bad_row_is_named_by_its_set_and_place(as_set):
    with pytest.raises(RowError, match=r"eval row 1 \(query 8\): documents 0 and 1 are the same text"):
        candidate_rows(
            as_set([PLAIN | {"query_id": "7"}, PLAIN | {"query_id": "8", "documents": ["x", "x "]}]), name="eval"
        )


KNOWN = FULL | {"selection_features": [[1, 0.5], [2, 0.0]], "selection_propensity": [1.0, 0.25]}


def test_where_documents_come_from_comes_through_where_it_is_asked_for():
    assert "judged" not in checked_row(KNOWN, "row 0")
    found = checked_row(KNOWN, "row 0", provenance=True)
    assert found["judged"] == [True, False]
    assert found["selection_features"] == [[1.0, 0.5], [2.0, 0.0]]
    assert found["selection_propensity"] == [1.0, 0.25]
    assert checked_row(PLAIN, "row 0", provenance=True)["judged"] == [False, False]
    assert "selection_features" not in candidate_rows([FULL], provenance=True).column_names
    assert candidate_rows([KNOWN, KNOWN], provenance=True)["selection_features"][1] == [[1.0, 0.5], [2.0, 0.0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"judged": [True, None]}, "judged of document b is None; say True or False"),
        ({"judged": [True, "no"]}, "judged of document b is 'no'"),
    ],
)
def test_bad_provenance_is_refused_by_name(changed, message):
    with pytest.raises(RowError, match=f"row 0 .query 7.: .*{message}"):
        checked_row(KNOWN | changed, "row 0", provenance=True)


def test_provenance_is_given_in_all_rows_or_none():
    with pytest.raises(RowError, match="train row 1: some rows have selection_propensity and others not"):
        candidate_rows([KNOWN, FULL], provenance=True)
