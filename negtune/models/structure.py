"""Finding the parts of a transformers causal LM under whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers or PEFT model inside DDP/FSDP1 (`.module`) and `torch.compile` wrappers."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP/FSDP1, `torch.compile` and PEFT wrappers."""
    while True:
        model = unwrapped(model)
        if not hasattr(model, "get_base_model"):
            return model
        model = model.get_base_model()


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, in order.

    Raises:
        ValueError: no list of modules has as many entries as the config has layers.
    """
    count = lm.config.get_text_config().num_hidden_layers
    found = [m for m in lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"{type(lm).__name__} keeps its {count} decoder layers in no list; they cannot be found")
    return found[0]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, _ in modes:
            module.training = True
