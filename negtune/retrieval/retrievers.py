"""Queries to ranked documents: by words (BM25), by vectors, from a run file, and reranked by a scorer of pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from negtune.data.retrieval import RetrievalTask, Run
from negtune.retrieval.encoder import TextEncoder, encode, similarity_of
from negtune.retrieval.index import ExactIndex, FaissIndex

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

INSTALL = "pip install 'negtune[retrieval]'"


@runtime_checkable
class Retriever(Protocol):
    """Anything that ranks documents for queries; its name tells its ranks from those of others."""

    name: str

    def retrieve(self, queries: Mapping[str, str], k: int) -> Run:
        """Query id to at most `k` {document id: score}, best first."""
        ...


def words(text: str) -> list[str]:
    """Lower-cased runs of two or more letters and digits: no stemming, no stop words, nothing of one language."""
    return re.findall(r"\b\w\w+\b", text.lower())


class BM25Retriever:
    """Okapi BM25 as Lucene computes it, by bm25s. Documents that share no word with the query are not retrieved.

    Args:
        corpus: document id to text.
        k1, b: saturation of term counts and weight of the length; the defaults are pyserini's.
        tokenize: text to terms, for documents and queries; another one may stem.
        name: of the ranks.

    Raises:
        ImportError: without bm25s, with the command that installs it.
        ValueError: no document has a term.
    """

    def __init__(
        self,
        corpus: Mapping[str, str],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        tokenize: Callable[[str], list[str]] = words,
        name: str = "bm25",
    ) -> None:
        self.name, self._tokenize, self._ids = name, tokenize, list(corpus)
        terms = [tokenize(text) for text in corpus.values()]
        if not any(terms):
            raise ValueError(f"none of {len(terms)} documents has a term to find it by; look at tokenize")
        self._bm25 = _bm25s().BM25(k1=k1, b=b, method="lucene")
        self._bm25.index(terms, show_progress=False)

    def retrieve(self, queries: Mapping[str, str], k: int) -> Run:
        """As `Retriever`; of equal scores the document that comes first in the corpus wins."""
        return {query_id: self._best(text, k) for query_id, text in queries.items()}

    def _best(self, query: str, k: int) -> dict[str, float]:
        known = self._bm25.get_tokens_ids(self._tokenize(query))
        if not known:
            return {}
        scores = self._bm25.get_scores_from_ids(known)
        bar = -np.partition(-scores, k - 1)[k - 1] if k < len(scores) else 0.0
        found = np.flatnonzero((scores >= bar) & (scores > 0))
        order = found[np.argsort(-scores[found], kind="stable")][:k]
        return {self._ids[i]: float(scores[i]) for i in order}


class DenseRetriever:
    """Vectors of a bi-encoder in an exact index.

    Args:
        model: as in `encode`.
        corpus: document id to text, encoded at once; or a ready index of it.
        query_model: another encoder for queries; by default `model`.
        similarity: `dot` or `cosine`; by default what the model was made for. A ready index has its own.
        batch_size, show_progress: as in `encode`.
        name: of the ranks.
    """

    def __init__(
        self,
        model: SentenceTransformer | TextEncoder,
        corpus: Mapping[str, str] | ExactIndex | FaissIndex,
        *,
        query_model: SentenceTransformer | TextEncoder | None = None,
        similarity: str | None = None,
        batch_size: int = 64,
        show_progress: bool = False,
        name: str = "dense",
    ) -> None:
        self.name, self._query_model = name, query_model if query_model is not None else model
        self._settings: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
        if isinstance(corpus, Mapping):
            vectors = encode(model, list(corpus.values()), side="document", **self._settings)
            self.index: ExactIndex | FaissIndex = ExactIndex(vectors, list(corpus), similarity or similarity_of(model))
        else:
            self.index = corpus

    def retrieve(self, queries: Mapping[str, str], k: int) -> Run:
        """As `Retriever`; of equal scores the document that comes first in the index wins."""
        vectors = encode(self._query_model, list(queries.values()), side="query", **self._settings)
        scores, positions = self.index.search(vectors, k)
        return {
            query_id: {self.index.ids[i]: score for i, score in zip(*row, strict=True)}
            for query_id, row in zip(queries, zip(positions.tolist(), scores.tolist(), strict=True), strict=True)
        }


class RunRetriever:
    """A run computed elsewhere, for instance read by `negtune.data.retrieval.read_run`.

    Args:
        run: documents best first.
        name: of the ranks.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.name, self._run = name, run

    def retrieve(self, queries: Mapping[str, str], k: int) -> Run:
        """As `Retriever`; nothing for queries that the run lacks."""
        return {query_id: dict(list(self._run.get(query_id, {}).items())[:k]) for query_id in queries}


def rerank(
    score: Callable[[list[tuple[str, str]]], Sequence[float]], task: RetrievalTask, run: Run, *, depth: int, k: int
) -> Run:
    """The first `depth` documents of each query in the order of another score, the best `k` of them kept.

    Args:
        score: (query text, document text) pairs to one number each, for instance `CrossEncoder.predict`; called once.
        task: with the texts.
        run: documents best first; equal new scores keep its order.
        depth: documents of a query that are scored.
        k: at most `depth`.

    Raises:
        ValueError: an answer that has not one number for each pair, or is NaN for one; a query or document that the
            task lacks.
    """
    if not 1 <= k <= depth:
        raise ValueError(f"need 1 <= k <= depth, got k={k}, depth={depth}")
    shallow = {query_id: list(documents)[:depth] for query_id, documents in run.items()}
    pairs = []
    for query_id, document_ids in shallow.items():
        for document_id in document_ids:
            if query_id not in task.queries or document_id not in task.corpus:
                raise ValueError(f"the run has query {query_id} with document {document_id}, which the task lacks")
            pairs.append((task.queries[query_id], task.corpus[document_id]))
    scores = [float(value) for value in score(pairs)] if pairs else []
    if len(scores) != len(pairs):
        raise ValueError(f"the scorer gave {len(scores)} scores for {len(pairs)} pairs; it must give one for each")
    places, reranked = iter(scores), {}
    for query_id, document_ids in shallow.items():
        scored = {document_id: next(places) for document_id in document_ids}
        for document_id, value in scored.items():
            if math.isnan(value):
                raise ValueError(f"query {query_id}: the scorer gave NaN for document {document_id}")
        reranked[query_id] = dict(sorted(scored.items(), key=lambda item: -item[1])[:k])
    return reranked


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ImportError(f"BM25 needs bm25s, which is not installed; run: {INSTALL}") from None
    return bm25s
