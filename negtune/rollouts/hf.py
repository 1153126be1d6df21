"""Sampling with transformers' `generate`, on any device, from the very weights that are trained.

Every row draws with noise of its own, seeded by its request: a token is the argmax of logits/temperature and Gumbel
noise, which is a draw from the softmax. So a row's completion does not depend on its neighbours in the batch, unless
what batching does to the logits' last bits turns a token over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from negtune.data.completions import padding_id
from negtune.models.structure import causal_lm, eval_mode, unwrapped
from negtune.rollouts.sampler import (
    Request,
    Rollout,
    Sampler,
    SamplingParams,
    eos_token_ids,
    fitting_token_ids,
    make_rollout,
)

ENGINE = "transformers"


class HFSampler(Sampler):
    """Draws with `model.generate`.

    Args:
        model: causal LM, plain or with an adapter; sampled from as it is at each call.
        tokenizer: of the model.
        batch_size: completions at a time.
        policy: version of the weights, for the record.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 32, policy: str = "0") -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.update(model, policy)

    def update(self, model: nn.Module, policy: str) -> None:
        """Sample from `model`, whose weights are called `policy`."""
        self.model, self.policy = unwrapped(model), policy

    def draw(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """See `Sampler.draw`. Raises ValueError, before anything is drawn, for a prompt that does not fit."""
        longest = self._longest()
        ids = fitting_token_ids(requests, self.tokenizer, longest, "max_position_embeddings")
        longest_first = sorted(range(len(requests)), key=lambda i: -len(ids[i]))
        drawn: dict[int, Rollout] = {}
        for start in range(0, len(requests), self.batch_size):
            chosen = longest_first[start : start + self.batch_size]
            rollouts = self._draw_batch([requests[i] for i in chosen], [ids[i] for i in chosen], params)
            drawn |= dict(zip(chosen, rollouts, strict=True))
        return [drawn[i] for i in range(len(requests))]

    def _longest(self) -> int | None:
        """Tokens that the model has positions for; None if its config does not say."""
        return getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def _draw_batch(
        self, requests: Sequence[Request], ids: Sequence[list[int]], params: SamplingParams
    ) -> list[Rollout]:
        device = next(self.model.parameters()).device
        width = max(map(len, ids))
        input_ids = torch.full((len(ids), width), padding_id(self.tokenizer))
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(ids):
            input_ids[i, width - len(row) :] = torch.tensor(row)
            attention_mask[i, width - len(row) :] = 1
        draw = _Draw(params, [request.seed(params) for request in requests], device)
        eos = set(eos_token_ids(self.tokenizer, causal_lm(self.model).generation_config))
        ends = _Ends(self.tokenizer, params.stop, width, eos, len(ids))
        longest = self._longest()
        rooms = [params.max_tokens if longest is None else min(params.max_tokens, longest - len(row)) for row in ids]
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        with eval_mode(self.model), _plain_generation(self.model, self.tokenizer, max(rooms)):
            cache = self._cache_of_prompts(ids, input_ids, attention_mask)
            out = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **({} if cache is None else {"past_key_values": cache}),
                logits_processor=[draw],
                stopping_criteria=[ends],
            )
        logps = torch.stack(draw.logps, 1).tolist()
        rollouts = []
        for i, (request, row) in enumerate(zip(requests, out[:, width:].tolist(), strict=True)):
            stopped = (ends.lengths[i] or len(row) + 1) <= rooms[i]
            length = ends.lengths[i] if stopped else rooms[i]
            rollouts.append(
                make_rollout(
                    request,
                    params,
                    self,
                    ENGINE,
                    prompt_ids=ids[i],
                    completion_ids=row[:length],
                    logps=logps[i][:length],
                    reason="stop" if stopped else "length",
                )
            )
        return rollouts

    def _cache_of_prompts(self, ids: Sequence[list[int]], input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Keys and values of all but the last token of every prompt, computed once for all completions of a prompt.

        None where no prompt comes twice, or the model keeps a state that is not one of keys and values.
        """
        places_of: dict[tuple[int, ...], int] = {}
        places = [places_of.setdefault(tuple(row), len(places_of)) for row in ids]
        lm = causal_lm(self.model)
        if len(places_of) == len(ids) or input_ids.shape[1] == 1 or getattr(lm, "_is_stateful", False):
            return None
        firsts = [places.index(i) for i in range(len(places_of))]
        mask, cache = attention_mask[firsts, :-1], DynamicCache(config=lm.config)
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            return None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        self.model(input_ids=input_ids[firsts, :-1], logits_to_keep=1, **given)
        cache.batch_select_indices(torch.tensor(places, device=input_ids.device))
        return cache


class _Draw(LogitsProcessor):
    """Draws each row's token with its own random numbers, keeps its log-probability, and leaves nothing else likely."""

    def __init__(self, params: SamplingParams, seeds: Sequence[int], device: torch.device) -> None:
        self.params, self.logps = params, list[Tensor]()
        self._noise = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        logits = scores.float()
        if self.params.temperature == 0:
            keys = logps = logits.log_softmax(-1)
        else:
            logps = cut((logits / self.params.temperature).log_softmax(-1), self.params).log_softmax(-1)
            exponential = torch.stack(
                [torch.empty(logps.shape[1], device=logps.device).exponential_(generator=g) for g in self._noise]
            )
            keys = logps - exponential.clamp(min=torch.finfo(torch.float32).tiny).log()
        tokens = keys.argmax(-1, keepdim=True)
        self.logps.append(logps.gather(-1, tokens)[:, 0])
        if not torch.isfinite(self.logps[-1]).all():
            raise FloatingPointError(
                "the model's logits are not numbers, and nothing can be drawn from them: the weights have diverged, or "
                "the model cannot compute padded rows in this precision (try float32)"
            )
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, 0.0)


def cut(logps: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """-inf for tokens that `top_k`, `top_p` or `min_p` leave out; `top_p` keeps the token that crosses it."""
    kept = logps
    if params.top_k > 0:
        smallest = kept.topk(min(params.top_k, kept.shape[-1])).values[:, -1:]
        kept = kept.masked_fill(kept < smallest, -math.inf)
    if params.min_p > 0:
        kept = kept.masked_fill(kept < kept.amax(-1, keepdim=True) + math.log(params.min_p), -math.inf)
    if params.top_p < 1:
        ordered, order = kept.log_softmax(-1).sort(-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        out: Bool[Tensor, "B V"] = torch.zeros_like(kept, dtype=torch.bool).scatter(
            -1, order, mass_before >= params.top_p
        )
        kept = kept.masked_fill(out, -math.inf)
    return kept


class _Ends(StoppingCriteria):
    """Ends a row at EOS or a stop text, and remembers how long it was: behind that `generate` writes padding."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, eos: set[int], rows: int) -> None:
        self._tokenizer, self._stop, self._width, self._eos = tokenizer, stop, width, eos
        self.lengths: list[int | None] = [None] * rows
        self._look_back = 2 + max((len(text.encode()) for text in stop), default=0)  # a token has a byte at least

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        drawn = input_ids.shape[1] - self._width
        for i, row in enumerate(input_ids[:, max(self._width, input_ids.shape[1] - self._look_back) :].tolist()):
            if self.lengths[i] is None and (row[-1] in self._eos or self._stopped(row)):
                self.lengths[i] = drawn
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

    def _stopped(self, row: list[int]) -> bool:
        if not self._stop:
            return False
        text = self._tokenizer.decode(row, skip_special_tokens=False)  # a stop text may be one
        return any(stop in text for stop in self._stop)


@contextmanager
def _plain_generation(model: Any, tokenizer: Any, max_tokens: int) -> Iterator[None]:
    """No setting of the checkpoint's `generation_config` (penalties, top-k ...) has a part in what is drawn."""
    lm = causal_lm(model)
    before = lm.generation_config
    eos = eos_token_ids(tokenizer, before)
    lm.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=padding_id(tokenizer)
    )
    try:
        yield
    finally:
        lm.generation_config = before
