"""Likelihood displacement, measured: what happens to the chosen answers while the rejected ones are pushed down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from negtune.data.preference import PAIR
from negtune.metrics.preference import ches
from negtune.models.forward import completion_logps, completion_logps_and_hidden
from negtune.models.structure import eval_mode, unwrapped
from negtune.trainers.progress import MetricSums


class FollowedPairs:
    """The same few pairs, from the first step on: a batch's numbers hide the drift behind other rows.

    Args:
        start: log-probability of each chosen and rejected answer when they were first measured; None until then.
    """

    def __init__(self) -> None:
        self.start: list[list[float]] | None = None

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], sums: MetricSums, *, logged: bool = True) -> None:
        """Adds `chosen/drift` and `rejected/drift` (nats a token since the first measurement), `drift/margin` (nats by
        which the two moved apart) and `ches` (length-normalised, as it is now).

        Args:
            model: the policy.
            batch: as `collate_pairs` makes it, of the same pairs every time.
            sums: gets the metrics.
            logged: false where only the start is wanted: its drift of 0 would be averaged with the next one.
        """
        model = unwrapped(model)
        with eval_mode(model):
            logps, hidden = completion_logps_and_hidden(model, batch)
        lengths, now = batch["completion_lengths"].chunk(2), logps.double().sum(-1).chunk(2)
        if self.start is None:
            self.start = [list(pair) for pair in zip(*(side.tolist() for side in now), strict=True)]
        if not logged:
            return
        start = torch.tensor(self.start, dtype=torch.float64, device=logps.device)
        moved = [side - start[:, i] for i, side in enumerate(now)]
        for side, change, tokens in zip(PAIR, moved, lengths, strict=True):
            sums.add(f"{side}/drift", change / tokens)
        sums.add("drift/margin", moved[0] - moved[1])
        sums.add("ches", ches(*hidden.chunk(2), *lengths))


def evenly_spaced(rows: Any, n: int) -> list[Mapping[str, Any]]:
    """`n` rows of a data set, or all if there are fewer; none of a stream."""
    if not n or not hasattr(rows, "__len__"):
        return []
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // n))][:n]


def measure_gradients(model: nn.Module, batch: Mapping[str, Tensor], sums: MetricSums) -> None:
    """Adds the norms of the gradients g_w, g_l of the mean log-probability of chosen and rejected answers, their
    cosine, and `grad_push` = 1 - <g_w, g_l>/|g_w|^2.

    Raising the one side and lowering the other alike moves the chosen answers by that share of what raising them alone
    would; below 0 they fall (gradient entanglement, https://arxiv.org/abs/2410.13828). In passes of their own without
    dropout and without random numbers, so that the training step is what it would be without.
    """
    if not batch["counted"].any():
        return
    model = unwrapped(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        sides = completion_logps(model, batch).sum(-1).chunk(2)
        means = [logps[batch["counted"]].mean() for logps in sides]
        chosen = torch.autograd.grad(means[0], parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rejected = torch.autograd.grad(means[1], parameters, allow_unused=True, materialize_grads=True)
    sums.add_gradients({"chosen": chosen, "rejected": rejected})
    square = _inner(chosen, chosen)
    if square > 0:
        sums.add_ratio("grad_push", 1 - _inner(chosen, rejected) / square, 1)


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float(torch.vdot(x.flatten().float(), y.flatten().float())) for x, y in zip(a, b, strict=True))
