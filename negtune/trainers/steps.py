"""What an optimiser step needs to know about all of its micro-batches, and when it has to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from negtune.records import write_json


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; the message names the file with the rows of that batch."""


class EpochSetter(TrainerCallback):
    """Tells a sampler the epoch, also after a resume, where the host builds a new data loader around it.

    Args:
        sampler: gives the sampler (with `set_epoch`) that is in use, or None.
    """

    def __init__(self, sampler: Callable[[], Any]) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.sampler()
        if sampler is not None:
            sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class SkipEmptySteps(TrainerCallback):
    """An optimiser step in which nothing counts moves nothing: without gradients there is no momentum and no decay.

    Args:
        empty: whether the step that is under way is one.
    """

    def __init__(self, empty: Callable[[], bool]) -> None:
        self.empty = empty

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.empty() and model is not None:
            for parameter in model.parameters():
                parameter.grad = None


def has_ended(trainer: Any) -> bool:
    """Whether all steps are done. A run that is resumed at its end must not take one more: where a data loader has no
    length, the host begins another epoch.
    """
    return trainer.state.global_step >= trainer.state.max_steps


def tell_step_totals(
    trainer: Any, batches: Sequence[dict[str, Any]], count: Callable[[Mapping[str, Any]], Tensor], **more: Any
) -> None:
    """Tell each micro-batch of one optimiser step what all of them hold, over all processes.

    A mean over the step is then `sum / total * share`: the host divides by the micro-batches of each process and
    averages over processes, so `share` takes both out again.

    Args:
        trainer: asks all processes; every one must call. Its `step_is_empty` says whether nothing counts.
        batches: each gets `step`: `counts` (nested list), `share`, and `more`.
        count: of one batch, what is to be totalled.
    """
    total = torch.stack([count(batch) for batch in batches]).sum(0).to(trainer.args.device)
    counts = trainer.accelerator.reduce(total, "sum").tolist()
    share = len(batches) * trainer.accelerator.num_processes
    trainer.step_is_empty = not torch.as_tensor(counts).any().item()
    for batch in batches:
        batch["step"] = {"counts": counts, "share": share, **more}


def stop_if_not_finite(
    trainer: Any, loss: Tensor, inputs: Mapping[str, Any], rows: Mapping[str, list[int]], instead: str = ""
) -> None:
    """Raise `NonFiniteLossError`, the rows of the batch written to disk, unless `loss` is a number.

    Args:
        trainer: for its folder, step and tokenizer.
        loss: of the batch.
        inputs: the batch; its texts are written too, unless `redact`, where it has `input_ids`.
        rows: row numbers in the data set, by side.
        instead: what else to use, for the message.
    """
    if torch.isfinite(loss):
        return
    args, step = trainer.args, trainer.state.global_step
    path = Path(args.output_dir) / f"nonfinite_step{step}_rank{args.process_index}.json"
    dump: dict[str, Any] = {"step": step, "loss": str(loss.item()), "rows": dict(rows)}
    if not args.redact and "input_ids" in inputs:
        dump["texts"] = trainer.processing_class.batch_decode(inputs["input_ids"])
    write_json(path, dump)
    raise NonFiniteLossError(
        f"the loss is {loss.item()} at step {step}; the rows of this batch are in {path}. Lower the learning rate"
        + (f", or use {instead}" if instead else "")
    )
