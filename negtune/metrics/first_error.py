"""ProcessBench's metric of judges that find the first wrong step of a solution, or say that there is none.

Zheng et al. 2024, https://arxiv.org/abs/2412.06559.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from negtune.metrics.stats import Numbers, bootstrap_interval, bootstrap_means, middle_of


def f1_of_accuracies(error: Numbers, correct: Numbers) -> np.ndarray:
    """Harmonic mean of the accuracies on erroneous and on correct solutions; 0 where both are 0."""
    error, correct = np.asarray(error, float), np.asarray(correct, float)
    total = error + correct
    return np.asarray(2 * error * correct / np.where(total == 0, 1, total))


def processbench_scores(
    hits: Sequence[float | int],
    labels: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """`error_accuracy`, `correct_accuracy` and their `f1`, each with `_low` and `_high`.

    F1 and not accuracy, so that a judge that always says the same is worth nothing.

    Args:
        hits: 1 where the judge's answer is the label, else 0; a chance for a judge that guesses.
        labels: index of the first wrong step; -1: all are right.
        confidence, resamples, seed: of the bootstrap intervals over rows; erroneous and correct rows are drawn apart.

    NaN for what has no row; an interval needs two rows.
    """
    if len(hits) != len(labels):
        raise ValueError(f"need one label per hit, got {len(hits)} and {len(labels)}")
    sides = {
        "error_accuracy": [hit for hit, label in zip(hits, labels, strict=True) if label >= 0],
        "correct_accuracy": [hit for hit, label in zip(hits, labels, strict=True) if label < 0],
    }
    found = {name: float(np.mean(side)) if side else math.nan for name, side in sides.items()}
    found["f1"] = float(f1_of_accuracies(found["error_accuracy"], found["correct_accuracy"]))
    for name, side in sides.items():
        if len(side) > 1:
            interval = bootstrap_interval(side, confidence=confidence, resamples=resamples, seed=seed)
            found[f"{name}_low"], found[f"{name}_high"] = interval
    if min(map(len, sides.values())) > 1:
        drawn = [bootstrap_means(s, resamples=resamples, seed=seed + i) for i, s in enumerate(sides.values())]
        found["f1_low"], found["f1_high"] = middle_of(f1_of_accuracies(*drawn), confidence)
    return found
