"""The frozen reference policy as one callable: adapter off, named adapter, frozen copy, or log-probs from disk.

A trainer calls `reference.logps(model, batch)` and, for the few objectives that compare whole distributions or
activations, `reference.hidden(model, batch, tokens, layer)`; it never asks which kind it holds. References run before
the policy's forward and leave the model as they found it.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from negtune.models.forward import (
    ScoredTokens,
    attach_scoring,
    completion_hidden,
    completion_logps,
    head_of,
    scored_tokens,
)
from negtune.models.structure import causal_lm, eval_mode, unwrapped
from negtune.ops import Head

REFERENCE_ADAPTER = "negtune_reference"


@runtime_checkable
class Reference(Protocol):
    """What the policy is compared with."""

    has_hidden: bool

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        """Reference log-probabilities of the completion tokens of `batch`, 0 behind the mask, without gradient."""
        ...

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> tuple[Float[Tensor, "N H"], Head]:
        """Reference hidden states that predict the scored tokens and the head that turns them into logits; with `layer`
        that layer's output at the scored tokens instead."""
        ...


class AdapterReference:
    """The policy's own base weights: all adapters off, or another (frozen) adapter on. No second model in memory.

    Args:
        adapter: name of the reference adapter; None switches adapters off.
    """

    has_hidden = True

    def __init__(self, adapter: str | None = None) -> None:
        self.adapter = adapter

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        with torch.no_grad(), self._active(model):
            return completion_logps(model, batch)

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> tuple[Float[Tensor, "N H"], Head]:
        with self._active(model):
            hidden = completion_hidden(model, batch, tokens, layer)
        lm = causal_lm(model)
        return hidden, head_of(lm, self._head_module(lm.get_output_embeddings()))

    def _head_module(self, module: nn.Module) -> nn.Module:
        """A head trained through `modules_to_save` keeps its frozen twin beside it."""
        if not hasattr(module, "modules_to_save"):
            return module
        return module.modules_to_save[self.adapter] if self.adapter else module.original_module

    @contextmanager
    def _active(self, model: nn.Module) -> Iterator[None]:
        peft_model = _peft_model(model)
        with eval_mode(model), trainability_kept(model):
            if self.adapter is None:
                with peft_model.disable_adapter():
                    yield
                return
            policy = peft_model.active_adapter
            peft_model.set_adapter(self.adapter, inference_mode=True)
            try:
                yield
            finally:
                peft_model.set_adapter(policy)


class FrozenCopy:
    """A second model, in evaluation mode, without gradients: twice the weights in memory.

    Args:
        model: the policy, which is copied, or another model, which is taken as it is with `own=True`.
    """

    has_hidden = True

    def __init__(self, model: nn.Module, *, own: bool = False) -> None:
        self.model = (model if own else copy.deepcopy(model)).eval().requires_grad_(False)
        lm = causal_lm(self.model)
        if hasattr(lm, "_scores_for"):
            del lm.forward, lm._scores_for
        attach_scoring(self.model)

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        self._follow(model)
        with torch.no_grad():
            return completion_logps(self.model, batch)

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> tuple[Float[Tensor, "N H"], Head]:
        self._follow(model)
        return completion_hidden(self.model, batch, tokens, layer), head_of(causal_lm(self.model))

    def _follow(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)


class CachedReference:
    """Per-token log-probabilities read from a file written by `CachedReference.build`; no reference model at all.

    Serves objectives that read log-probabilities only. Rows are found by the content hash of their token ids, so the
    file serves any order, batch size, number of processes and every later run with the same rows and weights.

    Args:
        path: `.safetensors` file.
    """

    has_hidden = False

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._file = safe_open(self.path, framework="pt")
        keys, offsets = self._file.get_tensor("keys").tolist(), self._file.get_tensor("offsets").tolist()
        self._spans = {key: (offsets[i], offsets[i + 1]) for i, key in enumerate(keys)}
        self._values = self._file.get_slice("logps")

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        mask = scored_tokens(batch).mask
        out = torch.zeros(mask.shape, dtype=torch.float32)
        for i, (key, length) in enumerate(
            zip(batch["keys"].tolist(), batch["completion_lengths"].tolist(), strict=True)
        ):
            start, stop = self._span(key)
            if stop - start != length:
                raise ValueError(f"{self.path}: row {key} has {stop - start} cached log-probabilities, not {length}")
            out[i, :length] = self._values[start:stop]
        return out.to(batch["input_ids"].device)

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> Any:
        raise NotImplementedError("cached log-probabilities cannot serve whole distributions or activations")

    def _span(self, key: int) -> tuple[int, int]:
        if key not in self._spans:
            raise KeyError(
                f"{self.path} has no reference log-probabilities for a row of this batch (content hash {key}). If the "
                "data changed after the cache was built, delete the file and start again; rows that were not there at "
                "construction need reference=adapter or copy"
            )
        return self._spans[key]

    @classmethod
    def build(
        cls,
        path: str | os.PathLike,
        reference: Reference,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
    ) -> CachedReference:
        """Write the log-probabilities of all rows in `batches` under `reference` to `path` (atomically) and open it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        spans: dict[int, Tensor] = {}
        for batch in batches:
            logps = reference.logps(model, batch).float().cpu()
            for key, length, row in zip(
                batch["keys"].tolist(), batch["completion_lengths"].tolist(), logps, strict=True
            ):
                spans[key] = row[:length].clone()
        lengths = torch.tensor([0, *(len(v) for v in spans.values())])
        tensors = {
            "keys": torch.tensor(list(spans), dtype=torch.long),
            "offsets": lengths.cumsum(0),
            "logps": torch.cat(list(spans.values())) if spans else torch.zeros(0),
        }
        partial_path = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial_path)
        os.replace(partial_path, path)
        return cls(path)


class PolicyReference:
    """The policy as it stands, in evaluation mode: what a cache is built from before the first update."""

    has_hidden = True

    def logps(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "B T"]:
        with torch.no_grad(), eval_mode(model):
            return completion_logps(model, batch)

    def hidden(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: ScoredTokens, layer: int | None = None
    ) -> tuple[Float[Tensor, "N H"], Head]:
        with eval_mode(model):
            return completion_hidden(model, batch, tokens, layer), head_of(causal_lm(model))


def freeze_current_adapter(model: nn.Module) -> AdapterReference:
    """Reference for a `PeftModel` that arrives with a live adapter: a frozen twin of that adapter.

    Switching adapters off would compare with the base model instead of the fine-tuned one. The twin is kept out of
    `save_pretrained`: in unlearning it holds exactly what was to be forgotten.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    peft_model = _peft_model(model)
    policy = peft_model.active_adapter
    if policy == REFERENCE_ADAPTER:
        raise ValueError(f"{REFERENCE_ADAPTER!r} is the name of the frozen twin; give the trained adapter another name")
    if REFERENCE_ADAPTER in peft_model.peft_config:  # of an earlier run on the same model
        peft_model.delete_adapter(REFERENCE_ADAPTER)
    config = copy.deepcopy(peft_model.peft_config[policy])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA, OLoRA and their like would rewrite the base weights a second time
    state = get_peft_model_state_dict(peft_model, adapter_name=policy)
    with trainability_kept(peft_model):
        peft_model.add_adapter(REFERENCE_ADAPTER, config)
        set_peft_model_state_dict(
            peft_model, {k: v.detach().clone() for k, v in state.items()}, adapter_name=REFERENCE_ADAPTER
        )
        peft_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        peft_model.set_adapter(policy)
    original_save = peft_model.save_pretrained

    def save_without_reference(save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("selected_adapters", [policy])
        return original_save(save_directory, *args, **kwargs)

    peft_model.save_pretrained = save_without_reference
    return AdapterReference(REFERENCE_ADAPTER)


def weights_hash(model: nn.Module, include: Any = None) -> str:
    """SHA-256 over names, dtypes and bytes of the state dict; `include(name)` selects. Equal weights, equal hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or (include is not None and not include(name)):
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.dim() else tensor.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` afterwards: PEFT switches it on for a whole adapter whenever it activates one."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _peft_model(model: nn.Module) -> Any:
    """The PeftModel inside DDP, FSDP1 and `torch.compile` wrappers."""
    model = unwrapped(model)
    if not hasattr(model, "peft_config"):
        raise ValueError("adapter reference needs a PEFT model; use a frozen copy or cached log-probabilities")
    return model
