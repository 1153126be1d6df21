"""Train queries against a frozen index: each step searches it anew, and only the query side moves (ADORE).

Of the trainers of lists it differs in where lists come from; how the loss is reduced: see `list_training`.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from negtune._st_compat import BaseTrainer
from negtune.data.positives import positive_rows
from negtune.data.retrieval import RetrievalTask
from negtune.records import read_json, write_json
from negtune.retrieval.collate import prompts_of
from negtune.retrieval.index import ExactIndex
from negtune.retrieval.query_side import QueryCollator, QueryLoss, check_index, check_lengths, differing_vectors
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.towers import join_towers, query_copy, split_towers
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
    show_progress,
    tell_counted,
    train_loader,
)
from negtune.trainers.progress import Columns, MetricSums
from negtune.trainers.query_encoder_config import QueryEncoderConfig as QueryEncoderConfig
from negtune.trainers.ranker_setup import set_up_ranker
from negtune.trainers.steps import has_ended

logger = logging.getLogger(__name__)

INDEX_FILE, LISTS_FILE = "index.json", "last_lists_rank{rank}.safetensors"
TRIED = 8
"""Texts encoded at construction, to see that the model and the index belong together."""
SEARCHED: Columns = (
    ("search/mrr", "found, MRR", "{:.3f}"),
    ("search/missed", "missed", "{:.2f}"),
    ("search/changed", "changed", "{:.2f}"),
)


class IndexChangedError(RuntimeError):
    """The vectors of the index are not those that training began with."""


class QueryEncoderTrainer(BaseTrainer):
    """Train the query side of a bi-encoder against an exact index that stays byte by byte as it is.

    The model given goes on to encode documents and is left as it is: a copy is trained, or an adapter on one that
    shares its weights. Each process has the index; a memory-mapped one is in memory once for all.

    `save_model` writes one sentence-transformers model, a `Router`: its `encode_query` is what was trained, its
    `encode_document` what the index was made with. With the query encoder alone `encode_document` would give vectors
    that fit no index, and nothing would say so. Checkpoints, and `save_document_encoder=False`, have the query encoder
    alone; its card names the encoder of the documents.

    Args:
        model: the encoder that made the index, or its name, folder or hub id; or one that this trainer has saved.
        index: of the documents.
        args: settings; `loss_type` names the objective, `adore` or any of `losses.ranking` that needs no teacher.
        train_dataset: a `RetrievalTask` whose documents are in the index, or rows with `query` and `positives`; see
            `data.positives`. `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`), or a list.
        eval_dataset: the same; `evaluate` gives `eval_loss`, `eval_search/mrr` and the rest of what is logged.
        evaluator: `retrieval.evaluation.RetrievalEvaluator(task, index=index)`, which embeds queries only.
        processing_class: as in transformers; the model's own if not given.
        peft_config: adapter to add to the query side.
        document_model: encoder of the documents where `model` is not: goes into what is saved.
        objective: `(scores, gains, mask) -> [Q]`, to use instead of the named one.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
        IndexChangedError: at the end of training, or on resuming, if the index is another one.
    """

    training_args_class = QueryEncoderConfig
    loss_is_scaled_for_ga = False
    step_is_empty = False

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        index: ExactIndex,
        args: QueryEncoderConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluator: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        document_model: Any = None,
        objective: Callable[..., Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = copy.copy(args) if args is not None else QueryEncoderConfig(output_dir="trainer_output")
        self.index, self.document_name = index, None
        if isinstance(model, str | os.PathLike):
            self.document_name = str(model)
            model = load_ranker(model, "bi_encoder", model_kwargs=dict(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
        queries, documents = split_towers(model)
        self.document_model = documents if document_model is None else document_model
        check_index(queries, index, args.depth)
        self.fingerprint = index.fingerprint()
        logger.info("index of %d documents, SHA-256 %s", len(index), self.fingerprint)
        places = {document_id: place for place, document_id in enumerate(index.ids)}
        self.checked_rows = CheckedRows(positive_rows, places=places, index=self.fingerprint, in_memory=args.redact)
        train = None if train_dataset is None else self.checked_rows(train_dataset, "train")
        evaluated = self.checked_rows.each(eval_dataset)
        model = set_up_ranker(query_copy(queries, adapter=peft_config is not None), args, peft_config)
        loss = QueryLoss(
            model,
            index,
            args.loss_type,
            **{"depth": args.depth, "rank_by": args.rank_by, "scale": args.scale, "objective": objective},
            **args.objective_settings(),
        )
        self.collate = QueryCollator(model.preprocess, loss.kind, prompts=prompts_of(model, loss.kind))
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
            callbacks=[*list_callbacks(self, args), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # what transformers below 5.19 reads for loss_is_scaled_for_ga
        show_progress(self, (*FIRST, *SEARCHED, *SCORES, *LAST))
        self._check_vectors(train_dataset)
        quantised = getattr(self.model.transformers_model, "is_quantized", False)
        self.saves_both = args.save_document_encoder and not quantised
        self.add_callback(IndexCallback(self))

    def _check_vectors(self, train_dataset: Any) -> None:
        """See that the model and the index belong together, by a few texts."""
        rows = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        if hasattr(rows, "column_names") and not isinstance(rows, Mapping):
            check_lengths(self.model, self.index, [row["query"] for row, _ in zip(rows, range(TRIED), strict=False)])
        if not isinstance(train_dataset, RetrievalTask):
            return
        others = differing_vectors(self.document_model, self.index, train_dataset.corpus, TRIED)
        if others:
            logger.warning(
                "the model gives %d of %d documents another vector than the index has, %s among them: another encoder, "
                "another prompt, or ids in another order? Pass document_model= if another model encodes documents",
                *(len(others), TRIED, others[0]),
            )

    def get_train_dataloader(self) -> Any:
        return train_loader(self, super().get_train_dataloader, "a RetrievalTask, or rows with query and positives")

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
        tell_counted(self, batches)
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective over the queries of the optimiser step, on the lists that they find."""
        loss = list_loss(self, model, inputs)
        return (loss, {}) if return_outputs else loss

    # --- what a person sees -------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `RankingTrainer.evaluate`, on the lists that queries find."""
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

    # --- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write both encoders as one model; in checkpoints, and where that cannot be, the query encoder alone.

        It cannot be with an adapter on quantised weights, and where processes share the weights out (FSDP, DeepSpeed).
        """
        together = self.saves_both and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if _internal_call or not together:
            super().save_model(output_dir, _internal_call)
            return
        if not self.args.should_save:
            return
        folder, card = output_dir or self.args.output_dir, self.model.model_card_data
        both = join_towers(self.model, self.document_model)
        both.model_card_data = card
        card.register_model(both)
        try:
            both.save_pretrained(folder)
        finally:
            card.register_model(self.model)
        self._add_to_card(folder, "`encode_document` is the encoder that the index was made with.")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self._add_to_card(
            output_dir or self.args.output_dir,
            "This is the query encoder alone: do **not** encode documents with it, its `encode_document` gives vectors "
            f"that do not belong to the index. Encoder of the documents: {self._document_encoder()}.",
        )

    def _document_encoder(self) -> str:
        """Its name or path, as far as there is one that can be told."""
        transformer = self.document_model.transformers_model
        path = "" if transformer is None else str(getattr(transformer.config, "_name_or_path", ""))
        name = self.document_name or self.document_model.model_card_data.base_model or path
        local = Path(name).is_absolute() or Path(name).exists()
        if not name or (local and (self.args.redact or not Path(name).exists())):
            return "the one that the index was made with"
        return name

    def _add_to_card(self, folder: str, which: str) -> None:
        path = Path(folder) / "README.md"
        if not path.exists():
            return
        index = (
            f"an index of {len(self.index)} documents, {self.index.embeddings.shape[1]} wide, compared by "
            f"{self.index.similarity}, SHA-256 `{self.fingerprint}`"
        )
        text = f"\n## Documents\n\nTrained to search {index}, which training left as it is. {which}\n"
        path.write_text(path.read_text(encoding="utf-8").rstrip("\n") + "\n" + text, encoding="utf-8")

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        """As the host, with the lists that queries have found; another index is refused."""
        about = Path(checkpoint_path) / INDEX_FILE
        if not about.exists():
            raise OSError(
                f"{checkpoint_path} has no {INDEX_FILE}: it was not finished, or not written by a QueryEncoderTrainer; "
                "resume from another one"
            )
        if read_json(about)["fingerprint"] != self.fingerprint:
            raise IndexChangedError(f"{checkpoint_path} was trained on another index; resume with that one")
        super()._load_from_checkpoint(checkpoint_path)
        seen = Path(checkpoint_path) / LISTS_FILE.format(rank=self.args.process_index)
        if seen.exists():
            self.loss.last_lists.load(seen)


class IndexCallback(TrainerCallback):
    """Keeps in checkpoints what is not in weights, and looks at the end whether the index is what it was.

    Args:
        trainer: with the index and its fingerprint.
    """

    def __init__(self, trainer: QueryEncoderTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trainer.loss.last_lists.save(folder / LISTS_FILE.format(rank=args.process_index))
        if state.is_world_process_zero:
            write_json(folder / INDEX_FILE, {"fingerprint": self.trainer.fingerprint})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.trainer.index.fingerprint()
        if found != self.trainer.fingerprint:
            raise IndexChangedError(
                f"the index was {self.trainer.fingerprint} before training and is {found}: something wrote to its "
                "vectors; make it again, and train again"
            )
        if state.is_world_process_zero:
            about = {"documents": len(self.trainer.index), "similarity": self.trainer.index.similarity}
            write_json(Path(args.output_dir) / INDEX_FILE, {"fingerprint": found, **about})
