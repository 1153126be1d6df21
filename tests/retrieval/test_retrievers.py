"""Ranked documents: by words, by vectors, from a run, and reranked; and the published figures of real collections."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch

from negtune.data.retrieval import RetrievalTask, load_beir
from negtune.retrieval import encoder, retrievers
from negtune.retrieval.encoder import load_encoder
from negtune.retrieval.index import ExactIndex, FaissIndex
from negtune.retrieval.retrievers import BM25Retriever, DenseRetriever, Retriever, RunRetriever, rerank, words

needs_bm25s = pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason=f"needs bm25s: {retrievers.INSTALL}")
needs_wordllama = pytest.mark.skipif(
    not (importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("wordllama")),
    reason=f"needs sentence-transformers and wordllama: {encoder.INSTALL_WORDLLAMA}",
)
CORPUS = {"a": "the cat sat", "b": "cat cat dog", "c": "a bird", "d": "the cat sat"}


def ndcg_at_10(task, run):
    total = 0.0
    for query_id, gains in task.qrels.items():
        found = [gains.get(document_id, 0) for document_id in list(run[query_id])[:10]]
        ideal = sorted(gains.values(), reverse=True)[:10]
        dcg, best = (sum(g / math.log2(2 + i) for i, g in enumerate(row)) for row in (found, ideal))
        total += dcg / best
    return total / len(task.qrels)


@needs_bm25s
def test_bm25_gives_the_scores_of_its_formula_to_documents_that_share_a_word_and_no_others():
    run = BM25Retriever(CORPUS, k1=0.9, b=0.4).retrieve({"1": "dog", "2": "cat", "3": "zebra", "4": ""}, 10)
    assert (run["3"], run["4"]) == ({}, {})
    # dog is in 1 of 4 documents; document b has 3 words, the mean is (3 + 3 + 1 + 3) / 4 = 2.5
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    assert run["1"] == pytest.approx({"b": idf * 1 / (1 + 0.9 * (1 - 0.4 + 0.4 * 3 / 2.5))}, rel=1e-5)
    idf = math.log(1 + (4 - 3 + 0.5) / (3 + 0.5))
    assert run["2"]["b"] == pytest.approx(idf * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * 3 / 2.5)), rel=1e-5)
    assert list(run["2"]) == ["b", "a", "d"]  # a and d are equal


@needs_bm25s
def test_bm25_keeps_the_first_of_equals_at_the_cut():
    corpus = {f"d{i}": "cat" for i in range(50)} | {"best": "cat cat"}
    assert list(BM25Retriever(corpus).retrieve({"1": "cat"}, 4)["1"]) == ["best", "d0", "d1", "d2"]


@needs_bm25s
def test_bm25_takes_the_terms_it_is_told():
    stem = BM25Retriever({"a": "cats", "b": "dogs"}, tokenize=lambda text: [w.rstrip("s") for w in words(text)])
    assert list(stem.retrieve({"1": "Cats"}, 5)["1"]) == ["a"]
    with pytest.raises(ValueError, match="none of 2 documents has a term"):
        BM25Retriever({"a": "", "b": "!"})


def test_words_are_lower_case_and_of_two_letters_or_more():
    assert words("The p53-Gene: a café, 2 x 10") == ["the", "p53", "gene", "café", "10"]


def test_without_bm25s_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(
        ImportError, match=r"needs bm25s, which is not installed; run: pip install 'negtune\[retrieval\]'"
    ):
        BM25Retriever(CORPUS)


def counts(texts):
    """Vectors for texts: how often each of three words is in them."""
    return torch.tensor([[text.split().count(word) for word in ("cat", "dog", "bird")] for text in texts]).float()


def test_dense_ranks_by_the_similarity_asked_for():
    queries = {"1": "cat dog", "2": "bird"}
    by_dot = DenseRetriever(counts, CORPUS, similarity="dot").retrieve(queries, 2)
    assert by_dot == {"1": {"b": 3.0, "a": 1.0}, "2": {"c": 1.0, "a": 0.0}}
    assert list(by_dot["1"]) == ["b", "a"]
    by_cosine = DenseRetriever(counts, CORPUS).retrieve(queries, 1)
    assert by_cosine["1"] == pytest.approx({"b": 3 / 10**0.5})


def test_dense_has_its_own_encoder_for_queries_and_takes_a_ready_index():
    index = ExactIndex(counts(CORPUS.values()), list(CORPUS))
    retriever = DenseRetriever(counts, index, query_model=lambda texts: counts(["bird"] * len(texts)), name="x")
    assert isinstance(retriever, Retriever)
    assert retriever.index is index
    assert retriever.retrieve({"1": "cat"}, 1) == {"1": {"c": 1.0}}


def test_dense_tells_queries_from_documents():
    pytest.importorskip("sentence_transformers", reason=f"needs sentence-transformers: {encoder.INSTALL}")
    from negtune.models.tiny_encoder import tiny_encoder

    model = tiny_encoder()
    model.prompts = {"query": "bada ", "document": "lusa "}
    run = DenseRetriever(model, {"x": "mobo", "y": "moge"}).retrieve({"1": "mobo"}, 2)
    expected = model.encode(["bada mobo", "lusa mobo"], normalize_embeddings=True)
    assert run["1"]["x"] == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)


def test_dense_searches_faiss_too():
    pytest.importorskip("faiss", reason="needs faiss: pip install 'negtune[retrieval]'")
    index = FaissIndex(counts(CORPUS.values()), list(CORPUS))
    assert DenseRetriever(counts, index).retrieve({"1": "dog"}, 1) == {"1": {"b": 1.0}}


def test_a_run_from_elsewhere_is_cut_and_lacks_what_it_lacks():
    run = {"1": {"b": 2.0, "a": 1.0}}
    assert RunRetriever(run, "theirs").retrieve({"1": "x", "2": "y"}, 1) == {"1": {"b": 2.0}, "2": {}}
    assert len(run["1"]) == 2


TASK = RetrievalTask(CORPUS, {"1": "cat", "2": "bird"}, {"1": {"a": 1.0}, "2": {"c": 1.0}})


def test_reranking_reorders_the_first_documents_and_keeps_the_best():
    asked = []

    def length(pairs):
        asked.extend(pairs)
        return torch.tensor([len(document) for _, document in pairs])

    run = {"1": {"c": 9.0, "d": 8.0, "a": 7.0, "b": 6.0}, "2": {}}
    reranked = rerank(length, TASK, run, depth=3, k=2)
    assert reranked == {"1": {"d": 11.0, "a": 11.0}, "2": {}}
    assert list(reranked["1"]) == ["d", "a"]  # equal: in the order of the run
    assert asked == [("cat", "a bird"), ("cat", "the cat sat"), ("cat", "the cat sat")]
    assert rerank(lambda pairs: 1 / 0, TASK, {"2": {}}, depth=1, k=1) == {"2": {}}


def test_reranking_refuses_answers_that_fit_no_pair():
    run = {"1": {"a": 2.0, "b": 1.0}}
    with pytest.raises(ValueError, match="need 1 <= k <= depth, got k=3, depth=2"):
        rerank(len, TASK, run, depth=2, k=3)  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="gave 1 scores for 2 pairs"):
        rerank(lambda pairs: [1.0], TASK, run, depth=2, k=2)
    with pytest.raises(ValueError, match="query 1: the scorer gave NaN for document b"):
        rerank(lambda pairs: [1.0, math.nan], TASK, run, depth=2, k=2)
    for bad in ({"1": {"z": 1.0}}, {"9": {"a": 1.0}}):
        with pytest.raises(ValueError, match="which the task lacks"):
            rerank(lambda pairs: [1.0], TASK, bad, depth=2, k=2)


@needs_bm25s
@pytest.mark.parametrize(("name", "low", "high"), [("scifact", 0.64, 0.66), ("cranfield", 0.30, 0.33)])
def test_bm25_has_the_known_ndcg_on_real_collections(data_dir, name, low, high):
    task = load_beir(data_dir / name, empty="keep")
    assert low < ndcg_at_10(task, BM25Retriever(task.corpus).retrieve(task.queries, 10)) < high


@needs_wordllama
@pytest.mark.parametrize(("name", "expected"), [("scifact", 0.513), ("cranfield", 0.308)])
def test_wordllama_has_the_known_ndcg_on_real_collections(data_dir, name, expected):
    task = load_beir(data_dir / name, empty="keep")
    retriever = DenseRetriever(load_encoder("wordllama", device="cpu"), task.corpus)
    assert ndcg_at_10(task, retriever.retrieve(task.queries, 10)) == pytest.approx(expected, abs=0.002)
