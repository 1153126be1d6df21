"""What a retriever finds in a corpus and what a reranker makes of a list, by the judgements of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from negtune._st_compat import BaseEvaluator
from negtune.data.retrieval import RetrievalTask, Run
from negtune.metrics.runs import RankingResult, evaluate_run
from negtune.records import write_json
from negtune.retrieval.index import ExactIndex, FaissIndex
from negtune.retrieval.losses import kind_of
from negtune.retrieval.retrievers import DenseRetriever, rerank

METRICS = ("ndcg@10", "mrr@10", "recall@100")


def evaluate_retrieval(
    model: Any,
    task: RetrievalTask,
    *,
    metrics: Sequence[str] = METRICS,
    depth: int = 100,
    batch_size: int = 64,
    index: ExactIndex | FaissIndex | None = None,
    **conventions: Any,
) -> RankingResult:
    """Search the whole corpus with a bi-encoder (first stage), exactly.

    Args:
        model: `SentenceTransformer`, or what else `retrieval.encoder.encode` takes.
        task: corpus, queries, judgements.
        metrics: see `metrics.runs.evaluate_run`.
        depth: documents found for each query.
        batch_size: texts embedded at a time.
        index: of the corpus, ready made: only queries are embedded. Default: the model embeds the corpus.
        conventions: gain, ties and missing of `evaluate_run`.
    """
    if hasattr(model, "preprocess") and kind_of(model) != "bi_encoder":  # else a function of texts
        raise ValueError(
            f"searching needs a bi-encoder, got {type(model).__name__}; evaluate_reranking is for the others"
        )
    corpus = task.corpus if index is None else index
    run = DenseRetriever(model, corpus, batch_size=batch_size).retrieve(task.queries, depth)
    return evaluate_run(run, task.qrels, metrics, **conventions)


def evaluate_reranking(
    model: Any,
    task: RetrievalTask,
    run: Run,
    *,
    metrics: Sequence[str] = ("ndcg@10", "mrr@10"),
    depth: int = 100,
    batch_size: int = 64,
    **conventions: Any,
) -> RankingResult:
    """Rerank the first `depth` documents of a run (second stage) and evaluate what comes out.

    Relevant documents that the run lacks stay lost: these figures are those of a pipeline. Lists into which they were
    put are another, easier thing.

    Args:
        model: `CrossEncoder` (a causal LM among them), `SentenceTransformer` or `MultiVectorEncoder`.
        task, metrics, batch_size, conventions: see `evaluate_retrieval`.
        run: the first stage.
        depth: documents to rerank; those behind are dropped.
    """
    training = model.training  # predict and encode leave the model in evaluation mode
    try:
        reranked = rerank(scorer(model, batch_size), task, run, depth=depth, k=depth)
    finally:
        model.train(training)
    return evaluate_run(reranked, task.qrels, metrics, **conventions)


def scorer(model: Any, batch_size: int = 64) -> Any:
    """`(pairs of query and document) -> scores` of any ranker."""
    kind = kind_of(model)
    if kind == "cross_encoder":
        from torch import nn

        return lambda pairs: model.predict(
            pairs, batch_size=batch_size, activation_fn=nn.Identity(), show_progress_bar=False
        ).tolist()

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        queries, documents = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        settings: Mapping[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
        if kind == "bi_encoder":
            settings = {**settings, "convert_to_tensor": True}
        encoded = model.encode_query(queries, **settings), model.encode_document(documents, **settings)
        place = [{text: i for i, text in enumerate(side)} for side in (queries, documents)]
        scores = model.similarity(*encoded)
        return [float(scores[place[0][query], place[1][document]]) for query, document in pairs]

    return score


class RetrievalEvaluator(BaseEvaluator):
    """An evaluator for sentence-transformers' trainers and `RankingTrainer`: first-stage retrieval, graded.

    The host's `InformationRetrievalEvaluator` knows no grades, breaks ties by id upwards, and keeps no value per query.

    Args:
        task: corpus, queries and judgements to search.
        metrics: the first one is the primary one.
        depth, batch_size, index, conventions: see `evaluate_retrieval`.
    """

    def __init__(
        self,
        task: RetrievalTask,
        *,
        metrics: Sequence[str] = METRICS,
        depth: int = 100,
        batch_size: int = 64,
        index: ExactIndex | FaissIndex | None = None,
        **conventions: Any,
    ) -> None:
        super().__init__()
        self.task, self.metrics = task, tuple(metrics)
        self.settings = {"depth": depth, "batch_size": batch_size, "index": index, **conventions}
        self.primary_metric = self.metrics[0]
        self.last: RankingResult | None = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float | int = -1.0, steps: int = -1
    ) -> dict[str, float]:
        """Mean of each metric; `last` has them per query, and so has `retrieval_<steps>.json` in `output_path`."""
        self.last = evaluate_retrieval(model, self.task, metrics=self.metrics, **self.settings)
        if output_path is not None:
            write_json(Path(output_path) / f"retrieval_{steps}.json", self.last.per_query)
        return dict(self.last.means)
