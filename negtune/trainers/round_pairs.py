"""Scored completions of a round -> pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

from negtune.data.pair_selection import PairSelection
from negtune.trainers.rounds import behaviour_of

PairRow = dict[str, Any]


@dataclass
class PairRows:
    """The `RowMaker` of `PreferenceTrainer`.

    Args:
        selection: which completions of a prompt become pairs.
        step_scores: what step credit gives, `rewards` or `values`; for the rule first_pit.
        seed: of rules that draw.
    """

    selection: PairSelection
    step_scores: str
    seed: int

    filler = {
        **{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0], "filler": True},
        **{"chosen_behaviour": [0.0], "rejected_behaviour": [0.0], "chosen_ref": [0.0], "rejected_ref": [0.0]},
    }
    nothing = "no two completions of a prompt made a pair"
    way_out = (
        "Equal scores are ties and teach nothing, nor do answers of the same tokens: take easier or harder prompts, "
        "more num_generations, a higher temperature, a smaller min_gap or min_chosen"
    )

    def credited(self, drawn: Sequence[Mapping[str, Any]], running: float | None) -> list[dict[str, Any]]:
        """Completions; the first of every group carries the pairs of its group."""
        found = []
        for group in _groups(drawn):
            pairs = self._pairs(group)
            found += [{**row, "signal": bool(pairs), "pairs": pairs if i == 0 else []} for i, row in enumerate(group)]
        return found

    def rows(self, credited: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Pairs."""
        return [pair for row in credited for pair in row["pairs"]]

    def moved(self, running: float | None, seen: Sequence[Mapping[str, Any]]) -> float | None:
        """There is no baseline."""
        return running

    def metrics(self, seen: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Pairs, ties (groups with scores of which no two differ in score and in tokens), and how far apart the two
        sides are."""
        groups = list(_groups(seen))
        known = [[row for row in group if row["score"] is not None] for group in groups]
        found = {
            "rounds/pairs": float(len(rows)),
            "rounds/ties": sum(len(group) > 1 and _tied(group) for group in known) / len(groups),
        }
        for name in ("gap", "chosen_score", "rejected_score") if rows else ():
            found[f"rounds/{name}"] = sum(row[name] for row in rows) / len(rows)
        return found

    def followed(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """All pairs."""
        return list(rows)

    def _pairs(self, group: Sequence[Mapping[str, Any]]) -> list[PairRow]:
        scores = [row["score"] for row in group]
        if self.selection.rule == "first_pit":  # a worse completion without a pit can be cut nowhere
            top = max((score for score in scores if score is not None), default=None)
            has_pit = [_pit(row, self.step_scores) > 0 for row in group]
            scores = [s if s == top or pit else None for s, pit in zip(scores, has_pit, strict=True)]
        answers = [tuple(row["completion_ids"]) for row in group]
        chosen = self.selection.choose(scores, answers, seed=self.seed * 1_000_003 + group[0]["group"])
        return [self._pair(group[i], group[j]) for i, j in chosen]

    def _pair(self, better: Mapping[str, Any], worse: Mapping[str, Any]) -> PairRow:
        end = len(worse["completion_ids"])
        if self.selection.rule == "first_pit":
            end = worse["step_ends"][_pit(worse, self.step_scores) - 1]
        behaviour = {"chosen_behaviour": behaviour_of(better), "rejected_behaviour": behaviour_of(worse)}
        if behaviour["rejected_behaviour"] is not None:
            behaviour["rejected_behaviour"] = behaviour["rejected_behaviour"][:end]
        return {
            **{"prompt_ids": better["prompt_ids"], "group": better["group"]},
            **{"chosen_ids": better["completion_ids"], "rejected_ids": worse["completion_ids"][:end]},
            **{"key": f"{better['key']}:{worse['key']}", "temperature": better["temperature"], **behaviour},
            **{"chosen_score": better["score"], "rejected_score": worse["score"]},
            "gap": better["score"] - worse["score"],
        }


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row["group"])]


def _tied(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no two of these answers could be a pair."""
    return all(a["score"] == b["score"] or a["completion_ids"] == b["completion_ids"] for a, b in combinations(rows, 2))


def _pit(row: Mapping[str, Any], kind: str) -> int:
    """The step, from 1, that ruined a completion: the first with a negative reward, or with the lowest value if that is
    below the first value known; 0: none was judged to be."""
    scores = row["step_scores"]
    if scores is None:
        return 0
    steps = len(row["step_ends"])
    if kind == "values":
        bare = len(scores) - steps  # 1 if the value of the bare prompt comes first
        known = [(value, i) for i, value in enumerate(scores, start=1 - bare) if value is not None]
        return min(known)[1] if known and min(known)[0] < known[0][0] else 0
    return next((i for i, score in enumerate(scores, start=1) if score is not None and score < 0), 0)
