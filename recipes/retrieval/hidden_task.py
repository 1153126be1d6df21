"""Cells of hidden_positives.py: collections with positives hidden, the lists that arms train on, and judges of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from search_task import indexed
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from negtune.data.hidden import HiddenTask, RankChances, hide_positives, rank_chances
from negtune.data.retrieval import (
    SYNTHETIC_WORDS,
    RetrievalTask,
    load_beir,
    query_folds,
    split_queries,
    synthetic_retrieval,
)
from negtune.records import append_jsonl, stream_jsonl
from negtune.retrieval.choice import choose
from negtune.retrieval.encoder import encode, load_encoder
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import CandidateList, Mined, mine, picked
from negtune.retrieval.negatives import EVERYTHING, AbsoluteMargin, RelativeMargin, add_scores, drop_negatives
from negtune.retrieval.rankers import causal_reranker
from negtune.retrieval.relabel import relabel, verdict_key
from negtune.retrieval.retrievers import BM25Retriever, DenseRetriever, RunRetriever
from negtune.retrieval.score_judge import ScoreJudge, Thresholds, fit_thresholds, known_scores
from negtune.retrieval.static_rows import only_used_rows

WHOLE, UNIFORM, BY_RANK = "whole", "uniform", "by rank"
NEGATIVES = ("none", "random", "static", "mined")
ORACLE, WORDS = "oracle", "words"
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    """One data set with a share of its positives hidden in one way.

    Args:
        data: name of the set.
        way: `whole` (nothing is hidden), `uniform`, or `by rank`: the lower BM25 ranks a positive, the likelier.
        hidden: share of the positives.
    """

    data: str
    way: str = WHOLE
    hidden: float = 0.0

    @property
    def name(self) -> str:
        """For tables and folders."""
        return f"{self.data}, whole" if self.way == WHOLE else f"{self.data}, {self.way}, {self.hidden:.0%} hidden"


@dataclass(frozen=True)
class Judging:
    """A judge by scores, see `retrieval.score_judge`.

    Args:
        kind: `bi_encoder` (cosine) or `causal_lm` (logit of yes minus logit of no).
        model: what `load_encoder` or `causal_reranker` know.
        depth: so many first candidates of a query have a score; None: all.
        words: so many first words of a document are read; None: all.
        precision, kept: of `fit_thresholds`.
    """

    kind: str
    model: str
    depth: int | None = None
    words: int | None = None
    precision: float = 0.5
    kept: float = 0.5
    answers: tuple[str, str] = ("yes", "no")

    def __post_init__(self) -> None:
        if self.kind not in ("bi_encoder", "causal_lm"):
            raise ValueError(f"a judge is a bi_encoder or a causal_lm, got kind: {self.kind}")
        if not (0 < self.precision <= 1 and 0 < self.kept <= 1):
            raise ValueError(
                f"precision and kept of a judge are above 0 and at most 1, got {self.precision}, {self.kept}"
            )


class Collection:
    """What does not change while models are trained on one data set.

    Args:
        name: of the set.
        source: a folder in BEIR's layout, or a mapping of settings of `synthetic_retrieval`.
        encoder: of the start, or `words`; a static table is cut to the tokens of the collection.
        depth: documents that BM25 and the start find for each query.
        folder: for scores of judges.
    """

    def __init__(
        self,
        name: str,
        source: Path | Mapping[str, int],
        encoder: str,
        depth: int,
        folder: Path,
        max_length: int | None = None,
    ) -> None:
        self.name, self.depth, self.folder = name, depth, folder
        made_up = isinstance(source, Mapping)
        self.task = synthetic_retrieval(**source) if made_up else load_beir(source, "test", empty="drop")
        start = word_table() if encoder == WORDS else load_encoder(encoder, device="cpu")
        if max_length is not None:
            start.max_seq_length = max_length
        self.start = only_used_rows(start, [*self.task.corpus.values(), *self.task.queries.values()])
        self.query_at = {text: i for i, text in enumerate(self.task.queries.values())}
        self.document_at = {text: i for i, text in enumerate(self.task.corpus.values())}
        index = indexed(self.start, self.task)
        queries = encode(self.start, list(self.task.queries.values()))
        self.cosines = self._cosines(queries, index.vectors(torch.arange(len(index))))
        self.runs = {
            "dense": DenseRetriever(self.start, index).retrieve(self.task.queries, depth),
            "bm25": BM25Retriever(self.task.corpus).retrieve(self.task.queries, len(self.task.corpus)),
        }

    def retriever(self, name: str) -> RunRetriever:
        """Of what was found before."""
        return RunRetriever(self.runs[name], name)

    def scores(self, pairs: Pairs) -> list[float]:
        """Cosines of the start."""
        return self._of(self.cosines, pairs)

    def _of(self, table: Tensor, pairs: Pairs) -> list[float]:
        rows, columns = [self.query_at[q] for q, _ in pairs], [self.document_at[d] for _, d in pairs]
        return table[rows, columns].tolist()

    @staticmethod
    def _cosines(queries: Tensor, documents: Tensor) -> Tensor:
        return torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(documents, dim=-1).T

    def lexical_rank(self, query_id: str, document_id: str) -> int:
        """BM25's, from 1; what shares no word with the query stands behind all that does."""
        ranks = self._lexical_ranks[query_id]
        return ranks.get(document_id, len(ranks) + 1)

    @cached_property
    def _lexical_ranks(self) -> dict[str, dict[str, int]]:
        return {query_id: {d: i for i, d in enumerate(found, 1)} for query_id, found in self.runs["bm25"].items()}

    def chances(self, cell: Cell) -> RankChances | float:
        """Of a positive to stay; by BM25's rank with the wanted mean over all positives of the set."""
        if cell.way != BY_RANK:
            return 1 - cell.hidden
        known = [self.lexical_rank(q, d) for q in self.task.queries for d in self.task.positives(q)]
        return rank_chances(known, 1 - cell.hidden)

    # --- judges -------------------------------------------------------------------------------------------------------

    def judge_scores(self, name: str, judging: Judging) -> Any:
        """`pairs -> scores` of a judge, made once and kept on the disk; None for what it was not asked."""
        file = self.folder / "judges" / f"{self.name} {name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if judging.kind == "bi_encoder":
            return self._cosine_judge(judging, file.with_suffix(".safetensors"))
        return self._asked_judge(judging, file.with_suffix(".jsonl"))

    def _cosine_judge(self, judging: Judging, file: Path) -> Any:
        if not file.exists():
            model = load_encoder(judging.model, device="cpu")
            queries = encode(model, list(self.task.queries.values()))
            documents = encode(model, list(self.task.corpus.values()), side="document", batch_size=16)
            save_file({"queries": queries, "documents": documents}, file)
        vectors = load_file(file)
        if [len(vectors["queries"]), len(vectors["documents"])] != [len(self.task.queries), len(self.task.corpus)]:
            raise ValueError(f"{file} belongs to another collection; delete it")
        table = self._cosines(vectors["queries"], vectors["documents"])
        return lambda pairs: self._of(table, pairs)

    def _asked_judge(self, judging: Judging, file: Path) -> Any:
        known = {row["key"]: row["score"] for row in stream_jsonl(file)} if file.exists() else {}
        pairs = [(self.task.queries[q], self.task.corpus[d]) for q, d in self._first(judging.depth)]
        named = f"{judging.model} {judging.words}"
        missing = [pair for pair in pairs if verdict_key(named, *pair) not in known]
        if missing:
            yes, no = judging.answers
            score = scorer(causal_reranker(judging.model, yes=yes, no=no, max_length=None), 8)
            for start in range(0, len(missing), 32):
                some = missing[start : start + 32]
                values = score([(q, " ".join(d.split()[: judging.words])) for q, d in some])
                lines = [{"key": verdict_key(named, *pair), "score": s} for pair, s in zip(some, values, strict=True)]
                append_jsonl(file, lines, sync=True)
                known |= {line["key"]: line["score"] for line in lines}
        return lambda pairs: [known.get(verdict_key(named, *pair)) for pair in pairs]

    def _first(self, depth: int | None) -> list[tuple[str, str]]:
        """The first candidates of all queries, retrievers in turn."""
        found = []
        for query_id in self.task.queries:
            runs = [list(run[query_id])[: self.depth] for run in self.runs.values()]
            turns = [d for i in range(self.depth) for run in runs for d in run[i : i + 1]]
            found += [(query_id, d) for d in list(dict.fromkeys(turns))[:depth]]
        return found


def word_table(width: int = 64, seed: int = 0) -> SentenceTransformer:
    """A random vector for each word of `synthetic_retrieval`: it finds what shares words, and learns which are paired.

    Pieces of words, as other tables have them, are shared between words that have nothing to do with each other.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SYNTHETIC_WORDS)}, SYNTHETIC_WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(SYNTHETIC_WORDS), width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


@dataclass(frozen=True)
class Lists:
    """Lists to train on, and what is known of them because the truth is.

    Args:
        lists: see `retrieval.mining`.
        facts: `lists/false_negatives`, the share of hidden positives among the negatives; of judges
            `lists/found`, the share of hidden candidates that are labelled positive now, and `lists/found_right`, the
            share of new positives that are positives.
    """

    lists: list[CandidateList]
    facts: dict[str, float] = field(default_factory=dict)


class Part:
    """One seed of a cell: queries split, positives of the training queries hidden.

    Args:
        collection, cell: see there.
        seed: of the split and of what is hidden.
        test_share: of the queries.
        fold: the sweep's, of `folds`: a part of the training queries stands in for the test queries, with all labels.
        n_documents, max_positives, depth, static_depth: of lists, see the recipe.
    """

    def __init__(
        self,
        collection: Collection,
        cell: Cell,
        seed: int,
        *,
        test_share: float,
        fold: int | None,
        folds: int,
        n_documents: int,
        max_positives: int,
        depth: int,
        static_depth: int,
    ) -> None:
        self.collection, self.cell, self.seed = collection, cell, seed
        self.n_documents, self.max_positives = n_documents, max_positives
        self.depth, self.static_depth = depth, static_depth
        train, self.test = split_queries(collection.task, test_share, seed)
        if fold is not None:
            train, self.test = query_folds(train, folds, seed)[fold]
        self.truth, self.chances = train, collection.chances(cell)
        self.hidden: HiddenTask = hide_positives(train, self._keep(train), seed=seed)
        self.train = self.hidden.task
        self._relabelled: dict[tuple[str, str], Mined] = {}

    def _keep(self, train: RetrievalTask) -> Any:
        if isinstance(self.chances, float):
            return self.chances
        return {
            query_id: {d: self.chance(query_id, d) for d in train.positives(query_id)} for query_id in train.queries
        }

    def chance(self, query_id: str, document_id: str) -> float:
        """That a document would have been kept, if it is relevant."""
        if isinstance(self.chances, float):
            return self.chances
        return self.chances(self.collection.lexical_rank(query_id, document_id))

    @cached_property
    def pool(self) -> Mined:
        """All that the start and BM25 found and all visible positives, with all cosines of the start."""
        retrievers = [self.collection.retriever("dense"), self.collection.retriever("bm25")]
        settings = {"depth": self.depth, "n_documents": EVERYTHING, "positives": "guaranteed", "seed": self.seed}
        return add_scores(mine(self.train, retrievers, **settings), self.collection.scores, name="dense")

    def lists(self, arm: Mapping[str, Any], judges: Mapping[str, Judging]) -> Lists:
        """Of an arm: `negatives`, with `rule`, `margin` and `against`, or with `judge` and what becomes of positives
        that it has `found`."""
        kind = arm.get("negatives", "mined")
        if kind in ("random", "static"):
            return self._facts(self._drawn(kind))
        pool = self.pool
        if arm.get("rule") is not None:
            make = {"relative": RelativeMargin, "absolute": AbsoluteMargin}[arm["rule"]]
            pool = drop_negatives(pool, [make("dense", arm["margin"], against=arm["against"])])
        if arm.get("judge") is not None:
            pool = self._judged(arm["judge"], judges, arm.get("found", "relabel"))
        chosen = choose(pool, self.n_documents, max_positives=self.max_positives, seed=self.seed)
        if kind == "none":
            kept = [picked(one, [i for i, gain in enumerate(one.gains) if gain > 0]) for one in chosen.lists]
            return Lists(kept, {"lists/false_negatives": 0.0})
        found = self._facts(chosen)
        if arm.get("judge") is None or arm.get("found") == "drop":
            return found
        return replace(found, facts={**found.facts, **self._verdicts(pool)})

    def _drawn(self, kind: str) -> Mined:
        """Negatives drawn from the start's first, or from the whole corpus."""
        corpus = list(self.train.corpus)
        retriever = self.collection.retriever("dense")
        if kind == "random":
            some = min(self.static_depth, len(corpus))
            drawn = {q: random.Random(f"{self.seed} {q}").sample(corpus, some) for q in self.train.queries}
            retriever = RunRetriever(
                {q: {d: -float(i) for i, d in enumerate(ids)} for q, ids in drawn.items()}, "random"
            )
        settings = {"n_documents": self.n_documents, "max_positives": self.max_positives, "seed": self.seed}
        return mine(
            self.train, [retriever], depth=self.static_depth, positives="guaranteed", select="random", **settings
        )

    def _judged(self, name: str, judges: Mapping[str, Judging], found: str) -> Mined:
        if (name, found) not in self._relabelled:
            judge = self._oracle() if name == ORACLE else self._score_judge(name, judges[name])
            self._relabelled[name, found] = relabel(self.pool, judge, name=name, positives=found, audit=0).mined
        return self._relabelled[name, found]

    def _oracle(self) -> Any:
        """Knows the hidden positives, and says nothing else."""
        hidden = {
            (self.train.queries[q], self.train.corpus[d]) for q, found in self.hidden.hidden.items() for d in found
        }
        return lambda queries, documents: [
            "positive" if pair in hidden else None for pair in zip(queries, documents, strict=True)
        ]

    def _score_judge(self, name: str, judging: Judging) -> ScoreJudge:
        """Thresholds by the visible labels of all training queries; what has none counts as irrelevant there."""
        score = self.collection.judge_scores(name, judging)
        scores, relevant = known_scores(self.pool.lists, score, queries=self.train.queries, unjudged="irrelevant")
        try:
            limits = fit_thresholds(scores, relevant, precision=judging.precision, kept=judging.kept).thresholds
        except ValueError:  # no threshold is as precise: nothing is called positive
            positives = sorted(s for s, r in zip(scores, relevant, strict=True) if r and s is not None)
            highest = max(s for s in scores if s is not None)
            limits = Thresholds(highest + 1, positives[int((1 - judging.kept) * len(positives))])
        return ScoreJudge(score, limits, model=name)

    # --- what is known of lists ---------------------------------------------------------------------------------------

    def _facts(self, mined: Mined) -> Lists:
        negatives = [
            document_id in self.hidden.hidden.get(one.query_id, {})
            for one in mined.lists
            for document_id, gain in zip(one.document_ids, one.gains, strict=True)
            if gain <= 0
        ]
        return Lists(mined.lists, {"lists/false_negatives": share(negatives)})

    def _verdicts(self, judged: Mined) -> dict[str, float]:
        new = {
            (one.query_id, d)
            for one in judged.lists
            for d, said in zip(one.document_ids, one.relabelled, strict=True)
            if said is not None and said.startswith("positive")
        }
        candidates = {(one.query_id, d) for one in self.pool.lists for d in one.document_ids}
        hidden = {(q, d) for q, found in self.hidden.hidden.items() for d in found} & candidates
        return {
            "lists/found": share(pair in new for pair in hidden),
            "lists/found_right": share(pair in hidden for pair in new),
        }


def share(values: Iterable[bool]) -> float:
    """Of what is true; 0 of nothing."""
    known: Sequence[bool] = list(values)
    return sum(known) / len(known) if known else 0.0
