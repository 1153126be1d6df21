"""What the two models of CET make of the documents of a step: weights or targets for each other's loss.

Shapes: B queries of a micro-batch, D documents of the longest list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negtune.losses.debiased import cet_weights, pair_means, relevance_targets, selection_targets
from negtune.losses.ranking import sides
from negtune.trainers.coupled_config import KNOWN, CoupledConfig
from negtune.trainers.list_training import lists_of
from negtune.trainers.progress import MetricSums


def opinions(
    batch: Mapping[str, Any],
    scores: Tensor,
    selection: Tensor | None,
    args: CoupledConfig,
    *,
    level: Tensor | None,
    uniform: bool,
    trained: bool,
) -> dict[str, Any]:
    """Of a micro-batch, by its scores.

    Args:
        batch: with `lists` and `provenance`.
        scores: of the ranker, [B, D].
        selection: logits of selection, [B, D]; None where nothing is known of it.
        args: the mode and its settings.
        level: added to scores where they are log-odds.
        uniform: in warm-up, all weigh the same.
        trained: whether there is a selection model to teach.

    Returns:
        `relevance` and, where it is trained, `selection`: what the objectives take; `level`: what moves it, [2].
    """
    lists, provenance = lists_of(batch), batch["provenance"]
    gains, mask, judged = lists.gains, lists.mask, provenance["judged"]
    relevance = scores if level is None else scores + level
    labels, seen = (gains > 0).to(scores), ((gains > 0) | judged).to(scores)
    hoped = labels if uniform or selection is None else relevance_targets(gains, judged, relevance, selection)
    found: dict[str, Any] = {}
    if args.mode == "em":
        found["relevance"] = {"targets": hoped}
    elif uniform:
        found["relevance"] = {"weights": torch.ones_like(scores)}
    else:
        known = provenance["propensities"] if args.mode in KNOWN else None
        settings = {"judged": judged, "mode": args.mode, "temperature": args.temperature, "clip": args.clip}
        other = None if args.mode in KNOWN else selection
        weights = cet_weights(relevance, gains, mask, selection=other, propensities=known, **settings)
        found["relevance"] = {"weights": weights}
    if trained and args.mode == "official":
        weights = cet_weights(selection, gains, mask, selection=scores, temperature=args.temperature)
        found["selection"] = {"weights": torch.ones_like(scores) if uniform else weights}
    elif trained:
        targets = seen if uniform else selection_targets(gains, judged, relevance, selection)
        found["selection"] = {"targets": targets}
    r = torch.sigmoid(relevance[mask].double())
    found["level"] = torch.stack([(hoped[mask] - r).sum(), (r * (1 - r)).sum()])
    return found


def normalize(
    found: Sequence[tuple[Mapping[str, Tensor], dict[str, Tensor]]], reduce: Callable[[Tensor], Tensor]
) -> None:
    """Divide the weights of a step by their mean over the pairs, as the loss counts them, in place.

    Args:
        found: lists and opinion of one side, for each micro-batch.
        reduce: sums over the processes.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for lists, opinion in found:
        relevant, irrelevant = sides(lists["gains"], lists["mask"])
        both = (relevant.any(-1) & irrelevant.any(-1)).sum()
        means = pair_means(opinion["weights"].double(), lists["gains"], lists["mask"])
        total = total.to(means) + torch.stack([means.sum(), both.double()])
    means, both = reduce(total).tolist()
    if means > 0:
        for _, opinion in found:
            opinion["weights"] = opinion["weights"] / (means / both) ** 0.5  # of a pair, two


def add_weights(sums: MetricSums, lists: Mapping[str, Any], judged: Tensor) -> None:
    """Metrics `weight/positive`, `weight/negative` and quantiles; with targets `hidden/probability`, of what nobody
    judged."""
    relevant, irrelevant = sides(lists["gains"], lists["mask"])
    if "targets" in lists["more"]:
        sums.add("hidden/probability", lists["more"]["targets"][irrelevant & ~judged])
        return
    sums.add("weight/positive", lists["more"]["weights"][relevant])
    sums.add("weight/negative", lists["more"]["weights"][irrelevant])
    sums.add_quantiles("weight/negative", lists["more"]["weights"][irrelevant])
