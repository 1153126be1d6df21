"""TREC's judgements with texts from files and from memory: what is read, what stays unjudged, what is refused."""

import gzip
import json

import pytest

from negtune.data.completions import RowError
from negtune.data.retrieval import load_beir, synthetic_retrieval
from negtune.data.trec import load_trec, read_qrels

CORPUS = {"a": "Lift of a wing", "b": "Heat in a slab", "c": "Flow"}
QUERIES = {"1": "wing lift", "2": "slab", "3": "not judged"}
QRELS = "1 0 a 2\n1 Q0 b\t0\n\n2 0 b  1\n2 0 c -2\n"


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def tsv(texts):
    return "".join(f"{text_id}\t{text}\n" for text_id, text in texts.items())


def test_judgements_are_read_and_what_has_no_line_is_unjudged(tmp_path):
    task = load_trec(CORPUS, QUERIES, write(tmp_path, "qrels.txt", QRELS))
    assert task.qrels == {"1": {"a": 2.0, "b": 0.0}, "2": {"b": 1.0, "c": 0.0}}
    assert task.queries == {"1": "wing lift", "2": "slab"}
    assert task.corpus == CORPUS
    assert "c" not in task.qrels["1"]


def test_texts_come_from_tabs_or_json_lines_compressed_or_not(tmp_path):
    qrels = write(tmp_path, "qrels.txt", QRELS)
    with gzip.open(tmp_path / "collection.tsv.gz", "wt") as out:
        out.write(tsv(CORPUS))
    lines = [json.dumps({"_id": query_id, "text": text}) for query_id, text in QUERIES.items()]
    queries = write(tmp_path, "queries.jsonl", "\n".join(lines))
    assert load_trec(tmp_path / "collection.tsv.gz", str(queries), qrels) == load_trec(CORPUS, QUERIES, qrels)


def test_the_same_collection_in_both_layouts_is_the_same_task(tmp_path):
    task = synthetic_retrieval(2, 6, 3)
    (tmp_path / "qrels").mkdir()
    judged = [(q, d, int(gain)) for q, gains in task.qrels.items() for d, gain in gains.items()]
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in judged)]
    write(tmp_path, "qrels/test.tsv", "\n".join(lines))
    for name, texts in (("corpus", task.corpus), ("queries", task.queries)):
        write(tmp_path, f"{name}.jsonl", "\n".join(json.dumps({"_id": i, "text": t}) for i, t in texts.items()))
    qrels = write(tmp_path, "qrels.txt", "".join(f"{q} 0 {d} {gain}\n" for q, d, gain in judged))
    found = load_trec(write(tmp_path, "c.tsv", tsv(task.corpus)), write(tmp_path, "q.tsv", tsv(task.queries)), qrels)
    assert found == load_beir(tmp_path) == task


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 a 1", "qrels.txt line 2 has 3 columns; judgements of TREC have four: qid iter docid rel"),
        ("1 0 b 1 x", "qrels.txt line 2 has 5 columns"),
        ("1 0 b one", "qrels.txt line 2: rel 'one' is no number"),
        ("1 0 b nan", "qrels.txt line 2: rel 'nan' is no number"),
        ("1 0 a 1", "qrels.txt line 2: query 1 gave document a another grade before; delete one of the two"),
    ],
)
def test_a_bad_judgement_is_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path, "qrels.txt", f"1 0 a 2\n{line}\n")
    with pytest.raises(RowError) as raised:
        read_qrels(path)
    assert str(raised.value).replace(f"{tmp_path}/", "").startswith(message)
    assert read_qrels(write(tmp_path, "twice.txt", "1 0 a 2\n1 0 a 2\n")) == {"1": {"a": 2.0}}


@pytest.mark.parametrize(
    ("corpus", "queries", "message"),
    [
        ("a\tx\nb\n", QUERIES, "corpus.tsv line 2 has 1 columns by tabs; it must be an id, a tab and the text"),
        ("a\tx\ty\n", QUERIES, "corpus.tsv line 1 has 3 columns by tabs"),
        ("a\tx\na\ty\n", QUERIES, "corpus.tsv line 2: document a was there before; ids are unique"),
        ("a\tx\nb\t \n", QUERIES, "corpus.tsv line 2: document b has no title and no text; pass empty='drop'"),
        (tsv(CORPUS), {"1": "x", "2": " "}, "queries 2: query 2 is empty"),
        (tsv(CORPUS), {"1": "x"}, "qrels judge query 2, which is not among the queries"),
        ("a\tx\nb\ty\n", QUERIES, "qrels of query 2 judge document c, which the corpus lacks"),
    ],
)
def test_bad_texts_are_named_by_file_and_line_or_by_query(tmp_path, corpus, queries, message):
    qrels = write(tmp_path, "qrels.txt", QRELS)
    with pytest.raises(RowError) as raised:
        load_trec(write(tmp_path, "corpus.tsv", corpus), queries, qrels)
    assert str(raised.value).replace(f"{tmp_path}/", "").startswith(message)


def test_empty_documents_are_dropped_with_their_judgements_or_kept(tmp_path):
    qrels = write(tmp_path, "qrels.txt", QRELS)
    dropped = load_trec(CORPUS | {"a": ""}, QUERIES, qrels, empty="drop")
    assert (dropped.qrels["1"], "a" in dropped.corpus) == ({"b": 0.0}, False)
    assert load_trec(CORPUS | {"a": ""}, QUERIES, qrels, empty="keep").corpus["a"] == ""
