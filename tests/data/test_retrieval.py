import gzip
import json
import math

import pytest

from negtune.data import retrieval
from negtune.data.completions import RowError
from negtune.data.retrieval import (
    RetrievalTask,
    duplicate_documents,
    load_beir,
    query_folds,
    read_run,
    split_queries,
    synthetic_retrieval,
    write_run,
)

CORPUS = [
    {"_id": "a", "title": "Lift", "text": "of a wing"},
    {"_id": "b", "title": "", "text": "Heat in a slab"},
    {"_id": "c", "text": "Flow"},
]
QUERIES = [{"_id": "1", "text": "wing lift"}, {"_id": "2", "text": "slab"}, {"_id": "3", "text": "not judged"}]
QRELS = ["query-id\tcorpus-id\tscore", "1\ta\t2", "1\tb\t0", "2\tb\t1"]


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    return folder


def refusal(folder, **options):
    with pytest.raises(RowError) as raised:
        load_beir(folder, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(f"{folder}/", "")


def test_title_and_text_are_joined_and_only_judged_queries_are_kept(tmp_path):
    task = load_beir(write(tmp_path))
    assert task.corpus == {"a": "Lift of a wing", "b": "Heat in a slab", "c": "Flow"}
    assert task.queries == {"1": "wing lift", "2": "slab"}
    assert task.qrels == {"1": {"a": 2.0, "b": 0.0}, "2": {"b": 1.0}}
    assert task.positives("1") == {"a": 2.0}


def test_compressed_files_another_qrels_file_and_numbers_as_ids_are_read(tmp_path):
    write(tmp_path, queries=[{"_id": 1, "text": "wing lift"}, {"_id": 2, "text": "slab"}])
    plain = (tmp_path / "corpus.jsonl").read_bytes()
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(plain))
    other = tmp_path / "mine.tsv"
    other.write_text("query-id\tcorpus-id\tscore\r\n2\ta\t-1\r\n\r\n")
    task = load_beir(tmp_path, "nowhere", qrels_file=other)
    assert (task.queries, task.qrels) == ({"2": "slab"}, {"2": {"a": 0.0}})
    assert len(task.corpus) == 3


def test_a_hub_id_is_read_from_its_two_repositories(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(hub_id, config, split):
        asked.append((hub_id, config, split))
        if config is None:
            return [{"query-id": 1, "corpus-id": "a", "score": 2}]
        return {"corpus": CORPUS, "queries": QUERIES}[config]

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_beir("BeIR/wings", "dev")
    assert (task.queries, task.qrels) == ({"1": "wing lift"}, {"1": {"a": 2.0}})
    assert sorted(asked, key=str) == [
        ("BeIR/wings", "corpus", "corpus"),
        ("BeIR/wings", "queries", "queries"),
        ("BeIR/wings-qrels", None, "dev"),
    ]


@pytest.mark.parametrize("error", [ConnectionError("offline\nmore"), RuntimeError("Dataset scripts are gone")])
def test_an_unreachable_hub_says_what_to_pass_instead(monkeypatch, error):
    import datasets

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"cannot read BeIR/wings.* \((offline|Dataset scripts are gone)\); .* a folder"):
        load_beir("BeIR/wings")


def test_missing_folders_and_splits_are_named_with_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; .* Hub id such as BeIR/scifact"):
        load_beir(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"dev\.tsv; splits that are there: test\. Name one, or pass qrels_file"
    ):
        load_beir(write(tmp_path), "dev")
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no queries\.jsonl or queries\.jsonl\.gz"):
        load_beir(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus": [CORPUS[0], CORPUS[0]]}, "corpus.jsonl line 2: document a was there before"),
        ({"corpus": [*CORPUS[:2], '{"_id": "c", "te']}, "corpus.jsonl line 3 is not JSON"),
        ({"corpus": ["[1]"]}, "corpus.jsonl line 1 is no JSON object but list"),
        ({"corpus": [{"title": "x", "text": "y"}]}, "corpus.jsonl line 1 has no _id; it has title, text"),
        ({"corpus": [{"_id": "a", "title": "x"}]}, "corpus.jsonl line 1 has no text"),
        ({"corpus": [{"_id": "a", "title": 3, "text": "y"}]}, "corpus.jsonl line 1: title must be text, not int"),
        ({"queries": [QUERIES[0], QUERIES[0]]}, "queries.jsonl line 2: query 1 was there before"),
        ({"queries": [{"_id": "1", "text": " "}]}, "queries.jsonl line 1: query 1 is empty"),
        ({"qrels": ["1\ta\t2"]}, "qrels/test.tsv line 1 must be the header query-id corpus-id score"),
        ({"qrels": []}, "qrels/test.tsv must be the header"),
        ({"qrels": QRELS[:1]}, "no query has a judgement"),
        ({"qrels": [*QRELS, "2\tc"]}, "qrels/test.tsv line 5 has 2 columns"),
        ({"qrels": [*QRELS, "2\tc\thigh"]}, "qrels/test.tsv line 5: score 'high' is no number"),
        ({"qrels": [*QRELS, "2\tc\tnan"]}, "qrels/test.tsv line 5: score 'nan' is no number"),
        ({"qrels": [*QRELS, "1\ta\t1"]}, "qrels/test.tsv line 5: query 1 gave document a another score before"),
        ({"qrels": [*QRELS, "2\tz\t1"]}, "qrels of query 2 judge document z, which the corpus lacks"),
        ({"qrels": [*QRELS, "9\ta\t1"]}, "qrels judge query 9, which is not among the queries"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line_or_by_query(tmp_path, changed, message):
    assert refusal(write(tmp_path, **changed)).startswith(message)


def test_a_file_cut_short_is_no_shorter_file(tmp_path):
    write(tmp_path)
    whole = gzip.compress((tmp_path / "corpus.jsonl").read_bytes())
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.jsonl.gz").write_bytes(whole[:-12])
    assert "cannot be read after line" in refusal(tmp_path)


def test_a_judgement_given_twice_alike_is_no_contradiction(tmp_path):
    assert load_beir(write(tmp_path, qrels=[*QRELS, "1\ta\t2"])).qrels["1"] == {"a": 2.0, "b": 0.0}


def test_documents_without_text_are_refused_dropped_with_their_judgements_or_kept(tmp_path):
    write(tmp_path, corpus=[*CORPUS, {"_id": "d", "title": " ", "text": ""}], qrels=[*QRELS, "1\td\t1", "3\td\t1"])
    assert refusal(tmp_path).startswith("corpus.jsonl line 4: document d has no title and no text; pass empty='drop'")
    dropped, kept = load_beir(tmp_path, empty="drop"), load_beir(tmp_path, empty="keep")
    assert "d" not in dropped.corpus
    assert dropped.qrels == {"1": {"a": 2.0, "b": 0.0}, "2": {"b": 1.0}}
    assert sorted(dropped.queries) == ["1", "2"]  # nothing is left of what query 3 was judged on
    assert kept.corpus["d"] == ""
    assert kept.positives("3") == {"d": 1.0}
    with pytest.raises(ValueError, match="empty='no' is none of refuse, drop, keep"):
        load_beir(tmp_path, empty="no")


def test_real_collections_have_the_published_counts(data_dir):
    counts = {}
    for name, split in (("scifact", "train"), ("scifact", "test"), ("cranfield", "test"), ("cisi", "test")):
        task = load_beir(data_dir / name, split, empty="keep")
        counts[name, split] = len(task.corpus), len(task.queries), sum(map(len, task.qrels.values()))
    assert counts == {
        ("scifact", "train"): (5183, 809, 919),
        ("scifact", "test"): (5183, 300, 339),
        ("cranfield", "test"): (1400, 225, 1837),
        ("cisi", "test"): (1460, 76, 3114),
    }
    assert duplicate_documents(task) == [["234", "1440"], ["1084", "1447"]]


def test_an_empty_document_of_cranfield_is_judged_relevant_so_leaving_it_out_moves_the_ideal(data_dir):
    with pytest.raises(RowError, match="line 471: document 471 has no title and no text"):
        load_beir(data_dir / "cranfield")
    assert load_beir(data_dir / "cranfield", empty="keep").positives("125")["995"] == 2
    dropped = load_beir(data_dir / "cranfield", empty="drop")
    assert (len(dropped.corpus), sum(map(len, dropped.qrels.values()))) == (1398, 1836)


def many(n=20, twins=()):
    queries = {str(i): f"query {i}" for i in range(n)} | {str(i): "the same  words" for i in twins}
    return RetrievalTask({"a": "x", "b": "y"}, queries, {query_id: {"a": 1.0} for query_id in queries})


def test_a_split_is_disjoint_whole_and_repeatable():
    task = many()
    train, test = split_queries(task, 0.3, seed=1)
    assert (len(train.queries), len(test.queries)) == (14, 6)
    assert train.queries | test.queries == task.queries
    assert train.qrels | test.qrels == task.qrels
    assert test.corpus is task.corpus
    again = RetrievalTask(task.corpus, dict(reversed(task.queries.items())), task.qrels)
    assert split_queries(again, 0.3, seed=1)[1].queries == test.queries
    assert split_queries(task, 0.3, seed=2)[1].queries != test.queries
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="leaves one part empty"):
            split_queries(task, share)


def test_a_pool_keeps_judgements_of_what_a_run_found_and_queries_with_a_relevant_one():
    qrels = {"q1": {"a": 2.0, "b": 0.0, "c": 1.0}, "q2": {"a": 1.0, "b": 0.0}, "q3": {"c": 1.0}}
    task = RetrievalTask({d: d for d in "abc"}, {q: q for q in qrels}, qrels)
    pooled = task.pooled({"q1": {"b": 2.0, "a": 1.0}, "q2": {"b": 1.0}, "q3": {"a": 3.0, "c": 0.0}})
    assert pooled == RetrievalTask(
        task.corpus, {"q1": "q1", "q3": "q3"}, {"q1": {"a": 2.0, "b": 0.0}, "q3": {"c": 1.0}}
    )
    assert task.qrels == qrels


def test_every_query_is_tested_in_one_fold_and_trained_on_in_the_others():
    task = many(11)
    folds = query_folds(task, 4, seed=3)
    assert sorted(len(test.queries) for _, test in folds) == [2, 3, 3, 3]
    assert sorted(query_id for _, test in folds for query_id in test.queries) == sorted(task.queries)
    assert all(train.queries.keys() == task.queries.keys() - test.queries.keys() for train, test in folds)
    with pytest.raises(ValueError, match="need 2 <= n <= different queries, got n=12 and 11"):
        query_folds(task, 12)


def test_queries_with_the_same_text_are_never_on_both_sides():
    task, twins = many(20, twins=range(6)), {str(i) for i in range(6)}
    for seed in range(10):
        for part in (*split_queries(task, 0.5, seed), *(test for _, test in query_folds(task, 4, seed))):
            assert len(twins & part.queries.keys()) in (0, 6)


def test_documents_of_equal_text_are_found_whatever_their_white_space():
    corpus = {"a": "one two", "b": "three", "c": " one\n two", "d": "", "e": " ", "f": "three"}
    task = RetrievalTask(corpus, {"1": "q"}, {"1": {"a": 1.0}})
    assert duplicate_documents(task) == [["a", "c"], ["b", "f"]]


def test_a_task_refuses_judgements_of_nothing():
    with pytest.raises(RowError, match="the corpus has no documents: its file is empty"):
        RetrievalTask({}, {"1": "q"}, {"1": {"a": 1.0}})
    with pytest.raises(RowError, match="no query has a judgement"):
        RetrievalTask({"a": "x"}, {}, {})
    with pytest.raises(RowError, match="query 2 has no judgement; drop it"):
        RetrievalTask({"a": "x"}, {"1": "q", "2": "q"}, {"1": {"a": 1.0}})


def test_a_run_is_written_as_trec_does_and_comes_back_in_its_order(tmp_path):
    run = {"1": {"b": 0.1 + 0.2, "z": 0.25, "a": 0.25}, "2": {"c": -1.0}}
    write_run(tmp_path / "run.trec", run, tag="bm25")
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert lines[0] == "1 Q0 b 1 0.30000000000000004 bm25"
    assert lines[3] == "2 Q0 c 1 -1.0 bm25"
    again = read_run(tmp_path / "run.trec")
    assert again == run
    assert list(again["1"]) == ["b", "z", "a"]


def test_a_run_is_ordered_by_score_and_not_by_its_rank_column(tmp_path):
    (tmp_path / "run.trec").write_text("1 Q0 a 1 0.5 x\n1\tQ0\tb\t2\t0.9\tx\n\n")
    assert list(read_run(tmp_path / "run.trec")["1"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 Q0 b 2 0.5", "line 2 has 5 columns; a run has six"),
        ("1 Q0 b 2 high x", "line 2: score 'high' is no number"),
        ("1 Q0 b 2 inf x", "line 2: score 'inf' is no number"),
        ("1 Q0 a 2 0.4 x", "line 2: query 1 had document a before"),
    ],
)
def test_a_bad_line_of_a_run_is_named(tmp_path, line, message):
    (tmp_path / "run.trec").write_text(f"1 Q0 a 1 0.5 x\n{line}\n")
    with pytest.raises(RowError, match=f"run.trec {message}"):
        read_run(tmp_path / "run.trec")


def test_what_a_run_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RowError, match="cannot hold the name 'my doc'"):
        write_run(tmp_path / "run.trec", {"1": {"my doc": 1.0}})
    with pytest.raises(RowError, match="query 1, document a: score nan cannot be ranked"):
        write_run(tmp_path / "run.trec", {"1": {"a": math.nan}})
    assert list(tmp_path.iterdir()) == []


def test_the_synthetic_collection_grades_documents_by_topic_and_aspect():
    task = synthetic_retrieval(n_topics=4, documents_per_topic=6, queries_per_topic=3, seed=5)
    assert (len(task.corpus), len(task.queries)) == (24, 12)
    assert task == synthetic_retrieval(n_topics=4, documents_per_topic=6, queries_per_topic=3, seed=5)
    assert task != synthetic_retrieval(n_topics=4, documents_per_topic=6, queries_per_topic=3, seed=6)
    assert sorted(task.qrels["q2-1-0"].values()) == [0.0] * 5 + [1.0] * 4 + [2.0] * 2
    assert {d for d, gain in task.qrels["q2-1-0"].items() if gain == 2} == {"d2-1-0", "d2-1-1"}
    with pytest.raises(ValueError, match="takes 1 to 40 topics"):
        synthetic_retrieval(n_topics=41)
    assert len(synthetic_retrieval(n_topics=40).corpus) == 480


def test_a_bag_of_words_finds_some_of_the_synthetic_answers_and_the_right_word_pairs_nearly_all():
    """Otherwise nothing could be learned from it, or nothing would be left to learn."""
    task = synthetic_retrieval(seed=0)
    found = {}
    for name in ("overlap", "topic"):
        hits = 0
        for query_id, query in task.queries.items():
            words, topic = set(query.split()), query_id[1]
            score = {
                d: float(d[1] == topic) if name == "topic" else len(words & set(text.split()))
                for d, text in task.corpus.items()
            }
            best = sorted(score, key=lambda d: -score[d])[:10]
            hits += len(task.positives(query_id).keys() & set(best))
        found[name] = hits / (10 * len(task.queries))
    assert 0.3 < found["overlap"] < 0.7
    assert found["topic"] == 1
    assert set(" ".join([*task.corpus.values(), *task.queries.values()]).split()) <= set(retrieval.SYNTHETIC_WORDS)
