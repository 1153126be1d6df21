"""What the arms of a grid share: prompts, the model they start from, the reward, and how a policy is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from negtune import HFSampler, SamplingParams
from negtune.data.instructions import load_instructions, synthetic
from negtune.data.pair_selection import PairSelection
from negtune.data.prompts import ShuffledPrompts
from negtune.eval.frontier import reward_and_kl, under
from negtune.models.load import load_model
from negtune.models.policy import is_peft
from negtune.models.tiny import save_tiny
from negtune.records import read_jsonl, write_jsonl
from negtune.rollouts.sampler import Rollout, requests_for
from negtune.trainers.finetune import fine_tune
from negtune.verifiers.shape import MinLength, ModeLength, OneSentence

REWARDS = ("min_length", "mode_length", "one_sentence")
NOT_DECIDING = ("seeds", "sweep_seed", "rates", "arms")
COUNTS = (
    *("longest", "steps", "prompts_per_step", "num_generations", "micro_batch", "sample_batch", "max_tokens"),
    *("test_prompts", "test_samples", "lora_r"),
)


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Args:
        arms: name to `trainer` (preference or advantage) and settings of its config; `steps_per_round: all` draws
            everything from the start; `rates` in place of the grid's.
        model: folder, Hub id, `smollm2`, or `tiny` (which is taught a few made-up answers first).
        prompts: JSON lines of instructions, a folder of such, or a Hub id; None: made up.
        longest: characters of an instruction; longer ones are left out.
        suffix: behind every instruction.
        reward: min_length, mode_length or one_sentence.
        steps: optimiser steps of every arm.
        prompts_per_step, num_generations: samples that a step of every arm may use.
        micro_batch: rows of one forward pass.
        sample_batch: completions drawn at a time.
        max_tokens: of a completion.
        mask_truncated_completions: leave cut ones out of the training; by default they are scored as they stand, there
            as in the measurement.
        test_prompts, test_samples: held-out prompts, and samples of each, by which a policy is measured; the sweep has
            as many prompts of its own.
        kl_price: what a nat of KL costs: the rate is chosen by reward - kl_price KL. At 0 the best rate is nearly
            always the largest that does not diverge.
        rates: learning rates to sweep.
        sweep_seed, seeds: see `negtune.eval.compare`.
        lora_r: rank of the adapter on all linear layers.
    """

    arms: dict[str, dict[str, Any]]
    model: str = "smollm2"
    prompts: str | None = None
    longest: int = 300
    suffix: str = " Answer in a few words."
    reward: str = "min_length"
    steps: int = 12
    prompts_per_step: int = 4
    num_generations: int = 4
    micro_batch: int = 16
    sample_batch: int = 64
    max_tokens: int = 24
    mask_truncated_completions: bool = False
    test_prompts: int = 48
    test_samples: int = 2
    kl_price: float = 0.01
    rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    sweep_seed: int = 0
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    lora_r: int = 16

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        object.__setattr__(self, "rates", _numbers("rates", self.rates))
        object.__setattr__(self, "kl_price", _numbers("kl_price", [self.kl_price])[0])
        if not isinstance(self.seeds, list) or not all(type(s) is int for s in [*self.seeds, self.sweep_seed]):
            raise ValueError(f"seeds and sweep_seed must be whole numbers, got {self.seeds!r} and {self.sweep_seed!r}")
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        if not isinstance(self.arms, dict) or not self.arms:
            raise ValueError(f"a grid needs arms: names with a trainer and its settings, got {self.arms!r}")
        for name, arm in self.arms.items():
            if not isinstance(arm, dict) or arm.get("trainer") not in ("preference", "advantage"):
                raise ValueError(f"arm {name!r} needs trainer: preference or advantage, and settings of its config")

    def deciding(self) -> dict[str, Any]:
        """What decides the result of a run, besides its arm, rate and seed."""
        return {name: value for name, value in vars(self).items() if name not in NOT_DECIDING}

    def shrunk(self) -> Grid:
        """The same on a tiny model, in a minute or two."""
        small = {
            "steps": 3,
            "prompts_per_step": 4,
            "test_prompts": 8,
            "sample_batch": 32,
            "lora_r": 4,
            "max_tokens": 16,
        }
        fast = {"rates": [1e-3, 1e-2], "seeds": self.seeds[:2]}
        return replace(self, model="tiny", prompts=None, suffix="", **fast, **small)


def _numbers(name: str, given: Any) -> list[float]:
    """A list of numbers; YAML reads 1e-4 as a text, and 1.0e-4 as a number."""
    try:
        if not isinstance(given, list) or not given:
            raise TypeError
        return [float(value) for value in given]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, in a list where there may be several; got {given!r}") from None


def read_grid(file: Path, *, smoke: bool = False, **given: Any) -> Grid:
    """A grid file, shrunk for a smoke run, with what the command line says instead.

    Raises:
        ValueError: no such file, no YAML, no mapping, or a name that a grid does not have.
    """
    if not file.exists():
        raise ValueError(f"there is no grid file {file}")
    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ValueError(f"{file}{line} is no YAML: {getattr(error, 'problem', None) or error}") from error
    names = [f.name for f in fields(Grid)]
    if not isinstance(found, dict) or not set(found) <= set(names):
        wrong = sorted(set(found) - set(names)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file}: a grid has {', '.join(names)}; this has {wrong}")
    only = given.pop("arms")
    grid = Grid(**found).shrunk() if smoke else Grid(**found)
    grid = replace(grid, **{name: value for name, value in given.items() if value is not None})
    if only is None:
        return grid
    missing = [name for name in only if name not in grid.arms]
    if missing:
        raise ValueError(f"--arms {missing[0]!r} is not in {file}, which has {', '.join(map(repr, grid.arms))}")
    return replace(grid, arms={name: grid.arms[name] for name in only})


def instructions(source: str | None, suffix: str, *, chat: bool, longest: int = 300) -> list[Any]:
    """Prompts in an order of their own, which does not depend on the file's."""
    made_up = [row["prompt"] for row in synthetic(400)]
    texts = made_up if source is None else load_instructions(source, longest=longest)
    shuffled = ShuffledPrompts([{"prompt": text + suffix} for text in texts], 0).take(0, len(texts))
    prompts = [row["prompt"] for row in shuffled]
    return [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts


def start_of(model: str, folder: Path) -> str:
    """`model`, or the tiny one after it was taught what answers look like."""
    if model != "tiny":
        return model
    training = {"epochs": 6, "learning_rate": 3e-3, "batch_size": 16, "disable_tqdm": True}
    return str(fine_tune(str(save_tiny(folder / "tiny")), synthetic(400), folder / "start", **training))


def reward_of(name: str, limit: int, typical: Callable[[], int]) -> Any:
    """The reward called `name`; `typical` gives the length that mode_length wants."""
    if name == "min_length":
        return MinLength(limit)
    return ModeLength(typical(), limit) if name == "mode_length" else OneSentence()


class Task:
    """A grid made ready to run.

    Args:
        grid: what to run.
        folder: of the run.
    """

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.start = start_of(grid.model, folder)
        chat = grid.model != "tiny" and load_model(self.start)[1].chat_template is not None
        prompts = instructions(grid.prompts, grid.suffix, chat=chat, longest=grid.longest)
        n = grid.test_prompts
        self.test, self.validation, self.train = prompts[:n], prompts[n : 2 * n], prompts[2 * n :]
        if len(self.train) < grid.prompts_per_step:
            raise ValueError(f"{len(prompts)} prompts leave {len(self.train)} to train on beside twice {n} to test on")
        self.reward = reward_of(grid.reward, grid.max_tokens, self._mode)
        self.best, self.worst = self._best_and_worst()

    def load(self) -> tuple[Any, Any]:
        """The model that every arm starts from."""
        return load_model(self.start)

    def adapter(self) -> LoraConfig:
        rank = self.grid.lora_r
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def measured(self, model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
        """Reward, KL and their value on held-out prompts, others on the seed of the sweep; where a rate is confirmed
        also how the log-probability of the start's own best and worst answers has changed, in nats a token.

        The start is the model without its adapter.
        """
        grid = self.grid
        prompts = self.validation if seed == grid.sweep_seed else self.test

        def reference(rollouts: Sequence[Rollout]) -> list[float]:
            if not is_peft(model):
                return under(model, tokenizer)(rollouts)
            with model.disable_adapter():
                return under(model, tokenizer)(rollouts)

        params = SamplingParams(max_tokens=grid.max_tokens, seed=seed + 1_000_000)
        sampler = HFSampler(model, tokenizer, batch_size=grid.sample_batch)
        found = reward_and_kl(sampler, self.reward, prompts, reference, n=grid.test_samples, params=params)
        value = found.metrics["reward"] - grid.kl_price * found.metrics["kl"]
        shown = {"value": value, **{name: found.metrics[name] for name in ("reward", "kl", "length", "truncated")}}
        if seed == grid.sweep_seed:
            return shown
        both = [r for pair in zip(self.best, self.worst, strict=True) for r in pair]  # of a prompt side by side
        now = under(model, tokenizer)(both)
        changes = [(a - sum(r.logps)) / len(r.logps) for a, r in zip(now, both, strict=True)]
        for side, of_side in (("best", changes[::2]), ("worst", changes[1::2])):
            shown[f"{side}/drift"] = sum(of_side) / len(of_side)
        return shown

    def _drawn(self, name: str, prompts: Sequence[Any]) -> list[Rollout]:
        """Answers of the start, drawn once; anew where those in the folder are of another model or draw."""
        file, n, params = (
            self.folder / f"{name}.jsonl",
            self.grid.num_generations,
            SamplingParams(max_tokens=self.grid.max_tokens),
        )
        found = [Rollout.from_record(record) for record in read_jsonl(file)] if file.exists() else []
        if [r.key for r in found] != [r.key(params, self.start) for r in requests_for(prompts, n)]:
            sampler = HFSampler(*self.load(), batch_size=self.grid.sample_batch, policy=self.start)
            found = sampler.sample(prompts, n, params)
            write_jsonl(file, [vars(r) for r in found])
        return found

    def _best_and_worst(self) -> tuple[list[Rollout], list[Rollout]]:
        drawn, n = self._drawn("test_answers", self.test), self.grid.num_generations
        texts = [r.text if isinstance(r.prompt, str) else [{"role": "assistant", "content": r.text}] for r in drawn]
        ids = [r.completion_ids for r in drawn]
        scores = self.reward([r.prompt for r in drawn], texts, completion_ids=ids)
        chosen = [PairSelection().choose(scores[i : i + n], range(n), seed=0) for i in range(0, len(drawn), n)]
        places = [(i * n + a, i * n + b) for i, pairs in enumerate(chosen) for a, b in pairs]
        return [drawn[a] for a, _ in places], [drawn[b] for _, b in places]

    def _mode(self) -> int:
        """Median length of what the start says to some of the training prompts."""
        lengths = sorted(len(r.completion_ids) for r in self._drawn("train_answers", self.train[:32]))
        return lengths[len(lengths) // 2]
