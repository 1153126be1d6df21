"""Which of several scored answers to a prompt become pairs of a better and a worse one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

RULES = ("best_worst", "all", "mu_minus_2sigma", "random", "first_pit")


@dataclass(frozen=True)
class PairSelection:
    """A rule for pairs. A tie is never a pair: two equal scores, or two answers of the same tokens.

    Args:
        rule:
            best_worst: the best answer over the worst, the second best over the second worst, and so on.
            all: every pair (i, j) with score i above score j; of more than `pairs_per_prompt` a random subset.
            mu_minus_2sigma: the best answer over the one whose score is nearest to mean - 2 standard deviations: with
                many samples the worst of all is an outlier that is no longer worth learning from
                (https://arxiv.org/abs/2502.16825).
            random: random answers two by two, none in two pairs: what a data set of pairs is like.
            first_pit: the best answer over the worst ones, each cut behind the step that ruined it
                (https://arxiv.org/abs/2406.14532, algorithm 1); the caller cuts.
        pairs_per_prompt: at most.
        min_gap: least difference of the two scores.
        min_chosen: least score of the better answer.
    """

    rule: str = "best_worst"
    pairs_per_prompt: int = 1
    min_gap: float = 0.0
    min_chosen: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"pair_selection must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.pairs_per_prompt < 1 or not self.min_gap >= 0:
            raise ValueError(
                f"need pairs_per_prompt >= 1 and min_gap >= 0, got {self.pairs_per_prompt} and {self.min_gap}"
            )
        if self.rule == "mu_minus_2sigma" and self.pairs_per_prompt > 1:
            raise ValueError("mu_minus_2sigma gives one pair of a prompt; set pairs_per_prompt to 1")

    def most(self, n: int) -> int:
        """Pairs that the rule makes of `n` answers, at most."""
        return {"all": n * (n - 1) // 2, "first_pit": n - 1, "mu_minus_2sigma": 1}.get(self.rule, n // 2)

    def choose(
        self, scores: Sequence[float | None], answers: Sequence[Hashable], *, seed: int
    ) -> list[tuple[int, int]]:
        """Pairs of indices, the better answer first.

        Args:
            scores: of the answers to one prompt, None where not scored: such an answer is in no pair.
            answers: their tokens, or whatever is equal where they are.
            seed: of `random`, and of the subset of `all`.
        """
        known = [(score, i) for i, score in enumerate(scores) if score is not None]
        candidates = _CANDIDATES[self.rule](known, seed)
        by_index = {i: score for score, i in known}
        fit = [
            (i, j)
            for i, j in candidates
            if by_index[i] > by_index[j]
            and by_index[i] - by_index[j] >= self.min_gap
            and (self.min_chosen is None or by_index[i] >= self.min_chosen)
            and answers[i] != answers[j]
        ]
        return fit[: self.pairs_per_prompt]


Known = list[tuple[float, int]]
Candidates = list[tuple[int, int]]


def _best_worst(known: Known, seed: int) -> Candidates:
    ranked = [i for _, i in sorted(known, key=lambda pair: (-pair[0], pair[1]))]
    return [(ranked[k], ranked[-1 - k]) for k in range(len(ranked) // 2)]


def _all(known: Known, seed: int) -> Candidates:
    pairs = [_ordered(a, b) for a, b in combinations(known, 2)]
    return [pairs[k] for k in _permutation(len(pairs), seed)]


def _mu_minus_2sigma(known: Known, seed: int) -> Candidates:
    if not known:
        return []
    scores = [score for score, _ in known]
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    best = max(known, key=lambda pair: (pair[0], -pair[1]))
    worse = [pair for pair in known if pair[0] < best[0]]
    if not worse:
        return []
    return [(best[1], min(worse, key=lambda pair: (abs(pair[0] - (mean - 2 * deviation)), pair))[1])]


def _random(known: Known, seed: int) -> Candidates:
    order = [known[k] for k in _permutation(len(known), seed)]
    return [_ordered(a, b) for a, b in zip(order[::2], order[1::2], strict=False)]


def _first_pit(known: Known, seed: int) -> Candidates:
    ranked = [i for _, i in sorted(known, key=lambda pair: (-pair[0], pair[1]))]
    return [(ranked[0], worse) for worse in reversed(ranked[1:])]


def _ordered(a: tuple[float, int], b: tuple[float, int]) -> tuple[int, int]:
    return (a[1], b[1]) if a[0] >= b[0] else (b[1], a[1])


def _permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


_CANDIDATES = {
    "best_worst": _best_worst,
    "all": _all,
    "mu_minus_2sigma": _mu_minus_2sigma,
    "random": _random,
    "first_pit": _first_pit,
}
