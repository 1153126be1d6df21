"""Train queries against documents that stay as they are: lists are what a search of a frozen index finds at each step.

Shapes: B queries of a batch, J judged documents of a query (positives, and those never to be found), K documents that
the search returns, D documents of the longest list, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from negtune.losses.hard_negatives import SEARCH_LOSSES, append_missed
from negtune.ops import at_least_float32
from negtune.retrieval.collate import CandidateCollator, _padded
from negtune.retrieval.encoder import encode, similarity_of
from negtune.retrieval.index import ExactIndex
from negtune.retrieval.losses import Lists, NonFiniteScoresError, RankingLoss, kind_of

WATCHED = 4096
"""Queries of a process whose last lists are remembered, to tell how much of them has changed."""
UNIT = 1e-3
"""How far from 1 the length of a normalised vector may be."""
CHECKED = 64
"""Vectors whose lengths are looked at."""
RANK_BY = ("list", "score")


class QueryLoss(RankingLoss):
    """Query-side training: search with the encoder as it is now, train the query on what was found.

    Each batch is embedded twice. Without dropout and gradient, to search the index: the lists are its first documents,
    in which a positive is always relevant, and all positives behind them where none was found (`append_missed`). And as
    the model trains, for the scores: the gradient goes through the query; documents are copies of the index's vectors.

    For `SentenceTransformerTrainer`: one column of queries, and `label`, the positions of the positives in the index
    (-1: padding). `QueryEncoderTrainer` makes one of these itself.

    Args:
        model: a bi-encoder.
        index: of the documents; it is read only, and compares as the model does.
        loss_type: one of `SEARCH_LOSSES`.
        depth: documents that the search returns (the paper's K).
        rank_by: places that `adore` weighs pairs by: `list`, those of the search, missed positives behind all others,
            as released; `score`, those by the scores that are trained.
        scale: similarities are multiplied by it. Default: 20 for cosines, else 1.
        objective: `(scores, gains, mask) -> [Q]` to use instead of the named one.
        loss_kwargs: hyper-parameters of the objective; `metric_cut` of `adore` is `depth` by default.

    Raises:
        ValueError: no such objective or hyper-parameter, or an index that does not fit the model or `depth`.
    """

    objectives: ClassVar[Mapping[str, Callable[..., Tensor]]] = SEARCH_LOSSES

    def __init__(
        self,
        model: nn.Module,
        index: ExactIndex,
        loss_type: str = "adore",
        *,
        depth: int = 200,
        rank_by: str = "list",
        scale: float | None = None,
        objective: Callable[..., Tensor] | None = None,
        **loss_kwargs: Any,
    ) -> None:
        check_index(model, index, depth)
        if rank_by not in RANK_BY:
            raise ValueError(f"rank_by must be one of {', '.join(RANK_BY)}, got {rank_by!r}")
        if loss_type == "adore":
            loss_kwargs = {"metric_cut": depth, **loss_kwargs}
        super().__init__(model, loss_type, scale=scale, objective=objective, **loss_kwargs)
        self.index, self.depth, self.rank_by = index, depth, rank_by
        self.last_lists = LastLists()

    def forward(
        self, sentence_features: Any, labels: Any = None, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The loss of one batch of queries.

        Args:
            sentence_features: features of the queries, a list of one.
            labels: their judged documents: `Lists` whose `documents` are positions in the index, gain 0 for those that
                are never to be found; or positions of positives `[B J]`, -1 for padding.
            prompt, task: of the host, not read.
        """
        (features,) = sentence_features
        judged = labels if isinstance(labels, Lists) else _of_positions(labels)
        found = self.search(features, judged)
        self._track_search(found, judged)
        lists = lists_of(found, judged)
        places, documents = lists.documents.unique(return_inverse=True)
        queries = self._outputs(dict(features))
        vectors = self.index.vectors(places).to(queries.device, at_least_float32(queries).dtype)
        return self.calculate_loss([[queries], [vectors]], replace(lists, documents=documents))

    @torch.no_grad()
    def search(self, features: Mapping[str, Any], judged: Lists) -> Int[Tensor, "B K"]:
        """Positions in the index of what the model finds without dropout, best first; -1 where there is no more."""
        training = self.model.training
        self.model.eval()
        try:
            queries = self._outputs(dict(features))
        finally:
            self.model.train(training)
        if not bool(queries.isfinite().all()):
            raise NonFiniteScoresError("the vector of a query is not finite; the model has diverged")
        never = (judged.gains <= 0) & judged.mask
        exclude = [
            {self.index.ids[place] for place in places[kept].tolist()}
            for places, kept in zip(judged.documents, never, strict=True)
        ]
        return self.index.search(queries, self.depth, exclude=exclude)[1].to(judged.mask.device)

    def _arguments(self, lists: Lists) -> dict[str, Any]:
        arguments = super()._arguments(lists)
        if self.loss_type != "adore":
            return arguments
        if self.rank_by == "list":
            places = torch.arange(1, lists.gains.shape[-1] + 1, device=lists.gains.device)
            arguments["ranks"] = places.expand_as(lists.gains)
        return {**arguments, "ideal_gains": lists.ideal}

    # --- what a person watches ----------------------------------------------------------------------------------------

    def _track_search(self, found: Tensor, judged: Lists) -> None:
        """`search/mrr` of the positives that were found; `search/missed`, the share of positives that were not, and
        `search/appended`, of queries without any; `search/changed`, the share of a list that was not in the list of the
        same query when it was last seen (in training, of up to `WATCHED` queries of each process)."""
        mode = "train" if torch.is_grad_enabled() else "eval"
        hits = _same(found, judged)
        queries = judged.relevant.any(-1)
        reached = hits.any(-1)  # [B K]
        first = reached.float().argmax(-1) + 1
        some = reached.any(-1)
        n_positives, n_queries = int(judged.relevant.sum()), int(queries.sum())
        self._add(mode, "search/mrr", float((1 / first).masked_fill(~some, 0.0).sum()), n_queries)
        self._add(mode, "search/missed", n_positives - int(hits.any(-2).sum()), n_positives)
        self._add(mode, "search/appended", n_queries - int(some.sum()), n_queries)
        if mode == "train" and judged.rows is not None:
            shares = self.last_lists.changed([row["row"] for row in judged.rows], found.cpu().numpy())
            self._add(mode, "search/changed", sum(shares), len(shares))

    def _add(self, mode: str, name: str, part: float | int, whole: int) -> None:
        self._sums[mode][name][0] += part
        self._sums[mode][name][1] += whole

    def get_config_dict(self) -> dict[str, Any]:
        """For the host's model card."""
        settings = {k: v for k, v in super().get_config_dict().items() if k != "in_batch"}
        more = {"rank_by": self.rank_by} if self.loss_type == "adore" else {}
        return {**settings, "depth": self.depth, "documents": len(self.index), **more}

    @property
    def citation(self) -> str:
        """Of the objective and of training against a frozen index, in BibTeX."""
        own = (
            "@inproceedings{zhan2021optimizing,\n"
            "    title={Optimizing Dense Retrieval Model Training with Hard Negatives},\n"
            "    author={Jingtao Zhan and Jiaxin Mao and Yiqun Liu and Jiafeng Guo and Min Zhang and Shaoping Ma},\n"
            "    booktitle={SIGIR},\n    year={2021},\n    eprint={2104.08051},\n    archivePrefix={arXiv}\n}"
        )
        return "\n\n".join(part for part in (own, super().citation) if part)


def lists_of(found: Int[Tensor, "B K"], judged: Lists) -> Lists:
    """Lists to train on of what was found: positions, grades, mask; `ideal` has the gains of all positives.

    Args:
        found: positions in the index, best first, -1 where there is nothing.
        judged: see `QueryLoss.forward`. A query without a positive there gets a list that is masked throughout.
    """
    positives = [places[kept].tolist() for places, kept in zip(judged.documents, judged.relevant, strict=True)]
    positions, _, mask = append_missed(found, positives)
    gains = judged.gains.unsqueeze(-2).masked_fill(~_same(positions, judged), 0.0).amax(-1)
    return replace(
        judged,
        gains=gains,
        mask=mask & judged.relevant.any(-1, keepdim=True),
        documents=positions.clamp(min=0),
        ideal=judged.gains.masked_fill(~judged.relevant, 0.0),
    )


def _same(positions: Int[Tensor, "B D"], judged: Lists) -> Bool[Tensor, "B D J"]:
    """Which documents are which positives."""
    return (positions.unsqueeze(-1) == judged.documents.unsqueeze(-2)) & judged.relevant.unsqueeze(-2)


def _of_positions(labels: Any) -> Lists:
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(
            "label must be positions of positives in the index, a list of whole numbers as long for each query; pad "
            "shorter ones with -1"
        )
    mask = labels >= 0
    if not bool(mask.any(-1).all()):
        raise ValueError(f"query {int((~mask.any(-1)).nonzero()[0])} of the batch (from 0) has no positive; drop it")
    return Lists(mask.float(), mask, labels.clamp(min=0))


class QueryCollator(CandidateCollator):
    """Rows of `data.positives` to one batch: only queries are tokenised."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`features` of the queries, a list of one; `lists`: their judged documents, see `QueryLoss.forward`."""
        lengths = torch.tensor([len(row["documents"]) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        lists = {"gains": _padded(rows, "gains"), "mask": mask, "documents": _padded(rows, "documents").long()}
        numbers = [int(row["row"]) for row in rows]
        return {
            "features": [self._features([row["query"] for row in rows], "query")],
            "lists": lists,
            "rows": torch.tensor(numbers),
            "texts": [{"row": number} for number in numbers],
        }


@dataclass
class LastLists:
    """What queries found when they were last seen, of the first `WATCHED` that come: 4 bytes a document."""

    lists: dict[int, np.ndarray] = field(default_factory=dict)

    def changed(self, rows: Sequence[int], found: np.ndarray) -> list[float]:
        """Share of each list that is new, of queries that were seen before; the lists are remembered.

        Args:
            rows: numbers of the queries, B.
            found: positions `[B K]`, below 0 where there is nothing.
        """
        shares = []
        for row, places in zip(rows, found.astype(np.int32), strict=True):
            last, places = self.lists.get(row), places[places >= 0]
            if last is not None and len(places):
                shares.append(1 - len(np.intersect1d(last, places)) / len(places))
            if last is not None or len(self.lists) < WATCHED:
                self.lists[row] = places
        return shares

    def save(self, path: Path) -> None:
        """As safetensors."""
        from safetensors.numpy import save_file

        rows = list(self.lists)
        lengths = np.array([len(self.lists[row]) for row in rows], np.int32)
        places = np.concatenate([np.zeros(0, np.int32), *(self.lists[row] for row in rows)])
        save_file({"rows": np.array(rows, np.int64), "lengths": lengths, "places": places}, path)

    def load(self, path: Path) -> None:
        """What `save` wrote, instead of what is remembered."""
        from safetensors.numpy import load_file

        found = load_file(path)
        parts = np.split(found["places"], np.cumsum(found["lengths"])[:-1])
        self.lists = dict(zip(found["rows"].tolist(), parts, strict=False))


def check_index(model: Any, index: Any, depth: int) -> None:
    """Refuse a model that is no bi-encoder, and an index that is not of its kind or has fewer documents than `depth`.

    Raises:
        ValueError: saying which.
    """
    if kind_of(model) != "bi_encoder":
        raise ValueError(f"an index is searched with a bi-encoder, got {type(model).__name__}")
    if not isinstance(index, ExactIndex):
        raise ValueError(f"index must be an ExactIndex, whose vectors can be read, got {type(index).__name__}")
    if not 1 <= depth <= len(index):
        raise ValueError(f"need 1 <= depth <= documents of the index, got depth={depth} and {len(index)} documents")
    width, own = index.embeddings.shape[1], model.get_embedding_dimension()
    if own is not None and own != width:
        raise ValueError(f"the index is {width} wide and the model's vectors {own}; encode the documents with it")
    if similarity_of(model) != index.similarity:
        raise ValueError(
            f"the model compares by {similarity_of(model)} and the index by {index.similarity}; make it with "
            f"ExactIndex(..., similarity={similarity_of(model)!r}), or set the model's similarity_fn_name"
        )


def check_lengths(model: Any, index: ExactIndex, queries: Sequence[str]) -> None:
    """Refuse inner products of vectors of which one side is normalised and the other is not.

    Args:
        model, index: that fit by `check_index`. Cosines have no lengths.
        queries: a few texts.
    """
    if index.similarity == "cosine":
        return
    ours = encode(model, queries).norm(dim=1)
    some = torch.arange(0, len(index), max(1, len(index) // CHECKED))
    theirs = index.vectors(some).float().norm(dim=1).cpu()
    unit = [bool(((lengths - 1).abs() < UNIT).all()) for lengths in (ours, theirs)]
    if unit[0] == unit[1]:
        return
    which, other = ("model's", "index's") if unit[0] else ("index's", "model's")
    lengths = theirs if unit[0] else ours
    raise ValueError(
        f"the {which} vectors have length 1 and the {other} {lengths.min():.3g} to {lengths.max():.3g}, compared by "
        "dot; encode queries and documents alike, or compare both by cosine (similarity_fn_name of the model, "
        "similarity of the index)"
    )


def differing_vectors(model: Any, index: ExactIndex, corpus: Mapping[str, str], n: int) -> list[str]:
    """Of the first `n` documents of a corpus those whose vector in the index points elsewhere than the model's.

    A cosine below .99: another encoder, another prompt, or ids in another order; lower precision does less.
    """
    places = {document_id: i for i, document_id in enumerate(index.ids)}
    ids = [document_id for document_id in corpus if document_id in places][:n]
    if not ids:
        return []
    ours = encode(model, [corpus[document_id] for document_id in ids], side="document")
    theirs = index.vectors(torch.tensor([places[document_id] for document_id in ids])).float().cpu()
    likeness = torch.nn.functional.cosine_similarity(ours, theirs)
    return [document_id for document_id, value in zip(ids, likeness.tolist(), strict=True) if value < 0.99]
