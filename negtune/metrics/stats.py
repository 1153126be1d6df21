"""Statistics that several families of metrics share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import ncf, rankdata
from scipy.stats import t as student_t

Numbers = np.ndarray | np.floating | Sequence[Any] | float | int
"""What `np.asarray` turns into numbers: one of them, an array, or (nested) sequences."""


def auc(positives: Numbers, negatives: Numbers) -> float:
    """Chance that a random positive scores above a random negative, a tie counting half: area under the ROC curve.

    Equals the Mann-Whitney U statistic over its maximum. .5 means that the scores do not tell the two apart.
    """
    positives, negatives = np.asarray(positives, float), np.asarray(negatives, float)
    if not len(positives) or not len(negatives):
        raise ValueError(
            f"auc needs scores on both sides, got {len(positives)} positives and {len(negatives)} negatives"
        )
    if np.isnan(positives).any() or np.isnan(negatives).any():
        raise ValueError("auc needs scores without NaN")
    ranks = rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    below = ranks.sum() - len(positives) * (len(positives) + 1) / 2
    return float(below / (len(positives) * len(negatives)))


def mean_interval(values: Numbers, *, confidence: float = 0.95) -> tuple[float, float]:
    """Mean of independent runs and the half-width of its Student t interval: mean ± half.

    With 3 seeds the half-width is 2.48 standard deviations: few seeds make wide intervals, as they should.

    Args:
        values: one number per run, at least two.
        confidence: chance that the interval covers the true mean if the numbers are normal.
    """
    values = np.asarray(values, float)
    if values.size < 2:
        raise ValueError(f"an interval needs at least 2 runs, got {values.size}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    half = student_t.ppf((1 + confidence) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean()), float(half)


def bootstrap_interval(
    values: Numbers, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent units (prompts, runs): low and high.

    Args:
        values: one number per unit, at least two.
        confidence: of the interval.
        resamples: draws with replacement.
        seed: of the draws; the same numbers give the same interval.
    """
    return middle_of(bootstrap_means(values, resamples=resamples, seed=seed), confidence)


def paired_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean over units of ours minus theirs, and its 95 % bootstrap interval: difference, low, high.

    Args:
        ours, theirs: one number per unit, in the same order; a unit that either lacks (None) is left out.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    gains = np.array([a - b for a, b in pairs])
    low, high = bootstrap_interval(gains)
    return float(gains.mean()), low, high


def permutation_test(differences: Numbers, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: how often random signs make a mean at least as far from 0.

    Fisher's randomization test: if two systems were the same, each unit's difference could as well have had the other
    sign. Up to 12 units all signs are gone through and the p-value is exact, never below 2/2^n: five units cannot be
    significant at .05. Beyond, it is (count + 1)/(resamples + 1), which is never 0.

    Args:
        differences: ours minus theirs, one number per unit (query, prompt).
        resamples: draws of signs where there are more than 12 units.
        seed: of the draws; the same numbers give the same p-value.
    """
    values = np.asarray(differences, float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a permutation test needs one difference per unit, got shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError("a permutation test needs differences without NaN; leave out units that either side lacks")
    n = len(values)
    bar = abs(values.sum()) - 1e-12 * np.abs(values).sum()  # sums that are equal but for rounding are as far
    if n <= 12:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ values) >= bar).mean())
    generator, count, block = np.random.default_rng(seed), 0, max(1, 2**22 // n)
    for start in range(0, resamples, block):
        signs = 1 - 2 * generator.integers(2, size=(min(block, resamples - start), n), dtype=np.int8)
        count += int((np.abs(signs @ values) >= bar).sum())
    return (count + 1) / (resamples + 1)


def detectable_difference(differences: Numbers, *, power: float = 0.8, level: float = 0.05) -> float:
    """Smallest true mean difference that a two-sided paired t test of so many units finds with this power.

    With the standard deviation of these differences, by the noncentral distribution of t^2: 5 units of deviation 1 find
    1.68, 112 units .27. It says what an experiment could have seen, not what is there.

    Args:
        differences: ours minus theirs, one number per unit (seed, query), at least two.
        power: chance to find it, above `level` and below 1.
        level: chance to find something where nothing is.
    """
    values = np.asarray(differences, float)
    if values.size < 2:
        raise ValueError(f"a detectable difference needs at least 2 units, got {values.size}")
    if not 0 < level < power < 1:
        raise ValueError(f"need 0 < level < power < 1, got level={level} and power={power}")
    freedom = values.size - 1
    bar = student_t.ppf(1 - level / 2, freedom)

    def missing(shift: float) -> float:
        return float(ncf.sf(bar**2, 1, freedom, shift**2)) - power

    high = 2 * (bar + student_t.ppf(power, freedom))  # that without the factor is nearly the answer
    return float(brentq(missing, 1e-3, high) * values.std(ddof=1) / np.sqrt(values.size))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: all below .05 together hold at .05 (Holm's step-down of Bonferroni).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none gets smaller than the one before it.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        found[i] = least
    return found


def bootstrap_means(values: Numbers, *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `resamples` draws with replacement from at least two independent units."""
    values = np.asarray(values, float)
    if values.size < 2:
        raise ValueError(f"an interval needs at least 2 units, got {values.size}")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    return values[draws].mean(1)


def middle_of(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Between which two values the middle share `confidence` of the draws lies."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
