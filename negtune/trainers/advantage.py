"""Policy-gradient training on completions whose steps carry advantages, from a data set or from fresh samples.

Shapes: B completions, T completion tokens. An objective returns `[B T]` or `[B]`; `reduction` says how those are
averaged over the optimiser step, over all micro-batches and processes; the host divides by accumulation steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from negtune._trl_compat import BaseTrainer
from negtune.data.advantages import CREDIT, collate_advantages, tokenize_advantages
from negtune.data.completions import padding_id
from negtune.losses.policy import kl_to_reference, only, positive_nll
from negtune.models.forward import completion_logps, scored_tokens
from negtune.models.reference import Reference
from negtune.models.sharing import take_counts
from negtune.models.structure import causal_lm, eval_mode, unwrapped
from negtune.ops import Needs, SequenceLogps, TokenCredit, masked_sum, needs_of, weigh_signs
from negtune.rollouts.ratios import use_ratios
from negtune.rollouts.sampler import Sampler
from negtune.trainers.advantage_config import AdvantageConfig as AdvantageConfig
from negtune.trainers.guards import Guards, falling_positives, lost_entropy
from negtune.trainers.on_policy import (
    OnPolicy,
    RoundBatches,
    checkpoint_of,
    prepare_for_prompts,
    read_state,
    scorer_of,
    write_state,
)
from negtune.trainers.progress import HistoryCallback, MetricSums, ProgressTable
from negtune.trainers.references import LogpCache, choose_reference
from negtune.trainers.rounds import StepCredit
from negtune.trainers.setup import arrives_with_adapter, set_up_policy, tokenizer_of
from negtune.trainers.steps import SkipEmptySteps, has_ended, stop_if_not_finite, tell_step_totals
from negtune.verifiers.verdict import Verifier

PROGRESS = (
    ("step", "step", "{:d}"),
    ("loss", "loss", "{:.4f}"),
    ("rounds/reward", "reward", "{:.3f}"),
    ("rounds/no_signal", "no signal", "{:.2f}"),
    ("rounds/entropy", "entropy", "{:.3f}"),
    ("positive/logp", "pos logp/tok", "{:.3f}"),
    ("negative/logp", "neg logp/tok", "{:.3f}"),
    ("positive/grad_norm", "pos grad", "{:.2f}"),
    ("negative/grad_norm", "neg grad", "{:.2f}"),
    ("grad_norm", "grad norm", "{:.2f}"),
)


class AdvantageTrainer(BaseTrainer):
    """Fine-tune a causal LM by policy gradient on what its completions, or their steps, deserve.

    Without a `sampler` it trains on the completions of a data set; with one it draws fresh completions from the policy
    every `steps_per_round` optimiser steps, scores them, and trains on those.

    Args:
        model: hub id, path, transformers causal LM, or `PeftModel` (its adapter goes on training).
        args: settings; `loss_type` names the objective.
        train_dataset: rows with credit (`data.advantages`), or with a sampler rows with `prompt` and the columns that
            the scorer wants; `datasets.Dataset`, `datasets.IterableDataset` (then set `max_steps`) or a list.
        eval_dataset: the same kind; with a sampler `evaluate` gives `eval_accuracy`, `eval_pass@k`, `eval_reward`.
        processing_class: tokenizer; loaded with the model if the model is a name.
        peft_config: adapter to add.
        sampler: draws from the policy, or `(model, tokenizer) -> sampler`, called once the model is set up.
        reward_funcs: TRL reward functions, one or several (`reward_weights`), plain or async, with `completion_ids`,
            `trainer_state`, `log_metric` and `log_extra` for those that take them; reward models, or their names. None
            as a reward is unscored.
        verifier: scores instead of reward functions.
        step_credit: gives numbers to the steps of fresh completions: see `rounds.StepCredit`,
            `rollouts.steps.RolloutCredit` for Monte-Carlo values.
        reference: `Reference` or model to compare with instead of what `args.reference` says.
        objective: `(policy, credit) -> [B T] or [B]`, to use instead of the named one.
        reward_processing_classes: tokenizers of reward models, as in TRL.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError, RowError, OSError: at construction, for anything that would fail or be wrong later.
        StaleEngineError: the sampler does not draw from the model that is trained.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ["negtune", "advantage"]
    _name = "Advantage"
    _paper = {
        "title": "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold",
        "id": "2406.14532",
    }

    def __init__(
        self,
        model: str | nn.Module,
        args: AdvantageConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        sampler: Sampler | Callable[[nn.Module, Any], Sampler] | None = None,
        reward_funcs: Any = None,
        verifier: Verifier | None = None,
        step_credit: StepCredit | None = None,
        reference: Reference | nn.Module | None = None,
        objective: Callable[..., Tensor] | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = copy.copy(args) if args is not None else AdvantageConfig()  # which gets a number of steps
        self.objective = objective or args.objective()
        needs = needs_of(self.objective)
        if not needs.logps_suffice or needs.sides != {"policy", "credit"}:
            raise ValueError("objective must take policy (SequenceLogps) and credit (TokenCredit), and nothing else")
        needed = [needs, Needs(reference=args.kl_weight > 0)]
        if args.temperature != 1 and any(n.reference for n in needed):
            raise ValueError(
                f"temperature={args.temperature} and a reference do not go together: the reference's log-probabilities "
                "are at temperature 1; set temperature to 1, or kl_weight to 0 and an objective without reference"
            )
        self.on_policy: OnPolicy | None = None
        self.args = args
        processing_class = processing_class or tokenizer_of(model)
        if train_dataset is None or isinstance(train_dataset, Mapping):
            raise ValueError(
                "train_dataset must be one set of rows: completions with credit, or prompts with a sampler"
            )
        self._tokenize = partial(
            tokenize_advantages,
            tokenizer=processing_class,
            max_length=args.max_length,
            overlong=args.overlong,
            in_memory=args.redact,
        )
        if sampler is not None:
            use_ratios(args.sampling_params(), wanted=needs.behaviour)
            scorer = scorer_of(self, reward_funcs, verifier, reward_processing_classes)
            train = train_dataset
            prepare_for_prompts(args, train)
        else:
            _refuse_scorers(reward_funcs, verifier, step_credit)
            train, scorer = self._tokenize(_with_credit(train_dataset), name="train"), None
            check_rows(train, needs, args)
        arrived_with_adapter = arrives_with_adapter(model)
        model = set_up_policy(model, args, peft_config)
        self._sums, self._eval_rows = MetricSums(), {}
        self.guards = Guards(
            falling_positives(args.positive_guard, args.max_positive_drop),
            lost_entropy(args.entropy_guard, args.min_entropy),
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(
                collate_advantages,
                pad_token_id=padding_id(processing_class),
                temperature=args.temperature,
                ratios=needs.behaviour,
            ),
            train_dataset=train,
            eval_dataset=eval_dataset if sampler is not None else self._tokenized_for_evaluation(eval_dataset),
            processing_class=processing_class,
            callbacks=[HistoryCallback(args.output_dir), SkipEmptySteps(self._is_empty), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressTable(PROGRESS, ("loss", "accuracy", "reward")))
        cache = LogpCache.for_trainer(self, lambda: self.train_dataset)
        known_beforehand = sampler is None and eval_dataset is None and hasattr(train, "__len__")
        with self.accelerator.autocast():
            self.reference = choose_reference(
                args.reference,
                self.model,
                needed,
                arrived_with_adapter=arrived_with_adapter,
                cache=cache if known_beforehand else None,
                given=reference,
            )
        self._first_positive: float | None = None
        if sampler is not None:
            self.on_policy = OnPolicy(self, sampler, scorer, step_credit)

    # --- rounds -------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers. A run with a sampler goes on in the middle of the round that its checkpoint is in."""
        checkpoint = checkpoint_of(self.args.output_dir, resume_from_checkpoint)
        self._restore(checkpoint)
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            if self.on_policy is not None:
                self.on_policy.close()

    def _restore(self, checkpoint: str | None) -> None:
        """Guards, and the round that a checkpoint is in the middle of."""
        saved = read_state(checkpoint, on_policy=self.on_policy is not None)
        if saved is not None:
            self.guards.restore(saved["guards"])
        self._first_positive = None if saved is None else saved["first_positive"]
        if self.on_policy is not None:
            self.on_policy.begin(None if saved is None else saved["round"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        more = {"guards": self.guards.state(), "first_positive": self._first_positive}
        write_state(self, trial, self.on_policy, more)
        super()._save_checkpoint(model, trial)

    def get_train_dataloader(self) -> Any:
        if self.on_policy is None:
            return super().get_train_dataloader()
        return RoundBatches(self.on_policy, lambda: self.state.global_step, self.data_collator, self._sums)

    # --- loss ---------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, each told the rows and judged tokens of the whole step."""
        if has_ended(self):
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            tell_step_totals(self, batches, _counts)
            logged = max(1, int(self.state.logging_steps or 1))  # a fraction of all steps is a number here
            every = logged if self.args.gradient_norms_every is None else self.args.gradient_norms_every
            step = self.state.global_step + 1
            batches[0]["step"]["gradients"] = every > 0 and step % every == 0
            batches[0]["step"]["probe"] = step % logged == 0
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective, the anchor and the KL term, averaged over the optimiser step."""
        step = inputs.get("step") or {"counts": _counts(inputs).tolist(), "share": 1}
        if step.get("gradients") and model.training:
            self._record_gradients(inputs)
        if step.get("probe") and model.training:
            self._record_probe()
        policy, credit = self._read(model, inputs)
        values = self._values(policy, credit)
        loss = _reduce(values, credit, step, self.args.reduction)
        stop_if_not_finite(
            self, loss, inputs, {"rows": inputs["rows"].tolist()}, "an objective whose push fades (topr)"
        )
        self._record(policy, credit, values, inputs["rows"] if not model.training else None)
        return (loss, {"values": values}) if return_outputs else loss

    def _read(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[SequenceLogps, TokenCredit]:
        """What the policy says of the tokens, and what they deserve."""
        args, ref_logps = self.args, None
        if self.reference is not None:
            with self.accelerator.autocast():  # a frozen copy is not wrapped by the host
                ref_logps = self.reference.logps(model, inputs)
        logps = completion_logps(model, inputs, temperature=args.temperature)
        weighed = weigh_signs(
            inputs["advantages"], positive_weight=args.positive_weight, negative_weight=args.negative_weight
        )
        given = inputs["known"], inputs.get("behaviour_logps"), inputs["steps"]
        credit = TokenCredit(weighed, *given, undialled=inputs["advantages"])
        return SequenceLogps(logps, scored_tokens(inputs).mask, ref_logps), credit

    def _values(self, policy: SequenceLogps, credit: TokenCredit) -> Tensor:
        """Objective per token or row, with anchor and KL where they are per token too."""
        args = self.args
        values = self.objective(policy, credit)
        anchor = max(args.nll_weight, args.anchor_weight) if self.guards.anchored else args.nll_weight
        extra = torch.zeros_like(policy.logps)
        if anchor:
            extra = extra + anchor * positive_nll(policy, credit)
        if args.kl_weight:
            extra = extra + args.kl_weight * kl_to_reference(policy).masked_fill(~credit.known, 0.0)
        if not anchor and not args.kl_weight:
            return values
        if values.dim() == 2:
            return values + extra
        return values + masked_sum(extra, credit.known) / credit.known.sum(-1).clamp(min=1)

    def _record_gradients(self, inputs: Mapping[str, Any]) -> None:
        """Norm of the gradient of the objective on positive and on negative tokens alone, and the angle between them.

        Of one micro-batch, in passes of their own without dropout and without random numbers, so that the training step
        is what it would be without. Holds two gradients besides.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # parameters are split: no process has a whole gradient
        model = unwrapped(self.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found, step = {}, {"counts": _counts(inputs).tolist(), "share": 1}
        with eval_mode(model):
            for side, sign in (("positive", 1), ("negative", -1)):
                policy, credit = self._read(model, inputs)
                loss = _reduce(self.objective(policy, only(credit, sign)), credit, step, self.args.reduction)
                found[side] = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        self._sums.add_gradients(found)

    @torch.no_grad()
    def _record_probe(self) -> None:
        """How far positives of the first round have moved: fresh samples hide it, since they are the policy's own."""
        probe = None if self.on_policy is None else self.on_policy.probe
        if not probe:
            return
        batch = self._prepare_inputs(self.data_collator(probe))
        model = unwrapped(self.model)
        with eval_mode(model):
            policy, credit = self._read(model, batch)
        if not credit.positive.any():
            return
        if credit.behaviour_logps is not None:
            self._sums.add("positive/drift", credit.log_ratio(policy)[credit.positive])
        else:  # drawn from a cut distribution: compared with the first measurement
            self._sums.add("positive/probe_logp", policy.logps[credit.positive])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # --- what a person sees -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, policy: SequenceLogps, credit: TokenCredit, values: Tensor, evaluated: Tensor | None) -> None:
        """Positives and negatives apart; in an evaluation by row number, since processes repeat rows."""
        logps = policy.logps.detach()
        if evaluated is not None:
            self._record_evaluated(logps, credit, values, evaluated)
            return
        judged = int(credit.known.sum())
        drift = self._drift(policy, credit)
        for side, tokens in (("positive", credit.positive), ("negative", credit.negative)):
            self._sums.add_ratio(f"{side}/tokens", int(tokens.sum()), judged)
            if not tokens.any():
                continue
            self._sums.add(f"{side}/logp", logps[tokens])
            self._sums.add(f"{side}/probability", logps[tokens].exp())
            self._sums.add(f"{side}/advantage", credit.advantages[tokens])
            if drift is not None and (side == "negative" or self.on_policy is None):
                self._sums.add(f"{side}/drift", drift[tokens])
        if credit.behaviour_logps is not None and judged:
            self._sums.add_quantiles("ratio", credit.log_ratio(policy).detach()[credit.known].exp())

    def _drift(self, policy: SequenceLogps, credit: TokenCredit) -> Tensor | None:
        """How far log-probabilities have moved: on stored rows from the reference, else from the policy that drew."""
        if self.on_policy is None and policy.ref_logps is not None:
            return (policy.logps - policy.ref_logps).detach()
        return None if credit.behaviour_logps is None else credit.log_ratio(policy).detach()

    def _record_evaluated(self, logps: Tensor, credit: TokenCredit, values: Tensor, rows: Tensor) -> None:
        loss = values if values.dim() == 1 else values.sum(-1) / credit.known.sum(-1).clamp(min=1)
        for i, row in enumerate(rows.tolist()):
            found = {"loss": float(loss[i])}
            for side, tokens in (("positive", credit.positive[i]), ("negative", credit.negative[i])):
                if tokens.any():
                    found[f"{side}/logp"] = float(logps[i][tokens].mean())
            self._eval_rows[row] = found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per completion and each side's log-probability; with a sampler, how many problems are solved."""
        if self.on_policy is None:
            return super().evaluate(self._tokenized_for_evaluation(eval_dataset), ignore_keys, metric_key_prefix)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError("there is no eval_dataset; pass prompts")
        sets = data if isinstance(data, Mapping) else {"": data}
        metrics = {}
        for name, rows in sets.items():
            prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            metrics |= {prefix + metric: value for metric, value in self.on_policy.solved(list(rows)).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._eval_rows = {}
        return super().evaluation_loop(*args, **kwargs)

    def _tokenized_for_evaluation(self, data: Any) -> Any:
        if data is None or isinstance(data, str):
            return data
        if isinstance(data, Mapping):
            return {name: self._tokenized_for_evaluation(rows) for name, rows in data.items()}
        if {"prompt_ids", "unknown"} <= set(getattr(data, "column_names", None) or ()):
            return data
        rows = self._tokenize(data, name="eval")
        check_rows(rows, needs_of(self.objective), self.args, name="eval")
        return rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered since the last logging step or during the evaluation, over all processes."""
        if "loss" in logs:
            self._sums.add_tokens(take_counts(causal_lm(self.model)))
            logs.update(self._sums.flush())
            self._follow_positives(logs)
            if self.on_policy is not None:
                drawn = self.on_policy.state
                logs |= {"sampled_tokens": drawn.tokens, "sampled_completions": drawn.completions}
        evaluated = next((name for name in logs if name.endswith("_loss") and name != "train_loss"), None)
        if evaluated is not None and self._eval_rows:
            rows = {row: found for part in gather_object([self._eval_rows]) for row, found in part.items()}
            prefix = evaluated.removesuffix("loss")
            for name in sorted({name for found in rows.values() for name in found}):
                having = [found[name] for found in rows.values() if name in found]
                logs[prefix + name] = sum(having) / len(having)
        super().log(logs, start_time)
        self.guards.check(logs, self.state.global_step)

    def _follow_positives(self, logs: dict[str, float]) -> None:
        """Without behaviour policy and reference the first log-probabilities seen stand in for both."""
        name = "positive/logp" if self.on_policy is None else "positive/probe_logp"
        if "positive/drift" in logs or name not in logs:
            return
        if self._first_positive is None:
            self._first_positive = logs[name]
        logs["positive/drift"] = logs[name] - self._first_positive

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.create_model_card()

    def _is_empty(self) -> bool:
        return getattr(self, "step_is_empty", False)

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


def _counts(batch: Mapping[str, Any]) -> Tensor:
    """Rows with a judged token, and judged tokens."""
    known = batch["known"]
    return torch.stack([known.any(-1).sum(), known.sum()])


def _reduce(values: Tensor, credit: TokenCredit, step: Mapping[str, Any], reduction: str) -> Tensor:
    """Mean over the optimiser step: over rows of `[B]`, over tokens or rows of `[B T]` as `reduction` says."""
    rows, tokens = (max(1, count) for count in step["counts"])
    if values.dim() == 1:
        return values.sum() / rows * step["share"]
    if reduction == "token_mean":
        return values.sum() / tokens * step["share"]
    of_rows = values.sum(-1)
    if reduction == "row_mean":
        of_rows = of_rows / credit.known.sum(-1).clamp(min=1)
    return of_rows.sum() / rows * step["share"]


def _refuse_scorers(*given: Any) -> None:
    if any(g is not None for g in given):
        raise ValueError(
            "reward_funcs, verifier and step_credit score fresh completions; pass a sampler too, or leave them out"
        )


def _with_credit(data: Any) -> Any:
    """`data`, unless it is a plain set of prompts."""
    columns = getattr(data, "column_names", None) or (data[0].keys() if isinstance(data, list) and data else CREDIT)
    if not set(CREDIT) & set(columns):
        raise ValueError(
            f"train_dataset has the columns {', '.join(sorted(columns))}, and none of {', '.join(CREDIT)}; to train on "
            "fresh samples of prompts pass a sampler"
        )
    return data


def check_rows(rows: Any, needs: Needs, args: AdvantageConfig, name: str = "train") -> None:
    """Ratios need rows with behaviour log-probabilities at the temperature that is trained."""
    if not needs.behaviour or not hasattr(rows, "__len__"):
        return
    without = [row for row, logps in zip(rows["row"], rows["behaviour_logps"], strict=True) if logps is None]
    if without:
        raise ValueError(
            f"loss_type={args.loss_type} weighs tokens by importance ratios, and {name} row {without[0]} has no "
            "behaviour_logps; give them for every row, or choose an objective without ratios"
        )
    other = [t for t in rows["temperature"] if t != args.temperature]
    if other:
        raise ValueError(
            f"rows were drawn at temperature {other[0]:g} and temperature is {args.temperature:g}: the ratio would be "
            "one of two distributions; set temperature to that of the draw"
        )
