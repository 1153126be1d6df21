"""What a verifier says, and the two ways in which verifiers and TRL's reward functions stand in for each other.

A completion is `correct`, `wrong`, or `unscored`: the scorer failed, the gold answer is missing, the completion was cut
off. Unscored is never reward 0: it becomes None, which TRL and negtune's trainers leave out.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import os
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

Outcome = Literal["correct", "wrong", "unscored"]
Completion = str | Sequence[Mapping[str, Any]]
"""Text, or the assistant's messages."""
OFFERED = ("completion_ids",)
"""Columns that are there for whoever asks for them, besides those of the data set."""


@dataclass(frozen=True)
class Verdict:
    """Of one completion.

    Args:
        outcome: `correct`, `wrong` or `unscored`.
        score: reward; 1 and 0 by default, None exactly where unscored.
        reason: what decided, for a person to read.
        seconds: how long it took.
    """

    outcome: Outcome
    score: float | None = None
    reason: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.outcome not in ("correct", "wrong", "unscored"):
            raise ValueError(f"outcome must be correct, wrong or unscored, got {self.outcome!r}")
        if self.outcome == "unscored" and self.score is not None:
            raise ValueError(f"an unscored completion has no score, got {self.score}")
        if self.outcome != "unscored" and self.score is None:
            object.__setattr__(self, "score", 1.0 if self.outcome == "correct" else 0.0)
        if self.score is not None and self.score != self.score:
            raise ValueError("the score is NaN; make the completion unscored instead")


@runtime_checkable
class Verifier(Protocol):
    """Anything that gives one verdict per completion; columns of the data set come as lists of the same length."""

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]: ...


class TooManyUnscored(RuntimeError):
    """More completions than allowed could not be scored: the scorer is broken, not the model."""


def rewards(verdicts: Sequence[Verdict]) -> list[float | None]:
    """Scores as TRL's reward functions return them: None for unscored."""
    return [verdict.score for verdict in verdicts]


def as_reward_function(verifier: Verifier, name: str | None = None) -> Callable[..., list[float | None]]:
    """`verifier` with TRL's reward signature `(prompts, completions, **columns) -> list[float | None]`.

    Args:
        verifier: columns that it does not take are TRL's own (`completion_ids`, `trainer_state` ...) and are dropped.
        name: under which TRL logs the reward; the class's name by default.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        of_rows = {key: values for key, values in columns.items() if _is_column(values, len(completions))}
        return rewards(verifier.verify(prompts, completions, **of_rows))

    reward.__name__ = name or type(verifier).__name__
    return reward


def verdicts_of(
    verifier: Verifier,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Sequence[Any]],
) -> list[Verdict]:
    """What a verifier says of completions, of whose token ids it is told if they are known and it takes them."""
    offered = {} if completion_ids is None else accepted(verifier.verify, {"completion_ids": completion_ids})
    return verifier.verify(prompts, completions, **{**columns, **offered})


@dataclass(frozen=True)
class FromRewardFunction:
    """A TRL reward function as a verifier.

    Args:
        function: `(prompts, completions, **columns) -> list[float | None]`, plain or async. If it raises, the
            completions of that call are unscored, with the traceback as the reason.
        threshold: a reward of at least this is correct.
        one_by_one: call it once per completion, so that one bad completion does not take others along.
        context: what else to offer at each call, by name. Of this, and of `completion_ids`, a function gets what it
            names, all of it if it has `**kwargs`.
    """

    function: Callable[..., Any]
    threshold: float = 0.5
    one_by_one: bool = True
    context: Callable[[], Mapping[str, Any]] | None = None

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        size = 1 if self.one_by_one else max(1, len(completions))
        verdicts: list[Verdict] = []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            chosen = {name: list(values[part]) for name, values in columns.items()}
            verdicts += self._call(list(prompts[part]), list(completions[part]), self._wanted(chosen))
        return verdicts

    def _wanted(self, columns: dict[str, list[Any]]) -> dict[str, Any]:
        """The columns, without what was only offered and is not taken."""
        offered = {**(self.context() if self.context else {}), **{k: v for k, v in columns.items() if k in OFFERED}}
        return {**{k: v for k, v in columns.items() if k not in OFFERED}, **accepted(self.function, offered)}

    def _call(self, prompts: list[Any], completions: list[Completion], columns: dict[str, list[Any]]) -> list[Verdict]:
        start = time.perf_counter()
        try:
            values = self.function(prompts=prompts, completions=completions, **columns)
            values = list(in_background(values) if inspect.iscoroutine(values) else values)
            if len(values) != len(completions):
                raise ValueError(f"{len(values)} rewards for {len(completions)} completions")
        except Exception:  # somebody else's code
            return [Verdict("unscored", reason=traceback.format_exc(), seconds=time.perf_counter() - start)] * len(
                completions
            )
        seconds = (time.perf_counter() - start) / len(completions)
        return [self._verdict(value, seconds) for value in values]

    def _verdict(self, value: float | None, seconds: float) -> Verdict:
        if value is None or not math.isfinite(value):
            return Verdict("unscored", reason=f"the reward function returned {value}", seconds=seconds)
        outcome: Outcome = "correct" if value >= self.threshold else "wrong"
        return Verdict(outcome, float(value), f"reward {value:g}", seconds)


def fingerprint(thing: Any) -> str:
    """Short name of a verifier, splitter or function with its settings: another one has another name.

    From the class and its attributes, or the source of a function where it can be read; what only a running process
    knows (addresses) is left out.
    """
    if isinstance(thing, partial):
        return fingerprint([fingerprint(thing.func), thing.args, thing.keywords])
    try:
        said = inspect.getsource(thing) if inspect.isroutine(thing) else ""
    except (OSError, TypeError):
        said = ""
    attributes = {} if inspect.isroutine(thing) else getattr(thing, "__dict__", {})
    inner = {
        name: fingerprint(value) if callable(value) else repr(value)
        for name, value in attributes.items()
        if not name.startswith("_")
    }
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{name}|{said}|{sorted(inner.items())}|{thing if not attributes else ''}")
    return f"{name.rpartition('.')[2]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def stop_if_unscored(verdicts: Sequence[Verdict], limit: float, *, at_least: int = 20) -> None:
    """Raise `TooManyUnscored`, with the most frequent reasons, where more than `limit` of the verdicts are unscored.

    Args:
        verdicts: so far.
        limit: share, 0 to 1.
        at_least: no judgement on fewer verdicts than this.
    """
    failed = [v for v in verdicts if v.outcome == "unscored"]
    if len(verdicts) < at_least or len(failed) <= limit * len(verdicts):
        return
    reasons = Counter(v.reason.strip().splitlines()[-1] if v.reason.strip() else "no reason given" for v in failed)
    common = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    raise TooManyUnscored(
        f"{len(failed)} of {len(verdicts)} completions could not be scored (limit {limit:.0%}): {common}. Mend the "
        "scorer, or raise max_unscored"
    )


def text_of(completion: Completion) -> str:
    """What the assistant said last."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What of `offered` a function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(offered)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


_first = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""By process: a forked child has no thread of its parent's."""


def in_background(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Its result, from the one event loop that all async reward functions of this process share.

    So clients that a function keeps between calls stay with their loop, and a notebook's own loop is not in the way.
    """
    with _first:  # two functions may start at once
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, daemon=True, name="negtune reward functions").start()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def _is_column(values: Any, rows: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == rows
