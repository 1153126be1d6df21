"""What a batch of candidate lists says besides its texts: gains, masks, which text each document is.

Shapes: B queries, D documents of the longest list, M documents of the batch, I gains of all judged documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lists:
    """What a batch of candidate lists says besides its texts.

    Args:
        gains: grades `[B D]`.
        mask: True where a document is no padding `[B D]`.
        documents: which of the embedded texts (of the scored pairs) each document is `[B D]`.
        teacher: scores of a teacher `[B D]`, or None.
        start: scores of the warm start `[B D]`, or None.
        ideal: gains of all judged documents of each query, zeros behind `[B I]`, or None.
        known: documents of the batch that are known to be relevant to each query `[B M]`, or None; read `in_batch`.
        own: which documents are the query's own, where lists hold those of the batch; withheld: how many it does not
            have as candidates since they are known to be relevant, `[B]`.
        rows: the rows of the data set, for a reward function.
        total: queries that count in the whole optimiser step, over all processes, before any was scored; None: this
            batch is the step.
        left_out: queries that say nothing and that a stream left out before these.
        share: micro-batches of the step times processes: what the host divides by.
        more: keyword arguments of an objective of one's own, `[B D]` each.
    """

    gains: Tensor
    mask: Tensor
    documents: Tensor
    teacher: Tensor | None = None
    start: Tensor | None = None
    ideal: Tensor | None = None
    known: Tensor | None = None
    own: Tensor | None = None
    withheld: Tensor | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    left_out: int = 0
    total: float | None = None
    share: float = 1.0
    more: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_labels(cls, labels: Tensor, n_queries: int, n_columns: int, *, teacher: bool = False) -> Lists:
        """Of sentence-transformers' columns (query, document_0, ..., document_{n-1}).

        Args:
            labels: gains `[B n]`, below 0 for padding; or a teacher's scores, NaN for padding, with which the first
                document is the relevant one.
            n_queries, n_columns: B, and n.
            teacher: which of the two.
        """
        if labels.shape != (n_queries, n_columns):
            raise ValueError(
                f"labels must be one number for each of the {n_columns} document columns, [{n_queries}, {n_columns}], "
                f"got {list(labels.shape)}; pad shorter lists with empty documents and the label "
                + ("NaN" if teacher else "-1")
            )
        columns = torch.arange(n_columns, device=labels.device) * n_queries
        documents = columns + torch.arange(n_queries, device=labels.device).unsqueeze(-1)
        labels = labels.float()
        if teacher:
            return cls(first_relevant(labels), ~labels.isnan(), documents, teacher=labels)
        return cls(labels.clamp(min=0), labels >= 0, documents)

    @classmethod
    def of_label_lists(cls, labels: Sequence[Any], device: torch.device, *, teacher: bool = False) -> Lists:
        """Of a cross-encoder's lists of gains, or of a teacher's scores, one after another; see `of_labels`."""
        lengths = [len(row) for row in labels]
        gains = torch.zeros(len(labels), max(lengths), device=device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(-1)
        gains[mask] = torch.cat([torch.as_tensor(row, dtype=torch.float, device=device) for row in labels])
        documents = torch.zeros_like(mask, dtype=torch.long)
        documents[mask] = torch.arange(sum(lengths), device=device)
        if teacher:
            return cls(first_relevant(gains), mask, documents, teacher=gains)
        return cls(gains, mask, documents)

    @property
    def relevant(self) -> Tensor:
        """[B D]."""
        return (self.gains > 0) & self.mask

    def mean(self, losses: Tensor, counted: Tensor) -> Tensor:
        """Of the losses of queries that count, both `[B]`, over those of the optimiser step; times `share`."""
        losses = losses.masked_fill(~counted, 0.0)
        if self.total is None:
            return losses.sum() / counted.sum().clamp(min=1)
        return losses.sum() / max(self.total, 1) * self.share


def first_relevant(like: Tensor) -> Tensor:
    """Gains `[B D]` by which the first document of each list is the relevant one."""
    gains = torch.zeros_like(like)
    gains[:, 0] = 1
    return gains
