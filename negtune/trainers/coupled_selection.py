"""Which model of selection `CoupledTrainer` trains beside the ranker: the given one, one that it makes, or none; and
where it is kept."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from negtune.models.policy import disable_dropout
from negtune.retrieval.collate import CandidateCollator, prompts_of
from negtune.retrieval.coupled import CoupledObjective, Level
from negtune.retrieval.losses import RankingLoss, kind_of
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.selection import FeatureSelection, ProvenanceCollator
from negtune.trainers.coupled_config import KNOWN, CoupledConfig

MOST_LISTS = 10_000
"""Of the train set, spread over it: their features are what is standardised by."""
SELECTION, LEVEL = "selection", "level.safetensors"
"""In a folder of the ranker: folder of the selection model, file of the level."""


class CoupledWarning(UserWarning):
    """Nothing tells relevance from selection."""


def selection_model(given: Any, ranker: nn.Module, rows: Any, args: CoupledConfig) -> nn.Module | None:
    """Ready to train; None where selection is known, and to evaluate only.

    Args:
        given: a cross-encoder, its name or folder, a `FeatureSelection`, or None.
        ranker: the other model.
        rows: the checked train set, or None.
        args: settings; `mode` says what is needed.

    Raises:
        ValueError: what is given and the columns of the rows do not go together.
    """
    if rows is None and given is None:
        return None
    columns = () if rows is None else tuple(rows.column_names or ())
    featured, known = ("selection_features" in columns, "selection_propensity" in columns)
    if args.mode in KNOWN and rows is not None and not known:
        raise ValueError(
            f"mode {args.mode} needs rows with selection_propensity, the probability of each document to be selected; "
            "without it take mode em with selection_features"
        )
    if given is not None and (known or args.mode in KNOWN):
        raise ValueError("selection is known by selection_propensity: leave the selection model out, or the column")
    if known and (args.mode in KNOWN or not featured):
        return None
    if known:
        raise ValueError("rows have selection_features and selection_propensity; leave one of the two out")
    if given is None and not featured:
        raise ValueError(
            f"mode {args.mode} needs a model of selection: give rows selection_features (of mined lists: "
            "negtune.retrieval.selection.provenance), or a cross-encoder as selection, as published"
        )
    if given is None:
        given = _of_features(rows, args)
    elif isinstance(given, str | os.PathLike):
        given = load_ranker(given, "cross_encoder")
    _check(given, ranker, rows, featured)
    if args.disable_dropout:
        disable_dropout(given)
    return given.to(args.device)


def _of_features(rows: Any, args: CoupledConfig) -> FeatureSelection:
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "the features of a stream cannot be standardised before it is read; pass "
            "selection=FeatureSelection(n).standardise(features) with features of some documents"
        )
    apart = -(-len(rows) // MOST_LISTS)
    lists = rows.select(range(0, len(rows), apart))["selection_features"]
    features = torch.tensor([document for one in lists for document in one], dtype=torch.float64)
    found = FeatureSelection(features.shape[-1], args.selection_hidden, args.seed).standardise(features)
    if bool(found.deviation.isinf().all()):
        warnings.warn(
            "selection_features are the same for all documents: they say nothing of which were selected, and labels "
            "cannot tell relevance from selection then. Give those that retrievers rank differently, or "
            "selection_propensity",
            CoupledWarning,
            stacklevel=4,
        )
    return found


def _check(selection: Any, ranker: nn.Module, rows: Any, featured: bool) -> None:
    if isinstance(selection, FeatureSelection):
        if rows is not None and not featured:
            raise ValueError("a FeatureSelection reads selection_features, which the rows do not have")
        if rows is not None:
            selection.preprocess(next(iter(rows))["selection_features"])
        return
    if kind_of(selection) != "cross_encoder":
        raise ValueError(f"selection must be a cross-encoder or a FeatureSelection, got {type(selection).__name__}")
    if featured:
        raise ValueError(
            "rows have selection_features, which a cross-encoder does not read; leave selection out, or the column"
        )
    ours = {id(p) for p in ranker.parameters()}
    if any(id(p) in ours for p in selection.parameters()):
        raise ValueError("the two models share parameters; load the selection model a second time")
    selection.model_card_data.local_files_only = True  # else the card asks the hub about a folder's name
    warnings.warn(
        "both models read the query and the document: labels cannot tell relevance from selection then (the coupling "
        "is not identified). Give rows selection_features or selection_propensity, and no selection model",
        CoupledWarning,
        stacklevel=4,
    )


def selection_loss(selection: nn.Module, args: CoupledConfig) -> RankingLoss:
    """What trains a selection model: weighed pairs in mode `official`, else cross-entropy with soft labels."""
    text = not isinstance(selection, FeatureSelection)
    if text and args.gradient_checkpointing:
        selection.gradient_checkpointing_enable()
    sizes = ("mini_batch_size", "mini_batch_num_tokens") if text else ()
    objective = CoupledObjective(soft=args.mode != "official")
    return RankingLoss(selection, "rank_net", objective=objective, **{name: getattr(args, name) for name in sizes})


def with_provenance(collate: CandidateCollator, selection: nn.Module | None) -> ProvenanceCollator:
    """Batches of `collate` with what the selection model reads."""
    text = selection is not None and not isinstance(selection, FeatureSelection)
    return ProvenanceCollator(collate, selection, prompts_of(selection, "cross_encoder") if text else None)


def save_beside(folder: Path, selection: nn.Module | None, level: Level | None) -> None:
    """In the folder of the ranker."""
    if selection is not None:
        selection.save_pretrained(str(folder / SELECTION))
    if level is not None:
        save_file(level.state_dict(), folder / LEVEL)


def check_beside(folder: Path, selection: nn.Module | None, level: Level | None) -> None:
    """Before anything is loaded from there.

    Raises:
        OSError: one of them is missing, or there is a level that this mode has no use for.
    """
    if not folder.is_dir():
        raise OSError(f"no folder {folder}; a checkpoint is a folder checkpoint-N in the output folder of a run")
    if level is None and (folder / LEVEL).exists():
        raise OSError(f"{folder} has {LEVEL}, which this mode does not read; resume with the mode it was trained in")
    for wanted, file in ((selection, SELECTION), (level, LEVEL)):
        if wanted is not None and not (folder / file).exists():
            raise OSError(f"{folder} has no {file}; it was not written by a CoupledTrainer with these settings")


def load_beside(folder: Path, selection: nn.Module | None, level: Level | None) -> None:
    """What `save_beside` has written, into these."""
    if isinstance(selection, FeatureSelection):
        selection.load_state_dict(FeatureSelection.from_pretrained(folder / SELECTION).state_dict())
    elif selection is not None:
        selection.load_state_dict(load_ranker(folder / SELECTION, "cross_encoder").state_dict())
    if level is not None:
        level.load_state_dict(load_file(folder / LEVEL))
