"""Proof that the engine samples from the weights that are trained.

Two things are compared before a round: the hash of the trainer's weights with that of the weights the engine was last
given, and log-probabilities of a few tokens that the engine draws for it (canaries), as engine and trainer see them.
The hash finds weights that were never handed over, however small their change; the canaries find an engine that has
them and does not use them: stale cached prefixes, a wrong adapter, another temperature, another `logprobs_mode`. The
canaries' prompts are the same every time and longer than a block of the prefix cache, so that it takes part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from negtune.data.completions import collate, padding_id
from negtune.models.forward import attach_scoring, completion_logps, scored_tokens
from negtune.models.policy import is_peft
from negtune.models.reference import weights_hash
from negtune.models.structure import causal_lm, eval_mode, unwrapped
from negtune.rollouts.sampler import Prompt, Rollout, Sampler, SamplingParams

logger = logging.getLogger(__name__)

EXACT, HALF = 1e-3, 0.15
"""Nats a token: mean absolute difference beyond which engine and trainer are not the same, where both compute in
float32 or better, and where one of them computes in half precision. Without a fault it was at most 2.4e-5 and 0.052
(SmolLM2-135M, recipes/LOG.md); what is smaller than the tolerance is found by the hash."""
CANARY_TOKENS = 160
"""Of a canary's prompt; vLLM caches prefixes in blocks of 16 tokens on a GPU and 128 on a CPU."""
_TEXTS = (
    "The lighthouse keeper counts the ships that pass by night, and writes each one into a book with a blue cover. ",
    "To add two fractions, first find a number that both denominators divide, then write each fraction with it. ",
)


class StaleEngineError(RuntimeError):
    """The engine does not sample from the weights that are trained."""


@dataclass(frozen=True)
class Attestation:
    """What was compared, in nats.

    Args:
        policy: as the engine calls it.
        mean_difference, max_difference: of the canary tokens' log-probabilities, engine against trainer.
        tokens: canary tokens.
        trainer_hash, engine_hash: of the weights; the engine's is that of what it was last given.
        seconds: that this took.
    """

    policy: str
    mean_difference: float
    max_difference: float
    tokens: int
    trainer_hash: str
    engine_hash: str
    seconds: float


@torch.no_grad()
def attest(
    sampler: Sampler,
    model: nn.Module,
    tokenizer: Any,
    *,
    temperature: float = 1.0,
    tolerance: float | None = None,
    canaries: Sequence[Prompt] | None = None,
    tokens: int = 16,
) -> Attestation:
    """Compare engine and trainer; raise `StaleEngineError`, saying which side is stale, where they differ.

    Args:
        sampler: whose engine is to be proven.
        model: the trained model, on its device; run under the autocast that the caller is in.
        tokenizer: of both.
        temperature: at which the round will be drawn.
        tolerance: nats a token; by default `EXACT` or `HALF`, see `computes_in_half`.
        canaries: prompts; two texts of 160 tokens by default, which the engine's context has to hold.
        tokens: drawn for each.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    if tolerance is None:
        tolerance = HALF if computes_in_half(sampler, model) else EXACT
    params = SamplingParams(temperature=temperature, max_tokens=tokens)
    rollouts = sampler.sample(canaries or canary_prompts(tokenizer), params=params)
    engine = torch.cat([torch.tensor(r.logps, dtype=torch.float64) for r in rollouts])
    found = difference(engine, policy_logps(model, tokenizer, rollouts, temperature))
    live, served = served_weights_hash(model), getattr(sampler, "served_hash", None)
    attestation = Attestation(
        policy=sampler.policy,
        mean_difference=found.mean().item(),
        max_difference=found.max().item(),
        tokens=len(found),
        trainer_hash=live,
        engine_hash=live if served is None else served,
        seconds=time.perf_counter() - start,
    )
    logger.info("attestation: %s", asdict(attestation))
    if attestation.engine_hash != live:
        raise StaleEngineError(
            f"the engine is stale: it serves policy {sampler.policy!r} (weights {attestation.engine_hash[:12]}), the "
            f"trainer has {live[:12]}, {attestation.mean_difference:.3g} nats a token away. Call sampler.update(model, "
            "policy) after every optimiser step that is to be sampled from"
        )
    if not attestation.mean_difference <= tolerance:
        raise StaleEngineError(_why(attestation, tolerance, engine, model, tokenizer, rollouts, temperature))
    return attestation


def _why(
    attestation: Attestation,
    tolerance: float,
    engine: Tensor,
    model: nn.Module,
    tokenizer: Any,
    rollouts: Sequence[Rollout],
    temperature: float,
) -> str:
    said = (
        f"engine and trainer have the same weights ({attestation.trainer_hash[:12]}) and differ by "
        f"{attestation.mean_difference:.3g} nats a token (tolerance {tolerance:g})"
    )
    if temperature != 1 and difference(engine, policy_logps(model, tokenizer, rollouts, 1.0)).mean() <= tolerance:
        return f"{said}: the engine's log-probabilities leave out the temperature; set logprobs_mode=processed_logprobs"
    return (
        f"{said}: the engine is stale. It does not use what it was given (a cached prefix or an adapter of earlier "
        "weights), has another base checkpoint than the one under the trainer's adapter, or computes in another dtype; "
        "start it again, with the trained model's checkpoint and dtype"
    )


@torch.no_grad()
def policy_logps(model: nn.Module, tokenizer: Any, rollouts: Sequence[Rollout], temperature: float) -> Tensor:
    """Log-probability of each drawn token under `model` at `temperature` (0 counts as 1), all rollouts joined."""
    attach_scoring(model)
    device = next(model.parameters()).device
    rows = [{"prompt_ids": r.prompt_ids, "completion_ids": r.completion_ids} for r in rollouts]
    batch = {name: tensor.to(device) for name, tensor in collate(rows, padding_id(tokenizer)).items()}
    with eval_mode(model):
        logps = completion_logps(model, batch, temperature=temperature or 1.0)
    return logps[scored_tokens(batch).mask].double().cpu()


def computes_in_half(sampler: Sampler, model: nn.Module) -> bool:
    """Whether weights, autocast, 4-bit products or the engine work in bfloat16 or float16."""
    half = (torch.bfloat16, torch.float16)
    lm = causal_lm(model)
    if hasattr(model, "_original_forward") or hasattr(lm, "_original_forward"):  # accelerate's mixed precision
        return True
    device = next(lm.parameters()).device.type
    found = {p.dtype for p in lm.parameters()} | {getattr(m, "compute_dtype", None) for m in lm.modules()}
    found.add(getattr(sampler, "dtype", None))
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    return not found.isdisjoint(half)


def difference(engine: Tensor, trainer: Tensor) -> Tensor:
    """Absolute, infinite where one of the two is not a number."""
    return (engine - trainer).abs().nan_to_num(nan=torch.inf)


def served_weights_hash(model: nn.Module) -> str:
    """Hash of what an engine is given of `model`: the active adapter, or all weights."""
    model = unwrapped(model)
    if is_peft(model):
        return weights_hash(model, lambda name: f".{model.active_adapter}." in f".{name}.")
    return weights_hash(model)


def policy_name(model: nn.Module, *names: str | None) -> str:
    """`names` joined, and eight digits of the hash of all weights: other weights of that name are another policy."""
    return f"{'+'.join(filter(None, names))}@{weights_hash(unwrapped(model))[:8]}"


def canary_prompts(tokenizer: Any) -> list[str]:
    """Texts of at least `CANARY_TOKENS` tokens."""
    return [text * -(-CANARY_TOKENS // len(tokenizer(text)["input_ids"])) for text in _TEXTS]
