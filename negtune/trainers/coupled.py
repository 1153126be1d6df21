"""CET: train a model of relevance and a model of selection on candidate lists, each weighing the other's documents.

Before every optimiser step both models score all lists of the step, in eval mode. From those scores come the weights
(with `em` the targets) of all its micro-batches, over all processes; then both models take the step. Where a step is
one micro-batch and neither model has dropout, the scores of the step are the same ones, and nothing is scored twice.
The models share the optimiser, but neither gradients nor their clipping.

Shapes: B queries of a batch, D documents of the longest list, F features.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from negtune.losses.debiased import (
    cet_weights,
    matching_level,
    pair_means,
    relevance_targets,
    selection_targets,
)
from negtune.losses.ranking import sides
from negtune.models.policy import disable_dropout, has_dropout
from negtune.retrieval.collate import prompts_of
from negtune.retrieval.coupled import CoupledLoss, CoupledObjective, Level
from negtune.retrieval.losses import Lists, NonFiniteScoresError, RankingLoss, kind_of
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.selection import FeatureSelection, ProvenanceCollator
from negtune.trainers.coupled_config import KNOWN, LEVELLED
from negtune.trainers.coupled_config import CoupledConfig as CoupledConfig
from negtune.trainers.progress import MetricSums
from negtune.trainers.ranking import RankingTrainer, _lists
from negtune.trainers.steps import stop_if_not_finite

FIRST_LISTS = 64
"""Of the train set: their scores and labels decide the first level of relevance."""
MOST_LISTS = 10_000
"""Of the train set, spread over it: their features are what is standardised by."""
SELECTION, LEVEL = "selection", "level.safetensors"
"""In a checkpoint: folder of the selection model, file of the level."""


class CoupledWarning(UserWarning):
    """Nothing tells relevance from selection."""


class CoupledTrainer(RankingTrainer):
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
    ranking_loss = CoupledLoss
    reads_provenance = True

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
        args = args if args is not None else CoupledConfig(output_dir="trainer_output")
        if not isinstance(args, CoupledConfig):
            raise ValueError(f"CoupledTrainer takes a CoupledConfig, got {type(args).__name__}")
        objective = CoupledObjective(soft=args.mode == "em")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            evaluator=evaluator,
            processing_class=processing_class,
            peft_config=peft_config,
            objective=objective,
            callbacks=[_BeforeStep(lambda: self), *(callbacks or [])],
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("there is a second model here, of which DeepSpeed and FSDP do not know; train with DDP")
        self._coupled = MetricSums()
        self.selection = self._selection_of(selection)
        self.selection_loss = None if self.selection is None else self._loss_of_selection()
        self.level = Level(self._first_level()).to(args.device) if args.mode in LEVELLED else None
        objective.level = self.level
        several = [self.model] if self.selection is None else [self.model, self.selection]
        self._draws = any(has_dropout(one) for one in several)
        self._with_provenance = ProvenanceCollator(self.collate, self.selection, self._prompts_of_selection())

    # --- the selection model ------------------------------------------------------------------------------------------

    def _selection_of(self, given: Any) -> nn.Module | None:
        """Ready to train; None where selection is known."""
        mode, rows = self.args.mode, self.train_dataset
        if rows is None and given is None:
            return None  # to evaluate
        columns = () if rows is None else tuple(rows.column_names or ())
        featured, known = ("selection_features" in columns, "selection_propensity" in columns)
        if mode in KNOWN and rows is not None and not known:
            raise ValueError(
                f"mode {mode} needs rows with selection_propensity, the probability of each document to be selected; "
                "without it take mode em with selection_features"
            )
        if given is not None and (known or mode in KNOWN):
            raise ValueError("selection is known by selection_propensity: leave the selection model out, or the column")
        if known and (mode in KNOWN or not featured):
            return None
        if known:
            raise ValueError("rows have selection_features and selection_propensity; leave one of the two out")
        if given is None and not featured:
            raise ValueError(
                f"mode {mode} needs a model of selection: give rows selection_features (of mined lists: "
                "negtune.retrieval.selection.provenance), or a cross-encoder as selection, as published"
            )
        if given is None:
            given = self._of_features(rows)
        elif isinstance(given, str | os.PathLike):
            given = load_ranker(given, "cross_encoder")
        self._check_selection(given, rows, featured)
        if self.args.disable_dropout:
            disable_dropout(given)
        return given.to(self.args.device)

    def _of_features(self, rows: Any) -> FeatureSelection:
        if not hasattr(rows, "__len__"):
            raise ValueError(
                "the features of a stream cannot be standardised before it is read; pass "
                "selection=FeatureSelection(n).standardise(features) with features of some documents"
            )
        apart = -(-len(rows) // MOST_LISTS)
        lists = rows.select(range(0, len(rows), apart))["selection_features"]
        features = torch.tensor([document for one in lists for document in one], dtype=torch.float64)
        model = FeatureSelection(features.shape[-1], self.args.selection_hidden, self.args.seed)
        return model.standardise(features)

    def _check_selection(self, selection: Any, rows: Any, featured: bool) -> None:
        if isinstance(selection, FeatureSelection):
            if rows is not None and not featured:
                raise ValueError("a FeatureSelection reads selection_features, which the rows do not have")
            if rows is not None:
                selection.preprocess(next(iter(rows))["selection_features"])
            return
        if kind_of(selection) != "cross_encoder":
            raise ValueError(f"selection must be a cross-encoder or a FeatureSelection, got {type(selection).__name__}")
        if featured:
            raise ValueError(
                "rows have selection_features, which a cross-encoder does not read; leave selection out, or the column"
            )
        ours = {id(p) for p in self.model.parameters()}
        if any(id(p) in ours for p in selection.parameters()):
            raise ValueError("the two models share parameters; load the selection model a second time")
        selection.model_card_data.local_files_only = True  # else the card asks the hub about a folder's name
        warnings.warn(
            "both models read the query and the document: labels cannot tell relevance from selection then (the "
            "coupling is not identified). Give rows selection_features or selection_propensity, and no selection model",
            CoupledWarning,
            stacklevel=4,
        )

    def _loss_of_selection(self) -> RankingLoss:
        """In an attribute of the trainer: the host puts the ranker into whatever `model` it finds inside `loss`."""
        text = not isinstance(self.selection, FeatureSelection)
        if text and self.args.gradient_checkpointing:
            self.selection.gradient_checkpointing_enable()
        sizes = ("mini_batch_size", "mini_batch_num_tokens") if text else ()
        objective = CoupledObjective(soft=self.args.mode != "official")
        return RankingLoss(
            self.selection, "rank_net", objective=objective, **{name: getattr(self.args, name) for name in sizes}
        )

    def _prompts_of_selection(self) -> Any:
        text = self.selection is not None and not isinstance(self.selection, FeatureSelection)
        return prompts_of(self.selection, "cross_encoder") if text else None

    def _first_level(self) -> float:
        if self.train_dataset is None:
            return 0.0
        rows = list(itertools.islice(self.train_dataset, FIRST_LISTS))
        scores = torch.tensor([score for row in self._scores_of(rows) for score in row])
        labels = [gain > 0 for row in rows for gain in row["gains"]]
        share = (sum(labels) + 0.5) / (len(labels) + 1)  # neither 0 nor 1
        return matching_level(scores, share)

    def _move_level(self, found: Sequence[Tensor]) -> None:
        """By what targets lack and by variances, summed over the documents of the step, of all processes."""
        if self.level is not None:
            total = self.accelerator.reduce(torch.stack(list(found)).sum(0).to(self.args.device), "sum")
            self.level.move(*total.tolist())

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

    def get_train_dataloader(self) -> Any:
        plain, self.data_collator = self.data_collator, self._with_provenance
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    # --- weights ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """All micro-batches of one optimiser step, with what their documents weigh."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) == 1 and not self._draws:
            batches[0]["coupled"] = None  # weighed within the step
        elif batches:
            batches = [self._prepare_inputs(batch) for batch in batches]
            with self._as_searched():
                scores = [self.loss.scores(batch["features"], _lists(batch)) for batch in batches]
                logits = [self._selection_logits(batch["provenance"], _lists(batch)) for batch in batches]
            self._weigh(batches, scores, logits)
        return batches, items

    @torch.no_grad()
    def _weigh(self, batches: Sequence[dict], scores: Sequence[Tensor], selection: Sequence[Tensor | None]) -> None:
        """Tell the micro-batches of a step what their documents weigh."""
        found = [self._opinions(*one) for one in zip(batches, scores, selection, strict=True)]
        self._move_level([opinion.pop("level") for opinion in found])
        for side in ("relevance", "selection"):
            if self.args.normalizes and "weights" in found[0].get(side, {}):
                self._normalize([(b["lists"], opinion[side]) for b, opinion in zip(batches, found, strict=True)])
        for batch, opinion in zip(batches, found, strict=True):
            batch["lists"]["more"] = opinion.pop("relevance")
            batch["coupled"] = opinion
            self._watch_weights(lists=batch["lists"], judged=batch["provenance"]["judged"])

    @contextmanager
    def _weighed_within(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Weights are those of the scores that the losses are made of: a micro-batch that is a whole step."""

        def weigh(scores: Tensor) -> Mapping[str, Tensor]:
            with self.compute_loss_context_manager():
                if self.selection_loss is None:
                    self._weigh([inputs], [scores], [self._selection_logits(inputs["provenance"], _lists(inputs))])
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

    def _opinions(self, batch: Mapping[str, Any], scores: Tensor, selection: Tensor | None) -> dict[str, Any]:
        """`relevance` and `selection`: what their objectives take; `level`: what moves it."""
        lists, provenance, args = _lists(batch), batch["provenance"], self.args
        gains, mask, judged = lists.gains, lists.mask, provenance["judged"]
        relevance = scores if self.level is None else scores + self.level.bias
        labels, seen = (gains > 0).to(scores), ((gains > 0) | judged).to(scores)
        uniform = self.state.global_step < args.uniform_steps
        hoped = labels if uniform or selection is None else relevance_targets(gains, judged, relevance, selection)
        found: dict[str, Any] = {}
        if args.mode == "em":
            found["relevance"] = {"targets": hoped}
        elif uniform:
            found["relevance"] = {"weights": torch.ones_like(scores)}
        else:
            known = provenance["propensities"] if args.mode in KNOWN else None
            settings = {"judged": judged, "mode": args.mode, "temperature": args.temperature, "clip": args.clip}
            other = None if args.mode in KNOWN else selection
            weights = cet_weights(relevance, gains, mask, selection=other, propensities=known, **settings)
            found["relevance"] = {"weights": weights}
        if self.selection is not None and args.mode == "official":
            weights = cet_weights(selection, gains, mask, selection=scores, temperature=args.temperature)
            found["selection"] = {"weights": torch.ones_like(scores) if uniform else weights}
        elif self.selection is not None:
            targets = seen if uniform else selection_targets(gains, judged, relevance, selection)
            found["selection"] = {"targets": targets}
        r = torch.sigmoid(relevance[mask].double())
        found["level"] = torch.stack([(hoped[mask] - r).sum(), (r * (1 - r)).sum()])
        return found

    def _selection_logits(self, provenance: Mapping[str, Any], lists: Lists) -> Tensor | None:
        if self.selection_loss is not None:
            return self.selection_loss.scores(provenance["features"], _of_selection(lists, provenance))
        return torch.logit(provenance["propensities"].masked_fill(~lists.mask, 0.5))

    def _normalize(self, found: Sequence[tuple[Mapping[str, Tensor], dict[str, Tensor]]]) -> None:
        """Divide the weights of the step by their mean over the pairs, as the loss counts them."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for lists, opinion in found:
            relevant, irrelevant = sides(lists["gains"], lists["mask"])
            both = (relevant.any(-1) & irrelevant.any(-1)).sum()
            means = pair_means(opinion["weights"].double(), lists["gains"], lists["mask"])
            total += torch.stack([means.sum(), both.double()]).to(total)
        means, both = self.accelerator.reduce(total, "sum").tolist()
        if means > 0:
            for _, opinion in found:
                opinion["weights"] = opinion["weights"] / (means / both) ** 0.5  # of a pair, two

    # --- the step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the losses of all that is trained; none has a gradient in what is another's."""
        trains = torch.is_grad_enabled() and "coupled" in inputs
        with self._weighed_within(inputs) if trains and inputs["coupled"] is None else nullcontext():
            loss = super().compute_loss(model, inputs)
        if trains:
            self._coupled.add_ratio("relevance/loss", float(loss.detach()), 1)
            if self.selection_loss is not None:
                own = inputs["coupled"].pop("loss", None)
                own = self._loss_beside(inputs) if own is None else own
                self._coupled.add_ratio("selection/loss", float(own.detach()), 1)
                loss = loss + own.to(loss)
        return (loss, {}) if return_outputs else loss

    def _loss_beside(self, inputs: Mapping[str, Any]) -> Tensor:
        lists, provenance = _of_selection(_lists(inputs), inputs["provenance"]), inputs["provenance"]
        self.selection_loss.train()
        try:
            more = {} if inputs["coupled"] is None else inputs["coupled"]["selection"]
            loss = self.selection_loss(provenance["features"], replace(lists, more=more))
        except NonFiniteScoresError:
            loss = torch.tensor(float("nan"))
        stop_if_not_finite(self, loss, {}, {"queries": inputs["rows"].tolist()})
        return loss

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
        self._coupled.add_ratio("selection/grad_norm", float(norm), 1)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.selection is not None:
            self.selection.save_pretrained(str(folder / SELECTION))
        if self.level is not None:
            save_file(self.level.state_dict(), folder / LEVEL)

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        folder = Path(checkpoint_path)
        for wanted, file in ((self.selection, SELECTION), (self.level, LEVEL)):
            if wanted is not None and not (folder / file).exists():
                raise OSError(f"{folder} has no {file}; it was not written by a CoupledTrainer with these settings")
        super()._load_from_checkpoint(checkpoint_path)
        if isinstance(self.selection, FeatureSelection):
            self.selection.load_state_dict(FeatureSelection.from_pretrained(folder / SELECTION).state_dict())
        elif self.selection is not None:
            self.selection.load_state_dict(load_ranker(folder / SELECTION, "cross_encoder").state_dict())
        if self.level is not None:
            self.level.load_state_dict(load_file(folder / LEVEL))

    # --- what a person sees -------------------------------------------------------------------------------------------

    def _watch_weights(self, lists: Mapping[str, Any], judged: Tensor) -> None:
        """`weight/positive`, `weight/negative` and quantiles, `hidden/probability` of what nobody judged."""
        relevant, irrelevant = sides(lists["gains"], lists["mask"])
        relevant, irrelevant, judged = (t.to(self.args.device) for t in (relevant, irrelevant, judged))
        if "targets" in lists["more"]:
            self._coupled.add("hidden/probability", lists["more"]["targets"][irrelevant & ~judged])
            return
        self._coupled.add("weight/positive", lists["more"]["weights"][relevant])
        self._coupled.add("weight/negative", lists["more"]["weights"][irrelevant])
        self._coupled.add_quantiles("weight/negative", lists["more"]["weights"][irrelevant])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the metrics of both models, see `_watch_weights`, and the level."""
        if "loss" in logs:
            if self.selection_loss is not None:
                for name, (total, count) in self.selection_loss.take_metrics().items():
                    if name in ("positive/score", "negative/score"):
                        self._coupled.add_ratio(f"selection/{name.replace('/', '_')}", total, count)
            logs.update(self._coupled.flush())
            if self.level is not None:
                logs["level"] = self.level.bias.item()
        super().log(logs, start_time)


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer().before_step()


def _of_selection(lists: Lists, provenance: Mapping[str, Any]) -> Lists:
    return replace(lists, documents=provenance["documents"], more={})
