"""Completions scored and prompts answered by a model, the work shared between processes.

Every completion ends with an EOS that counts as one of its tokens. Answers are generated greedily.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from negtune.data.batching import longest_first
from negtune.data.completions import RowError, collate, padding_id, prompt_token_ids, tokenize_row
from negtune.metrics import unlearning as metrics
from negtune.models.forward import attach_scoring, completion_statistics
from negtune.models.sharing import set_prefix_sharing
from negtune.models.structure import causal_lm


def score_completions(
    model: nn.Module, tokenizer: Any, items: Sequence[Any], batch_size: int, max_length: int | None
) -> list[dict[str, Any]]:
    """Teacher-forced numbers of each completion, in order, on all processes; one dictionary an item.

    Args:
        model: causal LM, plain, with an adapter, or wrapped for several processes; in evaluation mode.
        tokenizer: with an EOS token, and a chat template if items are chats.
        items: `prompt`, `completion`, and `name`, by which an error calls the item.
        batch_size: sequences per forward pass.
        max_length: prompt plus completion; longer completions are cut and marked `truncated`.

    Returns:
        `tokens`, `truncated`, `nll` (per token), `probability`, `exact_memorization`, `extraction_strength`, `min_k`.
    """
    attach_scoring(model)
    _share_prefixes_if_undecided(model)
    work = functools.partial(_score, _without_ddp(model), tokenizer, batch_size, max_length)
    return _over_processes(items, work, batch_size)


def generate_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Any], batch_size: int, max_new_tokens: int
) -> list[str]:
    """A greedy answer to each prompt, in order, on all processes."""
    work = functools.partial(_generate, _without_ddp(model), tokenizer, batch_size, max_new_tokens)
    return _over_processes(prompts, work, batch_size)


def tokenize_completion(item: Mapping[str, Any], tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Token ids of one item, see `score_completions`; an error names the item."""
    try:
        return tokenize_row(item, tokenizer, max_length=max_length)
    except RowError as error:
        raise RowError(f"{item['name']}: {error}") from None


def _share_prefixes_if_undecided(model: nn.Module) -> None:
    """Several answers to one question are common here; a trainer has decided already, and split weights cannot be
    probed."""
    lm = causal_lm(model)
    split = hasattr(model, "_fsdp_wrapped_module")  # FSDP1; FSDP2 has DTensors, ZeRO-3 marks its parameters
    split = split or any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in lm.parameters())
    if not hasattr(lm, "_prefix_sharing") and not split:
        set_prefix_sharing(model, "auto")


def _over_processes(
    items: Sequence[Any], work: Callable[[Sequence[Any], int], list[Any]], batch_size: int
) -> list[Any]:
    """`work` on all items, each process taking every n-th; results in the items' order on all processes.

    `work(items, steps)` runs exactly `steps` batches, equal on all processes: sharded weights are gathered by everybody
    in every forward pass, so a process with less to do repeats an item.
    """
    if not items:
        return []
    several = dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    mine = items[rank::processes]
    steps = math.ceil(math.ceil(len(items) / processes) / batch_size)
    results = work(mine or items[:1], steps)[: len(mine)]
    if processes == 1:
        return results
    shares: list[Any] = [None] * processes
    dist.all_gather_object(shares, results)
    merged: list[Any] = [None] * len(items)
    for start, share in enumerate(shares):
        merged[start::processes] = share
    return merged


def _batches(order: Sequence[int], batch_size: int, steps: int) -> Iterator[Sequence[int]]:
    """Exactly `steps` batches of neighbours; the first item again where nothing is left."""
    for step in range(steps):
        yield order[step * batch_size : (step + 1) * batch_size] or order[:1]


def _score(
    model: nn.Module, tokenizer: Any, batch_size: int, max_length: int | None, items: Sequence[Any], steps: int
) -> list[dict[str, Any]]:
    """Teacher-forced numbers of each completion."""
    rows = [tokenize_completion(item, tokenizer, max_length) for item in items]
    device = next(model.parameters()).device
    out: list[Any] = [None] * len(rows)
    for chunk in _batches(longest_first(rows), batch_size, steps):
        batch = collate([rows[i] for i in chunk], padding_id(tokenizer))
        logps, correct, mask = completion_statistics(model, {k: v.to(device) for k, v in batch.items()})
        logps, correct, mask = logps.double().cpu().numpy(), correct.cpu().numpy(), mask.cpu().numpy()
        for i, row_logps, row_correct, row_mask in zip(chunk, logps, correct, mask, strict=True):
            out[i] = _numbers(row_logps[row_mask], row_correct[row_mask], rows[i]["truncated"])
    return out


def _numbers(logps: np.ndarray, correct: np.ndarray, truncated: bool) -> dict[str, Any]:
    return {
        "tokens": len(logps),
        "truncated": truncated,
        "nll": float(-logps.mean()),
        "probability": float(metrics.probability(float(-logps.sum()), len(logps))),
        "exact_memorization": metrics.exact_memorization(correct),
        "extraction_strength": metrics.extraction_strength(correct),
        "min_k": metrics.min_k_score(logps),
    }


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, batch_size: int, max_new_tokens: int, prompts: Sequence[Any], steps: int
) -> list[str]:
    """Greedy answers; prompts are padded on the left, text from the first end token on is cut off."""
    from transformers import GenerationConfig

    ids = [prompt_token_ids(prompt, tokenizer) for prompt in prompts]
    device = next(model.parameters()).device
    ends = _end_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
    )
    out: list[Any] = [None] * len(ids)
    for chunk in _batches(sorted(range(len(ids)), key=lambda i: -len(ids[i])), batch_size, steps):
        width = max(len(ids[i]) for i in chunk)
        input_ids = torch.tensor([[padding_id(tokenizer)] * (width - len(ids[i])) + ids[i] for i in chunk])
        attention_mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chunk])
        generated = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
        )
        for i, row in zip(chunk, generated[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            out[i] = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
    return out


def _end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokenizer's EOS, which completions end with, and those that the model's generation config adds."""
    configured = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [tokenizer.eos_token_id, *more] if end is not None})


def _without_ddp(model: nn.Module) -> nn.Module:
    """DDP has no `generate`, and its forward synchronises buffers; sharding wrappers have to stay."""
    return model.module if isinstance(model, DistributedDataParallel) else model
