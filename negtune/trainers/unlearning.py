"""Unlearning: push forget rows down, hold retain rows, one forward for both.

Shapes: B rows of one side, T completion tokens, N scored tokens. An objective that returns `[B]` is averaged over the
rows of the optimiser step, one that returns `[B T]` over its tokens; both counts run over all micro-batches and all
processes, so accumulation and the number of processes change nothing. The host divides by accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from negtune._trl_compat import BaseTrainer
from negtune.data.completions import padding_id
from negtune.data.pairing import EpochSampler, ForgetRetainDataset, ForgetRetainStream
from negtune.data.sides import SIDES, collate_sides, part_of, side_batch, side_counts, side_slices, trimmed
from negtune.data.unlearning import prepare_sides
from negtune.eval.unlearning import check_sets, evaluate
from negtune.losses.unlearning import RETAIN_LOSSES, npo_weight
from negtune.models.forward import check_layer, run, scored_tokens
from negtune.models.head import LogitsHead
from negtune.models.reference import PolicyReference, Reference
from negtune.models.sharing import take_counts
from negtune.models.structure import causal_lm
from negtune.ops import (
    LayerActivations,
    Needs,
    SequenceLogps,
    TokenDistributions,
    needs_of,
    scatter_tokens,
    tiled_token_values,
    token_logps,
)
from negtune.trainers.card import write_unlearning_card
from negtune.trainers.progress import HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.references import LogpCache, choose_reference
from negtune.trainers.setup import arrives_with_adapter, set_up_policy, tokenizer_of
from negtune.trainers.steps import EpochSetter, has_ended, stop_if_not_finite, tell_step_totals
from negtune.trainers.steps import NonFiniteLossError as NonFiniteLossError
from negtune.trainers.unlearning_config import UnlearningConfig


class UnlearningTrainer(BaseTrainer):
    """Fine-tune a causal LM to forget.

    Args:
        model: hub id, path, transformers causal LM, or `PeftModel`. A `PeftModel` is taken as the fine-tuned state:
            its adapter goes on training and a frozen twin of it is the reference.
        args: settings; `loss_type` names the objective.
        train_dataset: `{"forget": rows, "retain": rows}`; rows in TRL's prompt/completion or conversational format, as
            `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`) or a list. Forget rows may carry
            `alternative`, a string or a list of strings. `retain` may be absent with `retain_loss_type="none"`.
        eval_dataset: `{name: rows}`, for `negtune.eval.unlearning.evaluate`: `forget`, `retain`, `real_authors` ...
        processing_class: tokenizer; loaded with the model if the model is a name.
        peft_config: adapter to add; the base weights are then the reference.
        reference: `Reference` or model to compare with instead of what `args.reference` says.
        forget_loss, retain_loss: objectives to use instead of the named ones.
        oracle: truth ratios of a retain-only model, for forget quality; see `evaluate`.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ["negtune", "unlearning"]
    _name = "Unlearning"

    def __init__(
        self,
        model: str | nn.Module,
        args: UnlearningConfig | None = None,
        train_dataset: Mapping[str, Any] | None = None,
        eval_dataset: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        reference: Reference | nn.Module | None = None,
        forget_loss: Callable[..., Tensor] | None = None,
        retain_loss: Callable[..., Tensor] | None = None,
        oracle: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args or UnlearningConfig()
        self.forget_loss = forget_loss or args.forget_objective()
        self.retain_loss = retain_loss or args.retain_objective()
        self.forget_needs = needs_of(self.forget_loss)
        self.retain_needs = needs_of(self.retain_loss) if self.retain_loss else Needs()
        processing_class = processing_class or tokenizer_of(model)
        datasets = prepare_sides(
            train_dataset,
            processing_class,
            max_length=args.max_length,
            overlong=args.overlong,
            with_alternatives=bool(self.forget_needs.sides & {"alternative", "z0"}),
            retain_needed_by=args.retain_loss_type if self.retain_loss is not None else None,
            retain_per_forget=args.retain_per_forget,
            seed=_data_seed(args),
            in_memory=args.redact,
        )
        arrived_with_adapter = arrives_with_adapter(model)
        model = set_up_policy(model, args, peft_config)
        self.layers = self._checked_layers(model)
        if args.ddp_find_unused_parameters is None:  # nothing above RMU's layer gets a gradient
            args.ddp_find_unused_parameters = bool(self.layers)
        if isinstance(datasets, ForgetRetainStream) and args.dataloader_num_workers > 0:
            raise ValueError("streams are read in the training process; set dataloader_num_workers to 0")
        if eval_dataset is not None and not isinstance(eval_dataset, Mapping):
            raise ValueError('eval_dataset must be {"forget": rows, "retain": rows, ...}: a name for every set')
        eval_sets = {name: list(rows) for name, rows in (eval_dataset or {}).items()}
        check_sets(eval_sets, processing_class, max_length=args.max_length, oracle=oracle)
        self.oracle, self._sums, self._epoch_sampler = oracle, MetricSums(), None
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_sides, pad_token_id=padding_id(processing_class)),
            train_dataset=datasets,
            eval_dataset=eval_sets or None,
            processing_class=processing_class,
            callbacks=[EpochSetter(lambda: self._epoch_sampler), HistoryCallback(args.output_dir), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressTable())
        cache = LogpCache.for_trainer(self, self._rows_to_cache)
        with self.accelerator.autocast():
            self.reference = choose_reference(
                args.reference,
                self.model,
                [self.forget_needs, self.retain_needs],
                arrived_with_adapter=arrived_with_adapter,
                cache=cache if isinstance(datasets, ForgetRetainDataset) else None,
                given=reference,
            )

    def _checked_layers(self, model: nn.Module) -> list[int]:
        """The layer whose activations the objectives read, if any, as a list."""
        layers = sorted({n.layer for n in (self.forget_needs, self.retain_needs) if n.layer is not None})
        if len(layers) > 1:
            raise ValueError(
                f"the forget objective reads layer {self.forget_needs.layer} and the retain objective layer "
                f"{self.retain_needs.layer}; set the same layer in loss_kwargs and retain_loss_kwargs"
            )
        for layer in layers:
            check_layer(model, layer)
        return layers

    # --- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, ForgetRetainDataset):
            return None
        self._epoch_sampler = EpochSampler(len(dataset), _data_seed(self.args))
        return self._epoch_sampler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the row and token counts of the whole step."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            z0 = self._z0(batches) if "z0" in self.forget_needs.sides else None
            tell_step_totals(self, batches, side_counts, z0=z0)
        return batches, items

    @torch.no_grad()
    def _z0(self, batches: list[dict[str, Any]]) -> Tensor:
        """Mean log-ratio of the alternative answers over the optimiser step and all processes (KTO's z0)."""
        total = torch.zeros(2, device=self.args.device)
        for batch in batches:
            side = side_batch(batch, "alternative")
            with self.compute_loss_context_manager():
                ref_logps = self.reference.logps(self.model_wrapped, side)
                policy = PolicyReference().logps(self.model_wrapped, side)
            ratios = SequenceLogps(policy, scored_tokens(side).mask, ref_logps).log_ratio
            total += torch.stack([ratios.float().sum(), torch.tensor(float(len(ratios)), device=total.device)])
        total = self.accelerator.reduce(total, "sum")
        return total[0] / total[1]

    # --- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """forget_weight x forget objective + retain_weight x retain objective, scaled for the optimiser step."""
        step = inputs.get("step") or {"counts": side_counts(inputs).tolist(), "share": 1, "z0": None}
        outputs = self._forward(model, inputs)
        sequences = {side: outputs[side] for side in SIDES if side in outputs}
        available = {**sequences, "z0": step["z0"]}
        forget = outputs.get("forget_value")
        if forget is None:
            forget = self.forget_loss(**{side: available[side] for side in self.forget_needs.sides})
        loss = self.args.forget_weight * _reduce(forget, _objective_side(self.forget_needs), step)
        if self.retain_loss is not None:
            retain = outputs.get("retain_value")
            retain = self.retain_loss(sequences["retain"]) if retain is None else retain
            loss = loss + self.args.retain_weight * _reduce(retain, "retain", step)
        rows = inputs["rows"].tolist()
        by_side = {side: rows[at] for side, at in side_slices(inputs["sides"]).items()}
        bounded = "a bounded objective (npo, simnpo) in place of an unbounded one (grad_ascent)"
        stop_if_not_finite(self, loss, inputs, by_side, instead=bounded)
        self._record(sequences, outputs)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """`SequenceLogps` per side, and the values of objectives that read whole distributions."""
        tokens = scored_tokens(inputs)
        sides = {side: rows for side, rows in side_slices(inputs["sides"]).items() if rows.stop > rows.start}
        masks = {side: trimmed(tokens.mask[rows]) for side, rows in sides.items()}
        references = {side: self._reference_side(model, inputs, side) for side in sides}
        kl_now = self._retain_kl_is_due(sides)

        def score(hidden: Tensor, head: LogitsHead, layers: Mapping[int, Tensor]) -> dict[str, Tensor]:
            out = {}
            for side, rows in sides.items():
                part = part_of(tokens.mask, rows)
                inside, mask, needed = hidden[part], masks[side], self._needs(side)
                targets = tokens.targets[part]
                ref_hidden, ref_head = references[side].get("hidden", (None, None))
                distributions = TokenDistributions(inside, targets, mask, head, ref_hidden, ref_head)
                if side in needed.sides and not needed.logps_suffice:
                    view: Any = distributions
                    if needed.activations:
                        view = LayerActivations(layers[needed.layer][part], mask, references[side].get("activations"))
                        out[f"{side}_norm"] = layers[needed.layer][part].detach().norm(dim=-1)
                    out[f"{side}_value"] = (self.forget_loss if side == "forget" else self.retain_loss)(view)
                graph = nullcontext() if side in needed.sides and needed.logps_suffice else torch.no_grad()
                with graph:
                    out[side] = scatter_tokens(tiled_token_values(token_logps, inside, targets, head), mask)
                if side == "retain" and kl_now:
                    with torch.no_grad():
                        out["retain_kl"] = RETAIN_LOSSES["kl"](distributions)
            return out

        out: dict[str, Any] = run(model, inputs, tokens, score, self.layers)
        for side in sides:
            out[side] = SequenceLogps(out[side], masks[side], references[side].get("logps"))
        return out

    def _needs(self, side: str) -> Needs:
        return self.retain_needs if side == "retain" else self.forget_needs

    def _reference_side(self, model: nn.Module, inputs: dict[str, Any], side: str) -> dict[str, Any]:
        """What the reference has to say about one side: log-probabilities, hidden states, activations, or nothing."""
        needed, found = self._needs(side), {}
        kl_now = side == "retain" and self._retain_kl_is_due({"retain": None} if inputs["sides"]["retain"] else {})
        if self.reference is None or not (needed.reference or kl_now):
            return found
        batch = side_batch(inputs, side)
        with self.accelerator.autocast():  # a frozen copy is not wrapped by the host
            if needed.reference and needed.logps_suffice and side in needed.sides | {"forget"}:
                found["logps"] = self.reference.logps(model, batch)
            if (needed.reference and needed.distributions) or kl_now:
                found["hidden"] = self.reference.hidden(model, batch, scored_tokens(batch))
            if needed.reference and needed.activations:
                found["activations"], _ = self.reference.hidden(model, batch, scored_tokens(batch), needed.layer)
        return found

    def _retain_kl_is_due(self, sides: Mapping[str, Any]) -> bool:
        """KL to the reference on retain rows is measured on logging steps only: it costs one more forward."""
        if self.reference is None or not self.reference.has_hidden or "retain" not in sides:
            return False
        every = max(1, int(self.state.logging_steps or 1)) if self.is_in_train else 1
        return (self.state.global_step + 1) % every == 0

    def _rows_to_cache(self) -> Iterator[Mapping[str, Any]]:
        """Every row whose reference log-probabilities an objective may ask for."""
        for row in self.train_dataset.forget:
            yield row
            if self.forget_needs.sides & {"alternative", "z0"}:
                yield from row["alternatives"]
        if self.retain_needs.reference:
            yield from self.train_dataset.retain

    # --- what a person sees -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, sequences: Mapping[str, SequenceLogps], outputs: Mapping[str, Any]) -> None:
        """Positives and negatives apart: log-probabilities, probabilities, and how hard NPO still pushes.

        With RMU also the norm of the activations, which `steering` has to stand out from.
        """
        for side, sequence in sequences.items():
            if f"{side}_norm" in outputs:
                self._sums.add(f"{side}/activation_norm", outputs[f"{side}_norm"])
            self._sums.add(f"{side}/logp", sequence.means)
            self._sums.add(f"{side}/probability", sequence.means.exp())
            if sequence.ref_logps is not None:
                self._sums.add(f"{side}/log_ratio", sequence.log_ratio)
        forget = sequences.get("forget")
        if forget is not None and forget.ref_logps is not None and self.args.loss_type == "npo":
            beta = self.args.beta if self.args.beta is not None else 0.1
            self._sums.add_quantiles("forget/weight", npo_weight(forget.log_ratio, beta=beta))
        if "retain_kl" in outputs:
            self._sums.add("retain/kl", outputs["retain_kl"][sequences["retain"].mask])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step, over all processes."""
        if "loss" in logs:
            self._sums.add_tokens(take_counts(causal_lm(self.model)))
            logs.update(self._sums.flush())
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Mapping[str, Any] | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score `eval_dataset` (or the trainer's) with `negtune.eval.unlearning.evaluate`, on all processes.

        Returns:
            `eval_forget/probability`, `eval_retain/probability` and so on, `eval_separation` (retain minus forget
            probability), and `eval_forget_quality_x_model_utility` where both exist: names for `metric_for_best_model`.
        """
        sets = eval_dataset or self.eval_dataset
        if not sets:
            raise ValueError("nothing to evaluate: pass eval_dataset={'forget': rows, 'retain': rows}")
        with self.accelerator.autocast():
            result = evaluate(
                self.model,
                self.processing_class,
                sets,
                batch_size=self.args.per_device_eval_batch_size,
                max_length=self.args.max_length,
                max_new_tokens=self.args.eval_max_new_tokens,
                generate=self.args.eval_generate,
                oracle=self.oracle,
                redact=self.args.redact,
            ).metrics
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in {**result, **_composites(result)}.items() if v is not None}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write `README.md`: objective, paper, settings, and what switching the adapter off would undo."""
        if self.is_world_process_zero():
            write_unlearning_card(self, self.args.output_dir, model_name, dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            write_unlearning_card(self, output_dir or self.args.output_dir)

    def _send_telemetry(self) -> None:
        """Nothing is sent: what people unlearn is nobody's business."""


def _reduce(value: Tensor, side: str, step: Mapping[str, Any]) -> Tensor:
    """Sum over rows `[B]` or tokens `[B T]`, divided by their number in the whole step; see the module docstring."""
    rows, tokens = step["counts"][SIDES.index(side)]
    return value.sum() / max(1.0, rows if value.dim() == 1 else tokens) * step["share"]


def _objective_side(needs: Needs) -> str:
    """The side whose rows and tokens a forget objective is averaged over."""
    return "forget" if "forget" in needs.sides else "alternative"


def _composites(metrics: Mapping[str, float | None]) -> dict[str, float]:
    found = {}
    forget, retain = metrics.get("forget/probability"), metrics.get("retain/probability")
    if forget is not None and retain is not None:
        found["separation"] = retain - forget
    quality, utility = metrics.get("forget_quality"), metrics.get("model_utility")
    if quality is not None and utility is not None:
        found["forget_quality_x_model_utility"] = quality * utility
    return found


def _data_seed(args: UnlearningConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed
