"""What the models of CET learn from a batch of lists, once their documents have weights or soft labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from negtune.losses.debiased import soft_labels, weighed_pairs
from negtune.retrieval.losses import RankingLoss

LEVEL_RATE, LEVEL_MOST = 0.25, 0.5
"""Of a Newton step of the level, the part that is taken, and the most."""


class Level(nn.Module):
    """What is added to scores to make them log-odds: the intercept of `em_relevance`, fitted beside the ranker.

    It has no part in gradients. Scores of a ranker that is trained on pairs move by several units within a few steps,
    and a level that an optimiser moves stays behind them; Newton's steps do not.
    """

    bias: Tensor

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor(bias))

    def move(self, lacking: float, slope: float) -> None:
        """Part of a Newton step.

        Args:
            lacking: sum of P(relevant) of the targets minus sigmoid(score + level).
            slope: sum of the variances r (1 - r).
        """
        step = LEVEL_RATE * lacking / max(slope, 1e-12)
        self.bias += min(max(step, -LEVEL_MOST), LEVEL_MOST)


class CoupledObjective:
    """Of either model: weighed pairs, or cross-entropy with soft labels.

    Args:
        soft: which of the two.

    Attributes:
        level: added to scores, for soft labels.
        weigh: called with the scores, detached, 0 for padding; gives `weights` or `targets`, instead of those passed.
    """

    def __init__(self, *, soft: bool) -> None:
        self.soft = soft
        self.level: Level | None = None
        self.weigh: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def __call__(
        self,
        scores: Tensor,
        gains: Tensor,
        mask: Tensor,
        *,
        weights: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Without weights all weigh the same, without targets labels are taken as they are."""
        if self.weigh is not None:
            said = self.weigh(scores.detach().masked_fill(~mask, 0.0))
            weights, targets = said.get("weights"), said.get("targets")
        if not self.soft:
            return weighed_pairs(scores, gains, mask, weights=torch.ones_like(scores) if weights is None else weights)
        shifted = scores if self.level is None else scores + self.level.bias
        return soft_labels(shifted, gains, mask, targets=(gains > 0).to(scores) if targets is None else targets)

    @contextmanager
    def weighed_by(self, weigh: Callable[[Tensor], Mapping[str, Tensor]]) -> Iterator[None]:
        """With this `weigh`."""
        self.weigh = weigh
        try:
            yield
        finally:
            self.weigh = None


class CoupledLoss(RankingLoss):
    """`RankingLoss` of a `CoupledObjective`, as the host's model card shows it."""

    def get_config_dict(self) -> dict[str, Any]:
        found = super().get_config_dict()
        return {**found, "loss_type": "expectation-maximisation" if self.objective.soft else "weighed pairs"}

    @property
    def citation(self) -> str:
        return (
            "@inproceedings{cai2022hard,\n"
            "    title={Hard Negatives or False Negatives: Correcting Pooling Bias in Training Neural Ranking "
            "Models},\n"
            "    author={Yinqiong Cai and Jiafeng Guo and Yixing Fan and Qingyao Ai and Ruqing Zhang and "
            "Xueqi Cheng},\n"
            "    booktitle={Proceedings of CIKM},\n    year={2022},\n    eprint={2209.05072},\n"
            "    archivePrefix={arXiv}\n}"
        )
