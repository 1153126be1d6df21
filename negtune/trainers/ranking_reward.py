"""Black boxes that score whole rankings, and queries that they cannot score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negtune.data.candidates import COUNTED, LEFT_OUT

RankingReward = Callable[..., Sequence[float | None]]
"""`(queries, rankings, **columns) -> rewards`: texts of the first k documents, best first, for each query; columns of
the data set, one value for each. None: could not be scored."""


class RewardOfPlaces:
    """A user's reward function as `losses.ranking` wants it: of places in the lists of rows, `[N B k]` to `[N B]`."""

    def __init__(self, reward_fn: RankingReward) -> None:
        self.reward_fn = reward_fn

    def __call__(self, rankings: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        samples, queries, _ = rankings.shape
        flat = [rows[q] for _ in range(samples) for q in range(queries)]
        ordered = [
            [row["documents"][d] for d in places if d < len(row["documents"])]
            for row, places in zip(flat, rankings.flatten(0, 1).tolist(), strict=True)
        ]
        columns = {
            name: [row[name] for row in flat] for name in flat[0] if name not in ("query", "row", COUNTED, LEFT_OUT)
        }
        rewards = self.reward_fn([row["query"] for row in flat], ordered, **columns)
        if not isinstance(rewards, Sequence | Tensor):
            raise ValueError(f"reward_fn must return a list of one reward a ranking, got {type(rewards).__name__}")
        if len(rewards) != len(flat):
            raise ValueError(f"reward_fn got {len(flat)} rankings and returned {len(rewards)} rewards")
        numbers = [float("nan") if reward is None else float(reward) for reward in rewards]
        return torch.tensor(numbers).view(samples, queries)


def leave_out_unscored(trainer: Any, counted: int, loss: Tensor) -> Tensor | float:
    """Make the gradients of an optimiser step a mean over the queries that were scored.

    Which ones could not be is known behind the last micro-batch only.

    Args:
        trainer: with its gradients; its `loss` knows the unscored queries of this process.
        counted: queries that the mean was taken over, of all processes.
        loss: of the step, of this process.

    Returns:
        What the loss lacks.
    """
    found = torch.tensor(trainer.loss.take_unscored(), device=trainer.args.device)
    unscored = int(trainer.accelerator.reduce(found, "sum"))
    if not unscored:
        return 0.0
    if unscored == counted:
        trainer.step_is_empty = True
        trainer.metric_sums.add_ratio("steps/empty", 1, 0)  # the step is counted already
        step = trainer.state.global_step + 1
        trainer.loss.tell("unscored", f"no query of step {step} could be scored: it moves nothing. Mend reward_fn")
        return 0.0
    if trainer.is_deepspeed_enabled:  # its step is behind us
        text = "under DeepSpeed queries that could not be scored stay in the mean, as if they said nothing"
        trainer.loss.tell("diluted", text)
        return 0.0
    factor = counted / (counted - unscored)
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return loss * (factor - 1)
