"""Preference tuning: the better of two answers up over the worse one, both in one forward pass.

Pairs come from a data set, from fresh samples that something scored, or from both in every optimiser step.

Shapes: B pairs, T tokens of the longest answer; a batch has 2 B rows, the chosen answers first. An objective returns
`[B]` and is averaged over the pairs of the optimiser step, over all micro-batches and processes; the host divides by
accumulation steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
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
from negtune.data.preference import PAIR, answer, collate_pairs, pair_units, tokenize_pairs
from negtune.data.prompts import ShuffledPrompts, StreamedPrompts
from negtune.losses.policy import kl_to_reference
from negtune.losses.preference import chosen_nll
from negtune.models.forward import completion_logps, scored_tokens
from negtune.models.moving import MovingReference
from negtune.models.reference import Reference
from negtune.models.sharing import packs_in_training, take_counts
from negtune.models.structure import causal_lm, unwrapped
from negtune.ops import Needs, SequenceLogps, masked_mean, masked_sum, needs_of
from negtune.rollouts.sampler import Sampler
from negtune.trainers.displacement import FollowedPairs, evenly_spaced, measure_gradients
from negtune.trainers.guards import Guards, displaced_chosen, lost_entropy
from negtune.trainers.on_policy import (
    ROUND_FILE,
    OnPolicy,
    RoundBatches,
    checkpoint_of,
    column_names,
    prepare_for_prompts,
    read_state,
    scorer_of,
    write_state,
)
from negtune.trainers.preference_checks import (
    are_pairs,
    check_evaluation,
    check_fresh,
    refuse_fresh,
    refuse_judged_prompts,
    refuse_scorers,
)
from negtune.trainers.preference_config import PreferenceConfig as PreferenceConfig
from negtune.trainers.progress import HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.references import LogpCache, choose_reference
from negtune.trainers.rounds import StepCredit
from negtune.trainers.setup import arrives_with_adapter, set_up_policy, tokenizer_of
from negtune.trainers.steps import EpochSetter, SkipEmptySteps, has_ended, stop_if_not_finite, tell_step_totals
from negtune.verifiers.judge import Judge, JudgeVerifier
from negtune.verifiers.verdict import Verifier

REFERENCE_FILE = "reference.safetensors"
PROGRESS = (
    ("step", "step", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("rounds/reward", "reward", "{:.3f}"),
    ("rounds/ties", "ties", "{:.2f}"),
    ("chosen/logp", "chosen logp/tok", "{:.3f}"),
    ("rejected/logp", "rejected logp/tok", "{:.3f}"),
    ("chosen/log_ratio", "chosen ratio", "{:+.3f}"),
    ("rejected/log_ratio", "rejected ratio", "{:+.3f}"),
    ("margin", "margin", "{:+.3f}"),
    ("accuracy", "accuracy", "{:.2f}"),
    ("grad_norm", "grad norm", "{:.2f}"),
)


class PreferenceTrainer(BaseTrainer):
    """Fine-tune a causal LM on pairs of a better and a worse answer.

    Without a `sampler` it trains on the pairs of a data set. With one it draws `num_generations` answers to each prompt
    from the policy, scores them, makes pairs of them (`pair_selection`) and trains on those, alone or beside pairs of
    the data set (`on_policy_fraction`).

    Args:
        model: hub id, path, transformers causal LM, or `PeftModel`. A `PeftModel` is taken as the fine-tuned state:
            its adapter goes on training and a frozen twin of it is the reference.
        args: settings; `loss_type` names the objective.
        train_dataset: pairs in TRL's preference format (`prompt`, `chosen`, `rejected`; text or chat; implicit prompts
            too), as `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`) or a list. With a sampler:
            rows with `prompt` and the columns that the scorer wants; for `on_policy_fraction` below 1 such rows that
            have `chosen` and `rejected` too, or a mapping of `prompts` and `pairs`.
        eval_dataset: pairs; `evaluate` gives `eval_loss`, `eval_accuracy`, `eval_margin` and each side's own numbers.
            With a sampler also prompts: then `eval_reward` and what else `eval.solving` measures. Or several sets by
            name.
        processing_class: tokenizer; loaded with the model if the model is a name.
        peft_config: adapter to add; the base weights are then the reference.
        sampler: draws from the policy, or `(model, tokenizer) -> sampler`, called once the model is set up.
        reward_funcs: TRL reward functions, one or several (`reward_weights`), reward models, or their names. None as a
            reward is unscored: such an answer is in no pair.
        verifier: scores instead of reward functions.
        judge: compares two answers instead; see `negtune.verifiers.judge`.
        step_credit: gives numbers to the steps of fresh answers, for `pair_selection=first_pit`; see
            `rounds.StepCredit`.
        reference: `Reference` or model to compare with instead of what `args.reference` says.
        objective: `(chosen, rejected) -> [B]`, to use instead of the named one.
        reward_processing_classes: tokenizers of reward models, as in TRL.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
        StaleEngineError: the sampler does not draw from the model that is trained.
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
        sampler: Sampler | Callable[[nn.Module, Any], Sampler] | None = None,
        reward_funcs: Any = None,
        verifier: Verifier | None = None,
        judge: Judge | None = None,
        step_credit: StepCredit | None = None,
        reference: Reference | nn.Module | None = None,
        objective: Callable[..., Tensor] | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = copy.copy(args) if args is not None else PreferenceConfig()  # which gets a number of steps
        self.args = args
        self.objective = objective or args.objective()
        needs = needs_of(self.objective)
        if not needs.logps_suffice or needs.sides != set(PAIR):
            raise ValueError("objective must take chosen and rejected, both SequenceLogps, and nothing else")
        needed = [needs, Needs(reference=args.kl_weight > 0)]
        if args.reference_decay is not None and (reference is not None or not any(n.reference for n in needed)):
            raise ValueError(
                "reference_decay moves a reference of the policy's own; leave it out where a reference is passed, or "
                f"where loss_type={args.loss_type} reads none"
            )
        self.on_policy: OnPolicy | None = None
        self._draws, self._judge = sampler is not None, judge
        processing_class = processing_class or tokenizer_of(model)
        self._tokenize = partial(
            tokenize_pairs,
            tokenizer=processing_class,
            max_length=args.max_length,
            overlong=args.overlong,
            in_memory=args.redact,
        )
        if sampler is None:
            refuse_scorers(reward_funcs, verifier, judge, step_credit)
            refuse_fresh(args)
            train, scorer, self._offline = self._pairs_of(train_dataset, needs), None, None
        else:
            scorer = self._scorer(reward_funcs, verifier, judge, reward_processing_classes)
            check_fresh(args, needs, step_credit)
            check_evaluation(args, eval_dataset, judge)
            train, self._offline = self._prompts_of(train_dataset, needs)
            prepare_for_prompts(args, train)
        arrived_with_adapter = arrives_with_adapter(model)
        model = set_up_policy(model, args, peft_config)
        self._batches: TokenBudgetBatches | None = None
        self._sums, self._eval_rows = MetricSums(), {}
        self._followed = FollowedPairs()
        self.guards = Guards(
            displaced_chosen(args.displacement_guard, args.max_chosen_drop),
            lost_entropy(args.entropy_guard, args.min_entropy),
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_pairs, pad_token_id=padding_id(processing_class)),
            train_dataset=train,
            eval_dataset=self._tokenized_for_evaluation(eval_dataset),
            processing_class=processing_class,
            callbacks=[
                EpochSetter(lambda: self._batches),
                HistoryCallback(args.output_dir),
                SkipEmptySteps(self._is_empty),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressTable(PROGRESS, ("loss", "accuracy", "margin", "reward")))
        self.reference = self._reference_for(needed, arrived_with_adapter, reference)
        if sampler is not None:
            once = args.reuse > 1 and self._offline is None and args.reference_decay is None
            self.on_policy = OnPolicy(
                self,
                sampler,
                scorer,
                step_credit,
                followed=args.displacement_pairs,
                besides=self._besides(),
                prepare=self._with_reference if once and self.reference is not None else None,
            )

    # --- what is trained on -------------------------------------------------------------------------------------------

    def _pairs_of(self, data: Any, needs: Needs, name: str = "train") -> Any:
        """The data set's pairs, tokenised."""
        if data is None:
            raise ValueError("train_dataset is missing: pass pairs with prompt, chosen and rejected")
        if isinstance(data, Mapping):
            raise ValueError(f"train_dataset must be one set of pairs, got {sorted(data)}; pass one of them")
        if not hasattr(data, "__len__") and self.args.tokens_per_batch is not None:
            raise ValueError("tokens_per_batch needs the rows beforehand; a stream needs per_device_train_batch_size")
        if not hasattr(data, "__len__") and not self._draws and self.args.displacement_guard in ("anchor", "stop"):
            raise ValueError(
                f"displacement_guard={self.args.displacement_guard} follows pairs of the data set, which a stream has "
                "not beforehand; set it to off, or pass a set with a length"
            )
        rows = self._tokenize(data, name=name)
        if needs.step and "chosen_step" not in (getattr(rows, "column_names", None) or ("chosen_step",)):
            raise ValueError(
                f"{self.args.loss_type} needs tokenised rows with chosen_step and rejected_step, which say where the "
                "two answers part (negtune steps pairs writes them); use dpo for whole answers"
            )
        return rows

    def _prompts_of(self, data: Any, needs: Needs) -> tuple[Any, Any]:
        """Prompts to draw from, and tokenised pairs to mix in, or None."""
        mixed = self.args.on_policy_fraction < 1
        if isinstance(data, Mapping):
            if set(data) != {"prompts", "pairs"} or not mixed:
                raise ValueError(
                    "with a sampler train_dataset is one set of prompts, or for on_policy_fraction below 1 a mapping "
                    f"of prompts and pairs; got {sorted(data)} at on_policy_fraction={self.args.on_policy_fraction}"
                )
            return data["prompts"], self._pairs_of(data["pairs"], needs, "pairs")
        if data is None:
            raise ValueError("train_dataset is missing: pass rows with prompt, and what the scorer wants to know")
        if not mixed:
            return data, None
        if not hasattr(data, "__len__"):
            raise ValueError("on_policy_fraction below 1 reads a stream twice; pass a mapping of prompts and pairs")
        pairs = self._pairs_of(data, needs)
        first = data[0]
        if isinstance(first.get("prompt"), str) and not isinstance(first.get("chosen", ""), str):
            raise ValueError(
                "prompt is text beside chats in chosen and rejected: fresh answers would be to a text; "
                "pass a mapping of prompts (chats) and pairs"
            )
        return data, pairs

    def _besides(self) -> Callable[[int], list[dict[str, Any]]] | None:
        """Pairs of the data set that an optimiser step takes, by its number."""
        if self._offline is None:
            return None
        args, processes = self.args, self.accelerator.num_processes
        seed = args.seed if args.data_seed is None else args.data_seed
        known = hasattr(self._offline, "__len__")
        rows = ShuffledPrompts(self._offline, seed + 1) if known else StreamedPrompts(self._offline)
        share = args.rows_per_step(processes) - args.fresh_per_step(processes)
        return lambda step: [dict(row) for row in rows.take(step * share, share)]

    def _scorer(self, reward_funcs: Any, verifier: Verifier | None, judge: Judge | None, classes: Any) -> Verifier:
        if judge is None:
            return scorer_of(self, reward_funcs, verifier, classes)
        if reward_funcs is not None or verifier is not None:
            raise ValueError("judge scores instead of reward_funcs and verifier; pass one of the three")
        return JudgeVerifier(judge)

    def _reference_for(
        self, needed: list[Needs], arrived_with_adapter: bool, given: Reference | nn.Module | None
    ) -> Reference | None:
        args = self.args
        if args.reference_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("a moving reference needs whole weights on every process; leave reference_decay out")
            moving = MovingReference(self.model, args.reference_decay)
            self.add_callback(_MoveReference(moving, lambda: unwrapped(self.model), args.reference_every))
            return moving
        cache = LogpCache.for_trainer(self, self._rows_to_cache)
        known_beforehand = not self._draws and all(hasattr(rows, "__len__") for rows in self._sets())
        with self.accelerator.autocast():
            return choose_reference(
                args.reference,
                self.model,
                needed,
                arrived_with_adapter=arrived_with_adapter,
                cache=cache if known_beforehand else None,
                given=given,
            )

    def _with_reference(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Pairs of a round with the reference's log-probabilities, which every pass over them takes; each process asks
        for its share. They are part of the round, in a checkpoint too: a resumed run has the same to the last bit."""
        size, index = self.args.per_device_eval_batch_size, self.accelerator.process_index
        mine, found = rows[index :: self.accelerator.num_processes], []
        for start in range(0, len(mine), size):
            batch = self._prepare_inputs(self.data_collator(mine[start : start + size]))
            logps = self.reference.logps(self.model, batch).float().cpu()
            lengths = batch["completion_lengths"].tolist()
            cut = [row[:length].tolist() for row, length in zip(logps, lengths, strict=True)]
            found += list(zip(cut[: len(cut) // 2], cut[len(cut) // 2 :], strict=True))
        parts = gather_object([found])
        both = [parts[i % len(parts)][i // len(parts)] for i in range(len(rows))]
        return [
            {**row, "chosen_ref": chosen, "rejected_ref": rejected}
            for row, (chosen, rejected) in zip(rows, both, strict=True)
        ]

    def _sets(self) -> list[Any]:
        """The training set and every evaluation set."""
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        return [rows for rows in (self.train_dataset, *evaluated.values()) if rows is not None]

    def _rows_to_cache(self) -> Iterator[Mapping[str, Any]]:
        for rows in self._sets():
            for row in rows:
                yield from (answer(row, side) for side in PAIR)

    def _tokenized_for_evaluation(self, data: Any) -> Any:
        """One set of pairs, or several by name; what is tokenised already is left alone, so are prompts."""
        if data is None or isinstance(data, str):
            return data
        if isinstance(data, Mapping):
            return {name: self._tokenized_for_evaluation(rows) for name, rows in data.items()}
        if {"prompt_ids", "tied"} <= column_names(data) or (self._draws and not are_pairs(data)):
            return data
        return self._tokenize(data, name="eval")

    # --- rounds and checkpoints ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers. A run with a sampler goes on in the middle of the round that its checkpoint is in."""
        checkpoint = checkpoint_of(self.args.output_dir, resume_from_checkpoint, rounds=self.on_policy is not None)
        self._restore(checkpoint)
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            if self.on_policy is not None:
                self.on_policy.close()

    def _restore(self, checkpoint: str | None) -> None:
        """What `_save_checkpoint` saves."""
        host_only = checkpoint is not None and self.on_policy is None and not (Path(checkpoint) / ROUND_FILE).exists()
        saved = None if host_only else read_state(checkpoint, on_policy=self.on_policy is not None)
        self._followed.start = None if saved is None else saved["followed"]
        if saved is not None:
            self.guards.restore(saved["guards"])
        if self.on_policy is not None:
            self.on_policy.begin(None if saved is None else saved["round"])
        if checkpoint is None:
            return
        path, moving = Path(checkpoint) / REFERENCE_FILE, isinstance(self.reference, MovingReference)
        if moving and not path.exists():
            raise ValueError(f"{path} is missing: the checkpoint is of a run with a fixed reference")
        if path.exists() and not moving:
            raise ValueError(f"{path} is of a moving reference; set reference_decay, or resume from another checkpoint")
        if moving:
            self.reference.load(self.model, path)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        more = {"guards": self.guards.state(), "followed": self._followed.start}
        folder = write_state(self, trial, self.on_policy, more)
        if isinstance(self.reference, MovingReference) and self.is_world_process_zero():
            self.reference.save(self.model, folder / REFERENCE_FILE)
        super()._save_checkpoint(model, trial)

    def get_train_dataloader(self) -> Any:
        if self.on_policy is not None:
            return RoundBatches(self.on_policy, lambda: self.state.global_step, self.data_collator, self._sums)
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        units, sizes = pair_units(
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

    # --- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the number of pairs of the whole step."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            tell_step_totals(self, batches, lambda batch: batch["counted"].sum())
            args, step = self.args, self.state.global_step + 1
            logged = max(1, int(self.state.logging_steps or 1))  # a fraction of all steps is a number here
            every = logged if args.gradient_norms_every is None else args.gradient_norms_every
            whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # else no process has a whole gradient
            batches[0]["step"]["gradients"] = whole and every > 0 and step % every == 0
            probed, due = self._followed.start is not None, step % logged == 0
            batches[0]["step"] |= {"probe": whole and (due or not probed), "probe_logged": due}
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the objective and its anchors over the pairs of the optimiser step."""
        step = inputs.get("step") or {"counts": int(inputs["counted"].sum()), "share": 1}
        if step.get("gradients") and model.training:
            measure_gradients(self.model, inputs, self._sums)
        if step.get("probe") and model.training:
            self._record_probe(logged=step["probe_logged"])
        pair = self._pair(model, inputs)
        values = (self._values(pair) * self._importance(pair, inputs)).masked_fill(~inputs["counted"], 0.0)
        loss = values.sum() / max(1, step["counts"]) * step["share"]
        stop_if_not_finite(self, loss, inputs, {"pairs": inputs["rows"].tolist()})
        self._record(pair, values, inputs, evaluated=not model.training)
        return (loss, {"values": values}) if return_outputs else loss

    def _pair(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, SequenceLogps]:
        ref_logps = inputs.get("ref_logps")
        if self.reference is not None and ref_logps is None:
            with self.accelerator.autocast():  # a frozen copy is not wrapped by the host
                ref_logps = self.reference.logps(model, inputs)
        logps, mask, pairs = completion_logps(model, inputs), scored_tokens(inputs).mask, len(inputs["rows"])
        sides = {"chosen": slice(0, pairs), "rejected": slice(pairs, 2 * pairs)}
        step = inputs.get("step_mask")
        return {
            side: SequenceLogps(logps[rows], mask[rows], *(None if x is None else x[rows] for x in (ref_logps, step)))
            for side, rows in sides.items()
        }

    def _values(self, pair: Mapping[str, SequenceLogps]) -> Tensor:
        """Objective per pair, with its anchors."""
        args, values = self.args, self.objective(**pair)
        anchor = max(args.nll_weight, args.anchor_weight) if self.guards.anchored else args.nll_weight
        if anchor:
            values = values + anchor * chosen_nll(**pair)
        if args.kl_weight:
            divergence = [masked_mean(kl_to_reference(answer), answer.mask) for answer in pair.values()]
            values = values + args.kl_weight * sum(divergence) / 2
        return values

    def _importance(self, pair: Mapping[str, SequenceLogps], inputs: Mapping[str, Any]) -> Tensor:
        """`[B]`: min(pi/mu, cap) of both answers together for fresh pairs, 1 for pairs of the data set."""
        drift = self._from_behaviour(pair, inputs)
        if drift is None or self.args.importance_cap is None:
            return torch.ones(len(inputs["rows"]), device=inputs["rows"].device)
        log_ratio = drift["chosen"] + drift["rejected"]
        return log_ratio.clamp(max=math.log(self.args.importance_cap)).exp().nan_to_num(nan=1.0)

    @torch.no_grad()
    def _from_behaviour(self, pair: Mapping[str, SequenceLogps], inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """log pi - log mu of each answer, summed; NaN where no policy that drew it is known."""
        if "behaviour_logps" not in inputs:
            return None
        behaviour = dict(zip(PAIR, inputs["behaviour_logps"].chunk(2), strict=True))
        return {side: masked_sum(answer.logps - behaviour[side], answer.mask) for side, answer in pair.items()}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # --- what a person sees -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(
        self, pair: Mapping[str, SequenceLogps], values: Tensor, inputs: Mapping[str, Any], *, evaluated: bool
    ) -> None:
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
        if evaluated:
            columns = {name: numbers.float().tolist() for name, numbers in {**found, "loss": values}.items()}
            for i, row in enumerate(inputs["rows"].tolist()):
                self._eval_rows[row] = {name: numbers[i] for name, numbers in columns.items()}
            return
        counted = inputs["counted"]
        for name, numbers in found.items():
            self._sums.add(name, numbers[counted])
        drift = self._from_behaviour(pair, inputs)
        if drift is not None and self.args.temperature == 1:  # else the two are not of one distribution
            both = (drift["chosen"] + drift["rejected"])[counted]
            self._sums.add_quantiles("ratio", both[~both.isnan()].exp())

    def _record_probe(self, *, logged: bool) -> None:
        rows = evenly_spaced(self.train_dataset, self.args.displacement_pairs)
        if self.on_policy is not None:
            rows = self.on_policy.probe or []
        if rows:
            with self.accelerator.autocast():
                batch = self._prepare_inputs(self.data_collator(rows))
                self._followed.measure(self.model, batch, self._sums, logged=logged)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Pairs: mean objective (`eval_loss`), accuracy, margin and each side's numbers. Prompts, with a sampler: mean
        reward of fresh samples, and what else `eval.solving` measures.

        Args:
            eval_dataset: pairs or prompts, or several sets by name; the trainer's if not given.
            ignore_keys, metric_key_prefix: as in transformers.
        """
        data = self._tokenized_for_evaluation(self.eval_dataset if eval_dataset is None else eval_dataset)
        if isinstance(data, Mapping):
            metrics = {}
            for name, rows in data.items():
                metrics |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if data is None or isinstance(data, str) or are_pairs(data):
            return super().evaluate(data, ignore_keys, metric_key_prefix)
        if self.on_policy is None:
            raise ValueError(
                "eval_dataset has prompts without chosen and rejected; only a trainer with a sampler can use them"
            )
        refuse_judged_prompts(self._judge, {False})
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.on_policy.solved(list(data)).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_rows = {}
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step or during the evaluation, over all processes."""
        if "loss" in logs:
            self._sums.add_tokens(take_counts(causal_lm(self.model)))
            logs.update(self._sums.flush())
            if self.on_policy is not None:
                drawn = self.on_policy.state
                logs |= {"sampled_tokens": drawn.tokens, "sampled_completions": drawn.completions}
        evaluated = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
        if evaluated is not None and self._eval_rows:
            rows = {row: found for part in gather_object([self._eval_rows]) for row, found in part.items()}
            prefix, columns = evaluated.removesuffix("loss"), next(iter(rows.values()))
            logs.update({prefix + name: sum(found[name] for found in rows.values()) / len(rows) for name in columns})
        super().log(logs, start_time)
        self.guards.check(logs, self.state.global_step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.create_model_card()

    def _is_empty(self) -> bool:
        return getattr(self, "step_is_empty", False)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


class _MoveReference(TrainerCallback):
    """Lets the reference follow the policy after every so many optimiser steps."""

    def __init__(self, reference: MovingReference, model: Callable[[], nn.Module], every: int) -> None:
        self.reference, self.model, self.every = reference, model, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.reference.update(self.model())
