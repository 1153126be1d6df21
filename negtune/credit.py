"""Outcomes of rollouts -> step values, advantages, the first pit, and baselines: who gets the credit, who the blame.

A solution has L steps. Its state i is the prompt and the first i steps, i = 0..L, and Q_i is the chance that a rollout
from state i ends well; step i (counted from 1) has the advantage A_i = Q_i - Q_{i-1}. Counts give exact fractions, so
that the advantages of all steps add up to Q_L - Q_0 without rounding.

What is not known is None, never 0: a state without a scored rollout, a rollout that was cut off or could not be scored.

Shapes: G groups (completions of one prompt), N completions each. `scored` is True where a reward counts.
Method: "RL on Incorrect Synthetic Data", https://arxiv.org/abs/2406.14532, section 2 and 4 of its notation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import comb
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Value = Fraction | float | None
"""Of a state: a chance, exact where it comes from counts; None where nothing is known."""


@dataclass(frozen=True)
class Tally:
    """Rollouts from one state.

    Args:
        correct, wrong: scored ones.
        unknown: cut off, or not scored; they count in neither.
    """

    correct: int
    wrong: int
    unknown: int = 0

    def __post_init__(self) -> None:
        if min(self.correct, self.wrong, self.unknown) < 0:
            raise ValueError(f"counts cannot be negative, got {self}")

    @property
    def scored(self) -> int:
        return self.correct + self.wrong

    @property
    def value(self) -> Fraction | None:
        """Share of correct ones among the scored; None if there is none."""
        return Fraction(self.correct, self.scored) if self.scored else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.correct + other.correct, self.wrong + other.wrong, self.unknown + other.unknown)


# --- Values and advantages of steps -----------------------------------------------------------------------------------


def best_of(tally: Tally, k: int, *, unbiased: bool = True) -> Fraction | None:
    """Value under best-of-k: the chance that at least one of `k` rollouts is correct, from n scored ones, s of them so.

    Unbiased: 1 - C(n-s, k) / C(n, k), which needs n >= k and is None below. Biased: 1 - (1 - s/n)^k, too low on
    average (concave in s/n), but defined for any n >= 1. k = 1 is the plain share either way.

    The paper takes k = 5. An exploring policy is a better judge of a step than the one that made it: with k > 1 a step
    is blamed only if a few tries do not repair it.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if tally.value is None:
        return None
    if not unbiased:
        return 1 - (1 - tally.value) ** k
    if tally.scored < k:
        return None
    return 1 - Fraction(comb(tally.wrong, k), comb(tally.scored, k))


def state_values(tallies: Sequence[Tally], outcome: bool | None, *, k: int = 1, unbiased: bool = True) -> list[Value]:
    """Q_0 .. Q_L: of the states before the last from rollouts, of the last from how the solution itself ended.

    Args:
        tallies: of the states 0 .. L-1.
        outcome: whether the solution was correct; None if that is not known.
        k, unbiased: see `best_of`.
    """
    if not tallies:
        raise ValueError("need a tally of at least one state: the bare prompt")
    end = None if outcome is None else Fraction(int(outcome))
    return [*(best_of(tally, k, unbiased=unbiased) for tally in tallies), end]


def step_advantages(values: Sequence[Value]) -> list[Value]:
    """A_1 .. A_L from Q_0 .. Q_L: A_i = Q_i - Q_{i-1} (equation 3); None where one of the two is."""
    if len(values) < 2:
        raise ValueError(f"need the values of two states at least (before and after one step), got {len(values)}")
    pairs = pairwise(values)
    return [None if before is None or after is None else after - before for before, after in pairs]


def spurious_steps(advantages: Sequence[Value], threshold: float = 0.0) -> list[int]:
    """Steps (from 1) of a *correct* solution that made success less likely by more than `threshold`.

    Training on such solutions alone teaches these steps too: what amplifies spurious correlations in RFT.
    """
    return [i for i, advantage in enumerate(advantages, start=1) if advantage is not None and advantage < -threshold]


# --- The first pit ----------------------------------------------------------------------------------------------------

PitRule = Literal["all_fail", "two_consecutive", "argmin", "largest_drop"]
PitReason = Literal["found", "correct", "unknown", "never solved", "always solved"]


@dataclass(frozen=True)
class Pit:
    """Where a wrong solution went wrong.

    Args:
        step: counted from 1; None unless `reason` is `found`.
        reason: `correct`: the solution has no pit; `unknown`: how it ended, or what a rollout from its prompt gives, is
            not known; `never solved`, `always solved`: no rollout from the bare prompt is correct, or every one, and
            such prompts are left out: no step is to blame for what fails anyway.
    """

    step: int | None
    reason: PitReason


def first_pit(
    tallies: Sequence[Tally],
    outcome: bool | None,
    rule: PitRule = "all_fail",
    *,
    k: int = 1,
    threshold: float = 0.0,
) -> Pit:
    """The step that ruined a wrong solution.

    Args:
        tallies: of the states 0 .. L-1. A state that was never sampled is `Tally(0, 0)` and no candidate.
        outcome: whether the solution was correct; None: not known.
        rule:
            all_fail: first step behind which every scored rollout fails (Self-Explore); with n rollouts a step that
                still succeeds with chance q is blamed wrongly with chance (1 - q)^n: .24 for q = .3 and n = 4.
            two_consecutive: first such step whose successor is one too, or that is the last.
            argmin: first step with the lowest value (the paper's first pit).
            largest_drop: first step with the lowest advantage; a drop over states without a value is that of the step
                behind them.
        k: values are those under best-of-k, for argmin and largest_drop.
        threshold: a state with at most this value counts as one from which every rollout fails: some end well by luck.

    Ties go to the earlier step.
    """
    if outcome is None:
        return Pit(None, "unknown")
    if outcome:
        return Pit(None, "correct")
    start = tallies[0].value if tallies else None
    if start is None:
        return Pit(None, "unknown")
    if start == 1:
        return Pit(None, "always solved")
    if start <= threshold:
        return Pit(None, "never solved")
    values = state_values(tallies, outcome, k=1 if rule in ("all_fail", "two_consecutive") else k)
    step = _PIT_RULES[rule](values, threshold)
    return Pit(step, "unknown" if step is None else "found")


def _all_fail(values: Sequence[Value], threshold: float) -> int:
    return next(i for i, value in enumerate(values) if i and value is not None and value <= threshold)


def _two_consecutive(values: Sequence[Value], threshold: float) -> int:
    known = [(i, value <= threshold) for i, value in enumerate(values) if i and value is not None]
    followed = pairwise([*known, (len(values), True)])
    return next(i for (i, fails), (_, next_fails) in followed if fails and next_fails)


def _argmin(values: Sequence[Value], threshold: float) -> int:
    return min((value, i) for i, value in enumerate(values) if i and value is not None)[1]


def _largest_drop(values: Sequence[Value], threshold: float) -> int | None:
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    drops = [(after - before, i) for (_, before), (i, after) in pairwise(known)]
    return min(drops)[1] if drops else None


_PIT_RULES: dict[str, Callable[[Sequence[Value], float], int | None]] = {
    "all_fail": _all_fail,
    "two_consecutive": _two_consecutive,
    "argmin": _argmin,
    "largest_drop": _largest_drop,
}


# --- Given labels -----------------------------------------------------------------------------------------------------


def advantages_from_labels(
    labels: Sequence[int | bool | None],
    *,
    neutral: int | None = None,
    right: float = 1.0,
    wrong: float = -1.0,
    after_error: float | None = None,
) -> list[float | None]:
    """One advantage per step from step labels.

    Args:
        labels: 1 or True: right; 0, -1 or False: wrong; None: not labelled.
        neutral: a label that says neither: 0 in PRM800K, whose wrong steps are -1.
        right, wrong: of right steps, and of the first wrong one.
        after_error: of the steps behind it; None: not known, since they carry on what went wrong before.
    """
    advantages: list[float | None] = []
    failed = False
    for label in labels:
        if label is not None and label not in (1, 0, -1):
            raise ValueError(f"a step label is 1, 0, -1, True, False or None, got {label!r}")
        if failed:
            advantages.append(after_error)
        elif label is None or (label is not False and label == neutral):
            advantages.append(None)
        else:
            failed = label != 1
            advantages.append(wrong if failed else right)
    return advantages


def labels_from_first_error(first_error: int, steps: int) -> list[bool | None]:
    """ProcessBench's label, the index (from 0) of the first wrong step or -1, as one label per step."""
    if not -1 <= first_error < steps:
        raise ValueError(f"the first error must be -1 or one of the {steps} steps counted from 0, got {first_error}")
    if first_error == -1:
        return [True] * steps
    return [True] * first_error + [False] + [None] * (steps - first_error - 1)


# --- Whole completions: rewards -> advantages -------------------------------------------------------------------------

Baseline = Literal["none", "group", "leave_one_out", "batch"]
Scale = Literal["none", "group", "batch"]


def advantages(
    rewards: Float[Tensor, "G N"],
    scored: Bool[Tensor, "G N"],
    *,
    baseline: Baseline = "leave_one_out",
    scale: Scale = "none",
    running: float | None = None,
    epsilon: float = 1e-6,
) -> Float[Tensor, "G N"]:
    """Rewards minus a baseline, over a scale; 0 where not scored.

    Args:
        rewards: what stands where `scored` is False plays no part.
        scored: which count.
        baseline: group: mean of the group (GRPO; biased by (N-1)/N); leave_one_out: mean of the *others* in the group
            (RLOO, unbiased); batch: mean of all; none: the reward itself.
        scale: divide by the standard deviation of the group (GRPO), or of the batch; none: not at all (Dr. GRPO).
            Within a group the scale undoes whatever a penalty's size was meant to say.
        running: subtract this number in place of the baseline: an exponential moving average, see `moving_average`.
        epsilon: added to the standard deviation.

    A completion that is the only scored one of its group has no group baseline: its advantage is 0. Rewards that are
    all alike deviate from no mean, to the last bit, and are divided by no scale.
    """
    if baseline == "leave_one_out" and rewards.shape[-1] < 2:
        raise ValueError(f"leave_one_out needs at least 2 samples per prompt, got {rewards.shape[-1]}")
    known = rewards.masked_fill(~scored, 0.0)
    counts = scored.sum(-1, keepdim=True)
    if running is not None:
        centred = known - running
    elif baseline == "group":
        centred = (known - known.sum(-1, keepdim=True) / counts.clamp(min=1)).masked_fill(
            _alike(known, scored, (-1,)), 0.0
        )
    elif baseline == "leave_one_out":
        others = (known.sum(-1, keepdim=True) - known) / (counts - 1).clamp(min=1)
        centred = (known - others).masked_fill((counts < 2) | _alike(known, scored, (-1,)), 0.0)
    elif baseline == "batch":
        centred = (known - known.sum() / scored.sum().clamp(min=1)).masked_fill(_alike(known, scored, (-2, -1)), 0.0)
    elif baseline == "none":
        centred = known
    else:
        raise ValueError(f"baseline must be none, group, leave_one_out or batch, got {baseline!r}")
    if scale not in ("none", "group", "batch"):
        raise ValueError(f"scale must be none, group or batch, got {scale!r}")
    if scale != "none":
        axes = (-1,) if scale == "group" else (-2, -1)
        scaled = centred / (_deviation(known, scored, axes) + epsilon)
        centred = centred.where(_alike(known, scored, axes), scaled)
    return centred.masked_fill(~scored, 0.0)


def moving_average(
    previous: float | None, rewards: Float[Tensor, "G N"], scored: Bool[Tensor, "G N"], *, decay: float = 0.9
) -> float | None:
    """The baseline after these rewards: decay * previous + (1 - decay) * their mean; the mean itself at first.

    Subtract the *previous* one from the rewards that it has not seen, or the baseline depends on the actions.
    """
    if not scored.any():
        return previous
    mean = rewards[scored].double().mean().item()
    return mean if previous is None else decay * previous + (1 - decay) * mean


def best_of_group(
    rewards: Float[Tensor, "G N"], scored: Bool[Tensor, "G N"], *, least: float | None = None
) -> Bool[Tensor, "G N"]:
    """Which completion of each group has the highest reward, the first of several; none in a group that says nothing.

    A group says nothing where fewer than two are scored, where all scored ones are alike, or where the best one has
    less than `least`. With N = 1 there is nothing to choose between and every scored completion is the best.
    """
    infinite = float("inf")
    known = rewards.masked_fill(~scored, -infinite)
    top = known.amax(-1, keepdim=True)
    first = (known == top).to(torch.int8).argmax(-1, keepdim=True)
    says = scored.any(-1, keepdim=True)
    if rewards.shape[-1] > 1:
        says = (scored.sum(-1, keepdim=True) > 1) & ~_alike(rewards, scored, (-1,))
    if least is not None:
        says = says & (top >= least)
    return torch.zeros_like(scored).scatter(-1, first, says)


def has_signal(advantages: Float[Tensor, "G N"], scored: Bool[Tensor, "G N"]) -> Bool[Tensor, " G"]:
    """Which groups say anything: an advantage that is not 0 among the scored."""
    return (advantages.masked_fill(~scored, 0.0) != 0).any(-1)


def _alike(known: Tensor, scored: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Where the scored are all equal, or none is there."""
    infinite = float("inf")
    lowest = known.masked_fill(~scored, infinite).amin(axes, keepdim=True)
    return lowest >= known.masked_fill(~scored, -infinite).amax(axes, keepdim=True)


def _deviation(known: Tensor, scored: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Standard deviation of the scored (divided by n - 1, as in TRL); 0 with fewer than two."""
    count = scored.sum(axes, keepdim=True)
    mean = known.sum(axes, keepdim=True) / count.clamp(min=1)
    square = (known - mean).square().masked_fill(~scored, 0.0).sum(axes, keepdim=True)
    return (square / (count - 1).clamp(min=1)).sqrt()
