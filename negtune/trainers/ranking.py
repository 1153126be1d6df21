"""Rank: lists of documents, scored by any of four kinds of model, and an objective over the scores.

How the loss is reduced: see `list_training`. Which queries a reward function cannot score is known behind the last
micro-batch: gradients are then scaled to the mean over the others.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from negtune._st_compat import BaseTrainer
from negtune.data.candidates import candidate_rows
from negtune.retrieval.collate import CandidateCollator, prompts_of
from negtune.retrieval.losses import READ_NO_GAINS, RankingLoss
from negtune.trainers.list_training import (
    FIRST,
    LAST,
    SCORES,
    CheckedRows,
    add_card,
    add_metrics,
    evaluated_loss,
    evaluating,
    last_batches_kept,
    list_callbacks,
    list_loss,
    refuse_level_lists,
    scores_of,
    show_progress,
    tell_counted,
    train_loader,
)
from negtune.trainers.progress import MetricSums
from negtune.trainers.ranker_setup import checked_room, set_up_ranker
from negtune.trainers.ranking_config import RankingConfig as RankingConfig
from negtune.trainers.ranking_reward import RankingReward as RankingReward
from negtune.trainers.ranking_reward import RewardOfPlaces, leave_out_unscored
from negtune.trainers.steps import has_ended


class RankingTrainer(BaseTrainer):
    """Train a retriever or reranker on candidate lists, by default on the metric itself (PG-RANK).

    One class for bi-encoders (`SentenceTransformer`, decoder LLMs with last-token pooling among them), multi-vector
    encoders, cross-encoders and causal LMs that rerank by their yes and no logits. Lists may differ in length. A text
    that is in several lists of a batch is embedded once.

    Args:
        model: the model, or a name, folder or hub id (`args.model_kind` says of what).
        args: settings; `loss_type` names the objective.
        train_dataset: rows with `query`, `documents`, `gains`; see `data.candidates` (`kl_distill` reads no gains).
            `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`), or a list.
        eval_dataset: the same; `evaluate` gives `eval_loss`, `eval_reward/greedy` and the rest of what is logged.
        evaluator: sentence-transformers evaluator, e.g. `retrieval.evaluation.RetrievalEvaluator`.
        processing_class: as in transformers; the model's own if not given.
        peft_config: adapter to add to the transformer of the model.
        objective: `(scores, gains, mask) -> [Q]`, to use instead of the named one.
        reward_fn: black box that scores whole rankings, for `pg_rank`; see `RankingReward`. Rows need no `gains` then,
            and all their other columns are handed to it.
        callbacks, optimizers: as in transformers.

    Attributes:
        relist: row numbers to rows, after the lists have changed: the data loader has collated a batch of old ones
            already, which the next optimiser step makes anew. None: they have not.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
    """

    training_args_class = RankingConfig
    loss_is_scaled_for_ga = False
    step_is_empty = False

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: RankingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluator: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        objective: Callable[..., Tensor] | None = None,
        reward_fn: RankingReward | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = copy.copy(args) if args is not None else RankingConfig(output_dir="trainer_output")
        named, rewarded = objective is None, reward_fn is not None
        self.checked_rows = CheckedRows(
            candidate_rows,
            k=args.places if named else None,
            teacher=args.needs_teacher and named,
            scored=rewarded or (named and args.loss_type in READ_NO_GAINS),
            in_batch=args.in_batch,
            keep=rewarded,
            in_memory=args.redact,
        )
        train = None if train_dataset is None else self.checked_rows(train_dataset, "train")
        if named and not rewarded and not args.in_batch and args.loss_type not in READ_NO_GAINS:
            refuse_level_lists(train, binary=False)
        evaluated = self.checked_rows.each(eval_dataset)
        if train is not None and not hasattr(train, "__len__") and args.kl_weight:
            raise ValueError("kl_weight needs the scores of the warm start for all rows, and a stream has them not yet")
        model = set_up_ranker(model, args, peft_config)
        room = checked_room(model, train, evaluated)
        loss = RankingLoss(
            model,
            args.loss_type,
            **{"scale": args.scale, "in_batch": args.in_batch, "objective": objective},
            **{"mini_batch_size": args.mini_batch_size, "mini_batch_num_tokens": args.mini_batch_num_tokens},
            reward_fn=None if reward_fn is None else RewardOfPlaces(reward_fn),
            **args.objective_settings(),
        )
        self.collate = CandidateCollator(
            model.preprocess,
            loss.kind,
            prompts=prompts_of(model, loss.kind),
            in_batch=loss.in_batch,
            keep_rows=rewarded,
            check=room,
        )
        self.metric_sums, self.evaluated_rows = MetricSums(), set()
        self.relist: Callable[[list[int]], list[dict[str, Any]]] | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluated,
            loss=loss,
            evaluator=evaluator,
            data_collator=self.collate,
            processing_class=processing_class,
            callbacks=[*list_callbacks(self, args), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # what transformers below 5.19 reads for loss_is_scaled_for_ga
        show_progress(self, (*FIRST, *SCORES, *LAST))
        if args.kl_weight and self.train_dataset is not None:
            self.train_dataset = self.train_dataset.add_column("start_scores", scores_of(self, self.train_dataset))

    def get_train_dataloader(self) -> Any:
        return train_loader(self, super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with last_batches_kept(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        add_card(self, super().add_model_card_callback, default_args_dict)

    def get_default_loss(self, model: nn.Module) -> nn.Module:
        raise AssertionError("the loss is always given")

    # --- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the number of queries that count in the whole step."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.relist is not None:
            batches, self.relist = [self.collate(self.relist(batch["rows"].tolist())) for batch in batches], None
        tell_counted(self, batches)
        self.loss.take_unscored()  # of what was computed between the steps
        self._step_loss = 0.0
        return batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += loss
        if self.loss.reward_fn is None or not self.accelerator.sync_gradients:
            return loss
        return loss + leave_out_unscored(self, inputs["step"]["counts"], self._step_loss)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective over the queries of the optimiser step."""
        loss = list_loss(self, model, inputs)
        return (loss, {}) if return_outputs else loss

    # --- what a person sees -------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean objective and the metrics of lists; with an evaluator also its own.

        Args:
            eval_dataset: rows, or several sets by name; the trainer's if not given.
            ignore_keys, metric_key_prefix: as in transformers.
        """
        if not isinstance(eval_dataset, str):
            eval_dataset = self.checked_rows.each(eval_dataset)
        with evaluating(self):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        return evaluated_loss(self, model, inputs), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step or during the evaluation, over all processes."""
        add_metrics(self, logs)
        super().log(logs, start_time)
