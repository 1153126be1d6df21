"""Candidate lists: what is in them, what is said of it, and that a trainer takes it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from negtune.data.candidates import candidate_rows
from negtune.data.retrieval import RetrievalTask, load_beir, synthetic_retrieval
from negtune.records import RecordError
from negtune.retrieval import retrievers
from negtune.retrieval.mining import Mined, mine, read_lists, to_rows, write_lists
from negtune.retrieval.retrievers import BM25Retriever, RunRetriever

CORPUS = {name: f"text of {name}" for name in "abcdefghij"}
TASK = RetrievalTask(CORPUS, {"1": "first", "2": "second"}, {"1": {"a": 2.0, "b": 0.0, "j": 1.0}, "2": {"c": 1.0}})
WORDS = {"1": {"b": 9.0, "a": 8.0, "d": 7.0, "e": 6.0, "f": 5.0}, "2": {"d": 3.0, "e": 2.0}}
DENSE = {"1": {"d": 0.9, "g": 0.8, "h": 0.7, "i": 0.6}, "2": {"c": 0.5, "a": 0.4}}
BOTH = [RunRetriever(WORDS, "words"), RunRetriever(DENSE, "dense")]


def mined_ids(**settings):
    return {one.query_id: sorted(one.document_ids) for one in mine(TASK, BOTH, **settings).lists}


def by_id(one, column):
    return dict(zip(one.document_ids, column, strict=True))


def test_a_list_says_of_every_document_what_is_known():
    first, second = mine(TASK, BOTH, n_documents=6).lists
    assert (first.query_id, first.query) == ("1", "first")
    assert sorted(first.document_ids) == ["a", "b", "d", "e", "g", "h"]
    assert first.documents == [CORPUS[document_id] for document_id in first.document_ids]
    assert by_id(first, first.gains) == {"a": 2.0, "b": 0.0, "d": 0.0, "e": 0.0, "g": 0.0, "h": 0.0}
    assert by_id(first, first.judged) == {"a": True, "b": True, "d": False, "e": False, "g": False, "h": False}
    assert by_id(first, first.ranks["words"]) == {"a": 2, "b": 1, "d": 3, "e": 4, "g": None, "h": None}
    assert by_id(first, first.ranks["dense"]) == {"a": None, "b": None, "d": 1, "e": None, "g": 2, "h": 3}
    assert by_id(first, first.scores["dense"]) == {"a": None, "b": None, "d": 0.9, "e": None, "g": 0.8, "h": 0.7}
    assert not first.guaranteed
    assert by_id(second, second.ranks["dense"])["c"] == 1
    assert len(candidate_rows([first, second], k=4)) == 2  # the second has c, d, a and e


def test_retrievers_take_turns_by_rank():
    # words: b a d e f; dense: d g h i; in turn: b d, a g, h (d was there), e i, f; of them a is relevant
    assert mined_ids(n_documents=4)["1"] == ["a", "b", "d", "g"]
    assert mined_ids(n_documents=6)["1"] == ["a", "b", "d", "e", "g", "h"]
    only = mine(TASK, BOTH[:1], n_documents=4).lists[0]
    assert sorted(only.document_ids) == ["a", "b", "d", "e"]


def test_first_ranks_can_be_skipped_for_negatives_but_not_for_positives():
    # b, d and g are among the first two of a retriever; so is a, which is relevant
    assert mined_ids(n_documents=4, skip=2)["1"] == ["a", "e", "h", "i"]
    assert mined_ids(n_documents=9, skip=2)["1"] == ["a", "e", "f", "h", "i"]


def test_no_deeper_ranks_are_used_than_asked_for():
    mined = mine(TASK, BOTH, depth=2, n_documents=10)
    assert sorted(mined.lists[0].document_ids) == ["a", "b", "d", "g"]
    assert mined.short == ["1", "2"]
    assert mine(TASK, BOTH, depth=2, n_documents=4).short == []
    eager = RunRetriever(WORDS, "words")
    eager.retrieve = lambda queries, k: WORDS
    assert sorted(mine(TASK, [eager], depth=2).lists[0].document_ids) == ["a", "b"]


def test_queries_whose_positives_were_not_retrieved_have_no_list_and_are_named():
    mined = mine(TASK, BOTH[:1])
    assert [one.query_id for one in mined.lists] == ["1"]
    assert mined.without_positive == ["2"]
    assert mined.missing == {"1": ["j"], "2": ["c"]}
    assert mined.counts() == {
        "lists": 1,
        "lists_with_added_positives": 0,
        "queries_without_positive": 1,
        "positives_missing": 2,
        "duplicates_left_out": 0,
        "short_lists": 1,
        "negatives": 4,
        "negatives_judged": 1,
    }


def test_guaranteed_positives_are_put_in_and_marked():
    mined = mine(TASK, BOTH[:1], n_documents=4, positives="guaranteed")
    first, second = mined.lists
    assert by_id(first, first.added) == {"a": False, "b": False, "d": False, "j": True}
    assert by_id(second, second.added) == {"c": True, "d": False, "e": False}
    assert first.guaranteed
    assert second.ranks == {"words": [{"c": None, "d": 1, "e": 2}[d] for d in second.document_ids]}
    assert (mined.missing, mined.without_positive) == ({}, [])
    assert mined.counts()["lists_with_added_positives"] == 2
    rows = [{**row, "positives": list(TASK.positives(row["query_id"]))} for row in to_rows(mined.lists)]
    assert len(candidate_rows(rows)) == 2


def test_of_too_many_positives_those_with_the_highest_gains_and_then_retrieved_ones_stay():
    gains = {"j": 1.0, "a": 1.0, "d": 2.0, "i": 3.0}
    task = RetrievalTask(CORPUS, {"1": "first"}, {"1": gains})
    for most, expected in ((1, {"i"}), (2, {"i", "d"}), (3, {"i", "d", "a"}), (None, {"i", "d", "a"})):
        mined = mine(task, BOTH, n_documents=4, max_positives=most, positives="guaranteed")
        assert {d for d, gain in by_id(mined.lists[0], mined.lists[0].gains).items() if gain > 0} == expected
        assert len(mined.lists[0].document_ids) == 4
        assert set(mined.missing["1"]) == gains.keys() - expected


def test_random_negatives_come_from_the_whole_depth_and_repeat_with_the_seed():
    settings = {"n_documents": 3, "select": "random"}
    drawn = [mined_ids(**settings, seed=seed)["1"] for seed in range(40)]
    assert drawn[0] == mined_ids(**settings, seed=0)["1"]
    assert all("a" in ids and len(ids) == 3 for ids in drawn)
    assert set().union(*drawn) == set("abdefghi")


def test_a_positive_may_stand_anywhere():
    mined = [mine(TASK, BOTH, n_documents=4, positives="guaranteed", seed=seed) for seed in range(60)]
    places = [one.lists[0].document_ids.index(name) for one in mined for name in "aj"]
    assert all(18 <= places.count(place) <= 42 for place in range(4))  # 30 of 120 each
    negatives = ["".join(d for d in one.lists[0].document_ids if d in "bd") for one in mined]
    assert 18 <= negatives.count("bd") <= 42  # nor do places tell of ranks


def test_a_list_does_not_depend_on_other_queries_or_on_the_run():
    whole = mine(TASK, BOTH, n_documents=4, select="random", seed=5)
    alone = mine(TASK.only(["2"]), BOTH, n_documents=4, select="random", seed=5)
    assert alone.lists == [one for one in whole.lists if one.query_id == "2"]


def test_texts_of_positives_are_no_negatives_and_equal_negatives_come_once():
    corpus = CORPUS | {"d": " text  of a", "f": CORPUS["e"], "g": CORPUS["j"]}
    mined = mine(RetrievalTask(corpus, TASK.queries, TASK.qrels), BOTH, n_documents=10)
    assert sorted(mined.lists[0].document_ids) == ["a", "b", "e", "h", "i"]  # j itself was not retrieved
    assert mined.duplicates["1"] == ["d", "g", "f"]
    assert mined.missing == {"1": ["j"]}
    assert len(candidate_rows(mined.lists)) == len(mined.lists)


def test_equal_positives_are_one_and_none_of_them_is_missing():
    corpus = CORPUS | {"j": CORPUS["a"]}
    mined = mine(RetrievalTask(corpus, TASK.queries, TASK.qrels), BOTH, n_documents=10, positives="guaranteed")
    assert [d for d in mined.lists[0].document_ids if d in "aj"] == ["a"]  # the higher gain
    assert (mined.duplicates, mined.missing) == ({"1": ["j"]}, {})


def test_documents_without_text_are_in_no_list():
    corpus = CORPUS | {"b": "", "c": " "}
    mined = mine(RetrievalTask(corpus, TASK.queries, TASK.qrels), BOTH, n_documents=10, positives="guaranteed")
    assert all("b" not in one.document_ids and "c" not in one.document_ids for one in mined.lists)
    assert (mined.without_positive, mined.missing) == (["2"], {"2": ["c"]})


def test_the_document_that_is_the_query_can_be_left_out():
    task = RetrievalTask(CORPUS, {"d": "first", "a": "second"}, {"d": {"b": 1.0}, "a": {"a": 1.0, "c": 1.0}})
    run = {"d": WORDS["1"], "a": WORDS["1"]}
    kept = mine(task, [RunRetriever(run, "x")], positives="guaranteed")
    assert all(one.query_id in one.document_ids for one in kept.lists)
    left = mine(task, [RunRetriever(run, "x")], positives="guaranteed", drop_same_id=True)
    assert [sorted(one.document_ids) for one in left.lists] == [["a", "b", "e", "f"], ["b", "c", "d", "e", "f"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": 100}, "need 0 <= skip < depth, got skip=100, depth=100"),
        ({"n_documents": 1}, "1 <= max_positives < n_documents, got max_positives=None, n_documents=1"),
        ({"max_positives": 16}, "got max_positives=16, n_documents=16"),
        ({"max_positives": 0}, "got max_positives=0, n_documents=16"),
        ({"positives": "all"}, "positives='all' is neither 'retrieved' nor 'guaranteed'"),
        ({"select": "hard"}, "select='hard' is neither 'top' nor 'random'"),
        ({"retrievers": []}, "at least one retriever, each with its own name, got []"),
        ({"retrievers": [BOTH[0], BOTH[0]]}, "each with its own name, got ['words', 'words']"),
        ({"retrievers": [RunRetriever({"1": {"z": 1.0}}, "x")]}, "x found document z for query 1, which the corpus"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        mine(TASK, settings.pop("retrievers", BOTH), **settings)


def test_lists_come_back_from_their_file(tmp_path):
    lists = mine(TASK, BOTH, positives="guaranteed").lists
    write_lists(tmp_path / "lists.jsonl", lists)
    assert read_lists(tmp_path / "lists.jsonl") == lists
    (tmp_path / "lists.jsonl").write_text('{"query_id": "1"}\n')
    with pytest.raises(RecordError, match=r"lists\.jsonl, list 1 is no candidate list .*missing.*; mine it again"):
        read_lists(tmp_path / "lists.jsonl")


def test_rows_have_what_a_trainer_needs_and_no_more():
    lists = mine(TASK, BOTH).lists
    rows = to_rows(lists)
    names = ["document_ids", "documents", "gains", "ideal_gains", "judged", "query", "query_id"]
    assert sorted(rows[0]) == names
    assert rows[1]["documents"] is lists[1].documents
    assert list(candidate_rows(rows, k=2)) == list(candidate_rows(lists, k=2))


def test_rows_name_all_that_is_known_to_be_relevant_and_what_found_their_documents():
    corpus = {**CORPUS, "twin": CORPUS["d"] + " "}
    task = RetrievalTask(corpus, {"1": "first"}, {"1": {"j": 1.0, "d": 2.0, "b": 0.0}})
    lists = mine(task, BOTH, n_documents=3, max_positives=1).lists
    (row,) = to_rows(lists, task=task, selected_by="dense")
    assert sorted(row["known_positives"]) == ["d", "j", "twin"]
    assert not {"d", "twin"} & {d for d, gain in zip(row["document_ids"], row["gains"], strict=True) if gain == 0}
    assert row["selection_ranks"] == lists[0].ranks[row["selection_retriever"]]
    (checked,) = candidate_rows([row], in_batch=True)
    assert checked["selection_ranks"] == [rank or 0 for rank in row["selection_ranks"]]
    with pytest.raises(ValueError, match="the task lacks query 1 of the lists; give the task they were mined for"):
        to_rows(lists, task=RetrievalTask(corpus, {"2": "other"}, {"2": {"d": 1.0}}))
    with pytest.raises(ValueError, match="the list of query 1 has no ranks of splade; it was mined with"):
        to_rows(lists, selected_by="splade")


def test_rows_know_what_was_taken_out_and_what_a_judge_said():
    task = RetrievalTask({**CORPUS, "twin": CORPUS["i"] + " "}, {"1": "first"}, {"1": {"j": 1.0, "e": 1.0}})
    (one,) = mine(task, BOTH, n_documents=5, positives="guaranteed").lists
    changed = by_id(one, one.gains)
    negative = next(d for d, gain in changed.items() if gain == 0)

    def known(dropped=(), **gains):
        found = replace(one, gains=[*(changed | gains).values()], ideal_gains=[1.0] * 3)
        (row,) = to_rows(Mined([found], dropped={"1": dict.fromkeys(dropped, "rule")}), task=task)
        candidate_rows([row], in_batch=True)
        return sorted(row["known_positives"])

    assert "i" not in changed
    assert known() == ["e", "j"]
    assert known(dropped=["i"]) == ["e", "i", "j", "twin"]
    assert known(**{negative: 1.0}) == sorted(["e", "j", negative])
    assert known(j=0.0) == ["e"]


def test_lists_without_the_ideal_of_their_query_have_to_be_mined_again(tmp_path):
    old = {name: value for name, value in vars(mine(TASK, BOTH).lists[0]).items() if name != "ideal_gains"}
    (tmp_path / "lists.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(
        RecordError, match=r"lists\.jsonl, list 1 is no candidate list .*'ideal_gains'.*; mine it again"
    ):
        read_lists(tmp_path / "lists.jsonl")


def test_the_ideal_holds_relevant_documents_that_the_list_lacks():
    gains = {"j": 1.0, "a": 1.0, "d": 2.0, "b": 0.0, "i": 3.0}
    task = RetrievalTask(CORPUS, {"1": "first"}, {"1": gains})
    for settings in ({}, {"max_positives": 1}, {"positives": "guaranteed"}, {"depth": 1}):
        (one,) = mine(task, BOTH, n_documents=4, **settings).lists
        assert one.ideal_gains == [3.0, 2.0, 1.0, 1.0]  # j was not retrieved, and no list has room for all
        assert sum(gain > 0 for gain in one.gains) < 4
        (row,) = candidate_rows([one])
        assert row["ideal_gains"] == one.ideal_gains


needs_bm25s = pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason=f"needs bm25s: {retrievers.INSTALL}")


@needs_bm25s
def test_synthetic_lists_hold_positives_and_hard_negatives():
    task = synthetic_retrieval()
    mined = mine(task, [BM25Retriever(task.corpus)], n_documents=8, max_positives=4)
    assert len(candidate_rows(mined.lists, k=8)) == len(mined.lists)
    assert len(mined.lists) == 44  # of 48; the others share no word with what they look for
    assert all(1 <= sum(gain > 0 for gain in one.gains) <= 4 and len(one.gains) == 8 for one in mined.lists)


@needs_bm25s
def test_lists_of_real_collections_pass_the_check(data_dir):
    for name, split in (("scifact", "train"), ("cranfield", "test"), ("cisi", "test")):
        task = load_beir(data_dir / name, split, empty="keep")
        mined = mine(task, [BM25Retriever(task.corpus)], depth=50, n_documents=16, max_positives=8)
        # a query of a few rare words shares them with a few documents only
        candidate_rows([one for one in mined.lists if one.query_id not in mined.short], k=16)
        assert len(candidate_rows(mined.lists, k=2)) == len(mined.lists)
        assert len(mined.short) < 0.05 * len(task.queries)
        assert len(mined.lists) + len(mined.without_positive) == len(task.queries)
        assert len(mined.lists) > 0.8 * len(task.queries)
