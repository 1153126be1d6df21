"""How often a verifier errs, where the truth is known.

A false positive is a wrong answer that was accepted, as a share of the wrong answers; a false negative a correct one
that was rejected, as a share of the correct ones. Answers that were not scored count in neither, and apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval (Wilson, 1927).

    Args:
        count, of: errors, and cases in which one could happen.
        low, high: ends of the interval; 0 and 1 where there is no case.
    """

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.of if self.of else float("nan")


@dataclass(frozen=True)
class VerifierErrors:
    """See `verifier_errors`."""

    false_positive: Rate
    false_negative: Rate
    unscored: Rate


def wilson(count: int, of: int, *, confidence: float = 0.95) -> Rate:
    """`count` out of `of` with its Wilson score interval."""
    if not 0 <= count <= of:
        raise ValueError(f"need 0 <= count <= of, got {count} of {of}")
    if of == 0:
        return Rate(0, 0, 0.0, 1.0)
    interval = binomtest(count, of).proportion_ci(confidence, method="wilson")
    return Rate(count, of, float(interval.low), float(interval.high))


def verifier_errors(accepted: Sequence[bool | None], truth: Sequence[bool]) -> VerifierErrors:
    """Error rates of verdicts (`None` is unscored) against the truth (`True` is a correct answer)."""
    if len(accepted) != len(truth):
        raise ValueError(f"need one truth per verdict, got {len(accepted)} and {len(truth)}")
    on_wrong = [a for a, t in zip(accepted, truth, strict=True) if not t and a is not None]
    on_right = [a for a, t in zip(accepted, truth, strict=True) if t and a is not None]
    return VerifierErrors(
        false_positive=wilson(sum(on_wrong), len(on_wrong)),
        false_negative=wilson(sum(not a for a in on_right), len(on_right)),
        unscored=wilson(sum(a is None for a in accepted), len(accepted)),
    )
