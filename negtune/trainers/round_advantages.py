"""Scored completions of a round -> rows with the advantages of their steps.

Shapes: G prompts (groups), N completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from negtune.credit import Baseline, Scale, advantages, best_of_group, moving_average
from negtune.trainers.guards import warn_of_lost_penalty
from negtune.trainers.rounds import advantages_of_steps, behaviour_of


@dataclass
class AdvantageRows:
    """The `RowMaker` of `AdvantageTrainer`; see `AdvantageConfig`, whose fields these are."""

    num_generations: int
    baseline: Baseline | str
    scale: Scale | str
    decay: float
    best: bool
    min_reward: float | None
    outcome_weight: float
    step_weight: float
    step_scores: str
    signs: tuple[bool, bool] = (True, True)
    _warned: bool = False

    filler = {
        **{"prompt_ids": [0], "completion_ids": [0], "step_ends": [1], "step_advantages": [None]},
        "behaviour_logps": [0.0],
    }
    nothing = "no completion had an advantage other than 0"
    way_out = "Equal rewards within every group teach nothing: take easier or harder prompts, more num_generations"

    def credited(self, drawn: Sequence[Mapping[str, Any]], running: float | None) -> list[dict[str, Any]]:
        """Completions with the advantages of their steps; `signal`: whether their group has one that is trained on."""
        rewards, scored = self._rewards(drawn)
        outcome, known = self._outcomes(rewards, scored, running)
        rows = []
        for record, advantage, is_known in zip(
            drawn, outcome.flatten().tolist(), known.flatten().tolist(), strict=True
        ):
            steps = self._of_steps(record, advantage if is_known else None)
            rows.append({**record, "step_advantages": steps, "known": any(a is not None for a in steps)})
        up, down = self.signs
        tells = {row["group"] for row in rows if any((up and a > 0) or (down and a < 0) for a in _known(row))}
        return [{**row, "signal": row["group"] in tells} for row in rows]

    def rows(self, credited: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What batches are made of."""
        names = ("prompt_ids", "completion_ids", "step_ends", "step_advantages", "group", "key")
        return [
            {
                **{name: row[name] for name in names},
                **{"behaviour_logps": behaviour_of(row), "temperature": row["temperature"]},
            }
            for row in credited
            if row["known"]
        ]

    def moved(self, running: float | None, seen: Sequence[Mapping[str, Any]]) -> float | None:
        """The moving average after a round, all of its refills taken together."""
        if self.baseline != "moving_average":
            return running
        return moving_average(running, *self._rewards(seen), decay=self.decay)

    def metrics(self, seen: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Beside those of every round: none."""
        return {}

    def followed(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Positives, whose log-probability is watched from then on."""
        return [row for row in rows if max((a or 0) for a in row["step_advantages"]) > 0]

    def _outcomes(
        self, rewards: torch.Tensor, scored: torch.Tensor, running: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[G N]` advantages of whole completions, and which are known."""
        if self.best:
            best = best_of_group(rewards, scored, least=self.min_reward)
            return best.to(rewards), best
        if self.scale == "group" and not self._warned:
            self._warned = warn_of_lost_penalty(
                rewards[scored].tolist(), "scale_advantages=group", "Set scale_advantages to none"
            )
        moving = self.baseline == "moving_average"
        found = advantages(
            rewards,
            scored,
            baseline="none" if moving else self.baseline,
            scale=self.scale,
            running=(running or 0.0) if moving else None,
        )
        return found, scored

    def _rewards(self, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """`[G N]`, and which of them were scored."""
        scores = [row["score"] for row in rows]
        rewards = torch.tensor([0.0 if score is None else score for score in scores], dtype=torch.float64)
        scored = torch.tensor([score is not None for score in scores])
        return rewards.view(-1, self.num_generations), scored.view(-1, self.num_generations)

    def _of_steps(self, record: Mapping[str, Any], outcome: float | None) -> list[float | None]:
        """Advantage of every step: outcome_weight x that of the completion + step_weight x its own; None if one is."""
        if outcome is None:
            return [None] * len(record["step_ends"])
        scores = record["step_scores"]
        if scores is None:
            return [self.outcome_weight * outcome] * len(record["step_ends"])
        scores = advantages_of_steps(scores, len(record["step_ends"]), self.step_scores)
        return [None if a is None else self.outcome_weight * outcome + self.step_weight * a for a in scores]


def _known(row: Mapping[str, Any]) -> list[float]:
    return [advantage for advantage in row["step_advantages"] if advantage is not None]
