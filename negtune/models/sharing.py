"""When a model may run on packed prefix trees instead of padded rows, and when that is worth it.

Exact sharing needs attention that obeys a mask and positions that come as an argument. Rules refuse what is known not
to work (windows, dropout, attention kernels that take no mask); a probe refuses the rest: a small tree has to give the
hidden states of its rows. So a state-space layer, or an attention bias by distance, is found whatever it is called.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from negtune.models.structure import causal_lm, decoder_layers, eval_mode
from negtune.models.tree import ATTENTION_WEIGHT, Cost, PackedTrees, pack_trees, row_tokens

logger = logging.getLogger(__name__)

PrefixSharing = Literal["auto", "on", "off"]
MARGIN = 1.1
"""`auto` packs where the estimated work of padded rows is larger by this factor."""
TOKEN_BUDGET = 8192
"""Most tokens of one packed sequence: a written-out mask of that width has 64 MiB."""

EVEN = Cost(1.0, 1.0)


@dataclass
class Sharing:
    """How a causal LM shares prefixes; kept on the model, so that its reference and its evaluation do the same.

    Args:
        mode: see `set_prefix_sharing`.
        cost: of one forward pass.
        longest: rows beyond it would be seen through a window; None: no window.
        budget: most tokens of one packed sequence.
        noisy: two training forwards of the same tokens differed.
        counts: see `take_counts`.
    """

    mode: PrefixSharing
    cost: Cost = EVEN
    longest: int | None = None
    budget: int = TOKEN_BUDGET
    noisy: bool = False
    counts: TokenCounts = field(default_factory=lambda: TokenCounts())


@dataclass
class TokenCounts:
    """Tokens of the training forwards since `take_counts` was last called.

    Args:
        rows: tokens of the rows, each shared prefix counted in every row.
        distinct: tokens that have to be computed.
        processed: tokens the model was given, padding and fillers included.
    """

    rows: int = 0
    distinct: int = 0
    processed: int = 0

    def add(self, rows: int, distinct: int, processed: int) -> None:
        self.rows, self.distinct = self.rows + rows, self.distinct + distinct
        self.processed += processed


def set_prefix_sharing(
    model: nn.Module, mode: PrefixSharing, *, budget: int = TOKEN_BUDGET, check: bool = True
) -> str | None:
    """Let the causal LM inside `model` compute shared prefixes once from now on, or say why not.

    Args:
        model: causal LM, plain or with an adapter.
        mode: `auto` packs a batch where that saves work, and keeps padded rows where the model does not allow it; `on`
            packs every batch; `off` never packs.
        budget: most tokens of one packed sequence.
        check: run the probe. It cannot run on weights that are split between processes.

    Returns:
        Why `auto` will not pack (because of random numbers: not in training), or None.

    Raises:
        ValueError: `on` where sharing would not be exact, with the reason.
    """
    lm = causal_lm(model)
    lm._prefix_sharing = Sharing("off")
    if mode == "off":
        return None
    reason = _refusal(lm) or _adapter_refusal(model) or (_probe(lm) if check else None)
    if reason is None:
        noisy = check and _draws_in_training(lm)
        lm._prefix_sharing = Sharing(mode, _cost(lm), _window(lm.config.get_text_config()), budget, noisy)
        reason = _noise(lm)
    if reason is not None and mode == "on":
        raise ValueError(f"prefix_sharing=on is not possible: {reason}, or set prefix_sharing to auto or off")
    return reason


def packs_in_training(lm: nn.Module) -> bool:
    """Whether training forwards may be packed."""
    sharing: Sharing | None = getattr(lm, "_prefix_sharing", None)
    return sharing is not None and sharing.mode != "off" and _noise(lm) is None


def take_counts(lm: nn.Module) -> TokenCounts:
    """The counts so far, and start anew."""
    sharing: Sharing | None = getattr(lm, "_prefix_sharing", None)
    if sharing is None:
        return TokenCounts()
    counts, sharing.counts = sharing.counts, TokenCounts()
    return counts


def packed_batch(lm: nn.Module, batch: Mapping[str, Tensor]) -> PackedTrees | None:
    """The batch as trees, or None where padded rows are to be used."""
    sharing: Sharing | None = getattr(lm, "_prefix_sharing", None)
    if sharing is None:
        return None
    packed = None if sharing.mode == "off" else _packed_if_worth_it(lm, sharing, batch)
    if torch.is_grad_enabled():
        total = int((batch["prompt_lengths"] + batch["completion_lengths"]).sum())
        chosen = batch["input_ids"] if packed is None else packed.input_ids
        sharing.counts.add(total, total if packed is None else packed.tokens, chosen.numel())
    return None if packed is None else packed.to(batch["input_ids"].device)


def _packed_if_worth_it(lm: nn.Module, sharing: Sharing, batch: Mapping[str, Tensor]) -> PackedTrees | None:
    rows = row_tokens(batch)
    longest = max(map(len, rows))
    reason = _noise(lm) if lm.training else None
    if sharing.longest is not None and longest > sharing.longest:
        reason = f"a row of {longest} tokens is longer than the attention window of {sharing.longest}; lower max_length"
    if reason is not None and sharing.mode == "on":
        raise ValueError(f"prefix_sharing=on is not possible: {reason}, or set prefix_sharing=auto")
    if reason is not None:
        return None
    packed = pack_trees(rows, sharing.cost, budget=sharing.budget)
    padded = sharing.cost.of(*batch["input_ids"].shape)
    if sharing.mode == "auto" and sharing.cost.of(*packed.input_ids.shape) * MARGIN > padded:
        return None
    return packed


def tree_inputs(packed: PackedTrees, lm: nn.Module) -> dict[str, Any]:
    """Keyword arguments for the model's forward: ids, positions, and the mask as its attention wants it."""
    attention = lm.config.get_text_config()._attn_implementation
    inputs: dict[str, Any] = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if attention == "flex_attention":
        return {**inputs, "attention_mask": packed.block_mask()}
    mask = packed.mask()
    if attention == "eager":  # adds its mask
        dtype = lm.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": mask}


def _refusal(lm: nn.Module) -> str | None:
    """A reason that can be read from the model without running it."""
    config = lm.config.get_text_config()
    attention = config._attn_implementation
    if attention == "flex_attention" and next(lm.parameters()).device.type == "cpu":
        return "flex_attention trains on CUDA only; load the model with attn_implementation=sdpa"
    if attention not in ("sdpa", "eager", "flex_attention"):
        return f"attn_implementation={attention} takes no tree mask; load the model with sdpa or flex_attention"
    if "position_ids" not in inspect.signature(type(lm).forward).parameters:
        return f"{type(lm).__name__} takes no position_ids"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} do not follow a tree mask"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "local attention layers count distance in memory"
    try:
        decoder_layers(lm)
    except ValueError as error:
        return str(error)
    return None


def _adapter_refusal(model: nn.Module) -> str | None:
    """Adapters that change the sequence, or that look for something in each row of a batch."""
    while isinstance(model, nn.Module):
        for config in getattr(model, "peft_config", {}).values():
            if getattr(config, "is_prompt_learning", False):
                return f"{type(config).__name__} puts virtual tokens before each row"
            if getattr(config, "alora_invocation_tokens", None):
                return "an activated LoRA looks for its invocation tokens once in each row of a batch"
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return None


def _noise(lm: nn.Module) -> str | None:
    """Randomness in training, of which rows would share one draw where they share a token."""
    if getattr(lm.get_input_embeddings(), "neftune_noise_alpha", None):
        return "NEFTune noise would be drawn once for all rows that share a token; leave neftune_noise_alpha out"
    for module in lm.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return "dropout would be drawn once for all rows that share a token; set disable_dropout=True"
    if lm._prefix_sharing.noisy:
        return (
            f"{type(lm).__name__} draws random numbers in training, once for all rows that share a token; if that is "
            "dropout, set disable_dropout=True"
        )
    return None


def _window(config: Any) -> int | None:
    """The shortest attention window of any layer: masks given ready-made replace it."""
    windowed = getattr(config, "layer_types", None) is None or "sliding_attention" in config.layer_types
    windows = [
        getattr(config, "sliding_window", None) if windowed else None,
        getattr(config, "attention_chunk_size", 0),
    ]
    if getattr(config, "use_sliding_window", True) is False:
        windows[0] = None
    return min((w for w in windows if w), default=None)


def _cost(lm: nn.Module) -> Cost:
    config = lm.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(map(_matrix_elements, decoder_layers(lm).parameters()))
    return Cost(per_token=2.0 * weights, per_pair=ATTENTION_WEIGHT * 4.0 * width * config.num_hidden_layers)


def _matrix_elements(parameter: Tensor) -> int:
    """Elements of a weight matrix, 0 for a vector. 4-bit weights lie two to a byte; ZeRO-3 keeps the shape aside."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return math.prod(shape) * (2 if parameter.dtype == torch.uint8 else 1) if len(shape) > 1 else 0


@torch.no_grad()
def _probe(lm: nn.Module, tolerance: float = 1e-3) -> str | None:
    """Compare the hidden states of a small tree with those of its rows, one by one."""
    vocabulary = lm.config.get_text_config().vocab_size
    rows = [[(11 * i + 3) % vocabulary for i in path] for path in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [0, 8, 9], [9])]
    device = next(lm.parameters()).device
    packed = pack_trees(rows, Cost(1.0, 0.0)).to(device)
    with eval_mode(lm):
        try:
            alone = [
                lm.base_model(torch.tensor([row], device=device), use_cache=False).last_hidden_state[0] for row in rows
            ]
            together = lm.base_model(**tree_inputs(packed, lm), use_cache=False).last_hidden_state
        except Exception as error:  # whatever somebody's modelling code raises on a mask it does not expect
            return f"{type(lm).__name__} does not run on a tree mask ({type(error).__name__}: {error})"
    for i, expected in enumerate(alone):
        found = together[packed.sequences[i], packed.places[i, : len(expected)]]
        allowed = tolerance * (1 if expected.dtype in (torch.float32, torch.float64) else 50)
        if not (found - expected).abs().max() <= allowed * expected.abs().max().clamp(min=1):
            return f"{type(lm).__name__} gives a token in a tree other hidden states than in its row"
    return None


@torch.no_grad()
def _draws_in_training(lm: nn.Module) -> bool:
    """Whether two training forwards of the same tokens differ: dropout or router noise under any name."""
    ids = torch.arange(8, device=next(lm.parameters()).device)[None] % lm.config.get_text_config().vocab_size
    modes = [(module, module.training) for module in lm.modules()]
    devices = [ids.device] if ids.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            for module, _ in modes:
                module.training = True
            first, second = (lm.base_model(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
    finally:
        for module, training in modes:
            module.training = training
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-5)
