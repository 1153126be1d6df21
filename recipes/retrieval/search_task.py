"""What the retrieval recipes share: a task split by query, lists mined from the start, and how a model is measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import get_quantization_config

from negtune._st_compat import has_static_embedding_input
from negtune.data.retrieval import RetrievalTask, Run, load_beir, split_queries, synthetic_retrieval
from negtune.metrics.runs import RankingResult, evaluate_run
from negtune.retrieval.encoder import encode, load_encoder, similarity_of
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.index import ExactIndex
from negtune.retrieval.mining import Mined, mine
from negtune.retrieval.rankers import causal_reranker, load_ranker
from negtune.retrieval.retrievers import BM25Retriever, DenseRetriever, rerank

METRICS = ("ndcg@10", "mrr@10", "recall@100")
DEPTH = 100


@dataclass
class TaskArguments:
    """Flags of a recipe on a task that is split by query."""

    data: str | None = field(default=None, metadata={"help": "Folder in BEIR's layout or a Hub id; default: made up."})
    train_split: str | None = field(default=None, metadata={"help": "Judgements to train on; default: part of test."})
    test_share: float = field(default=0.5, metadata={"help": "Of the queries, where there is no train_split."})
    smoke: bool = field(default=False, metadata={"help": "Tiny and quick, unless a flag says otherwise."})


def at_least(given: Any, **least: int) -> None:
    """Refuse flags that are smaller, before anything is loaded."""
    for name, limit in least.items():
        value = getattr(given, name)
        if value is not None and value < limit:
            raise ValueError(f"--{name} must be at least {limit}, got {value}")


@dataclass(frozen=True)
class Split:
    """A task, split by query.

    Args:
        train, test: the same corpus, other queries.
    """

    train: RetrievalTask
    test: RetrievalTask


def read_task(data: str | None, *, train_split: str | None, test_share: float, seed: int, empty: str = "keep") -> Split:
    """The task of a folder in BEIR's layout or a Hub id, or a made-up one.

    Args:
        data: folder or id; None: made up.
        train_split: name of the judgements to train on, `test` being the others; None: a share `test_share` of the
            test queries is held out, by `seed`.
        empty: what to do with documents without text, see `load_beir`.
    """
    if data is None:
        train, test = split_queries(synthetic_retrieval(), test_share, seed)
        return Split(train, test)
    if train_split is not None:
        return Split(load_beir(data, train_split, empty=empty), load_beir(data, "test", empty=empty))
    return Split(*split_queries(load_beir(data, "test", empty=empty), test_share, seed))


def mined(
    model: Any,
    task: RetrievalTask,
    *,
    n_documents: int,
    seed: int,
    bm25: bool = False,
    dense: bool = True,
    depth: int = DEPTH,
    select: str = "top",
) -> Mined:
    """Lists for the queries of a task from the first `depth` that the model and BM25 find, with every relevant document
    that fits; `select`: see `mine`."""
    retrievers: list[Any] = [DenseRetriever(model, task.corpus)] if dense else []
    if bm25:
        retrievers.append(BM25Retriever(task.corpus))
    half = max(1, n_documents // 2)
    settings: dict[str, Any] = {"positives": "guaranteed", "max_positives": half, "depth": depth, "select": select}
    return mine(task, retrievers, n_documents=n_documents, **settings, seed=seed)


@dataclass(frozen=True)
class Measured:
    """First stage, and reranking of BM25's first hundred: as a pipeline, and with the relevant documents put in.

    Args:
        stages: name of the stage to its result; `guaranteed` is the easier thing that reranking papers report.
        run: what the search (or the reranking, where nothing was searched) found.
    """

    stages: dict[str, RankingResult]
    run: Run

    def answers(self, task: RetrievalTask, n: int = 5) -> list[tuple[str, str | None, str]]:
        """Of the first queries: the query, a relevant document, and the document found first."""
        shown = []
        for query_id in list(task.queries)[:n]:
            best = max(task.positives(query_id), key=task.positives(query_id).__getitem__, default=None)
            first = next(iter(self.run[query_id]))
            shown.append((task.queries[query_id], best and task.corpus[best], task.corpus[first]))
        return shown

    def metrics(self) -> dict[str, float]:
        """`ndcg@10` ... of the first stage; `rerank/ndcg@10`, `guaranteed/ndcg@10` ..."""
        prefix = {"search": ""}
        return {
            f"{prefix.get(stage, stage + '/')}{name}": value
            for stage, result in self.stages.items()
            for name, value in result.means.items()
        }

    def per_query(self, name: str = "ndcg@10") -> dict[str, float]:
        """Of a metric, named as in `metrics`."""
        stage, _, metric = name.rpartition("/")
        return self.stages[stage or "search"].per_query[metric]


def bm25_run(task: RetrievalTask, depth: int = DEPTH) -> Run:
    """BM25's first documents of each query."""
    return BM25Retriever(task.corpus).retrieve(task.queries, depth)


def with_relevant(task: RetrievalTask, run: Run) -> Run:
    """The run with every relevant document it lacks behind it: what it is worth says nothing of a search."""
    return {
        query_id: {**found, **{d: -1.0 for d in task.positives(query_id) if d not in found}}
        for query_id, found in run.items()
    }


def measured(
    model: Any,
    task: RetrievalTask,
    lexical: Run,
    batch_size: int = 64,
    *,
    search: bool = True,
    index: ExactIndex | None = None,
) -> Measured:
    """A bi-encoder on the queries of a task, the corpus encoded once; or, without a search, any model as reranker.

    A ready index of the corpus, in its order, is searched as it is.
    """
    model.eval()
    if not search:
        depth = max(len(found) for found in lexical.values())
        run = rerank(scorer(model, min(batch_size, 16)), task, lexical, depth=depth, k=depth)
        return Measured({"rerank": evaluate_run(run, task.qrels, METRICS[:2])}, run)
    index = indexed(model, task, batch_size) if index is None else index
    vectors = index.vectors(torch.arange(len(index)))
    run = DenseRetriever(model, index).retrieve(task.queries, DEPTH)
    place = {document_id: i for i, document_id in enumerate(task.corpus)}
    queries = encode(model, list(task.queries.values()), batch_size=batch_size)
    if similarity_of(model) == "cosine":
        queries, vectors = (v / v.norm(dim=-1, keepdim=True).clamp(min=1e-12) for v in (queries, vectors))
    row = {text: i for i, text in enumerate(task.queries.values())}
    at = {text: place[document_id] for document_id, text in task.corpus.items()}

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        q, d = [row[query] for query, _ in pairs], [at[document] for _, document in pairs]
        return [float(value) for start in range(0, len(q), 4096) for value in (
            queries[q[start : start + 4096]] * vectors[d[start : start + 4096]]
        ).sum(-1)]  # fmt: skip

    stages = {"search": evaluate_run(run, task.qrels, METRICS)}
    for name, candidates in (("rerank", lexical), ("guaranteed", with_relevant(task, lexical))):
        depth = max(len(found) for found in candidates.values())
        reranked = rerank(score, task, candidates, depth=depth, k=10)
        stages[name] = evaluate_run(reranked, task.qrels, ("ndcg@10", "mrr@10"))
    return Measured(stages, run)


def indexed(model: Any, task: RetrievalTask, batch_size: int = 64) -> ExactIndex:
    """The corpus as the model encodes documents."""
    vectors = encode(model, list(task.corpus.values()), side="document", batch_size=batch_size)
    return ExactIndex(vectors, list(task.corpus), similarity_of(model))


def to_train(name: str, args: Any, model_args: Any, kind: str = "bi_encoder") -> Any:
    """The model that is trained: quantised if `model_args` say so, with the length of `args`, which static embeddings
    have not."""
    quantised = get_quantization_config(model_args)
    model = load_ranker(name, kind, model_kwargs={} if quantised is None else {"quantization_config": quantised})
    if has_static_embedding_input(model):
        if model_args.use_peft:
            raise ValueError(f"--use_peft needs a transformer, and {name} is a static table; leave it out")
        args.max_length = None  # whole texts
    elif args.max_length is not None:
        model.max_seq_length = args.max_length
    return model


class Start:
    """The encoder that all runs start from, loaded once."""

    def __init__(
        self,
        name: str,
        max_length: int | None = None,
        *,
        kind: str = "bi_encoder",
        answers: tuple[str, str] = ("yes", "no"),
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if kind == "causal_lm":
            yes, no = answers
            self.model = causal_reranker(name, max_length=max_length, yes=yes, no=no, model_kwargs=model_kwargs)
            return
        device = "cpu" if Path(name).exists() or "/" not in name else None
        self.model = load_encoder(name, device=device, model_kwargs=model_kwargs)
        if max_length is not None:
            self.model.max_seq_length = max_length

    def copy(self) -> Any:
        """A fresh one to train."""
        return copy.deepcopy(self.model)


def numbers(metrics: Mapping[str, float]) -> str:
    """For a person."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def file_name(arm: str, rate: float, seed: int, option: Mapping[str, float] | None = None) -> str:
    """Of a run."""
    swept = [f"{name} {value:g}" for name, value in (option or {}).items()]
    return " ".join([arm, f"{rate:g}", *swept, str(seed)]).replace(" ", "_")
