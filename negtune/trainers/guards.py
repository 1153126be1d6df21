"""What a run with negatives is watched for, and what happens then."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)


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


class Guards:
    """Watches the logged metrics; reacts once per cause.

    Args:
        positive: reaction to `positive/drift` below `-max_drop`: off, warn, anchor, stop.
        max_drop: nats a token.
        entropy: reaction to `rounds/entropy` below `min_entropy`: off, warn, stop.
        min_entropy: nats a token.
    """

    def __init__(self, *, positive: str, max_drop: float, entropy: str, min_entropy: float) -> None:
        self.positive, self.max_drop = positive, max_drop
        self.entropy, self.min_entropy = entropy, min_entropy
        self.anchored = False
        self._told: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"anchored": self.anchored, "told": sorted(self._told)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.anchored, self._told = state["anchored"], set(state["told"])

    def check(self, logs: Mapping[str, float], step: int) -> None:
        """Raises `GuardStop` where the reaction is stop; sets `anchored` where it is anchor."""
        drift = logs.get("positive/drift")
        if drift is not None and drift < -self.max_drop and self.positive != "off":
            self._react(
                self.positive,
                "positives",
                f"step {step}: the tokens with a positive advantage lost {-drift:.3g} nats each (limit "
                f"max_positive_drop={self.max_drop:g}): the push on negatives takes what is right along. Lower the "
                "learning rate or negative_weight, set nll_weight, or use topr or clipped, whose push fades",
            )
        entropy = logs.get("rounds/entropy")
        if entropy is not None and entropy < self.min_entropy and self.entropy != "off":
            self._react(
                self.entropy,
                "entropy",
                f"step {step}: samples have {entropy:.3g} nats of entropy a token (limit min_entropy="
                f"{self.min_entropy:g}): the policy draws the same again and again, and groups carry no signal. Lower "
                "the learning rate or positive_weight (.1 is W-REINFORCE), or raise the temperature",
            )

    def _react(self, reaction: str, cause: str, text: str) -> None:
        if reaction == "stop":
            raise GuardStop(text)
        if reaction == "anchor":
            self.anchored = True
        if cause not in self._told:
            self._told.add(cause)
            logger.warning("%s%s", text, "; positives are anchored from now on" if reaction == "anchor" else "")
