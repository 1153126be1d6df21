"""Queries and their positives: what a row becomes, and what is refused."""

import pytest

from negtune.data.completions import RowError
from negtune.data.positives import positive_rows, task_rows
from negtune.data.retrieval import RetrievalTask

PLACES = {"a": 0, "b": 1, "c": 2, "d": 3}
TASK = RetrievalTask(
    corpus={"a": "one", "b": "two  words", "c": "two words", "d": "four"},
    queries={"q1": "first", "q2": "second"},
    qrels={"q1": {"b": 2.0, "a": 1.0, "d": 0.0}, "q2": {"b": 1.0, "c": 1.0}},
)


def test_ids_and_positions_name_the_same_documents():
    made = [{"query": "q", "positives": ["c", "a"], "gains": [2, 1]}, {"query": "q", "positives": [2, 0]}]
    first, second = positive_rows(made, PLACES)
    assert (first["documents"], first["gains"]) == ([2, 0], [2.0, 1.0])
    assert (second["documents"], second["gains"]) == ([2, 0], [1.0, 1.0])
    assert [first["row"], second["row"]] == [0, 1]


def test_a_twin_of_a_positive_is_never_to_be_found_unless_it_is_one_too():
    """b and c have the same text: c was not judged for q1, and is relevant to q2."""
    first, second = positive_rows(TASK, PLACES)
    assert dict(zip(first["documents"], first["gains"], strict=True)) == {1: 2.0, 0: 1.0, 2: 0.0}
    assert dict(zip(second["documents"], second["gains"], strict=True)) == {1: 1.0, 2: 1.0}


def test_what_the_index_lacks_cannot_be_found_anyway():
    (first, _) = positive_rows(task_rows(TASK), {"a": 0, "b": 1, "d": 2, "c2": 3} | {"c": 4})
    assert 4 in first["documents"]
    (first,) = positive_rows(task_rows(TASK)[:1], {"a": 0, "b": 1, "d": 2})
    assert first["documents"] == [1, 0]


def test_a_document_with_the_query_s_id_is_left_out_where_asked_for():
    task = RetrievalTask({"q1": "self", "a": "other"}, {"q1": "self?"}, {"q1": {"q1": 1.0, "a": 1.0}})
    (row,) = task_rows(task, drop_same_id=True)
    assert (row["positives"], row["excluded"]) == (["a"], ["q1"])
    assert task_rows(task)[0]["positives"] == ["q1", "a"]


@pytest.mark.parametrize("streamed", [False, True])
def test_sets_and_streams_hold_the_same_rows(streamed):
    from datasets import Dataset, IterableDataset

    made = task_rows(TASK)
    data = IterableDataset.from_generator(lambda: iter(made)) if streamed else Dataset.from_list(made)
    found = [{k: row[k] for k in ("query", "documents", "gains", "row")} for row in positive_rows(data, PLACES)]
    listed = positive_rows(made, PLACES)
    assert found == [{k: row[k] for k in ("query", "documents", "gains", "row")} for row in listed]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": " ", "positives": ["a"]}, "query must be a text that is not empty"),
        ({"query": "q", "positives": []}, r"has no positive: nothing says what its search should find; drop"),
        ({"query": "q", "positives": None}, "has no positive"),
        ({"query": "q", "documents": ["x"], "gains": [1.0]}, "is a candidate list; here documents are searched for"),
        ({"query": "q", "positives": "a"}, "positives must be a list"),
        ({"query": "q", "positives": ["z"]}, "document 'z' is not in the index; add its vector, or drop"),
        ({"query": "q", "positives": [4]}, "4 is no document; give an id .* or a position from 0 to 3"),
        ({"query": "q", "positives": [-1]}, "-1 is no document"),
        ({"query": "q", "positives": [True]}, "True is no document"),
        ({"query": "q", "positives": ["a", 0]}, "document 0 comes twice"),
        ({"query": "q", "positives": ["a"], "excluded": ["a"]}, "document 'a' comes twice"),
        ({"query": "q", "positives": ["a"], "gains": [1, 2]}, "1 positives and 2 gains"),
        ({"query": "q", "positives": ["a"], "gains": [0.0]}, "gain of its positive 'a' is 0.0; it must be above 0"),
        ({"query": "q", "positives": ["a"], "gains": [float("nan")]}, "gain of its positive 'a' is nan"),
    ],
)
def test_rows_are_refused_by_number_and_id(row, message):
    good = {"query": "q", "positives": ["a"]}
    with pytest.raises(RowError, match=rf"train row 1 \(query q7\):? ?.*{message}"):
        positive_rows([good, {"query_id": "q7", **row}], PLACES)


def test_sets_without_rows_are_refused():
    with pytest.raises(RowError, match="the train set is missing: pass a RetrievalTask, or rows with query and pos"):
        positive_rows(None, PLACES)
    with pytest.raises(RowError, match="the train set is empty"):
        positive_rows([], PLACES)
