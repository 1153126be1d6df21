"""A judge that compares two answers, as a verifier: the score of an answer is how often it wins.

A judge sees a prompt and two answers and says which is better. Of N answers to a prompt every two are compared, in both
orders, since judges (people, and language models more so) prefer what stands first, or last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from typing import Any

from negtune.verifiers.verdict import Completion, Verdict, accepted

Judge = Callable[..., Sequence[float | None]]
"""`(prompts, completions, **columns)`: for each prompt and `[first, second]` 0 where the first is better, 1 where the
second is, between the two for a chance or a tie; None (or -1, as in TRL's judges) where it cannot tell. Of the data's
columns it gets those that it takes."""


class JudgeVerifier:
    """Scores the completions of a prompt by comparing them with each other.

    The score is the mean over the others of the chance to win, 0 to 1, so it says nothing beyond its prompt; `correct`
    means at least half. A completion none of whose comparisons succeeded is unscored; one that is alone gets 0.5.

    Args:
        judge: see `Judge`.
        both_orders: ask twice, with the two answers swapped, and take the mean.
    """

    compares = True

    def __init__(self, judge: Judge, *, both_orders: bool = True) -> None:
        self.judge, self.both_orders = judge, both_orders

    def verify(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Any = None,
        group_numbers: Sequence[int] | None = None,
        **columns: Any,
    ) -> list[Verdict]:
        """Completions to compare have to stand one after the other: those of a prompt, or of a group number if given.

        Token ids are of one answer, and not passed on.
        """
        start = time.perf_counter()
        groups = _groups(prompts if group_numbers is None else group_numbers)
        asked = [pair for group in groups for pair in combinations(group, 2)]
        if self.both_orders:
            asked += [(j, i) for i, j in asked]
        wins: list[list[float]] = [[] for _ in prompts]
        for (i, j), found in zip(asked, self._ask(asked, prompts, completions, columns), strict=True):
            if found is not None:
                wins[i].append(1 - found)
                wins[j].append(found)
        seconds = (time.perf_counter() - start) / max(1, len(prompts))
        alone = {group[0] for group in groups if len(group) == 1}
        return [_verdict([0.5] if i in alone else won, seconds) for i, won in enumerate(wins)]

    def _ask(
        self,
        asked: Sequence[tuple[int, int]],
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        columns: dict[str, Sequence[Any]],
    ) -> list[float | None]:
        if not asked:
            return []
        found = self.judge(
            [prompts[i] for i, _ in asked],
            [[completions[i], completions[j]] for i, j in asked],
            **accepted(self.judge, {name: [values[i] for i, _ in asked] for name, values in columns.items()}),
        )
        if not hasattr(found, "__len__") or len(found) != len(asked):
            given = len(found) if hasattr(found, "__len__") else repr(found)
            raise ValueError(f"the judge gave {given} answers to {len(asked)} questions; give one for each")
        return [_checked(answer) for answer in found]


def _groups(names: Sequence[Any]) -> list[list[int]]:
    numbered = groupby(range(len(names)), key=lambda i: names[i])
    return [list(group) for _, group in numbered]


def _checked(answer: float | None) -> float | None:
    if answer is None or answer == -1:
        return None
    if not 0 <= answer <= 1:
        raise ValueError(
            f"a judge says 0 (the first is better), 1 (the second), a number between, or None, got {answer!r}"
        )
    return float(answer)


def _verdict(won: Sequence[float], seconds: float) -> Verdict:
    if not won:
        return Verdict("unscored", reason="no comparison succeeded", seconds=seconds)
    score = sum(won) / len(won)
    return Verdict("correct" if score >= 0.5 else "wrong", score, f"won {score:.2f} of {len(won)} comparisons", seconds)
