"""Batches of candidate lists: every distinct text is tokenised and embedded once, whatever lists it is in.

Shapes: B queries, D documents of the longest list, F features of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negtune.data.candidates import LEFT_OUT
from negtune.retrieval.in_batch import share_texts


@dataclass
class CandidateCollator:
    """Rows of `data.candidates` to one batch.

    Args:
        preprocess: the model's: texts (pairs of texts, for a cross-encoder) to features.
        kind: of the model, see `losses.kind_of`.
        prompts: put before queries (`query`) and documents (`document`), or for a cross-encoder (a text) the pair.
        in_batch: queries share the documents: say which are known to be relevant to each, see `in_batch`.
        keep_rows: hand the rows themselves on, for a reward function.
        check: called with the rows of each batch.
    """

    preprocess: Callable[..., dict[str, Any]]
    kind: str
    prompts: Mapping[str, str] | str | None = None
    in_batch: bool = False
    keep_rows: bool = False
    check: Callable[[Sequence[Mapping[str, Any]]], None] | None = None
    valid_label_columns: Sequence[str] = ()  # asked for by the host

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`features`: one dict a column; `lists`: gains, mask, documents, left_out, known `in_batch`, and teacher,
        start, ideal where rows have them; `rows`: their numbers."""
        if self.check is not None:
            self.check(rows)
        lengths = [len(row["documents"]) for row in rows]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
        lists = {"gains": _padded(rows, "gains"), "mask": mask}
        for name, column in (("teacher", "teacher_scores"), ("start", "start_scores"), ("ideal", "ideal_gains")):
            if rows[0].get(column) is not None:
                lists[name] = _padded(rows, column)
        if self.kind == "cross_encoder":
            texts = [(row["query"], document) for row in rows for document in row["documents"]]
            features, places = [self._features(texts, "pair")], list(range(len(texts)))
        else:
            if self.in_batch:
                shared = share_texts(rows)
                texts, places, lists["known"] = shared.texts, shared.places, shared.known
            else:
                texts, places = distinct_texts([document for row in rows for document in row["documents"]])
            queries = self._features([row["query"] for row in rows], "query")
            features = [queries, self._features(texts, "document")]
        documents = torch.zeros_like(mask, dtype=torch.long)
        documents[mask] = torch.tensor(places)
        lists["left_out"] = sum(row.get(LEFT_OUT, 0) for row in rows)
        batch = {"features": features, "lists": {**lists, "documents": documents}}
        if "row" in rows[0]:
            batch["rows"] = torch.tensor([row["row"] for row in rows])
        return {**batch, "texts": list(rows)} if self.keep_rows else batch

    def _features(self, texts: list[Any], side: str) -> dict[str, Any]:
        prompt = self.prompts if isinstance(self.prompts, str) else (self.prompts or {}).get(side)
        task = {"task": side} if self.kind == "multi_vector" else {}
        return {**self.preprocess(texts, prompt=prompt, **task), **task}


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each once, as it came first; and which of them each one is."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), [places[text] for text in texts]


def _padded(rows: Sequence[Mapping[str, Any]], column: str) -> Tensor:
    width = max(len(row[column]) for row in rows)
    return torch.tensor([[*row[column], *[0.0] * (width - len(row[column]))] for row in rows])


def prompts_of(model: Any, kind: str) -> dict[str, str] | str | None:
    """What `encode_query`, `encode_document` and `predict` put before texts: training has to see the same."""
    known, default = dict(model.prompts or {}), getattr(model, "default_prompt_name", None)
    if kind == "cross_encoder":
        return known.get(default)
    names = {"query": ("query",), "document": ("document", "passage", "corpus")}
    # as the host does it: the first name that is there counts, with an empty text too
    found = {side: next((n for n in each if n in known), default) for side, each in names.items()}
    return {side: known[name] for side, name in found.items() if known.get(name)}
