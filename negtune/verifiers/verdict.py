"""What a verifier says, and the two ways in which verifiers and TRL's reward functions stand in for each other.

A completion is `correct`, `wrong`, or `unscored`: the scorer failed, the gold answer is missing, the completion was cut
off. Unscored is never reward 0: it becomes None, which TRL and negtune's trainers leave out.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

Outcome = Literal["correct", "wrong", "unscored"]
Completion = str | Sequence[Mapping[str, Any]]
"""Text, or the assistant's messages."""


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


@dataclass(frozen=True)
class FromRewardFunction:
    """A TRL reward function as a verifier.

    Args:
        function: `(prompts, completions, **columns) -> list[float | None]`. If it raises, the completions of that call
            are unscored, with the traceback as the reason.
        threshold: a reward of at least this is correct.
        one_by_one: call it once per completion, so that one bad completion does not take others along.
    """

    function: Callable[..., Sequence[float | None]]
    threshold: float = 0.5
    one_by_one: bool = True

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        size = 1 if self.one_by_one else max(1, len(completions))
        verdicts: list[Verdict] = []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            chosen = {name: list(values[part]) for name, values in columns.items()}
            verdicts += self._call(list(prompts[part]), list(completions[part]), chosen)
        return verdicts

    def _call(self, prompts: list[Any], completions: list[Completion], columns: dict[str, list[Any]]) -> list[Verdict]:
        start = time.perf_counter()
        try:
            values = list(self.function(prompts=prompts, completions=completions, **columns))
            if len(values) != len(completions):
                raise ValueError(f"{len(values)} rewards for {len(completions)} completions")
        except Exception:  # somebody else's code
            return [Verdict("unscored", reason=traceback.format_exc(), seconds=time.perf_counter() - start)] * len(
                completions
            )
        seconds = (time.perf_counter() - start) / len(completions)
        return [self._verdict(value, seconds) for value in values]

    def _verdict(self, value: float | None, seconds: float) -> Verdict:
        if value is None or value != value:
            return Verdict("unscored", reason=f"the reward function returned {value}", seconds=seconds)
        outcome: Outcome = "correct" if value >= self.threshold else "wrong"
        return Verdict(outcome, float(value), f"reward {value:g}", seconds)


def reward_verifier(reward_funcs: Any, weights: Sequence[float] | None = None) -> Verifier:
    """Reward functions with TRL's signature as one verifier: their weighted sum, unscored where any of them is None.

    Args:
        reward_funcs: one, or several.
        weights: one each; 1 by default. A function of weight 0 is called and logged by whoever wants to, but does not
            count, and cannot make a completion unscored.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(
            f"reward_weights needs one weight per reward function, got {len(weights)} for {len(functions)}"
        )
    if len(functions) == 1 and weights == [1.0]:
        return FromRewardFunction(functions[0], one_by_one=False)
    return _WeightedSum([FromRewardFunction(f, one_by_one=False) for f in functions], weights)


@dataclass(frozen=True)
class _WeightedSum:
    verifiers: list[FromRewardFunction]
    weights: list[float]
    threshold: float = 0.5

    def verify(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[Verdict]:
        found = [verifier.verify(prompts, completions, **columns) for verifier in self.verifiers]
        return [self._sum(verdicts) for verdicts in zip(*found, strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        total = 0.0
        for verdict, weight in zip(verdicts, self.weights, strict=True):
            if weight == 0:
                continue
            if verdict.score is None:
                return verdict
            total += weight * verdict.score
        return Verdict("correct" if total >= self.threshold else "wrong", total, f"weighted sum {total:g}")


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


def _is_column(values: Any, rows: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == rows
