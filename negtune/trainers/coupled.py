"""CET: train a model of relevance and a model of selection on candidate lists, each weighing the other's documents.

Before every optimiser step both models score all lists of the step, in eval mode. From those scores come the weights
(with `em` the targets) of all its micro-batches, over all processes; then both models take the step. Where a step is
one micro-batch and neither model has dropout, the scores of the step are the same ones, and nothing is scored twice.
The models share the optimiser, but neither gradients nor their clipping.

Shapes: B queries of a batch, D documents of the longest list, F features.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from negtune._st_compat import BaseTrainer
from negtune.data.candidates import candidate_rows
from negtune.losses.debiased import expected_gains, matching_level
from negtune.models.policy import has_dropout
from negtune.retrieval.collate import CandidateCollator, prompts_of
from negtune.retrieval.coupled import CoupledLoss, CoupledObjective, Level
from negtune.retrieval.losses import Lists
from negtune.trainers.coupled_config import LEVELLED
from negtune.trainers.coupled_config import CoupledConfig as CoupledConfig
from negtune.trainers.coupled_selection import CoupledWarning as CoupledWarning
from negtune.trainers.coupled_selection import (
    check_beside,
    load_beside,
    save_beside,
    selection_loss,
    selection_model,
    with_provenance,
)
from negtune.trainers.coupled_weights import add_weights, normalize, opinions
from negtune.trainers.list_training import (
    FIRST,
    LAST,
    SCORES,
    CheckedRows,
    add_card,
    add_metrics,
    evaluated_loss,
    evaluating,
    finite_loss,
    last_batches_kept,
    list_callbacks,
    list_loss,
    lists_of,
    refuse_level_lists,
    scores_of,
    show_progress,
    tell_counted,
    train_loader,
)
from negtune.trainers.progress import Columns, MetricSums
from negtune.trainers.ranker_setup import checked_room, set_up_ranker
from negtune.trainers.steps import has_ended

FIRST_LISTS = 64
"""Of the train set: their scores and labels decide the first level of relevance."""
WEIGHTS: Columns = (
    ("weight/negative_p10", "w- p10", "{:.2f}"),
    ("weight/negative_p90", "w- p90", "{:.2f}"),
    ("selection/loss", "selection", "{:.4f}"),
)


class CoupledTrainer(BaseTrainer):
    """CET: train a ranker on labels that only a pool of selected documents could get.

    As `RankingTrainer`, beside a model of which documents were selected for judging. `args.mode` says what the two make
    of each other. As published: two cross-encoders, mode `official`. Ours: relevance models of the other kinds, the
    other modes, and selection models that read where a document comes from.

    In the modes that read a score as log-odds of relevance (`posterior`, `ips_posterior`, `em`) a number, the level, is
    added to it: it starts where the mean of sigmoid(score + level) is the share of documents that are labelled in the
    first lists, and follows the scores by Newton's steps of `em_relevance`, one before each step of the models, from
    the same scores. P(relevant) of the trained model is sigmoid(scale * score + level).

    Lists without a labelled document are left out, in mode `em` too. Queries of the step are averaged as by
    `RankingTrainer`. Evaluation weighs nothing and takes labels as they are: `eval_loss` compares with other trainers.

    Args:
        model, args, eval_dataset, evaluator, processing_class, peft_config, callbacks: as of `RankingTrainer`.
        train_dataset: rows of `data.candidates`, with `judged` if known, and `selection_features` or
            `selection_propensity` (which mode `ips` and `ips_posterior` need).
        selection: the selection model: a cross-encoder, or its name, as published; or a `FeatureSelection`. If not
            given, one is made for the `selection_features`; `selection_propensity` need none.

    The selection model is saved beside the ranker, in the folder `selection`, the level in `level.safetensors`.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
    """

    training_args_class = CoupledConfig
    loss_is_scaled_for_ga = False
    step_is_empty = False

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: CoupledConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluator: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        selection: str | os.PathLike | nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = copy.copy(args) if args is not None else CoupledConfig(output_dir="trainer_output")
        if not isinstance(args, CoupledConfig):
            raise ValueError(f"CoupledTrainer takes a CoupledConfig, got {type(args).__name__}")
        self.checked_rows = CheckedRows(candidate_rows, provenance=True, in_memory=args.redact)
        train = None if train_dataset is None else self.checked_rows(train_dataset, "train")
        if args.mode != "em":
            refuse_level_lists(train, binary=True)
        evaluated = self.checked_rows.each(eval_dataset)
        model = set_up_ranker(model, args, peft_config)
        room = checked_room(model, train, evaluated)
        objective = CoupledObjective(soft=args.mode == "em")
        loss = CoupledLoss(
            model,
            "rank_net",
            scale=args.scale,
            mini_batch_size=args.mini_batch_size,
            mini_batch_num_tokens=args.mini_batch_num_tokens,
            objective=objective,
        )
        prompts = prompts_of(model, loss.kind)
        self.collate = CandidateCollator(model.preprocess, loss.kind, prompts=prompts, check=room)
        self.metric_sums, self.evaluated_rows = MetricSums(), set()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluated,
            loss=loss,
            evaluator=evaluator,
            data_collator=self.collate,
            processing_class=processing_class,
            callbacks=[*list_callbacks(self, args), _BeforeStep(lambda: self), *(callbacks or [])],
        )
        self.model_accepts_loss_kwargs = False  # what transformers below 5.19 reads for loss_is_scaled_for_ga
        show_progress(self, (*FIRST, *SCORES, *WEIGHTS, *LAST))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("there is a second model here, of which DeepSpeed and FSDP do not know; train with DDP")
        self.selection = selection_model(selection, self.model, self.train_dataset, args)
        # an attribute of the trainer: the host puts the ranker into whatever `model` it finds inside `loss`
        self.selection_loss = None if self.selection is None else selection_loss(self.selection, args)
        self._collate_train = with_provenance(self.collate, self.selection)
        self.level = objective.level = Level(self._first_level()).to(args.device) if args.mode in LEVELLED else None
        several = [self.model] if self.selection is None else [self.model, self.selection]
        self._draws = any(has_dropout(one) for one in several)

    def get_train_dataloader(self) -> Any:
        plain, self.data_collator = self.data_collator, self._collate_train
        try:
            return train_loader(self, super().get_train_dataloader)
        finally:
            self.data_collator = plain

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with last_batches_kept(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        add_card(self, super().add_model_card_callback, default_args_dict)

    def get_default_loss(self, model: nn.Module) -> nn.Module:
        raise AssertionError("the loss is always given")

    def _first_level(self) -> float:
        if self.train_dataset is None:
            return 0.0
        rows = list(itertools.islice(self.train_dataset, FIRST_LISTS))
        scores = torch.tensor([score for row in scores_of(self, rows) for score in row])
        labels = [gain > 0 for row in rows for gain in row["gains"]]
        share = (sum(labels) + 0.5) / (len(labels) + 1)  # neither 0 nor 1
        return matching_level(scores, share)

    def _move_level(self, found: Sequence[Tensor]) -> None:
        """By what targets lack and by variances, summed over the documents of the step, of all processes."""
        if self.level is not None:
            self.level.move(*self._sum(torch.stack(list(found)).sum(0).to(self.args.device)).tolist())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not new or self.selection is None:
            return optimizer
        rate = self.args.selection_learning_rate
        decayed = set(self.get_decay_parameter_names(self.selection))
        for decay in (True, False):
            named = self.selection.named_parameters()
            parameters = [p for n, p in named if p.requires_grad and (n in decayed) == decay]
            if parameters:
                optimizer.add_param_group(
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate if rate is None else rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                )
        return optimizer

    # --- weights ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, with what their documents weigh."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tell_counted(self, batches)
        if len(batches) == 1 and not self._draws:
            batches[0]["coupled"] = None  # weighed within the step
        elif batches:
            batches = [self._prepare_inputs(batch) for batch in batches]
            with self._as_searched():
                scores = [self.loss.scores(batch["features"], lists_of(batch)) for batch in batches]
                logits = [self._selection_logits(batch["provenance"], lists_of(batch)) for batch in batches]
            self._weigh(batches, scores, logits)
        return batches, items

    @torch.no_grad()
    def _weigh(self, batches: Sequence[dict], scores: Sequence[Tensor], selection: Sequence[Tensor | None]) -> None:
        """Tell the micro-batches of a step what their documents weigh."""
        settings: dict[str, Any] = {"level": None if self.level is None else self.level.bias}
        settings["uniform"] = self.state.global_step < self.args.uniform_steps
        settings["trained"] = self.selection is not None
        found = [opinions(*one, self.args, **settings) for one in zip(batches, scores, selection, strict=True)]
        self._move_level([opinion.pop("level") for opinion in found])
        for side in ("relevance", "selection"):
            if self.args.normalizes and "weights" in found[0].get(side, {}):
                normalize([(b["lists"], opinion[side]) for b, opinion in zip(batches, found, strict=True)], self._sum)
        for batch, opinion in zip(batches, found, strict=True):
            batch["lists"]["more"] = opinion.pop("relevance")
            batch["coupled"] = opinion
            add_weights(self.metric_sums, batch["lists"], batch["provenance"]["judged"])

    def _sum(self, values: Tensor) -> Tensor:
        """Over the processes."""
        return self.accelerator.reduce(values, "sum")

    @contextmanager
    def _weighed_within(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Weights are those of the scores that the losses are made of: a micro-batch that is a whole step."""

        def weigh(scores: Tensor) -> Mapping[str, Tensor]:
            with self.compute_loss_context_manager():
                if self.selection_loss is None:
                    self._weigh([inputs], [scores], [self._selection_logits(inputs["provenance"], lists_of(inputs))])
                    return inputs["lists"]["more"]

                def weigh_selection(logits: Tensor) -> Mapping[str, Tensor]:
                    self._weigh([inputs], [scores], [logits])
                    return inputs["coupled"]["selection"]

                with self.selection_loss.objective.weighed_by(weigh_selection):
                    loss = self._loss_beside(inputs)
            inputs["coupled"]["loss"] = loss
            return inputs["lists"]["more"]

        with self.loss.objective.weighed_by(weigh):
            yield

    @contextmanager
    def _as_searched(self) -> Iterator[None]:
        """Both models as they will be used: in eval mode, without gradient; not wrapped, since DDP counts calls."""
        wrapped, training = self.loss.model, self.model.training
        self.loss.model = self.model
        both = [self.model] if self.selection is None else [self.model, self.selection]
        for module in both:
            module.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            self.loss.model = wrapped
            for module in both:
                module.train(training)

    def _selection_logits(self, provenance: Mapping[str, Any], lists: Lists) -> Tensor | None:
        if self.selection_loss is not None:
            return self.selection_loss.scores(provenance["features"], _of_selection(lists, provenance))
        return torch.logit(provenance["propensities"].masked_fill(~lists.mask, 0.5))

    # --- the step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the losses of all that is trained; none has a gradient in what is another's."""
        trains = torch.is_grad_enabled() and "coupled" in inputs
        with self._weighed_within(inputs) if trains and inputs["coupled"] is None else nullcontext():
            loss = list_loss(self, model, inputs)
        if trains:
            self.metric_sums.add_ratio("relevance/loss", float(loss.detach()), 1)
            if self.selection_loss is not None:
                own = inputs["coupled"].pop("loss", None)
                own = self._loss_beside(inputs) if own is None else own
                self.metric_sums.add_ratio("selection/loss", float(own.detach()), 1)
                loss = loss + own.to(loss)
        return (loss, {}) if return_outputs else loss

    def _loss_beside(self, inputs: Mapping[str, Any]) -> Tensor:
        lists = _of_selection(lists_of(inputs), inputs["provenance"])
        lists = replace(lists, more={} if inputs["coupled"] is None else inputs["coupled"]["selection"])
        self.selection_loss.train()
        return finite_loss(self, self.selection_loss, inputs["provenance"]["features"], lists, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        several = self.accelerator.sync_gradients and self.accelerator.num_processes > 1
        for parameter in self.selection.parameters() if several and self.selection is not None else ():
            if parameter.requires_grad:  # for the ranker DDP does it
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, "mean")
        return loss

    def before_step(self) -> None:
        """Clip what the host does not see, by itself; an empty step moves it no more than the ranker."""
        if self.selection is None:
            return
        if self.step_is_empty:
            for parameter in self.selection.parameters():
                parameter.grad = None
            return
        norm = nn.utils.clip_grad_norm_(self.selection.parameters(), self.args.max_grad_norm or float("inf"))
        self.metric_sums.add_ratio("selection/grad_norm", float(norm), 1)

    # --- what others learn of it --------------------------------------------------------------------------------------

    def expected_rows(self, rows: Any) -> list[dict[str, Any]]:
        """Rows in which a document that nobody judged has the probability that it is relevant as its gain, by both
        models as they are now: for any objective over lists (`losses.debiased.expected_gains`). PG-RANK is then
        rewarded with the expected metric over what labels leave open.

        Train another model on them: one that is rewarded with its own opinion confirms itself. Queries without a label
        are left out, and so are `ideal_gains`.

        Args:
            rows: with what training rows have.

        Raises:
            ValueError: this mode gives no probabilities.
            RowError: rows that cannot be trained on.
        """
        if self.level is None:
            raise ValueError(f"mode {self.args.mode} gives no probabilities of relevance; train with mode em")
        checked, found = self.checked_rows(rows, "expected"), []
        given, size = (rows if hasattr(rows, "__getitem__") else list(rows)), self.args.per_device_eval_batch_size
        for start in range(0, len(checked), size):
            part = [checked[i] for i in range(start, min(start + size, len(checked)))]
            batch = self._prepare_inputs(self._collate_train(part))
            lists = lists_of(batch)
            with self._as_searched():
                relevance = self.loss.scores(batch["features"], lists) + self.level.bias
                selection = self._selection_logits(batch["provenance"], lists)
            gains = expected_gains(lists.gains, batch["provenance"]["judged"], relevance, selection)
            for row, values, keep in zip(part, gains, lists.mask, strict=True):
                columns = {name: value for name, value in given[row["row"]].items() if name != "ideal_gains"}
                found.append({**columns, "gains": values[keep].tolist()})
        return found

    # --- on disk ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save_beside(folder, self.selection, self.level)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        folder = Path(checkpoint_path)
        check_beside(folder, self.selection, self.level)
        super()._load_from_checkpoint(checkpoint_path)
        load_beside(folder, self.selection, self.level)

    # --- what a person sees -------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `RankingTrainer.evaluate`: nothing is weighed."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self.checked_rows.each(eval_dataset)
        with evaluating(self):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        return evaluated_loss(self, model, inputs), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the metrics of both models, see `add_weights`, and the level."""
        if "loss" in logs:
            if self.selection_loss is not None:
                for name, (total, count) in self.selection_loss.take_metrics().items():
                    if name in ("positive/score", "negative/score"):
                        self.metric_sums.add_ratio(f"selection/{name.replace('/', '_')}", total, count)
            if self.level is not None:
                logs["level"] = self.level.bias.item()
        add_metrics(self, logs)
        super().log(logs, start_time)


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer().before_step()


def _of_selection(lists: Lists, provenance: Mapping[str, Any]) -> Lists:
    return replace(lists, documents=provenance["documents"], more={})
