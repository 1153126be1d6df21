"""Train queries against a frozen index: each step searches it anew, and only the query side moves (ADORE).

Of the trainers of lists it differs in where lists come from; rows, loss and collator are other ones, the rest is
`RankingTrainer`: the mean over the queries of an optimiser step, processes, resuming, what is logged.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from negtune.data.positives import positive_rows
from negtune.data.retrieval import RetrievalTask
from negtune.records import read_json, write_json
from negtune.retrieval.index import ExactIndex
from negtune.retrieval.query_side import QueryCollator, QueryLoss, check_index, check_lengths, differing_vectors
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.towers import join_towers, query_copy, split_towers
from negtune.trainers.query_encoder_config import QueryEncoderConfig as QueryEncoderConfig
from negtune.trainers.ranking import PROGRESS, CheckedRows, RankingTrainer

logger = logging.getLogger(__name__)

INDEX_FILE, LISTS_FILE = "index.json", "last_lists_rank{rank}.safetensors"
TRIED = 8
"""Texts encoded at construction, to see that the model and the index belong together."""
SEARCHED = (
    ("search/mrr", "found, MRR", "{:.3f}"),
    ("search/missed", "missed", "{:.2f}"),
    ("search/changed", "changed", "{:.2f}"),
)


class IndexChangedError(RuntimeError):
    """The vectors of the index are not those that training began with."""


class QueryEncoderTrainer(RankingTrainer):
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
    collator_class = QueryCollator
    progress = (*PROGRESS[:2], *SEARCHED, *PROGRESS[2:])
    wanted = "a RetrievalTask, or rows with query and positives"

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
        super().__init__(
            model=query_copy(queries, adapter=peft_config is not None),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            evaluator=evaluator,
            processing_class=processing_class,
            peft_config=peft_config,
            objective=objective,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_vectors(train_dataset)
        quantised = getattr(self.model.transformers_model, "is_quantized", False)
        self.saves_both = args.save_document_encoder and not quantised
        self.add_callback(IndexCallback(self))

    def _row_checks(self, args: Any, objective: Any, reward_fn: Any) -> CheckedRows:
        places = {document_id: place for place, document_id in enumerate(self.index.ids)}
        return CheckedRows(positive_rows, places=places, index=self.fingerprint, in_memory=args.redact)

    def _make_loss(self, model: Any, args: Any, objective: Any, reward_fn: Any) -> QueryLoss:
        return QueryLoss(
            model,
            self.index,
            args.loss_type,
            **{"depth": args.depth, "rank_by": args.rank_by, "scale": args.scale, "objective": objective},
            **args.objective_settings(),
        )

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
        if about.exists() and read_json(about)["fingerprint"] != self.fingerprint:
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
