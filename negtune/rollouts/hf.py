"""Sampling with transformers' `generate`, on any device, from the very weights that are trained.

Every row draws with noise of its own, seeded by its request: a token is the argmax of logits/temperature and Gumbel
noise, which is a draw from the softmax. So a row's completion does not depend on its neighbours in the batch, unless
what batching does to the logits' last bits turns a token over.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
GOING_ON = 0.75
"""A batch is made smaller when at most this share of its rows has not ended."""


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
        longest = self._longest()
        rows = [
            _Row(
                torch.Generator(device).manual_seed(request.seed(params)),
                params.max_tokens if longest is None else min(params.max_tokens, longest - len(prompt_ids)),
            )
            for request, prompt_ids in zip(requests, ids, strict=True)
        ]
        with eval_mode(self.model), _plain_generation(self.model, self.tokenizer):
            self._complete(rows, input_ids.to(device), attention_mask.to(device), params)
        return [
            make_rollout(
                request,
                params,
                self,
                ENGINE,
                prompt_ids=prompt_ids,
                completion_ids=row.ids,
                logps=row.logps,
                reason="stop" if row.stopped else "length",
            )
            for request, prompt_ids, row in zip(requests, ids, rows, strict=True)
        ]

    def _complete(
        self,
        rows: Sequence[_Row],
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        params: SamplingParams,
    ) -> None:
        """Draw until every row has ended; those that have are dropped from the batch where they are many."""
        eos = set(eos_token_ids(self.tokenizer, causal_lm(self.model).generation_config))
        cache = self._cache_of_prompts(input_ids, attention_mask)
        while rows:
            ends = _Ends(rows, self.tokenizer, params.stop, eos, droppable=cache is not None)
            out = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max(row.left for row in rows),
                **({} if cache is None else {_cache_name(self.model): cache}),
                logits_processor=[_Draw(rows, params)],
                stopping_criteria=[ends],
            )
            going_on = [i for i, row in enumerate(rows) if not row.ended]
            rows = [rows[i] for i in going_on]
            if rows:
                kept = torch.tensor(going_on, device=out.device)
                cache.batch_select_indices(kept)
                input_ids, drawn = out[kept], out.shape[1] - input_ids.shape[1]
                attention_mask = nn.functional.pad(attention_mask[kept], (0, drawn), value=1)

    def _cache_of_prompts(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]) -> Any:
        """Keys and values of all but the last token of every prompt, computed once for all completions of a prompt;
        empty where no prompt comes twice, None where the model keeps a state that is not one of keys and values.
        """
        lm = causal_lm(self.model)
        cache = DynamicCache(config=lm.config)
        if getattr(lm, "_is_stateful", False) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            return None
        places_of: dict[tuple[int, ...], int] = {}
        whole = torch.cat([attention_mask, input_ids], 1).tolist()
        places = [places_of.setdefault(tuple(row), len(places_of)) for row in whole]
        if len(places_of) == len(places) or input_ids.shape[1] == 1:
            return cache
        firsts = [places.index(i) for i in range(len(places_of))]
        mask = attention_mask[firsts, :-1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": positions, _cache_name(self.model): cache, "use_cache": True}
        self.model(input_ids=input_ids[firsts, :-1], logits_to_keep=1, **given)
        cache.batch_select_indices(torch.tensor(places, device=input_ids.device))
        return cache


def _cache_name(model: nn.Module) -> str:
    """What transformers calls the argument, which has changed."""
    return "cache" if "cache" in inspect.signature(causal_lm(model).forward).parameters else "past_key_values"


@dataclass
class _Row:
    """A completion that is being drawn, with its own random numbers, and the tokens that it may have."""

    noise: torch.Generator
    room: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def left(self) -> int:
        return self.room - len(self.ids)

    @property
    def ended(self) -> bool:
        return self.stopped or self.left == 0


class _Draw(LogitsProcessor):
    """Draws the token of each row that has not ended, keeps its log-probability, and leaves nothing else likely."""

    def __init__(self, rows: Sequence[_Row], params: SamplingParams) -> None:
        self.rows, self.params = rows, params

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        going_on = [i for i, row in enumerate(self.rows) if not row.ended]
        logits = scores[going_on].float()  # a copy, and the largest of tensors here: changed in place from now on
        if self.params.temperature == 0:
            keys = logps = logits.log_softmax(-1)
        else:
            logps = logits.div_(self.params.temperature).log_softmax(-1)
            if self.params.truncated:
                logps = cut(logps, self.params).log_softmax(-1)
            exponential = logits
            for i, row in zip(going_on, exponential, strict=True):
                row.exponential_(generator=self.rows[i].noise)
            keys = exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().add_(logps)
        tokens = keys.argmax(-1)
        chosen = logps.gather(-1, tokens[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, chosen)):
            raise FloatingPointError(
                "the model's logits are not numbers, and nothing can be drawn from them: the weights have diverged, or "
                "the model cannot compute padded rows in this precision (try float32)"
            )
        for i, logp in zip(going_on, chosen, strict=True):
            self.rows[i].logps.append(logp)
        scores = scores.fill_(-math.inf)
        scores[going_on, tokens] = 0.0
        return scores


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
    """Gives every row its token, and ends it at EOS, a stop text or its last position; behind that `generate` writes
    padding. Ends the call where enough rows have ended to go on without them, or where one that has ended would be
    given a position that the model does not have.
    """

    def __init__(
        self, rows: Sequence[_Row], tokenizer: Any, stop: Sequence[str], eos: set[int], *, droppable: bool
    ) -> None:
        self._rows, self._tokenizer, self._stop, self._eos, self._droppable = rows, tokenizer, stop, eos, droppable
        self._look_back = 2 + max((len(text.encode()) for text in stop), default=0)  # a token has a byte at least

    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Any, **kwargs: Any) -> Bool[Tensor, " B"]:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                row.ids.append(token)
                row.stopped = token in self._eos or self._stop_text(row.ids[-self._look_back :])
        ended = [row.ended for row in self._rows]
        drawn = max(len(row.ids) for row in self._rows)
        few, over = len(ended) - sum(ended) <= GOING_ON * len(ended), any(drawn >= row.room for row in self._rows)
        if self._droppable and (few or over):
            ended = [True] * len(ended)
        return torch.tensor(ended, device=input_ids.device)

    def _stop_text(self, ids: list[int]) -> bool:
        if not self._stop:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=False)  # a stop text may be one
        return any(stop in text for stop in self._stop)


@contextmanager
def _plain_generation(model: Any, tokenizer: Any) -> Iterator[None]:
    """No setting of the checkpoint's `generation_config` (penalties, top-k ...) has a part in what is drawn."""
    lm = causal_lm(model)
    before = lm.generation_config
    eos = eos_token_ids(tokenizer, before)
    lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=padding_id(tokenizer))
    try:
        yield
    finally:
        lm.generation_config = before
