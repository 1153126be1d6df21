"""One forward pass, read only where completion tokens are predicted, without the `[B L V]` logits.

`attach_scoring` teaches a causal LM one more keyword, `score`: a function that receives the last hidden states that
predict the requested tokens, the LM head, and hidden states of inner layers if asked for, *inside* the model's forward,
so that DDP, FSDP and PEFT wrappers see an ordinary call. Without the keyword the forward is the original one;
`generate` is unaffected.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from negtune.models.head import LogitsHead
from negtune.models.sharing import packed_batch, tree_inputs
from negtune.models.structure import causal_lm, decoder_layers, eval_mode
from negtune.ops import at_least_float32, scatter_tokens, tiled_token_values, token_logps

Score = Callable[[Tensor, LogitsHead, Mapping[int, Tensor]], dict[str, Tensor]]
"""`(hidden [N H], head, layers) -> named tensors`, called inside the forward.

`hidden` predicts the scored tokens; `layers` maps each decoder layer asked for to its output at those tokens, `[N H]`.
"""


@dataclass(frozen=True)
class ScoredTokens:
    """Where the completion tokens of a batch stand: `N` tokens, row by row.

    Args:
        rows, columns: index of each token in `input_ids`; the hidden state that predicts it is at `columns - 1`.
        targets: the tokens.
        mask: the same `N` tokens in the padded `[B T]` layout, T the longest completion.
    """

    rows: Int[Tensor, " N"]
    columns: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    mask: Bool[Tensor, "B T"]


def attach_scoring(model: nn.Module) -> None:
    """Add the keywords `score`, `at` and `layers` to the forward of the causal LM inside `model`. Idempotent.

    `at` says where the scored tokens stand: their rows, the columns that predict them, their own columns, `[N]` each.
    """
    lm = causal_lm(model)
    if getattr(lm, "_scores_for", None) == id(lm):  # a deep copy carries the mark but the original's forward
        return
    original = types.MethodType(type(lm).forward, lm) if hasattr(lm, "_scores_for") else lm.forward

    @functools.wraps(type(lm).forward)  # `generate` validates its arguments against the signature
    def forward(
        self: nn.Module, *args: Any, score: Score | None = None, at: Any = None, layers: Any = (), **kwargs: Any
    ) -> Any:
        if score is None:
            return original(*args, **kwargs)
        rows, before, columns = at
        with _outputs_of(self, layers) as outputs:
            hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        inner = {layer: outputs[layer][rows, columns] for layer in layers}
        return score(hidden[rows, before], head_of(self), inner)

    lm.forward = types.MethodType(forward, lm)
    lm._scores_for = id(lm)


@contextmanager
def _outputs_of(lm: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Catch what these decoder layers return; unlike `output_hidden_states` nothing else is kept."""
    outputs: dict[int, Tensor] = {}

    def catch(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        outputs[layer] = output if isinstance(output, Tensor) else output[0]

    hooks = [decoder_layers(lm)[layer].register_forward_hook(functools.partial(catch, layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def head_of(lm: nn.Module, module: nn.Module | None = None) -> LogitsHead:
    """LM head of a causal LM; `module` replaces its weights (the reference's, where an adapter trains the head)."""
    return LogitsHead(module or lm.get_output_embeddings(), lm.config.get_text_config())


def scored_tokens(batch: Mapping[str, Tensor]) -> ScoredTokens:
    """Positions of the completion tokens of a batch from `collate`, for padding on either side."""
    lengths = batch["completion_lengths"]
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    mask = steps[None, :] < lengths[:, None]
    rows, offsets = mask.nonzero(as_tuple=True)
    first = batch["attention_mask"].argmax(-1)  # 0 when padded on the right
    columns = (first + batch["prompt_lengths"])[rows] + offsets
    return ScoredTokens(rows, columns, batch["input_ids"][rows, columns], mask)


def run(
    model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, score: Score, layers: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Forward `batch` through `model` (wrapped or not) and return what `score` makes of the scored positions.

    Args:
        model, batch, tokens: `model` must have been given `attach_scoring`; `tokens` is `scored_tokens(batch)`.
        score: see `Score`.
        layers: decoder layers whose outputs `score` wants, counted from 0; see `check_layer`.
    """
    lm = causal_lm(model)
    packed = packed_batch(lm, batch)
    if packed is not None:
        depths = tokens.columns - batch["attention_mask"].argmax(-1)[tokens.rows]
        kwargs = tree_inputs(packed, lm)
        at = (packed.sequences[tokens.rows], packed.places[tokens.rows, depths - 1], packed.places[tokens.rows, depths])
    else:
        kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if (batch["attention_mask"][:, 0] == 0).any() and _takes_position_ids(lm):
            kwargs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        at = (tokens.rows, tokens.columns - 1, tokens.columns)
    if layers:
        kwargs["layers"] = tuple(layers)
    return model(**kwargs, score=score, at=at)


def completion_logps(
    model: nn.Module, batch: Mapping[str, Tensor], *, temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """Log-probability of each completion token, 0 behind the mask; float32 or wider.

    Differentiable. `model` must have been given `attach_scoring`. Logits are divided by `temperature`.
    """
    tokens = scored_tokens(batch)

    def values(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> Tensor:
        return token_logps(logits if temperature == 1 else at_least_float32(logits) / temperature, targets)

    def score(hidden: Tensor, head: LogitsHead, layers: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {"logps": scatter_tokens(tiled_token_values(values, hidden, tokens.targets, head), tokens.mask)}

    return run(model, batch, tokens, score)["logps"]


@torch.no_grad()
def completion_logps_and_hidden(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B H"]]:
    """Log-probabilities, 0 behind the mask, and the sum over each completion of the last hidden states that predict its
    tokens; float32 or wider, from one forward pass."""
    tokens = scored_tokens(batch)

    def score(hidden: Tensor, head: LogitsHead, layers: Mapping[int, Tensor]) -> dict[str, Tensor]:
        values = tiled_token_values(token_logps, hidden, tokens.targets, head)
        rows = torch.arange(len(tokens.mask), device=hidden.device)[:, None].expand_as(tokens.mask)[tokens.mask]
        sums = at_least_float32(hidden.new_zeros(len(tokens.mask), hidden.shape[-1]))
        return {
            "logps": scatter_tokens(values, tokens.mask),
            "sums": sums.index_add(0, rows, at_least_float32(hidden)),
        }

    found = run(model, batch, tokens, score)
    return found["logps"], found["sums"]


@torch.no_grad()
def completion_statistics(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Log-probabilities, whether greedy decoding would have produced each token (teacher-forced), and the mask."""
    tokens = scored_tokens(batch)

    def logp_and_hit(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> Tensor:
        logps = token_logps(logits, targets)
        return torch.stack([logps, (logits.argmax(-1) == targets).to(logps.dtype)], -1)

    def score(hidden: Tensor, head: LogitsHead, layers: Mapping[int, Tensor]) -> dict[str, Tensor]:
        values = tiled_token_values(logp_and_hit, hidden, tokens.targets, head)
        return {"logps": scatter_tokens(values[:, 0], tokens.mask), "hits": scatter_tokens(values[:, 1], tokens.mask)}

    out = run(model, batch, tokens, score)
    return out["logps"], out["hits"].bool(), tokens.mask


@torch.no_grad()
def completion_hidden(
    model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
) -> Float[Tensor, "N H"]:
    """Last hidden states that predict the completion tokens, or with `layer` that layer's output at those tokens."""
    wanted = () if layer is None else (layer,)
    return run(
        model,
        batch,
        tokens,
        lambda hidden, head, layers: {"hidden": hidden if layer is None else layers[layer]},
        wanted,
    )["hidden"]


def check_layer(model: nn.Module, layer: int) -> None:
    """Raise unless `layer` is a decoder layer and something that is trained lies in it or below it."""
    layers = decoder_layers(causal_lm(model))
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"layer must be between 0 and {len(layers) - 1} for this model, got {layer}; set it where the objective "
            "reads activations: --loss_kwargs '{\"layer\": N}', and --retain_loss_kwargs if it is activation_mse"
        )
    below = [*layers[: layer + 1], causal_lm(model).get_input_embeddings()]
    if not any(p.requires_grad for module in below for p in module.parameters()):
        raise ValueError(
            f"nothing that is trained lies at or below layer {layer}, whose activations the objective reads; change "
            "layer, or what is trained (trainable, layers_to_transform of the adapter)"
        )


@torch.no_grad()
def check_scoring(model: nn.Module, tolerance: float = 1e-3) -> None:
    """Compare one scored token with the model's own logits; raise where this architecture's head is not understood.

    Catches a logit scale or soft-cap under a name we do not know before it silently falsifies every log-probability.
    """
    lm = causal_lm(model)
    device = next(model.parameters()).device
    row, column = torch.zeros(3, dtype=torch.long, device=device), torch.arange(3, device=device)
    ids = torch.arange(4, device=device)[None] + min(10, lm.config.get_text_config().vocab_size - 4)
    with eval_mode(model):
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        got = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            at=(row, column, column + 1),
            score=lambda hidden, head, layers: {"logits": head(hidden)},
        )["logits"]
    if not expected.isfinite().all():
        raise ValueError("the model's logits are not finite; its weights are broken")
    difference = (at_least_float32(got) - at_least_float32(expected[0])).abs().max().item()
    scale = at_least_float32(expected).abs().max().item()
    if not difference <= tolerance * max(1.0, scale) * (1 if expected.dtype == torch.float32 else 50):
        raise ValueError(
            f"{type(lm).__name__} does not compute its logits as LM head x scale, soft-capped: they differ by "
            f"{difference:.3g}; its log-probabilities would be wrong. Please report this architecture."
        )


@functools.cache
def _forward_parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


def _takes_position_ids(lm: nn.Module) -> bool:
    return "position_ids" in _forward_parameters(type(lm))
