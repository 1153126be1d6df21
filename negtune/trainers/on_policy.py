"""The on-policy half of a trainer: an engine that has the weights of this moment, rounds, and batches made of them.

A round lies in the run's folder (`rounds/`) before it is trained on; a checkpoint carries the round it is in the middle
of (`round.json`), so that a resumed run draws nothing twice and trains on the very rows it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from negtune.data.prompts import ShuffledPrompts, StreamedPrompts
from negtune.data.steps import SPLITTERS
from negtune.eval.solving import solve_together
from negtune.models.policy import sharded_at_load
from negtune.models.reference import weights_hash
from negtune.models.structure import unwrapped
from negtune.records import read_json, write_json
from negtune.rollouts.attest import attest, served_weights_hash
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import Sampler
from negtune.rollouts.store import RecordStore
from negtune.trainers.progress import MetricSums
from negtune.trainers.rounds import RESERVED, Round, Rounds, RoundState, StepCredit, refuse_reserved
from negtune.verifiers.rewards import reward_verifier
from negtune.verifiers.verdict import Verifier

ROUND_FILE = "round.json"
PROBE = 32
"""Rows of the first round that are followed, at most."""


class OnPolicy:
    """Sampler, scorer and rounds of one trainer.

    Args:
        trainer: whose model is sampled from, and whose arguments say how.
        sampler: or a function that makes one from the trained model and its tokenizer.
        scorer: of completions.
        step_credit: of their steps, or None.
        followed: rows of the first round that are watched from then on, at most.
        besides: rows of a data set that an optimiser step takes too, by its number.
        prepare: what a round's rows become, once, before they are trained on; called by every process with all rows.

    Raises:
        StaleEngineError: the engine does not have the weights that are trained.
    """

    def __init__(
        self,
        trainer: Any,
        sampler: Sampler | Callable[[Any, Any], Sampler],
        scorer: Verifier,
        step_credit: StepCredit | None,
        *,
        followed: int = PROBE,
        besides: Callable[[int], list[dict[str, Any]]] | None = None,
        prepare: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    ) -> None:
        self._trainer, self.args, accelerator = trainer, trainer.args, trainer.accelerator
        if trainer.is_fsdp_enabled or sharded_at_load():
            raise ValueError(
                "a sampler needs whole weights on every process, and FSDP or ZeRO-3 splits them; use DDP or ZeRO-2 "
                "(accelerate_configs/ddp.yaml, zero2.yaml)"
            )
        if isinstance(sampler, type) or not hasattr(sampler, "draw"):
            sampler = sampler(unwrapped(trainer.model), trainer.processing_class)
        self.sampler, self.scorer = sampler, scorer
        if hasattr(step_credit, "sampler") and step_credit.sampler is None:
            step_credit.sampler, step_credit.follows = sampler, False  # which gets the weights anyway
        self._start = weights_hash(unwrapped(trainer.model))[:8]
        self.state, self.round, self._followed = RoundState(), None, followed
        self._besides, self._prepare, self._proven = besides, prepare, False
        self.probe: list[dict[str, Any]] | None = None
        self.noted = MetricSums()
        args, rows = self.args, trainer.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        folder, index = Path(args.output_dir) / "rounds", accelerator.process_index
        settings = args.round_settings(accelerator.num_processes)
        self.steps_per_epoch = None
        if hasattr(rows, "__len__"):
            self.steps_per_epoch = math.ceil(len(rows) / settings.prompts_per_round) * args.steps_per_round
        trainer.add_callback(_EpochOfStep(self.steps_per_epoch))
        self.rounds = Rounds(
            sampler=self.sampler,
            verifier=scorer,
            prompts=ShuffledPrompts(rows, seed) if hasattr(rows, "__len__") else StreamedPrompts(rows),
            settings=settings,
            params=args.sampling_params(),
            maker=args.round_rows(),
            rollouts=RecordStore(folder, process_index=index),
            scores=RecordStore(folder, "scores", process_index=index),
            splitter=SPLITTERS[args.step_split],
            tokenizer=trainer.processing_class,
            step_credit=step_credit,
            process_index=index,
            processes=accelerator.num_processes,
        )
        self.sync(attested=True)

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Start from the first round, or in the one that `saved` is of."""
        self.round, self.state, self.probe = None, RoundState(), None
        if saved is None:
            return
        for name, was in saved.get("settings", {}).items():
            if was != (now := self._settings()[name]):
                raise ValueError(
                    f"the checkpoint is of rounds with {name}={was}, and now it is {now}: the round it is in would end "
                    "elsewhere; set it as it was, or start anew"
                )
        self.state, self.probe = RoundState(**saved["state"]), saved["probe"]
        if saved["rows"] is not None:
            self.round = Round(saved["rows"], {}, self.state)

    def saved(self, step: int) -> dict[str, Any]:
        """What a resumed run needs to know of the round, in a checkpoint after `step` steps."""
        inside = step % self.args.steps_per_round != 0 and self.round is not None
        rows = self.round.rows if inside else None
        return {"state": asdict(self.state), "probe": self.probe, "rows": rows, "settings": self._settings()}

    def _settings(self) -> dict[str, int]:
        """What says where a round ends."""
        found = self.rounds.settings
        return {
            **{"steps_per_round": self.args.steps_per_round, "reuse": self.args.reuse},
            **{"prompts_per_round": found.prompts_per_round, "num_generations": found.num_generations},
        }

    def close(self) -> None:
        """Let others write into the stores."""
        self.rounds.rollouts.close()
        self.rounds.scores.close()
        if hasattr(self.rounds.step_credit, "close"):
            self.rounds.step_credit.close()

    def sync(self, *, attested: bool) -> None:
        """Hand the weights of this moment to the engine, under a name that other weights do not get.

        Once proven, an engine that draws from the trained model itself has nothing left that could be stale.
        """
        trainer, model = self._trainer, unwrapped(self._trainer.model)
        policy = f"step {trainer.state.global_step} {self._start}{served_weights_hash(model)[:12]}"
        self.sampler.update(model, policy)
        if hasattr(self.rounds.step_credit, "update"):
            self.rounds.step_credit.update(model, policy)
        draws_from_it = type(self.sampler).draw is HFSampler.draw and self.sampler.model is model
        if attested and not (self._proven and draws_from_it):
            with trainer.accelerator.autocast():
                attest(self.sampler, model, trainer.processing_class, temperature=self.args.temperature)
            self._proven = True

    def log_metric(self, name: str, value: float) -> None:
        """For reward functions: a number, of which the log gets the mean over calls and processes."""
        self.noted.add_ratio(name, float(value), 1)

    def next_round(self, sums: MetricSums) -> Round:
        """Draw and score one."""
        every = self.args.attest_every
        self.sync(attested=every > 0 and self.state.number % every == 0)
        with self._trainer.accelerator.autocast():
            made = self.rounds.make(self.state)
            if self._prepare is not None:
                made = replace(made, rows=self._prepare(made.rows))
        self.state = made.state
        if self._followed and not self.probe:  # of the first round that has any
            followed = self.rounds.maker.followed(made.rows)
            self.probe = followed[:: max(1, len(followed) // self._followed)][: self._followed]
        for name, value in {**made.metrics, **self.noted.flush()}.items():
            if not math.isnan(value):
                sums.add_ratio(name, value, 1)
        return made

    def step_rows(self, step: int, sums: MetricSums) -> list[list[dict[str, Any]]]:
        """This process's micro-batches of optimiser step `step`; draws a round where one begins."""
        args, accelerator = self.args, self._trainer.accelerator
        number, place = divmod(step, args.steps_per_round)
        if place == 0 or self.round is None:
            self.round = self.next_round(sums)
        steps = args.steps_per_round // args.reuse
        rows = _shuffled_groups(self.round.rows, (args.seed * 1_000_003 + number) * 1_009 + place // steps)
        of_step = _part(rows, place % steps, steps)
        parts = args.gradient_accumulation_steps * accelerator.num_processes
        first = accelerator.process_index
        more = [] if self._besides is None else self._besides(step)
        mine = range(first, parts, accelerator.num_processes)
        return [_part(of_step, i, parts) + _part(more, i, parts) or [self.rounds.maker.filler] for i in mine]

    def solved(self, rows: list[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of `solve` with the weights of this moment; every process solves its share."""
        if not rows:
            raise ValueError("the evaluation set is empty; it needs at least one prompt")
        self.sync(attested=False)
        refuse_reserved(rows[0], RESERVED)
        n, params = self.args.eval_num_generations, self.args.sampling_params(evaluation=True)
        with self._trainer.accelerator.autocast():
            cut_too = not self.args.mask_truncated_completions
            found = solve_together(self.sampler, self.scorer, rows, n=n, params=params, score_truncated=cut_too)
        return {**found.metrics, **self.noted.flush()}


class RoundBatches:
    """Stands where the host expects a data loader: draws when a step's batches are asked for, not one ahead. An epoch
    ends with the round in which the last prompt is drawn; a stream has no length, and no epochs.

    Args:
        on_policy: gives the rows.
        step: the optimiser step that comes next.
        collate: rows to a batch.
        sums: gets the metrics of the rounds.
    """

    def __init__(
        self, on_policy: OnPolicy, step: Callable[[], int], collate: Callable[[Any], dict[str, Any]], sums: MetricSums
    ) -> None:
        self._on_policy, self._step, self._collate, self._sums = on_policy, step, collate, sums

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        steps = self._on_policy.steps_per_epoch
        if steps is None:
            raise TypeError("prompts of a stream have no number")
        return steps * self._on_policy.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches up to the end of the epoch, of which a resumed run has done a part."""
        steps = self._on_policy.steps_per_epoch
        end = math.inf if steps is None else (self._step() // steps + 1) * steps
        while self._step() < end:
            yield from map(self._collate, self._on_policy.step_rows(self._step(), self._sums))


class _EpochOfStep(TrainerCallback):
    """The epoch by the steps done: the host counts from the beginning of an epoch that a resumed run is within."""

    def __init__(self, steps_per_epoch: int | None) -> None:
        self._steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / (self._steps_per_epoch or state.max_steps)


def last_whole_checkpoint(folder: str, *, rounds: bool = True) -> str | None:
    """The last one that was written to its end; with `rounds` of those that know where their rounds stand."""
    found = [
        path.parent
        for path in Path(folder).glob("checkpoint-*/trainer_state.json")
        if not rounds or (path.parent / ROUND_FILE).exists()
    ]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def checkpoint_of(folder: str, resume: str | bool | None, *, rounds: bool = True) -> str | None:
    """The checkpoint that `resume` means; True is the last one in `folder` that was written to its end.

    Raises:
        ValueError: there is none.
    """
    if resume is not True:
        return resume or None
    found = last_whole_checkpoint(folder, rounds=rounds)
    if found is None:
        raise ValueError(f"there is no checkpoint in {folder}; leave resume_from_checkpoint out")
    return found


def write_state(trainer: Any, trial: Any, on_policy: OnPolicy | None, more: Mapping[str, Any]) -> Path:
    """Into a checkpoint what the host does not know: before the host's own, so that it is whole once that is there.

    Args:
        trainer: whose checkpoint this is.
        trial: of the host.
        on_policy: whose round is saved, if there is one.
        more: of the trainer itself.

    Returns:
        The checkpoint's folder.
    """
    step = trainer.state.global_step
    folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{step}"
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        made = None if on_policy is None else on_policy.saved(step)
        write_json(folder / ROUND_FILE, {**more, "round": made})
    return folder


def read_state(checkpoint: str | None, *, on_policy: bool) -> dict[str, Any] | None:
    """What `write_state` wrote, None without a checkpoint.

    Raises:
        ValueError: a checkpoint of something else.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint) / ROUND_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing: the checkpoint is not of this trainer; resume from another one")
    saved = read_json(path)
    if on_policy and saved["round"] is None:
        raise ValueError(f"{path} is of a run without a sampler; resume it without one")
    return saved


def scorer_of(trainer: Any, reward_funcs: Any, verifier: Verifier | None, processing_classes: Any) -> Verifier:
    """The one that was given; reward functions are offered what TRL's trainers offer them.

    Raises:
        ValueError: none, or both.
    """
    if (reward_funcs is None) == (verifier is None):
        raise ValueError("a sampler needs something that scores: pass reward_funcs, or a verifier (not both)")
    if verifier is not None:
        return verifier
    return reward_verifier(
        reward_funcs,
        trainer.args.reward_weights,
        context=lambda: {
            "trainer_state": trainer.state,
            "log_metric": trainer.on_policy.log_metric,
            "log_extra": trainer.on_policy.rounds.log_extra,
        },
        processing_classes=processing_classes,
        device=trainer.args.device,
    )


def prepare_for_prompts(args: Any, data: Any) -> None:
    """Give `args` a number of steps, and keep the host from skipping batches at a resume: rounds know their place.

    Raises:
        ValueError: no prompts, no column `prompt` or one with a name that scorers get from us, a stream without
            `max_steps`, or rounds that are no whole number of groups.
    """
    if hasattr(data, "__len__") and len(data) == 0:
        raise ValueError("train_dataset is empty; it needs at least one prompt")
    names = column_names(data)
    if names and "prompt" not in names:
        raise ValueError(
            f"train_dataset has the columns {', '.join(sorted(names))}, and no prompt; rename what is the prompt, or "
            "take it out of pairs with trl.extract_prompt"
        )
    refuse_reserved(names, RESERVED)
    settings = args.round_settings(args.world_size)
    if args.max_steps <= 0:
        if not hasattr(data, "__len__"):
            raise ValueError("a stream of prompts has no length; set max_steps")
        args.max_steps = (
            math.ceil(args.num_train_epochs * len(data) / settings.prompts_per_round) * args.steps_per_round
        )
    args.ignore_data_skip = True


def column_names(data: Any) -> set[str]:
    """Of a data set, by its first row where it has no names for them; a stream is begun anew by its next reader."""
    if getattr(data, "column_names", None):
        return set(data.column_names)
    return set(next(iter(data), ()))


def _part(items: Sequence[Any], i: int, parts: int) -> list[Any]:
    """The i-th of `parts` parts, all equally long but for one."""
    return list(items[len(items) * i // parts : len(items) * (i + 1) // parts])


def _shuffled_groups(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """Groups in another order, each kept together: its prompt is computed once."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    keys = list(groups)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    return [row for i in order for row in groups[keys[i]]]
