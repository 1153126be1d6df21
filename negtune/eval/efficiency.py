"""How many times the data: the number of examples another method would have needed for the same score."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def equal_data(reference: Mapping[int, float], score: float) -> float:
    """The number of examples with which the reference reaches `score`, interpolated in the logarithm of that number.

    Args:
        reference: number of examples to score, two or more; a score that is lower than one before it counts as that
            one (noise must not make the curve turn back).
        score: higher is better.

    Returns:
        infinity above the curve, NaN below it: nothing is extrapolated.
    """
    numbers = np.array(sorted(reference), float)
    if len(numbers) < 2 or numbers[0] <= 0:
        raise ValueError(f"a curve needs two numbers of examples above 0, got {sorted(reference)}")
    scores = np.maximum.accumulate([reference[int(n)] for n in numbers])
    if score > scores[-1]:
        return math.inf
    if score < scores[0]:
        return math.nan
    right = max(1, int(np.searchsorted(scores, score)))
    low, high = scores[right - 1], scores[right]
    share = 0.0 if score <= low else (score - low) / (high - low)
    return float(numbers[right - 1] * (numbers[right] / numbers[right - 1]) ** share)


def efficiency(reference: Mapping[int, float], n: int, score: float) -> float:
    """`equal_data` over `n`, the data that `score` was reached with: 8 is the paper's claim for per-step DPO over SFT.

    "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold",
    https://arxiv.org/abs/2406.14532.
    """
    return equal_data(reference, score) / n
