"""A model of selection that reads where a document comes from, and not what it says.

Relevance and selection can be told apart only where one of the two models reads something that the other does not. What
decides whether a document was judged is mostly where retrievers had it: those are the features.

Shapes: B queries of a batch, D documents of the longest list, M documents of all of them, F features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from negtune.records import write_json
from negtune.retrieval.collate import CandidateCollator
from negtune.retrieval.mining import CandidateList
from negtune.retrieval.rankers import query_room

BIAS = 1.0
"""Log-odds of selection at the start: at first labels are believed, and what is not labelled is mostly irrelevant."""


class FeatureSelection(nn.Module):
    """Log-odds that a document was selected for judging, from numbers that say where it comes from.

    Linear in the standardised features, or with one hidden layer. `CoupledTrainer` takes it where a cross-encoder could
    stand: `preprocess` makes its input, `forward` adds `scores`.

    Args:
        n_features: F.
        hidden: units of the hidden layer; 0: none.
        seed: of the hidden layer's first weights. The last layer starts at 0, with a bias of `BIAS`.
    """

    num_labels = 1
    prompts: dict[str, str] | None = None

    def __init__(self, n_features: int, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        if n_features < 1 or hidden < 0:
            raise ValueError(f"need at least one feature and hidden >= 0, got {n_features} and {hidden}")
        self.n_features, self.hidden = n_features, hidden
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU()) if hidden else nn.Identity()
            self.last = nn.Linear(hidden or n_features, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, BIAS)
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("deviation", torch.ones(n_features))

    def standardise(self, features: Tensor) -> FeatureSelection:
        """Take mean and standard deviation of `features` `[M F]` from now on; one that is always the same counts 0."""
        self._check(features.shape[-1])
        features = features.double()
        deviation = features.std(0, correction=0)
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(torch.where(deviation > 0, deviation, torch.inf))
        return self

    def preprocess(self, rows: Sequence[Sequence[float]], prompt: str | None = None) -> dict[str, Tensor]:
        """Features of M documents; there is nothing to prompt."""
        features = torch.tensor(rows, dtype=torch.float32)
        self._check(features.shape[-1])
        return {"selection_features": features}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds `scores` `[M 1]`."""
        values = (features["selection_features"].to(self.mean) - self.mean) / self.deviation
        return {**features, "scores": self.last(self.first(values))}

    def _check(self, found: int) -> None:
        if found != self.n_features:
            raise ValueError(f"this FeatureSelection reads {self.n_features} features a document, got {found}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `selection.json` and `selection.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "selection.json", {"n_features": self.n_features, "hidden": self.hidden})
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, _weights_of(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FeatureSelection:
        """What `save_pretrained` wrote."""
        settings = json.loads((Path(folder) / "selection.json").read_text(encoding="utf-8"))
        model = cls(int(settings["n_features"]), int(settings["hidden"]))
        model.load_state_dict(load_file(_weights_of(folder)))
        return model


def _weights_of(folder: str | Path) -> Path:
    return Path(folder) / "selection.safetensors"


@dataclass
class ProvenanceCollator:
    """Batches of `CandidateCollator`, and their `provenance`: `judged`, and what decides selection.

    Args:
        lists: makes the batch.
        selection: `FeatureSelection`, cross-encoder, or None where `selection_propensity` is known.
        prompts: of a cross-encoder, a text before the pair.
    """

    lists: CandidateCollator
    selection: Any
    prompts: Any = None
    valid_label_columns: Sequence[str] = ()  # asked for by the host

    def __post_init__(self) -> None:
        self.texts: CandidateCollator | None = None
        if self.selection is not None and not isinstance(self.selection, FeatureSelection):
            settings = {"prompts": self.prompts, "check": query_room(self.selection)}
            self.texts = CandidateCollator(self.selection.preprocess, "cross_encoder", **settings)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `CandidateCollator`; `provenance` has `judged` and `documents` (which scored text each is) `[B D]`, and
        `features` or `propensities` `[B D]`, 1 for padding."""
        batch = self.lists(rows)
        mask = batch["lists"]["mask"]
        documents = torch.zeros_like(mask, dtype=torch.long)
        documents[mask] = torch.arange(int(mask.sum()))
        found = {"judged": torch.zeros_like(mask), "documents": documents}
        found["judged"][mask] = torch.tensor([known for row in rows for known in row["judged"]])
        if self.texts is not None:
            found["features"] = self.texts(rows)["features"]
        elif self.selection is not None:
            found["features"] = [self.selection.preprocess([d for row in rows for d in row["selection_features"]])]
        else:
            found["propensities"] = torch.ones(mask.shape)
            found["propensities"][mask] = torch.tensor([p for row in rows for p in row["selection_propensity"]])
        return {**batch, "provenance": found}


def provenance_names(lists: Iterable[CandidateList]) -> list[str]:
    """Of the features of `provenance`, in order."""
    retrievers = sorted({name for one in lists for name in one.ranks})
    return [f"{name}/{what}" for name in retrievers for what in ("found", "rank", "score")] + ["added"]


def provenance(lists: Sequence[CandidateList]) -> list[list[list[float]]]:
    """`selection_features` of mined lists: for each retriever whether it found the document, 1/log2(1 + rank), and its
    score as a share of the range of the list; then whether the document was added.

    What is missing is 0. A document is added only *because* it is relevant, so that `added` tells the label; as a
    feature of its own it keeps that out of the weights of the ranks.

    Returns:
        `[lists][documents][F]`, in the order of `provenance_names`.
    """
    retrievers = sorted({name for one in lists for name in one.ranks})
    return [
        [
            [number for name in retrievers for number in _of_retriever(one, name, place)] + [float(one.added[place])]
            for place in range(len(one.documents))
        ]
        for one in lists
    ]


def _of_retriever(one: CandidateList, name: str, place: int) -> tuple[float, float, float]:
    ranks, scores = one.ranks.get(name), one.scores.get(name)
    rank = None if ranks is None else ranks[place]
    if rank is None or scores is None:
        return 0.0, 0.0, 0.0
    known = [score for score in scores if score is not None]
    lowest, span = min(known), max(known) - min(known)
    score = scores[place]
    return 1.0, 1 / log2(1 + rank), 0.0 if score is None or span == 0 else (score - lowest) / span
