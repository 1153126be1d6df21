"""Rank: lists of documents, scored by any of four kinds of model, and an objective over the scores.

Shapes: B queries of a batch, D documents of the longest list. An objective returns `[B]` and is averaged over the
queries of the optimiser step that have a relevant document, over all micro-batches and processes; the host divides by
accumulation steps. Which queries a reward function cannot score is known behind the last micro-batch: gradients are
then scaled to the mean over the others.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from negtune._st_compat import BaseTrainer, has_static_embedding_input
from negtune.data.candidates import COUNTED, LEFT_OUT, candidate_rows
from negtune.data.completions import RowError
from negtune.models.four_bit import keep_gradients
from negtune.models.policy import check_output_folder, checkpoint_bytes, disable_dropout
from negtune.retrieval.collate import CandidateCollator, prompts_of
from negtune.retrieval.losses import READ_NO_GAINS, Lists, NonFiniteScoresError, RankingLoss, kind_of
from negtune.retrieval.rankers import load_ranker, query_room
from negtune.trainers.progress import HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.ranking_config import RankingConfig as RankingConfig
from negtune.trainers.steps import SkipEmptySteps, has_ended, stop_if_not_finite, tell_step_totals

logger = logging.getLogger(__name__)

RankingReward = Callable[..., Sequence[float | None]]
"""`(queries, rankings, **columns) -> rewards`: texts of the first k documents, best first, for each query; columns of
the data set, one value for each. None: could not be scored."""

PROGRESS = (
    ("step", "step", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("reward/expected", "expected", "{:.3f}"),
    ("reward/greedy", "greedy", "{:.3f}"),
    ("reward/flat", "flat", "{:.2f}"),
    ("policy/uniformity", "uniformity", "{:.3f}"),
    ("positive/score", "positives", "{:.2f}"),
    ("negative/score", "negatives", "{:.2f}"),
    ("weight/negative_p10", "w- p10", "{:.2f}"),
    ("weight/negative_p90", "w- p90", "{:.2f}"),
    ("selection/loss", "selection", "{:.4f}"),
    ("grad_norm", "grad norm", "{:.2f}"),
)


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

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
    """

    training_args_class = RankingConfig
    ranking_loss = RankingLoss
    collator_class = CandidateCollator
    progress = PROGRESS
    wanted = "rows with query, documents and gains"
    loss_is_scaled_for_ga = False
    step_is_empty = False
    reads_provenance = False
    relist: Callable[[list[int]], list[dict[str, Any]]] | None = None
    """Row numbers to rows, after the lists have changed: the data loader has collated a batch of old ones already."""
    _evaluated: set[int]
    _step: dict[str, Any]

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
        self.checked_rows = self._row_checks(args, objective, reward_fn)
        train = None if train_dataset is None else self.checked_rows(train_dataset, "train")
        evaluated = self.checked_rows.each(eval_dataset)
        if train is not None and not hasattr(train, "__len__") and args.kl_weight:
            raise ValueError("kl_weight needs the scores of the warm start for all rows, and a stream has them not yet")
        set_seed(args.seed)  # the adapter's first weights are drawn before the host seeds
        model = prepare_ranker(model, args, peft_config)
        as_searched(model, args)
        room = query_room(model)
        if room is not None:
            several = evaluated if isinstance(evaluated, Mapping) else {"eval": evaluated}
            for name, rows in {"train": train, **several}.items():
                if hasattr(rows, "__len__"):  # those of a stream are checked batch by batch
                    room(rows.select_columns(["row", "query"]), name)
        check_output_folder(args.output_dir, checkpoint_bytes(model) if args.save_strategy != "no" else 0)
        self._sums = MetricSums()
        loss = self._make_loss(model, args, objective, reward_fn)
        self.collate = self.collator_class(
            model.preprocess,
            loss.kind,
            prompts=prompts_of(model, loss.kind),
            in_batch=loss.in_batch,
            keep_rows=reward_fn is not None,
            check=room,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluated,
            loss=loss,
            evaluator=evaluator,
            data_collator=self.collate,
            processing_class=processing_class,
            callbacks=[
                HistoryCallback(args.output_dir),
                SkipEmptySteps(lambda: self.step_is_empty),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # what transformers below 5.19 reads for loss_is_scaled_for_ga
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(
                ProgressTable(self.progress, ("loss", "reward/greedy", "ndcg@10", "mrr@10", "recall@100"))
            )
        if args.kl_weight and self.train_dataset is not None:
            self.train_dataset = self._with_start_scores(self.train_dataset)

    def _row_checks(self, args: Any, objective: Any, reward_fn: Any) -> CheckedRows:
        settings = {
            "k": args.places if objective is None else None,
            "teacher": args.needs_teacher and objective is None,
        }
        gainless = reward_fn is not None or (args.loss_type in READ_NO_GAINS and objective is None)
        return CheckedRows(
            candidate_rows,
            **settings,
            scored=gainless,
            in_batch=args.in_batch,
            keep=reward_fn is not None,
            provenance=self.reads_provenance,
            in_memory=args.redact,
        )

    def _make_loss(self, model: Any, args: Any, objective: Any, reward_fn: Any) -> RankingLoss:
        return self.ranking_loss(
            model,
            args.loss_type,
            **{"scale": args.scale, "in_batch": args.in_batch, "objective": objective},
            **{"mini_batch_size": args.mini_batch_size, "mini_batch_num_tokens": args.mini_batch_num_tokens},
            reward_fn=None if reward_fn is None else _Scored(reward_fn),
            **args.objective_settings(),
        )

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None:
            raise ValueError(f"the train set is missing: pass {self.wanted}")
        loader = super().get_train_dataloader()
        if not self.args.dataloader_drop_last or not hasattr(self.train_dataset, "__len__"):
            return loader
        rows, size = len(self.train_dataset), loader.total_batch_size
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All rows: the host leaves the last batch out where it does so in the training of several processes."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The host's card, which shows rows of the data and their statistics: not under `redact`. Without its examples
        for a widget, which are drawn with the global generator."""
        if self.args.redact:
            return
        card = self.model.model_card_data
        card.widget = card.widget or ["none"]
        super().add_model_card_callback(default_args_dict)
        card.widget = [example for example in card.widget if example != "none"]

    def get_default_loss(self, model: nn.Module) -> nn.Module:
        raise AssertionError("the loss is always given")

    # --- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the number of queries that count in the whole step."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches and self.state.global_step == 0:
            raise RowError(
                "nothing is left of the train stream: of its queries with a relevant document there is no full round "
                "of batches (processes x per_device_train_batch_size)"
            )
        if self.relist is not None:
            batches, self.relist = [self.collate(self.relist(batch["rows"].tolist())) for batch in batches], None
        if batches:
            tell_step_totals(self, batches, lambda batch: self.loss.counted(_lists(batch)).sum())
            self.loss.take_unscored()
            self._step = {"counted": batches[0]["step"]["counts"], "loss": 0.0}
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step["loss"] += loss
        if not self.accelerator.sync_gradients:
            return loss
        if self.loss.reward_fn is not None:
            loss = loss + self._leave_out_unscored()
        self._sums.add_ratio("steps/empty", float(self.step_is_empty), 1)
        return loss

    def _leave_out_unscored(self) -> Tensor | float:
        """Make the gradients of the step a mean over the queries that were scored; returns what its loss lacks."""
        unscored = torch.tensor(self.loss.take_unscored(), device=self.args.device)
        unscored, counted = int(self.accelerator.reduce(unscored, "sum")), self._step["counted"]
        if not unscored:
            return 0.0
        if unscored == counted:
            self.step_is_empty = True
            step = self.state.global_step + 1
            self.loss.tell("unscored", f"no query of step {step} could be scored: it moves nothing. Mend reward_fn")
            return 0.0
        if self.is_deepspeed_enabled:  # its step is behind us
            text = "under DeepSpeed queries that could not be scored stay in the mean, as if they said nothing"
            self.loss.tell("diluted", text)
            return 0.0
        factor = counted / (counted - unscored)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return self._step["loss"] * (factor - 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective over the queries of the optimiser step."""
        if model is self.model_wrapped and self.loss.model is not model:
            self.loss = self.override_model_in_loss(self.loss, model)
        try:
            loss = self.loss(inputs["features"], _lists(inputs))
        except NonFiniteScoresError:
            loss = torch.tensor(float("nan"))
        rows = {"queries": inputs["rows"].tolist()} if "rows" in inputs else {}
        stop_if_not_finite(self, loss, {}, rows)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        self._leave_out_repeated(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _leave_out_repeated(self, inputs: dict[str, Any]) -> None:
        """Several processes repeat rows to fill the last round of batches: those are masked."""
        if self.accelerator.num_processes == 1:
            return
        parts = gather_object([inputs["rows"].tolist()])
        for rank, rows in enumerate(parts):
            fresh = [row not in self._evaluated and row not in rows[:i] for i, row in enumerate(rows)]
            self._evaluated.update(rows)
            if rank == self.accelerator.process_index:
                keep = torch.tensor(fresh, device=inputs["rows"].device).unsqueeze(-1)
                inputs["lists"]["mask"] = inputs["lists"]["mask"] & keep

    def _with_start_scores(self, rows: Any) -> Any:
        """Rows with the scores of the model as it is now, without dropout."""
        return rows.add_column("start_scores", self._scores_of(rows))

    @torch.no_grad()
    def _scores_of(self, rows: Any) -> list[list[float]]:
        """Of the documents of each row, in eval mode."""
        training = self.model.training
        self.model.eval()
        found: list[list[float]] = []
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self.collate([rows[i] for i in range(start, min(start + size, len(rows)))]))
            lists = _lists(batch)
            scores = self.loss.scores(batch["features"], lists)
            found += [row[keep].tolist() for row, keep in zip(scores, lists.mask, strict=True)]
        self.model.train(training)
        return found

    # --- what a person sees -------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean objective and the metrics of lists; with an evaluator also its own.

        Args:
            eval_dataset: rows, or several sets by name; the trainer's if not given.
            ignore_keys, metric_key_prefix: as in transformers.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.checked_rows.each(eval_dataset)
        self.loss.take_metrics("eval")
        with torch.random.fork_rng():  # a data loader draws a seed, which is none of the training's business
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = set()
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step or during the evaluation, over all processes."""
        evaluated = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
        if "loss" in logs or evaluated is not None:
            for name, (total, count) in self.loss.take_metrics("eval" if evaluated else "train").items():
                self._sums.add_ratio(name, total, count)
            prefix = evaluated.removesuffix("loss") if evaluated else ""
            logs.update({prefix + name: value for name, value in self._sums.flush().items()})
        super().log(logs, start_time)


class CheckedRows:
    """What `candidate_rows`, or another check, makes of a set, or of several by name."""

    def __init__(self, check: Callable[..., Any], **settings: Any) -> None:
        self.check, self.settings = check, settings

    def __call__(self, data: Any, name: str) -> Any:
        if COUNTED in (getattr(data, "column_names", None) or ()):
            return data
        return self.check(data, name=name, **self.settings)

    def each(self, data: Any) -> Any:
        if data is None:
            return None
        if isinstance(data, Mapping):
            return {name: self(rows, name) for name, rows in data.items()}
        return self(data, "eval")


class _Scored:
    """A user's reward function as `losses.ranking` wants it."""

    def __init__(self, reward_fn: RankingReward) -> None:
        self.reward_fn = reward_fn

    def __call__(self, rankings: Tensor, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        samples, queries, _ = rankings.shape
        flat = [rows[q] for _ in range(samples) for q in range(queries)]
        ordered = [
            [row["documents"][d] for d in places if d < len(row["documents"])]
            for row, places in zip(flat, rankings.flatten(0, 1).tolist(), strict=True)
        ]
        columns = {
            name: [row[name] for row in flat] for name in flat[0] if name not in ("query", "row", COUNTED, LEFT_OUT)
        }
        rewards = self.reward_fn([row["query"] for row in flat], ordered, **columns)
        if not isinstance(rewards, Sequence | Tensor):
            raise ValueError(f"reward_fn must return a list of one reward a ranking, got {type(rewards).__name__}")
        if len(rewards) != len(flat):
            raise ValueError(f"reward_fn got {len(flat)} rankings and returned {len(rewards)} rewards")
        numbers = [float("nan") if reward is None else float(reward) for reward in rewards]
        return torch.tensor(numbers).view(samples, queries)


def as_searched(model: Any, args: RankingConfig) -> None:
    """Write `prompts` and `max_length` into the model: it is trained as it will be evaluated, saved and searched with.

    Raises:
        ValueError: prompts for a side that there is not, or a limit for a model that has none.
    """
    if args.max_length is not None:
        if has_static_embedding_input(model):
            raise ValueError("max_length is for transformers; static embeddings read whole texts, leave it out")
        model.max_seq_length = args.max_length
    if not args.prompts:
        return
    if kind_of(model) == "cross_encoder":
        if not isinstance(args.prompts, str):
            raise ValueError(f"prompts of a cross-encoder must be one text for the pair, got {args.prompts!r}")
        _refuse_unread(model, args.prompts)
        model.prompts, model.default_prompt_name = {**(model.prompts or {}), "pair": args.prompts}, "pair"
        return
    if not isinstance(args.prompts, Mapping) or not set(args.prompts) <= {"query", "document"}:
        raise ValueError(f"prompts must be a mapping with query, document or both, got {args.prompts!r}")
    model.prompts = {**(model.prompts or {}), **args.prompts}


def _refuse_unread(model: Any, prompt: str) -> None:
    """The prompt of a causal LM is a system message, which a chat template may leave out."""
    pair = [("query", "document")]
    if getattr(model[0], "transformer_task", None) == "text-generation" and torch.equal(
        model.preprocess(pair, prompt=prompt)["input_ids"], model.preprocess(pair)["input_ids"]
    ):
        raise ValueError(
            "the chat template of this causal LM does not read prompts; make the model with causal_reranker(..., "
            "instruction=...), and leave prompts out"
        )


def prepare_ranker(model: str | os.PathLike | nn.Module, args: RankingConfig, peft_config: Any = None) -> Any:
    """Load the model if it is a name, and add the adapter.

    Raises:
        ValueError: of no kind that can rank, nothing to train, or an adapter where there is no transformer.
    """
    if isinstance(model, str | os.PathLike):
        kind = "bi_encoder" if args.model_kind == "auto" else args.model_kind
        model = load_ranker(model, kind, model_kwargs=dict(args.model_init_kwargs or {}))
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs are for loading by name; this model is already an object, drop them")
    kind_of(model)
    if any(type(module).__name__ == "Router" for module in model.modules()):
        raise ValueError(
            "a Router has a tower for each side, and lists are not routed here; use RankingLoss with sentence-"
            "transformers' own trainer and its router_mapping"
        )
    model.model_card_data.local_files_only = True  # else the card asks the hub about a folder's name
    if peft_config is not None:
        if not model.has_peft_compatible_model():
            raise ValueError(
                "peft_config needs a model with a transformer, and this one has none; train all its weights"
            )
        model.add_adapter(peft_config)
        if args.gradient_checkpointing:
            model.transformers_model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    quantised = (
        bool(getattr(model.transformers_model, "is_quantized", False))
        if hasattr(model, "transformers_model")
        else False
    )
    if not trained or (quantised and peft_config is None and not _has_adapter(model)):
        raise ValueError(
            "the model has no parameters that can be trained"
            + ("; 4-bit and 8-bit weights need peft_config=LoraConfig(...)" if quantised else "")
        )
    if args.disable_dropout:
        disable_dropout(model)
    return keep_gradients(model)


def _has_adapter(model: Any) -> bool:
    return bool(getattr(model.transformers_model, "_hf_peft_config_loaded", False))


def _lists(batch: Mapping[str, Any]) -> Lists:
    step = batch.get("step")
    more = {} if step is None else {"total": float(step["counts"]), "share": float(step["share"])}
    return Lists(**batch["lists"], rows=batch.get("texts"), **more)
