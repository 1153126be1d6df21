"""A reference that follows the policy: its weights are an exponential moving average of the policy's.

TR-DPO's soft update, ref <- decay ref + (1 - decay) policy, and with decay 0 its hard update
(https://arxiv.org/abs/2404.09656). Under an adapter the reference is a twin of it, and what is averaged are the
adapter's own matrices: the average of A and of B, not of their product. A decay of 0 is exact either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from negtune.models.forward import ScoredTokens
from negtune.models.policy import is_peft
from negtune.models.reference import REFERENCE_ADAPTER, FrozenCopy, Reference, freeze_current_adapter
from negtune.models.structure import unwrapped
from negtune.ops import Head


class MovingReference:
    """A twin of what is trained: of the adapter where there is one (a small one), else of the whole model.

    Args:
        model: the policy before its first update; what it is now is what the average starts from.
        decay: share of itself that the reference keeps at an update, 0 (it becomes the policy) to below 1.

    Raises:
        ValueError: a decay out of range.
    """

    has_hidden = True

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"reference_decay must be at least 0 and below 1, got {decay}; leave it out for a fixed one"
            )
        self.decay = decay
        self._averages: dict[int, Tensor] = {}  # of weights in half precision, whose small steps would be rounded away
        self._inner: Reference = freeze_current_adapter(model) if is_peft(model) else FrozenCopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step towards what the policy is now."""
        for i, (mine, policys) in enumerate(self._pairs(model)):
            average = self._average(i, mine)
            average.lerp_(policys.to(average), 1 - self.decay)
            if average is not mine:
                mine.copy_(average)

    def _average(self, i: int, mine: Tensor) -> Tensor:
        if mine.dtype not in (torch.bfloat16, torch.float16):
            return mine
        return self._averages.setdefault(i, mine.float())

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        return self._inner.logps(model, batch)

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> tuple[Float[Tensor, "N H"], Head]:
        return self._inner.hidden(model, batch, tokens, layer)

    def save(self, model: nn.Module, path: str | os.PathLike) -> None:
        """The reference's own weights, for `load`."""
        path = Path(path)
        partial = path.with_suffix(".partial")
        averages = [self._average(i, mine) for i, (mine, _) in enumerate(self._pairs(model))]
        save_file({str(i): average.contiguous().clone() for i, average in enumerate(averages)}, partial)
        os.replace(partial, path)

    @torch.no_grad()
    def load(self, model: nn.Module, path: str | os.PathLike) -> None:
        """Weights that `save` wrote."""
        saved = load_file(path)
        pairs = list(self._pairs(model))
        if len(saved) != len(pairs):
            raise ValueError(f"{path} has {len(saved)} tensors, the reference {len(pairs)}: it is of another model")
        for i, (mine, _) in enumerate(pairs):
            self._average(i, mine).copy_(saved[str(i)])
            mine.copy_(saved[str(i)])

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of the reference that can move, and the policy's."""
        model = unwrapped(model)
        if isinstance(self._inner, FrozenCopy):
            for (_, mine), (_, policys) in zip(
                self._inner.model.named_parameters(), model.named_parameters(), strict=True
            ):
                if policys.requires_grad:
                    yield mine, policys
            return
        parameters = dict(model.named_parameters())
        for name, mine in parameters.items():
            if f".{REFERENCE_ADAPTER}." in name or name.endswith(f".{REFERENCE_ADAPTER}"):
                yield mine, parameters[name.replace(REFERENCE_ADAPTER, model.active_adapter)]
