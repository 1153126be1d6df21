"""What a run with negatives is watched for, and what happens then."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

REWARD = "rounds/reward"


class GuardStop(RuntimeError):
    """A guard stopped the run: what it watches went too far. The last checkpoint is from before."""


class PenaltyWarning(UserWarning):
    """A setting takes the size of a penalty back."""


def warn_of_lost_penalty(rewards: Iterable[float], setting: str, way_out: str) -> bool:
    """Warn where rewards are two numbers, one of them a penalty whose size somebody chose; returns whether it did.

    Args:
        rewards: of what is normalised by the deviation of its group, which makes two numbers the same two numbers.
        setting: that asks for this, with its value.
        way_out: how to say it so that it counts.
    """
    values = sorted(set(rewards))
    if len(values) != 2 or values[0] >= 0:
        return False
    warnings.warn(
        f"rewards are {values[1]:g} and {values[0]:g}, and {setting} divides by the deviation of each group: the size "
        f"of the penalty {values[0]:g} cancels, only the share of wrong answers in a group is left. {way_out}, or "
        "weigh the negatives with negative_weight, which is applied last",
        PenaltyWarning,
        stacklevel=3,
    )
    return True


@dataclass(frozen=True)
class Watch:
    """One thing to look for in the logged metrics.

    Args:
        cause: its name: a cause is told once.
        reaction: off, warn, anchor or stop.
        seen: metrics with the reward last logged, and those logged first, to what is wrong and what to do about it;
            None where nothing is.
    """

    cause: str
    reaction: str
    seen: Callable[[Mapping[str, float], Mapping[str, float]], str | None]


def falling_positives(reaction: str, max_drop: float) -> Watch:
    """`positive/drift` below `-max_drop` nats a token."""

    def seen(logs: Mapping[str, float], first: Mapping[str, float]) -> str | None:
        drift = logs.get("positive/drift")
        if drift is None or drift >= -max_drop:
            return None
        return (
            f"the tokens with a positive advantage lost {-drift:.3g} nats each (limit max_positive_drop={max_drop:g}): "
            "the push on negatives takes what is right along. Lower the learning rate or negative_weight, set "
            "nll_weight, or use topr or clipped, whose push fades"
        )

    return Watch("positives", reaction, seen)


def lost_entropy(reaction: str, least: float) -> Watch:
    """`rounds/entropy` below `least` nats a token."""

    def seen(logs: Mapping[str, float], first: Mapping[str, float]) -> str | None:
        entropy = logs.get("rounds/entropy")
        if entropy is None or entropy >= least:
            return None
        return (
            f"samples have {entropy:.3g} nats of entropy a token (limit min_entropy={least:g}): the policy draws the "
            "same again and again, and groups carry no signal. Lower the learning rate or positive_weight (.1 is "
            "W-REINFORCE), or raise the temperature"
        )

    return Watch("entropy", reaction, seen)


def displaced_chosen(reaction: str, max_drop: float) -> Watch:
    """Likelihood displacement: `drift/margin` above 0 while `chosen/drift` is below `-max_drop` nats a token.

    On fresh samples the chosen answers of the first round may also fall because better ones have taken their place:
    then the reward has risen, and nothing is wrong.
    """

    def seen(logs: Mapping[str, float], first: Mapping[str, float]) -> str | None:
        drift, margin = logs.get("chosen/drift"), logs.get("drift/margin")
        if drift is None or margin is None or drift >= -max_drop or margin <= 0:
            return None
        if logs.get(REWARD, -math.inf) > first.get(REWARD, math.inf):
            return None
        return (
            f"the margin grew by {margin:.3g} nats while the chosen answers lost {-drift:.3g} nats a token (limit "
            f"max_chosen_drop={max_drop:g}): likelihood displacement, what both sides lose goes to answers that nobody "
            "chose. Lower the learning rate, set nll_weight, use dpop, nca or ipo, or leave out the pairs with the "
            "highest CHES (negtune.eval.displacement)"
        )

    return Watch("chosen", reaction, seen)


class Guards:
    """Watches the logged metrics; reacts once per cause.

    Args:
        watches: what to look for.
    """

    def __init__(self, *watches: Watch) -> None:
        self._watches = [watch for watch in watches if watch.reaction != "off"]
        self.anchored = False
        self._told: set[str] = set()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}  # a row of the log has a reward only where a round was drawn

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"anchored": self.anchored, "told": sorted(self._told), "first": self._first, "last": self._last}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.anchored, self._told = state["anchored"], set(state["told"])
        self._first, self._last = dict(state.get("first", {})), dict(state.get("last", {}))

    def check(self, logs: Mapping[str, float], step: int) -> None:
        """Raises `GuardStop` where the reaction is stop; sets `anchored` where it is anchor."""
        if REWARD in logs:
            self._first.setdefault(REWARD, logs[REWARD])
            self._last[REWARD] = logs[REWARD]
        for watch in self._watches:
            text = watch.seen({**self._last, **logs}, self._first)
            if text is not None:
                self._react(watch, f"step {step}: {text}")

    def _react(self, watch: Watch, text: str) -> None:
        if watch.reaction == "stop":
            raise GuardStop(text)
        anchors = watch.reaction == "anchor"
        self.anchored = self.anchored or anchors
        if watch.cause not in self._told:
            self._told.add(watch.cause)
            logger.warning("%s%s", text, f"; {watch.cause} are anchored from now on" if anchors else "")
