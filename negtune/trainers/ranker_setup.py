"""The ranker as a trainer takes it over: loaded, adapted, trained as it will be searched with, checked before anything
is computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from negtune._st_compat import has_static_embedding_input
from negtune.models.four_bit import keep_gradients
from negtune.models.policy import check_output_folder, checkpoint_bytes, disable_dropout
from negtune.retrieval.losses import kind_of
from negtune.retrieval.rankers import QueryRoom, load_ranker, query_room
from negtune.trainers.ranking_config import RankingConfig


def set_up_ranker(model: str | os.PathLike | nn.Module, args: RankingConfig, peft_config: Any = None) -> Any:
    """The model ready to be trained as `args` says.

    Raises:
        ValueError: of no kind that can rank, nothing to train, an adapter where there is no transformer, prompts for a
            side that there is not, or a limit for a model that has none.
        OSError: `output_dir` cannot be written, or has no room for a checkpoint.
    """
    set_seed(args.seed)  # the adapter's first weights are drawn before the host seeds
    model = _loaded(model, args)
    model.model_card_data.local_files_only = True  # else the card asks the hub about a folder's name
    if peft_config is not None:
        _add_adapter(model, args, peft_config)
    _refuse_frozen(model, with_adapter=peft_config is not None)
    if args.disable_dropout:
        disable_dropout(model)
    model = keep_gradients(model)
    _write_limits(model, args)
    check_output_folder(args.output_dir, checkpoint_bytes(model) if args.save_strategy != "no" else 0)
    return model


def checked_room(model: Any, train: Any, evaluated: Any) -> QueryRoom | None:
    """See that queries of a causal LM leave room for documents; returns what checks batches, None for other models.

    Args:
        model: of `set_up_ranker`.
        train, evaluated: checked rows, the latter by name if there are several sets; those of a stream are left to the
            check of batches.

    Raises:
        RowError: naming the first query without room.
    """
    room = query_room(model)
    if room is not None:
        several = evaluated if isinstance(evaluated, Mapping) else {"eval": evaluated}
        for name, rows in {"train": train, **several}.items():
            if hasattr(rows, "__len__"):
                room(rows.select_columns(["row", "query"]), name)
    return room


def _loaded(model: str | os.PathLike | nn.Module, args: RankingConfig) -> Any:
    if isinstance(model, str | os.PathLike):
        kind = "bi_encoder" if args.model_kind == "auto" else args.model_kind
        model = load_ranker(model, kind, model_kwargs=dict(args.model_init_kwargs or {}))
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs are for loading by name; this model is already an object, drop them")
    kind_of(model)
    if any(type(module).__name__ == "Router" for module in model.modules()):
        raise ValueError(
            "a Router has a tower for each side, and lists are not routed here; use RankingLoss with sentence-"
            "transformers' own trainer and its router_mapping"
        )
    return model


def _add_adapter(model: Any, args: RankingConfig, peft_config: Any) -> None:
    if not model.has_peft_compatible_model():
        raise ValueError("peft_config needs a model with a transformer, and this one has none; train all its weights")
    model.add_adapter(peft_config)
    if args.gradient_checkpointing:
        model.transformers_model.enable_input_require_grads()


def _refuse_frozen(model: Any, *, with_adapter: bool) -> None:
    transformer = getattr(model, "transformers_model", None)
    quantised = bool(getattr(transformer, "is_quantized", False))
    with_adapter = with_adapter or bool(getattr(transformer, "_hf_peft_config_loaded", False))
    if not any(p.requires_grad for p in model.parameters()) or (quantised and not with_adapter):
        raise ValueError(
            "the model has no parameters that can be trained"
            + ("; 4-bit and 8-bit weights need peft_config=LoraConfig(...)" if quantised else "")
        )


def _write_limits(model: Any, args: RankingConfig) -> None:
    """`prompts` and `max_length` into the model: it is trained as it will be evaluated, saved and searched with."""
    if args.max_length is not None:
        if has_static_embedding_input(model):
            raise ValueError("max_length is for transformers; static embeddings read whole texts, leave it out")
        model.max_seq_length = args.max_length
    if not args.prompts:
        return
    if kind_of(model) == "cross_encoder":
        if not isinstance(args.prompts, str):
            raise ValueError(f"prompts of a cross-encoder must be one text for the pair, got {args.prompts!r}")
        _refuse_unread(model, args.prompts)
        model.prompts, model.default_prompt_name = {**(model.prompts or {}), "pair": args.prompts}, "pair"
        return
    if not isinstance(args.prompts, Mapping) or not set(args.prompts) <= {"query", "document"}:
        raise ValueError(f"prompts must be a mapping with query, document or both, got {args.prompts!r}")
    model.prompts = {**(model.prompts or {}), **args.prompts}


def _refuse_unread(model: Any, prompt: str) -> None:
    """The prompt of a causal LM is a system message, which a chat template may leave out."""
    pair = [("query", "document")]
    if getattr(model[0], "transformer_task", None) == "text-generation" and torch.equal(
        model.preprocess(pair, prompt=prompt)["input_ids"], model.preprocess(pair)["input_ids"]
    ):
        raise ValueError(
            "the chat template of this causal LM does not read prompts; make the model with causal_reranker(..., "
            "instruction=...), and leave prompts out"
        )
