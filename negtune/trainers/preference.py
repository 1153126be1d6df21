"""Preference tuning: the better of two answers up over the worse one, both in one forward pass.

Shapes: B pairs; a batch has 2 B rows, the chosen answers first. An objective returns `[B]` and is averaged over the
pairs of the optimiser step, over all micro-batches and processes; the host divides by accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from negtune._trl_compat import BaseTrainer
from negtune.data.batching import TokenBudgetBatches
from negtune.data.completions import padding_id
from negtune.data.preference import PAIR, answer, collate_pairs, tokenize_pairs
from negtune.losses.preference import PREFERENCE_LOSSES
from negtune.models.forward import completion_logps, scored_tokens
from negtune.models.reference import Reference
from negtune.models.sharing import packs_in_training, take_counts
from negtune.models.structure import causal_lm
from negtune.ops import SequenceLogps, needs_of
from negtune.trainers.config import PolicyConfig, bind_objective
from negtune.trainers.progress import HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.references import LogpCache, choose_reference
from negtune.trainers.setup import arrives_with_adapter, set_up_policy, tokenizer_of
from negtune.trainers.steps import EpochSetter, stop_if_not_finite, tell_step_totals

PROGRESS = (
    ("step", "step", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("chosen/logp", "chosen logp/tok", "{:.3f}"),
    ("rejected/logp", "rejected logp/tok", "{:.3f}"),
    ("chosen/log_ratio", "chosen ratio", "{:+.3f}"),
    ("rejected/log_ratio", "rejected ratio", "{:+.3f}"),
    ("margin", "margin", "{:+.3f}"),
    ("accuracy", "accuracy", "{:.2f}"),
    ("grad_norm", "grad norm", "{:.2f}"),
)


@dataclass
class PreferenceConfig(PolicyConfig):
    """`PolicyConfig`, plus how pairs are compared. `per_device_train_batch_size` counts *pairs*."""

    loss_type: str = field(
        default="dpo", metadata={"help": "Objective: one of negtune.losses.preference.PREFERENCE_LOSSES."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "beta of the objective; its own default if not given. Must be positive."}
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further hyper-parameters of the objective."}
    )

    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch on each process, in place of per_device_train_batch_size: pairs of similar "
            "length fill it, redrawn every epoch, so that little is padding. Where prefixes are shared a prompt counts "
            "once."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "With tokens_per_batch: pairs of one prompt stay in one batch; prefix sharing computes it once."
        },
    )

    _VALID_DICT_FIELDS = [*PolicyConfig._VALID_DICT_FIELDS, "loss_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_batch is not None:
            if self.tokens_per_batch < 1:
                raise ValueError(f"tokens_per_batch must be positive, got {self.tokens_per_batch}")
            if self.accelerator_config.split_batches:
                raise ValueError(
                    "tokens_per_batch is for each process; set split_batches to false in accelerator_config"
                )
        elif self.group_by_prompt:
            raise ValueError("group_by_prompt needs tokens_per_batch: a fixed number of pairs may tear a prompt apart")
        self.objective()

    def objective(self) -> Any:
        """The objective with its hyper-parameters bound."""
        given = {} if self.beta is None else {"beta": self.beta}
        return bind_objective(PREFERENCE_LOSSES, self.loss_type, {**(self.loss_kwargs or {}), **given}, "loss_type")


class PreferenceTrainer(BaseTrainer):
    """Fine-tune a causal LM on pairs of a better and a worse answer.

    Args:
        model: hub id, path, transformers causal LM, or `PeftModel`. A `PeftModel` is taken as the fine-tuned state:
            its adapter goes on training and a frozen twin of it is the reference.
        args: settings; `loss_type` names the objective.
        train_dataset: pairs in TRL's preference format (`prompt`, `chosen`, `rejected`; text or chat; implicit prompts
            too), as `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`) or a list.
        eval_dataset: pairs; `evaluate` gives `eval_loss`, `eval_accuracy`, `eval_margin` and each side's own numbers.
        processing_class: tokenizer; loaded with the model if the model is a name.
        peft_config: adapter to add; the base weights are then the reference.
        reference: `Reference` or model to compare with instead of what `args.reference` says.
        objective: `(chosen, rejected) -> [B]`, to use instead of the named one.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ["negtune", "preference"]
    _name = "Preference"
    _paper = {
        "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "id": "2305.18290",
    }

    def __init__(
        self,
        model: str | nn.Module,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        reference: Reference | nn.Module | None = None,
        objective: Callable[..., Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or PreferenceConfig()
        self.objective = objective or args.objective()
        needs = needs_of(self.objective)
        if not needs.logps_suffice or needs.sides != set(PAIR):
            raise ValueError("objective must take chosen and rejected, both SequenceLogps, and nothing else")
        processing_class = processing_class or tokenizer_of(model)
        if train_dataset is None:
            raise ValueError("train_dataset is missing: pass pairs with prompt, chosen and rejected")
        if isinstance(train_dataset, Mapping):
            raise ValueError(f"train_dataset must be one set of pairs, got {sorted(train_dataset)}; pass one of them")
        self._tokenize = partial(
            tokenize_pairs,
            tokenizer=processing_class,
            max_length=args.max_length,
            overlong=args.overlong,
            in_memory=args.redact,
        )
        train = self._tokenize(train_dataset, name="train")
        evaluated = self._tokenized_for_evaluation(eval_dataset)
        if needs.step and "chosen_step" not in (getattr(train, "column_names", None) or ("chosen_step",)):
            raise ValueError(
                f"{args.loss_type} needs tokenised rows with chosen_step and rejected_step, which say where the two "
                "answers part (negtune steps pairs writes them); use dpo for whole answers"
            )
        arrived_with_adapter = arrives_with_adapter(model)
        if args.tokens_per_batch is not None and not hasattr(train, "__len__"):
            raise ValueError("tokens_per_batch needs the rows beforehand; a stream needs per_device_train_batch_size")
        model = set_up_policy(model, args, peft_config)
        self._batches: TokenBudgetBatches | None = None
        self._sums, self._eval_rows = MetricSums(), {}
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_pairs, pad_token_id=padding_id(processing_class)),
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processing_class,
            callbacks=[EpochSetter(lambda: self._batches), HistoryCallback(args.output_dir), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressTable(PROGRESS, ("loss", "accuracy", "margin")))
        cache = LogpCache.for_trainer(self, self._rows_to_cache)
        known_beforehand = all(hasattr(rows, "__len__") for rows in self._sets())
        with self.accelerator.autocast():
            self.reference = choose_reference(
                args.reference,
                self.model,
                [needs],
                arrived_with_adapter=arrived_with_adapter,
                cache=cache if known_beforehand else None,
                given=reference,
            )

    def _sets(self) -> list[Any]:
        """The training set and every evaluation set."""
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        return [rows for rows in (self.train_dataset, *evaluated.values()) if rows is not None]

    def _rows_to_cache(self) -> Iterator[Mapping[str, Any]]:
        for rows in self._sets():
            for row in rows:
                yield from (answer(row, side) for side in PAIR)

    def _tokenized_for_evaluation(self, data: Any) -> Any:
        """One set of pairs, or several by name; what is tokenised already is left alone."""
        if data is None or isinstance(data, str):
            return data
        if isinstance(data, Mapping):
            return {name: self._tokenized_for_evaluation(rows) for name, rows in data.items()}
        if {"prompt_ids", "tied"} <= set(getattr(data, "column_names", None) or ()):
            return data
        return self._tokenize(data, name="eval")

    def get_train_dataloader(self) -> DataLoader:
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        units, sizes = _units(
            self.train_dataset,
            by_prompt=self.args.group_by_prompt,
            shared=packs_in_training(causal_lm(self.model)),
        )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._batches = TokenBudgetBatches(
            units, sizes, self.args.tokens_per_batch, seed=seed, processes=self.accelerator.num_processes
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the number of pairs of the whole step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            tell_step_totals(self, batches, lambda batch: torch.tensor(len(batch["rows"])))
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective over the pairs of the optimiser step."""
        step = inputs.get("step") or {"counts": len(inputs["rows"]), "share": 1}
        pair = self._pair(model, inputs)
        values = self.objective(**pair)
        loss = values.sum() / step["counts"] * step["share"]
        stop_if_not_finite(self, loss, inputs, {"pairs": inputs["rows"].tolist()})
        self._record(pair, values, inputs["rows"] if not model.training else None)
        return (loss, {"values": values}) if return_outputs else loss

    def _pair(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, SequenceLogps]:
        ref_logps = None
        if self.reference is not None:
            with self.accelerator.autocast():  # a frozen copy is not wrapped by the host
                ref_logps = self.reference.logps(model, inputs)
        logps, mask, pairs = completion_logps(model, inputs), scored_tokens(inputs).mask, len(inputs["rows"])
        sides = {"chosen": slice(0, pairs), "rejected": slice(pairs, 2 * pairs)}
        step = inputs.get("step_mask")
        return {
            side: SequenceLogps(logps[rows], mask[rows], *(None if x is None else x[rows] for x in (ref_logps, step)))
            for side, rows in sides.items()
        }

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    @torch.no_grad()
    def _record(self, pair: Mapping[str, SequenceLogps], values: Tensor, evaluated: Tensor | None) -> None:
        """Each side apart: a margin can grow while both answers become less likely.

        In an evaluation by row number: several processes repeat rows to fill the last round of batches.
        """
        chosen, rejected = pair["chosen"], pair["rejected"]
        margin = chosen.sums - rejected.sums if chosen.ref_logps is None else chosen.log_ratio - rejected.log_ratio
        found = {"margin": margin, "accuracy": (margin > 0).float()}
        for side, sequence in pair.items():
            found[f"{side}/logp"] = sequence.means
            if sequence.ref_logps is not None:
                found[f"{side}/log_ratio"] = sequence.log_ratio
        if evaluated is None:
            for name, numbers in found.items():
                self._sums.add(name, numbers)
            return
        columns = {name: numbers.float().tolist() for name, numbers in {**found, "loss": values}.items()}
        for i, row in enumerate(evaluated.tolist()):
            self._eval_rows[row] = {name: numbers[i] for name, numbers in columns.items()}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean objective (`eval_loss`), accuracy, margin and each side's numbers over the pairs of an evaluation set.

        Args:
            eval_dataset: pairs, or several sets by name; the trainer's if not given.
            ignore_keys, metric_key_prefix: as in transformers.
        """
        return super().evaluate(self._tokenized_for_evaluation(eval_dataset), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_rows = {}
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step or during the evaluation, over all processes."""
        if "loss" in logs:
            self._sums.add_tokens(take_counts(causal_lm(self.model)))
            logs.update(self._sums.flush())
        evaluated = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
        if evaluated is not None:
            rows = {row: found for part in gather_object([self._eval_rows]) for row, found in part.items()}
            prefix, columns = evaluated.removesuffix("loss"), next(iter(rows.values()))
            logs.update({prefix + name: sum(found[name] for found in rows.values()) / len(rows) for name in columns})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.create_model_card()

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _units(rows: Any, *, by_prompt: bool, shared: bool) -> tuple[list[list[int]], list[int]]:
    """Pairs, or groups of pairs with one prompt, and the tokens each costs: `shared` prompts once, else padded rows."""
    prompts, chosen, rejected = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    units: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        units.setdefault(tuple(prompt) if by_prompt else i, []).append(i)
    sizes = []
    for members in units.values():
        answers = [len(side[i]) for i in members for side in (chosen, rejected)]
        prompt = len(prompts[members[0]])
        sizes.append(prompt + sum(answers) if shared else (prompt + max(answers)) * len(answers))
    return list(units.values()), sizes
