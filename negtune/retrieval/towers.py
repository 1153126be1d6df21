"""One encoder for queries and another for documents: made of one model, and joined to one model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from negtune.retrieval.collate import prompts_of


def query_copy(model: Any, *, adapter: bool = False) -> Any:
    """A copy of an encoder to train for queries, while the one given goes on for documents as it is.

    Memory is shared with what is not trained: frozen parameters, and with an adapter all of them.

    Args:
        model: a SentenceTransformer.
        adapter: whether an adapter will be added to the copy, so that no other parameter of it is trained.
    """
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            shared[id(parameter)] = parameter
        elif adapter:  # which freezes the rest of the copy, but not of the model
            shared[id(parameter)] = nn.Parameter(parameter.data)
    return copy.deepcopy(model, shared)


def join_towers(query_model: Any, document_model: Any) -> Any:
    """One SentenceTransformer whose `encode_query` is that of the one model and `encode_document` that of the other.

    Its only module is a `Router` of sentence-transformers, which loads without code of ours; plain `encode` takes the
    document side. Each side keeps its prompt and its limit of tokens. An adapter is merged, into a copy.

    Raises:
        ValueError: an adapter on quantised weights: merging would round it away.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    pair = query_model, document_model
    towers = [list(_without_adapter(model).children()) for model in pair]
    prompts = [prompts_of(model, "bi_encoder") for model in pair]
    return SentenceTransformer(
        modules=[Router.for_query_document(query_modules=towers[0], document_modules=towers[1])],
        prompts={side: own.get(side, "") for side, own in zip(("query", "document"), prompts, strict=True)},
        similarity_fn_name=document_model.similarity_fn_name,
        device=str(document_model.device),
    )


def split_towers(model: Any) -> tuple[Any, Any]:
    """The query encoder and the document encoder of a model; for one without a Router of the two, twice itself."""
    from sentence_transformers import SentenceTransformer

    first, *rest = model.children()
    towers = getattr(first, "sub_modules", None)
    if towers is None or not {"query", "document"} <= set(towers):
        return model, model
    prompts = dict(model.prompts or {})
    query, document = (
        SentenceTransformer(
            modules=[*towers[side], *rest],
            prompts={side: prompts[side]} if side in prompts else {},
            similarity_fn_name=model.similarity_fn_name,
            device=str(model.device),
        )
        for side in ("query", "document")
    )
    return query, document


def _without_adapter(model: Any) -> Any:
    """The model itself if it has none, else a copy into which the adapter is merged."""
    transformer = getattr(model, "transformers_model", None)
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return model
    if getattr(transformer, "is_quantized", False):
        raise ValueError("merging an adapter into quantised weights would round it away; keep the adapter by itself")
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = copy.deepcopy(model)
    layers = [
        (parent, name, child)
        for parent in made.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    for parent, name, child in layers:
        child.merge(safe_merge=True)
        setattr(parent, name, child.get_base_layer())
    made.transformers_model._hf_peft_config_loaded = False
    return made
