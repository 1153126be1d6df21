"""What objectives read: log-probabilities of completions, next-token distributions, or hidden states of a layer.

Shapes: B sequences, T completion tokens (right-padded), N scored tokens of the whole batch (row by row, no padding),
V vocabulary, H hidden width. `mask` is True where a token counts. Nothing behind the mask may reach a result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LogitsFunction = Callable[..., Tensor]
"""`(logits [n V], targets [n], ref_logits [n V] or None) -> [n]`: one value per scored token."""

TILE_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB in float32. A tile never holds less than one token's row."""


class MissingReferenceError(ValueError):
    """An objective asked for the reference model and none was given."""


class MissingStepsError(ValueError):
    """An objective asked which tokens make up a step and the rows do not say."""


class MissingBehaviourError(ValueError):
    """An objective asked for the policy that drew the tokens and the rows do not have its log-probabilities."""


@runtime_checkable
class Head(Protocol):
    """Maps hidden states `[n H]` to logits `[n V]`, scaling and soft-capping included."""

    vocab_size: int
    trainable: bool

    def __call__(self, hidden: Tensor) -> Tensor: ...


def masked_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Sum over tokens; a fully masked row yields 0."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def masked_mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over tokens; a fully masked row yields 0."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probabilities of the completion tokens of `B` sequences, and what the reference says of the same tokens.

    Args:
        logps: policy log-probability of each token, in nats.
        mask: True where a token belongs to the completion.
        ref_logps: the reference's log-probabilities of the same tokens, or None.
        step: True on the tokens of the one step that the row is about, or None.
    """

    logps: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    ref_logps: Float[Tensor, "B T"] | None = None
    step: Bool[Tensor, "B T"] | None = None

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Completion tokens per sequence."""
        return self.mask.sum(-1)

    @property
    def sums(self) -> Float[Tensor, " B"]:
        """log pi(y|x), summed over tokens."""
        return masked_sum(self.logps, self.mask)

    @property
    def means(self) -> Float[Tensor, " B"]:
        """log pi(y|x) / |y|."""
        return masked_mean(self.logps, self.mask)

    @property
    def ref_sums(self) -> Float[Tensor, " B"]:
        """log pi_ref(y|x), summed over tokens. Raises `MissingReferenceError` without a reference."""
        if self.ref_logps is None:
            raise MissingReferenceError(
                "this objective needs reference log-probabilities; pass reference= to the trainer"
            )
        return masked_sum(self.ref_logps, self.mask)

    @property
    def log_ratio(self) -> Float[Tensor, " B"]:
        """log pi(y|x) - log pi_ref(y|x), summed over tokens. Raises `MissingReferenceError` without a reference."""
        return self.sums - self.ref_sums

    @property
    def mean_log_ratio(self) -> Float[Tensor, " B"]:
        """`log_ratio` / |y|. Raises `MissingReferenceError` without a reference."""
        return self.log_ratio / self.lengths.clamp(min=1)

    @property
    def on_step(self) -> SequenceLogps:
        """The same with nothing but the step that the row is about. Raises `MissingStepsError` if it has none."""
        if self.step is None:
            raise MissingStepsError(
                "this objective needs to know which tokens are the step; give rows with chosen_step and rejected_step"
            )
        return replace(self, mask=self.mask & self.step)


@dataclass(frozen=True)
class TokenCredit:
    """What the tokens of a completion deserve, and how they came about.

    Args:
        advantages: of each token; what stands where `known` is False plays no part.
        known: True where a token is trained on: part of a completion, and its step was judged.
        behaviour_logps: log-probability of each token of the completion under the policy that drew it, or None.
        steps: number of the step that each token belongs to, -1 where it belongs to none; or None.
        undialled: advantages before the sign dial, which say what is positive and what negative where a weight of the
            dial is 0; `advantages` themselves if None.
    """

    advantages: Float[Tensor, "B T"]
    known: Bool[Tensor, "B T"]
    behaviour_logps: Float[Tensor, "B T"] | None = None
    steps: Int[Tensor, "B T"] | None = None
    undialled: Float[Tensor, "B T"] | None = None

    @property
    def positive(self) -> Bool[Tensor, "B T"]:
        """Tokens of what was right, to make more likely."""
        return self.known & (self._signed > 0)

    @property
    def negative(self) -> Bool[Tensor, "B T"]:
        """Tokens of what was wrong, to make less likely."""
        return self.known & (self._signed < 0)

    @property
    def _signed(self) -> Float[Tensor, "B T"]:
        return self.advantages if self.undialled is None else self.undialled

    def log_ratio(self, policy: SequenceLogps) -> Float[Tensor, "B T"]:
        """log pi - log mu of each token, 0 behind the mask of `policy`. Raises `MissingBehaviourError` without mu."""
        if self.behaviour_logps is None:
            raise MissingBehaviourError(
                "this objective weighs tokens by how the policy has moved since they were drawn; give rows with "
                "behaviour_logps, or choose one without ratios (reinforce, awr, nsr ...)"
            )
        return (policy.logps - self.behaviour_logps).masked_fill(~policy.mask, 0.0)

    def segments(self, level: str) -> Int[Tensor, "B T"]:
        """Number of the segment of every token: all 0 for `sequence`, its own for `token`, its step's for `step`.

        Tokens of no step form one segment of their own. Raises `MissingStepsError` for steps that the rows do not have.
        """
        width = self.advantages.shape[1]
        if level == "sequence":
            return torch.zeros_like(self.known, dtype=torch.long)
        if level == "token":
            return torch.arange(width, device=self.known.device).expand_as(self.known)
        if level != "step":
            raise ValueError(f"level must be token, step or sequence, got {level!r}")
        if self.steps is None:
            raise MissingStepsError("level=step needs rows that say where their steps end (step_ends)")
        return self.steps.masked_fill(self.steps < 0, width - 1)


def segment_sums(values: Float[Tensor, "B T"], segments: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """At every token the sum over all tokens of its row's segment."""
    return torch.zeros_like(values).scatter_add(1, segments, values).gather(1, segments)


def weigh_signs(advantages: Tensor, *, positive_weight: float = 1.0, negative_weight: float = 1.0) -> Tensor:
    """The sign dial: positive advantages times one weight, negative ones times the other; any shape.

    (1, 0) trains on positives only, (0, 1) on negatives only. Applied last, no normalisation takes it back.
    """
    return torch.where(advantages > 0, advantages * positive_weight, advantages * negative_weight)


@dataclass(frozen=True)
class TokenDistributions:
    """Next-token distributions at the scored positions, kept as hidden states so that logits exist only in tiles.

    Args:
        hidden: last hidden states at the positions that predict a completion token.
        targets: the tokens that stand there.
        mask: where those `N` tokens sit in the padded `[B T]` layout, row by row.
        head: hidden states to logits.
        ref_hidden, ref_head: the same of the reference, or None.
    """

    hidden: Float[Tensor, "N H"]
    targets: Int[Tensor, " N"]
    mask: Bool[Tensor, "B T"]
    head: Head
    ref_hidden: Float[Tensor, "N H"] | None = None
    ref_head: Head | None = None

    def map(self, function: LogitsFunction) -> Float[Tensor, "B T"]:
        """`function` at every scored token, `[B T]` with 0 behind the mask; logits exist one tile at a time."""
        values = tiled_token_values(
            function, self.hidden, self.targets, self.head, ref_hidden=self.ref_hidden, ref_head=self.ref_head
        )
        return scatter_tokens(values, self.mask)

    def map_with_reference(self, function: LogitsFunction) -> Float[Tensor, "B T"]:
        """`map` for functions that read `ref_logits`. Raises `MissingReferenceError` without a reference."""
        if self.ref_hidden is None:
            raise MissingReferenceError(
                "this objective needs the reference's distributions; pass reference= to the trainer"
            )
        return self.map(function)


@dataclass(frozen=True)
class LayerActivations:
    """Hidden states after one decoder layer at the completion's own positions, not at those that predict them.

    Args:
        hidden: residual stream after the layer, at each of the `N` completion tokens.
        mask: where those tokens sit in the padded `[B T]` layout, row by row.
        ref_hidden: the same of the reference, or None.
    """

    hidden: Float[Tensor, "N H"]
    mask: Bool[Tensor, "B T"]
    ref_hidden: Float[Tensor, "N H"] | None = None

    def squared_distance(self, target: Float[Tensor, "*N H"]) -> Float[Tensor, "B T"]:
        """Mean over the width of (hidden - target)^2, 0 behind the mask; no gradient reaches `target`."""
        hidden = at_least_float32(self.hidden)
        difference = hidden - target.detach().to(hidden)
        return scatter_tokens(difference.square().mean(-1), self.mask)

    def squared_distance_to_reference(self) -> Float[Tensor, "B T"]:
        """`squared_distance` to the reference's. Raises `MissingReferenceError` without a reference."""
        if self.ref_hidden is None:
            raise MissingReferenceError(
                "this objective needs the reference's activations; pass reference= to the trainer"
            )
        return self.squared_distance(self.ref_hidden)


def scatter_tokens(values: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Lay `N` per-token values out row by row where `mask` is True, 0 elsewhere. Differentiable, also when N is 0."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logps(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], ref_logits: Tensor | None = None) -> Tensor:
    """log softmax(logits)[target], the `LogitsFunction` behind `SequenceLogps`; float32 or wider."""
    logits = at_least_float32(logits)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, anything narrower than float32 becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def tiled_token_values(
    function: LogitsFunction,
    hidden: Float[Tensor, "N H"],
    targets: Int[Tensor, " N"],
    head: Head,
    *,
    ref_hidden: Float[Tensor, "N H"] | None = None,
    ref_head: Head | None = None,
    tile_elements: int | None = None,
) -> Tensor:
    """`function(head(hidden), targets, ref_logits)` per token without ever holding more than one tile of logits.

    With a frozen head (LoRA, or any adapter below it) each tile's gradient towards `hidden` is taken while its logits
    exist, so the backward pass is one multiplication and nothing is recomputed. With a trainable head each tile is
    recomputed in the backward pass. Tokens are tiled rather than the vocabulary: peak memory is the same, and
    every `function` sees complete distributions.

    Args:
        function: one value per token; rows must not depend on each other.
        hidden: `[N H]`, differentiable.
        targets: `[N]`.
        head: hidden states to logits.
        ref_hidden, ref_head: reference; its logits reach `function` without a gradient.
        tile_elements: largest number of logits of one model alive at a time; `TILE_ELEMENTS` by default.

    Returns:
        `[N]`, or `[N k]` if `function` returns `[n k]` (without gradients only).
    """
    size = max(1, (tile_elements or TILE_ELEMENTS) // head.vocab_size)

    def tile(hidden_tile: Tensor, start: int) -> Tensor:
        stop = start + hidden_tile.shape[0]
        ref_logits = None
        if ref_hidden is not None and ref_head is not None:
            with torch.no_grad():
                ref_logits = ref_head(ref_hidden[start:stop])
        return function(head(hidden_tile), targets[start:stop], ref_logits)

    starts = range(0, max(1, hidden.shape[0]), size)  # one empty tile when nothing is scored keeps the graph connected
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head.trainable):
        return torch.cat([tile(hidden[start : start + size], start) for start in starts])
    if head.trainable:
        run = partial(checkpoint, tile, use_reentrant=False)
        return torch.cat([run(hidden[start : start + size], start) for start in starts])
    return _FrozenHeadValues.apply(hidden, tile, size)


class _FrozenHeadValues(torch.autograd.Function):
    """Per-token values whose gradient towards `hidden` is taken in the forward pass, tile by tile."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tile: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
        values, gradient = [], torch.empty_like(hidden)
        for start in range(0, max(1, hidden.shape[0]), size):
            with torch.enable_grad():
                leaf = hidden[start : start + size].detach().requires_grad_()
                value = tile(leaf, start)
                (gradient[start : start + size],) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].unsqueeze(-1).to(gradient.dtype), None, None


def needs(
    *,
    reference: bool = False,
    distributions: bool = False,
    activations: bool = False,
    behaviour: bool = False,
    step: bool = False,
) -> Callable[[Callable], Callable]:
    """Declare what an objective reads beyond policy log-probabilities, so that a trainer can refuse at construction.

    Args:
        reference: reads `ref_logps` (or the reference's distributions or activations).
        distributions: takes `TokenDistributions` instead of `SequenceLogps`.
        activations: takes `LayerActivations` of the layer that its hyper-parameter `layer` names.
        behaviour: reads log-probabilities of the policy that drew the tokens.
        step: reads which tokens make up a step.
    """

    def mark(objective: Callable) -> Callable:
        declared = Needs(reference, distributions, activations, behaviour, step)
        setattr(objective, "needs", declared)  # noqa: B010  functions take attributes
        return objective

    return mark


@dataclass(frozen=True)
class Needs:
    """What an objective reads.

    Args:
        reference, distributions, activations, behaviour, step: see `needs`.
        sides: its parameters without default: forget, alternative, retain, z0 ...
        layer: the decoder layer whose output it reads, counted from 0; None unless `activations`.
    """

    reference: bool = False
    distributions: bool = False
    activations: bool = False
    behaviour: bool = False
    step: bool = False
    sides: frozenset[str] = frozenset()
    layer: int | None = None

    @property
    def logps_suffice(self) -> bool:
        """Whether log-probabilities are all it reads, so that cached ones can stand for the reference."""
        return not (self.distributions or self.activations)


def needs_of(objective: Callable) -> Needs:
    """What `objective` declared with `@needs`, through `functools.partial`, and the sides it takes by name."""
    inner = objective
    while isinstance(inner, partial):
        inner = inner.func
    declared = getattr(inner, "needs", Needs())
    parameters = inspect.signature(objective).parameters
    sides = frozenset(name for name, p in parameters.items() if p.default is inspect.Parameter.empty)
    layer = parameters["layer"].default if declared.activations and "layer" in parameters else None
    if declared.activations and not isinstance(layer, int):
        raise ValueError("an objective that reads activations needs a keyword layer with a whole number as default")
    return replace(declared, sides=sides, layer=layer)
