"""Which reference a trainer compares its policy with: chosen once, at construction; afterwards nobody asks its kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from negtune.data.batching import longest_first
from negtune.data.completions import collate, content_key, padding_id
from negtune.models.policy import is_peft, on_device, sharded_at_load
from negtune.models.reference import (
    AdapterReference,
    CachedReference,
    FrozenCopy,
    PolicyReference,
    Reference,
    freeze_current_adapter,
    weights_hash,
)
from negtune.ops import Needs


@dataclass(frozen=True)
class LogpCache:
    """Reference log-probabilities of a training set, kept in a file that later runs with equal rows and weights reuse.

    Args:
        folder: where the files lie, one per combination of rows, weights, adapter settings and precision.
        rows: the tokenised rows, read once.
        batch_size: rows per forward while the file is made.
        pad_token_id: fills shorter rows.
        accelerator: device, precision and process group; the main process makes the file, the others wait for it.
    """

    folder: Path
    rows: Callable[[], Iterable[Mapping[str, Any]]]
    batch_size: int
    pad_token_id: int
    accelerator: Any

    @classmethod
    def for_trainer(cls, trainer: Any, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> LogpCache:
        """The cache where a trainer's settings put it, by default under its output folder."""
        args = trainer.args
        return cls(
            folder=Path(args.reference_cache_dir or Path(args.output_dir) / "reference_cache"),
            rows=rows,
            batch_size=args.per_device_eval_batch_size,
            pad_token_id=padding_id(trainer.processing_class),
            accelerator=trainer.accelerator,
        )

    def of(self, reference: Reference, model: nn.Module, *, only_base: bool) -> CachedReference:
        """The file for `reference`, made if it is missing. `only_base`: the adapter plays no part in what it says."""
        rows = list(self.rows())
        path = self.folder / f"{self._name(rows, model, only_base):016x}.safetensors"
        with self.accelerator.main_process_first():
            if not path.exists():
                with on_device(model, self.accelerator.device):
                    return CachedReference.build(path, reference, model, self._batches(rows))
        return CachedReference(path)

    def _name(self, rows: Sequence[Mapping[str, Any]], model: nn.Module, only_base: bool) -> int:
        """Hash of everything that decides the log-probabilities; exact, unlike torch's own hash of a tensor."""
        adapter = model.active_adapter if only_base else None
        weights = weights_hash(model, lambda name: adapter is None or f".{adapter}." not in f".{name}.")
        keys = sorted({content_key(row["prompt_ids"], row["completion_ids"]) for row in rows})
        configs = [model.config.to_json_string(), self.accelerator.mixed_precision]
        configs += [str(config) for config in getattr(model, "peft_config", {}).values() if not only_base]
        precise = hashlib.sha256(repr([weights, *configs]).encode()).hexdigest()
        return content_key(keys, [int(precise[:15], 16)])

    def _batches(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Tensor]]:
        order = longest_first(rows)
        for start in range(0, len(order), self.batch_size):
            batch = collate([rows[i] for i in order[start : start + self.batch_size]], self.pad_token_id)
            yield {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}


def choose_reference(
    kind: str,
    model: nn.Module,
    needs: Sequence[Needs],
    *,
    arrived_with_adapter: bool,
    cache: LogpCache | None,
    given: Reference | nn.Module | None = None,
) -> Reference | None:
    """The reference that objectives with these `needs` are compared with; None if none of them reads one.

    Args:
        kind: `auto`, `adapter`, `cached` or `copy`, as in the trainers' configs.
        model: the policy before its first update.
        arrived_with_adapter: the user's model was a `PeftModel` already, so its adapter is part of the reference.
        cache: for `cached`; None where the rows are not known beforehand (a stream).
        given: what the user passed instead: taken as it is.

    Raises:
        ValueError: the kind cannot serve the objectives, this model or this way of loading it.
    """
    needed = [n for n in needs if n.reference]
    hidden = any(not n.logps_suffice for n in needed)
    if given is not None:
        chosen = FrozenCopy(given, own=given is not model) if isinstance(given, nn.Module) else given
        _check_hidden(hidden, chosen.has_hidden)
        return chosen
    if not needed:
        return None
    if kind == "auto":
        kind = "adapter" if is_peft(model) else "copy" if hidden or cache is None else "cached"
    _check_hidden(hidden, kind != "cached")
    if kind == "adapter" and not is_peft(model):
        raise ValueError("reference=adapter needs an adapter; pass peft_config, or set reference to cached or copy")
    if kind in ("cached", "copy") and sharded_at_load():
        raise ValueError(
            f"reference={kind} needs whole weights and ZeRO-3 splits them while they load; train an adapter with "
            "reference=adapter, or use accelerate_configs/zero2.yaml (or fsdp2.yaml, where the whole model has to "
            "fit one device before training starts)"
        )
    if kind == "cached" and cache is None:
        raise ValueError("reference=cached needs the rows beforehand; a stream needs reference=adapter or copy")
    if kind == "copy":
        return FrozenCopy(model)
    live: Reference = PolicyReference()
    if is_peft(model):
        live = freeze_current_adapter(model) if arrived_with_adapter else AdapterReference()
    if kind == "adapter" or cache is None:
        return live
    return cache.of(live, model, only_base=is_peft(model) and not arrived_with_adapter)


def _check_hidden(needed: bool, has_hidden: bool) -> None:
    if needed and not has_hidden:
        raise ValueError(
            "this objective compares whole distributions or activations and cached log-probabilities cannot serve it; "
            "set reference to adapter or copy"
        )
