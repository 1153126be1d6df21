"""What every sampler takes and gives, whichever engine it runs on.

A request is one prompt, the beginning of the answer if that is given, and a number; its seed and its key follow from
these alone. So the same rollouts are drawn however the prompts are spread over processes and calls, and a store can
tell which of them it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from negtune.data.completions import prompt_token_ids

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or a chat up to the open assistant turn."""
Prefix = str | Sequence[int]
"""Beginning of the assistant's turn: text, or token ids, which are taken as they are."""
Item = TypeVar("Item")
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token, whatever the cuts. Between 0 and 0.01
            nothing: vLLM would take 0.01.
        max_tokens: most tokens of a completion.
        top_p, top_k, min_p: cut the distribution. Importance ratios are wrong for what such a distribution gives, so
            nothing is cut unless asked for.
        stop: texts that end a completion; they stay in it.
        seed: of all requests; another one gives other samples.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name in ("temperature", "top_p", "min_p"):  # 1 and 1.0 are the same setting, and give the same keys
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.temperature < 0 or 0 < self.temperature < 0.01:
            raise ValueError(f"temperature must be 0 (the likeliest token) or at least 0.01, got {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise ValueError(
                f"need 0 < top_p <= 1, 0 <= min_p < 1 and top_k >= 0 (0: all tokens), got top_p={self.top_p}, "
                f"min_p={self.min_p}, top_k={self.top_k}"
            )
        if "" in self.stop:
            raise ValueError("a stop text must not be empty")

    @property
    def truncated(self) -> bool:
        """Whether `top_p`, `top_k` or `min_p` cut the distribution that tokens are drawn from."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """One completion to draw.

    Args:
        prompt: as the data set has it.
        prefix: beginning of the assistant's turn, which the completion continues.
        number: among the completions of the same prompt and prefix; see `requests_for`.
    """

    prompt: Prompt
    prefix: Prefix
    number: int

    def seed(self, params: SamplingParams) -> int:
        """31 bits from the request and `params.seed`."""
        return _digest([self.prompt, self.prefix, self.number, params.seed]) >> 33

    def key(self, params: SamplingParams, policy: str) -> str:
        """Names the rollout of this request under these settings and this policy; equal on every machine."""
        return f"{_digest([self.prompt, self.prefix, self.number, vars(params), policy]):016x}"


@dataclass(frozen=True)
class Rollout:
    """One completion, and everything needed to train on it, weigh it, or draw it again.

    Args:
        key: see `Request.key`.
        prompt, prefix, number: of the request.
        prompt_ids: what the model was given, the prefix's tokens included.
        completion_ids: what it drew, its EOS included.
        logps: log-probability of each in the distribution it was drawn from: after `temperature` (before it, if that is
            0), `top_p`, `top_k` and `min_p`.
        text: the completion without special tokens.
        finish_reason: `stop` (EOS or a stop text), `length` (cut: whether it is right is unknown), `error`.
        temperature: at which the tokens were drawn.
        seed: of this completion.
        policy: version of the weights it was drawn from.
        engine: what drew it.
        error: what went wrong, if `finish_reason` is `error`.
        truncated: whether `top_p`, `top_k` or `min_p` cut the distribution; see `ratios`.
        prefix_text: the prefix as text.
    """

    key: str
    prompt: Prompt
    prefix: Prefix
    number: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logps: list[float]
    text: str
    finish_reason: FinishReason
    temperature: float
    seed: int
    policy: str
    engine: str
    error: str = ""
    truncated: bool = False
    prefix_text: str = ""

    def __post_init__(self) -> None:
        if len(self.logps) != len(self.completion_ids):
            raise ValueError(f"{len(self.completion_ids)} tokens need as many logps, got {len(self.logps)}")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Rollout:
        """From a line of a store; columns that are not its own are left out."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})


DEFAULT_PARAMS = SamplingParams()
AGAIN = 1_000_000


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from one policy. An engine implements `draw` and `update`.

    Args:
        tokenizer: of the model.
        policy: version of the weights that are sampled from.
    """

    tokenizer: Any
    policy: str

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        params: SamplingParams = DEFAULT_PARAMS,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list[Rollout]:
        """`n` completions of each prompt, in order: all of the first prompt, then all of the second.

        Args:
            prompts: text or chats.
            n: completions of each.
            params: how they are drawn.
            prefixes: one per prompt; the completion continues it inside the open assistant turn.
        """
        return self.draw(requests_for(prompts, n, prefixes), params)

    def draw(self, requests: Sequence[Request], params: SamplingParams) -> list[Rollout]:
        """One completion per request, in order."""
        ...

    def update(self, model: Any, policy: str) -> None:
        """Sample from the weights that `model` has now, which are called `policy` from here on."""
        ...

    def close(self) -> None:
        """Delete what the engine was given. The sampler is not used afterwards."""
        return

    def sleep(self) -> None:
        """Give device memory back until the next `update` or `draw`, where the engine can; nothing elsewhere."""
        return


def requests_for(prompts: Sequence[Prompt], n: int, prefixes: Sequence[Prefix] | None = None) -> list[Request]:
    """One request per completion, numbered from 0.

    A prompt that stands in the list again is numbered from `AGAIN`, then from twice that: no two requests are equal,
    and those of a prompt stay what they are when `n` grows.
    """
    if not 1 <= n < AGAIN:
        raise ValueError(f"need 1 to {AGAIN - 1} completions of each prompt, got {n}")
    if prefixes is not None and len(prefixes) != len(prompts):
        raise ValueError(f"need one prefix per prompt, got {len(prefixes)} for {len(prompts)} prompts")
    seen: dict[int, int] = {}
    requests = []
    for i, prompt in enumerate(prompts):
        prefix = prefixes[i] if prefixes is not None else ""
        name = _digest([prompt, prefix])
        first = seen.get(name, 0)
        seen[name] = first + AGAIN
        requests += [Request(prompt, prefix, first + j) for j in range(n)]
    return requests


def request_token_ids(request: Request, tokenizer: Any) -> list[int]:
    """What the model is given: the prompt up to the open assistant turn, then the prefix, and no EOS behind it."""
    ids = prompt_token_ids(request.prompt, tokenizer)
    prefix = request.prefix
    if isinstance(prefix, str):
        prefix = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    return [*ids, *prefix]


def make_rollout(
    request: Request,
    params: SamplingParams,
    sampler: Sampler,
    engine: str,
    *,
    prompt_ids: list[int],
    completion_ids: list[int],
    logps: list[float],
    reason: str,
) -> Rollout:
    """The record of one drawn completion; a `reason` of the engine's own becomes `error`."""
    ended = reason in ("stop", "length")
    return Rollout(
        key=request.key(params, sampler.policy),
        prompt=request.prompt,
        prefix=request.prefix,
        number=request.number,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        logps=logps,
        text=sampler.tokenizer.decode(completion_ids, skip_special_tokens=True),
        finish_reason=reason if ended else "error",
        temperature=params.temperature,
        seed=request.seed(params),
        policy=sampler.policy,
        engine=engine,
        error="" if ended else f"the engine ended with {reason}",
        truncated=params.truncated,
        prefix_text=_text_of(request.prefix, sampler.tokenizer),
    )


def fitting_token_ids(
    requests: Sequence[Request], tokenizer: Any, longest: int | None, name: str = "max_model_len"
) -> list[list[int]]:
    """`request_token_ids` of all.

    Raises:
        ValueError: a prompt without a token, or one that leaves no room in `longest` tokens, a limit called `name`.
    """
    ids = [request_token_ids(request, tokenizer) for request in requests]
    for request, row in zip(requests, ids, strict=True):
        if not row:
            raise ValueError(f"the prompt {request.prompt!r} has no tokens; drop the row")
        if longest is not None and len(row) >= longest:
            raise ValueError(
                f"a prompt of {len(row)} tokens leaves no room in {name}={longest} ({str(request.prompt)[:60]!r}...); "
                "use a larger one, or drop the row"
            )
    return ids


def eos_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """The tokenizer's EOS, and what the checkpoint's generation settings end with (an end-of-turn token)."""
    configured = getattr(generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*several, tokenizer.eos_token_id) if i is not None})


def share_of(items: Sequence[Item], process_index: int, processes: int) -> Sequence[Item]:
    """What one of several processes draws: nothing twice, nothing left out, all about equally much."""
    return items[process_index::processes]


def _text_of(prefix: Prefix, tokenizer: Any) -> str:
    return prefix if isinstance(prefix, str) else tokenizer.decode(list(prefix), skip_special_tokens=True)


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=list)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
