"""What trainers of lists of documents share: rows, data loaders, the mean over an optimiser step, evaluation, the log.

`trainer` is a trainer of sentence-transformers with `loss` (a `RankingLoss`), `collate` (rows to a batch, see
`CandidateCollator`), `checked_rows`, `metric_sums` (of the training), `evaluated_rows` (a set) and `step_is_empty`.

Shapes: B queries of a batch, D documents of the longest list. An objective returns `[B]` and is averaged over the
queries of the optimiser step that count, over all micro-batches and processes; the host divides by accumulation steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from negtune.data.candidates import COUNTED
from negtune.data.completions import RowError
from negtune.retrieval.losses import Lists, NonFiniteScoresError, RankingLoss
from negtune.trainers.progress import Columns, HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.steps import SkipEmptySteps, stop_if_not_finite, tell_step_totals

logger = logging.getLogger(__name__)

LISTS = "rows with query, documents and gains"
FIRST: Columns = (("step", "step", "{:d}"), ("loss", "loss", "{:.4f}"))
SCORES: Columns = (
    ("reward/expected", "expected", "{:.3f}"),
    ("reward/greedy", "greedy", "{:.3f}"),
    ("reward/flat", "flat", "{:.2f}"),
    ("policy/uniformity", "uniformity", "{:.3f}"),
    ("positive/score", "positives", "{:.2f}"),
    ("negative/score", "negatives", "{:.2f}"),
)
LAST: Columns = (("grad_norm", "grad norm", "{:.2f}"),)
EVALUATED = ("loss", "reward/greedy", "ndcg@10", "mrr@10", "recall@100")
"""Metrics that a person sees of an evaluation."""


# --- rows and batches -------------------------------------------------------------------------------------------------


class CheckedRows:
    """What `candidate_rows`, or another check, makes of a set, or of several by name.

    Rows that it has checked are taken as they are.

    Raises:
        ValueError: rows that a trainer with other settings has checked: they may lack what this one reads.
    """

    def __init__(self, check: Callable[..., Any], **settings: Any) -> None:
        self.check, self.settings = check, settings
        plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
        self._mark = f"checked by negtune.{check.__name__}: {plain}"

    def __call__(self, data: Any, name: str) -> Any:
        if COUNTED not in (getattr(data, "column_names", None) or ()):
            rows = self.check(data, name=name, **self.settings)
            rows.info.description = self._mark
            return rows
        if data.info.description not in ("", self._mark):
            raise ValueError(
                f"the {name} rows are those of another trainer, {data.info.description}, and this one needs them "
                f"{self._mark}; pass the rows that you gave to that trainer"
            )
        return data

    def each(self, data: Any) -> Any:
        if data is None:
            return None
        if isinstance(data, Mapping):
            return {name: self(rows, name) for name, rows in data.items()}
        return self(data, "eval")


def refuse_level_lists(rows: Any, *, binary: bool) -> None:
    """Where what is learned is an order within a list.

    Args:
        rows: the checked train set; None and streams pass.
        binary: a document is relevant or not; else grades differ.

    Raises:
        ValueError: in no list is a document better than another.
    """
    if rows is None or not hasattr(rows, "__len__"):
        return
    for gains in rows["gains"]:
        values = [gain > 0 for gain in gains] if binary else gains
        if max(values) > min(values):
            return
    what = "a relevant and an irrelevant document" if binary else "documents of different gains"
    raise ValueError(f"no train list has {what}: there is nothing to learn; give lists with negatives, see mine")


def lists_of(batch: Mapping[str, Any]) -> Lists:
    """The lists of a batch, with what it was told of its optimiser step."""
    step = batch.get("step")
    more = {} if step is None else {"total": float(step["counts"]), "share": float(step["share"])}
    return Lists(**batch["lists"], rows=batch.get("texts"), **more)


def train_loader(trainer: Any, make: Callable[[], Any], wanted: str = LISTS) -> Any:
    """The host's data loader of the train set, if it has one full round of batches where only full ones count.

    Args:
        trainer: see the top of the file.
        make: the host's method.
        wanted: what the train set is, for the message.

    Raises:
        ValueError: no train set, or too few rows.
    """
    if trainer.train_dataset is None:
        raise ValueError(f"the train set is missing: pass {wanted}")
    loader = make()
    if not trainer.args.dataloader_drop_last or not hasattr(trainer.train_dataset, "__len__"):
        return loader
    rows, size = len(trainer.train_dataset), loader.total_batch_size
    if rows < size:
        raise ValueError(
            f"{rows} train queries are no full round of batches, {size} (processes x per_device_train_batch_size); "
            "lower per_device_train_batch_size, or use fewer processes"
        )
    if rows % size:
        logger.warning(
            "train: %d of %d queries fill no round of %d and are left out, others in each epoch",
            *(rows % size, rows, size),
        )
    return loader


@contextmanager
def last_batches_kept(args: Any) -> Iterator[None]:
    """For data loaders of evaluations: the host drops the last batch where training with several processes does."""
    drop, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop


# --- the optimiser step -----------------------------------------------------------------------------------------------


def tell_counted(trainer: Any, batches: Sequence[dict[str, Any]]) -> None:
    """Tell each micro-batch of one optimiser step how many queries count in all of them, over all processes.

    Raises:
        RowError: a run begins without a batch.
    """
    if not batches:
        if trainer.state.global_step == 0:
            raise RowError(
                "nothing is left of the train stream: of its queries with a relevant document there is no full round "
                "of batches (processes x per_device_train_batch_size)"
            )
        return
    tell_step_totals(trainer, batches, lambda batch: trainer.loss.counted(lists_of(batch)).sum())
    trainer.metric_sums.add_ratio("steps/empty", float(trainer.step_is_empty), 1)


def list_loss(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mean of the objective over the queries of the optimiser step.

    Raises:
        NonFiniteLossError: it is no number; the message names the file with the rows.
    """
    if model is trainer.model_wrapped and trainer.loss.model is not model:
        trainer.loss = trainer.override_model_in_loss(trainer.loss, model)
    return finite_loss(trainer, trainer.loss, inputs["features"], lists_of(inputs), inputs)


def finite_loss(trainer: Any, loss: RankingLoss, features: Any, lists: Lists, inputs: Mapping[str, Any]) -> Tensor:
    """The same of any loss over the lists of the batch `inputs`."""
    try:
        value = loss(features, lists)
    except NonFiniteScoresError:
        value = torch.tensor(float("nan"))
    rows = {"queries": inputs["rows"].tolist()} if "rows" in inputs else {}
    stop_if_not_finite(trainer, value, {}, rows)
    return value


# --- evaluation -------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(trainer: Any) -> Iterator[None]:
    """An evaluation of one set, or of several one after another: it counts anew and changes nothing of the training."""
    trainer.loss.take_metrics("eval")
    trainer.evaluated_rows.clear()
    with torch.random.fork_rng():  # a data loader draws a seed, which is none of the training's business
        yield


@torch.no_grad()
def evaluated_loss(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The loss of a batch, without the rows that several processes repeat to fill their last round of batches."""
    inputs = trainer._prepare_inputs(inputs)
    if trainer.accelerator.num_processes > 1:
        keep = torch.tensor(_fresh(trainer, inputs["rows"].tolist()), device=inputs["rows"].device)
        inputs["lists"]["mask"] = inputs["lists"]["mask"] & keep.unsqueeze(-1)
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, inputs).detach()


def _fresh(trainer: Any, rows: list[int]) -> list[bool]:
    """Which rows of this process were in no batch of the evaluation before, of any process."""
    found: list[bool] = []
    for rank, part in enumerate(gather_object([rows])):
        fresh = [row not in trainer.evaluated_rows and row not in part[:i] for i, row in enumerate(part)]
        trainer.evaluated_rows.update(part)
        found = fresh if rank == trainer.accelerator.process_index else found
    return found


@torch.no_grad()
def scores_of(trainer: Any, rows: Any) -> list[list[float]]:
    """Of the documents of each row, by the model as it is now, in eval mode."""
    training = trainer.model.training
    trainer.model.eval()
    found: list[list[float]] = []
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch = trainer.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        batch = trainer._prepare_inputs(batch)
        lists = lists_of(batch)
        scores = trainer.loss.scores(batch["features"], lists)
        found += [row[keep].tolist() for row, keep in zip(scores, lists.mask, strict=True)]
    trainer.model.train(training)
    return found


# --- what a person sees -----------------------------------------------------------------------------------------------


def list_callbacks(trainer: Any, args: Any) -> list[TrainerCallback]:
    """Of every trainer of lists: the history on disk; steps in which nothing counts move nothing."""
    return [HistoryCallback(args.output_dir), SkipEmptySteps(lambda: trainer.step_is_empty)]


def show_progress(trainer: Any, columns: Columns) -> None:
    """A table of `columns` in place of the host's bars and prints, unless progress is switched off."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressTable(columns, EVALUATED))


def add_metrics(trainer: Any, logs: dict[str, float]) -> None:
    """To `logs`: the metrics since the last logging step, or those of the evaluation, over all processes."""
    evaluated = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
    if "loss" not in logs and evaluated is None:
        return
    sums = MetricSums() if evaluated else trainer.metric_sums  # steps since the last logging step go on being counted
    for name, (total, count) in trainer.loss.take_metrics("eval" if evaluated else "train").items():
        sums.add_ratio(name, total, count)
    prefix = evaluated.removesuffix("loss") if evaluated else ""
    logs.update({prefix + name: value for name, value in sums.flush().items()})


def add_card(trainer: Any, add: Callable[[dict[str, Any]], None], default_args: dict[str, Any]) -> None:
    """The host's model card, which shows rows of the data and their statistics: not under `redact`. Without its
    examples for a widget, which are drawn with the global generator.

    Args:
        trainer: see the top of the file.
        add: the host's method.
        default_args: of the host.
    """
    if trainer.args.redact:
        return
    card = trainer.model.model_card_data
    card.widget = card.widget or ["none"]
    add(default_args)
    card.widget = [example for example in card.widget if example != "none"]
