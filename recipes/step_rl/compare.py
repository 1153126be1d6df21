"""Does pushing down exactly the wrong step help? Eleven ways to learn from the same problems, fairly compared.

Paper       RL on Incorrect Synthetic Data, https://arxiv.org/abs/2406.14532 (figures on data efficiency); NSR and
            W-REINFORCE, https://arxiv.org/abs/2506.01347
Data        Made-up arithmetic chains; a Llama of 0.7 million weights that learns them from nothing, per seed.
Fair        Every arm starts from the same fine-tuned model of its seed, learns from the same new problems (whose
            answers it knows, not their solutions), takes the same number of optimiser steps and draws as many tokens
            as per-step DPO needs for solutions and rollouts. Rates are swept per arm with the same budget on one seed
            with its own held-out problems, and confirmed on fresh seeds. Doing nothing and continued SFT are in it.
Curve       --curve 280 560 800: the same from models that learnt from so many solved problems, at the chosen rates; how
            many times the data an arm is worth is read off the curve of fine-tuning alone.
Expected    The paper, on 7B models: per-step DPO as good as SFT on eight times the problems, trajectory DPO no better
            than SFT. On toys such orderings vanished under these controls before.
Measured    recipes/LOG.md

    python recipes/step_rl/compare.py --output_dir runs/compare --workers 2 --curve 280 560 800

A comparison that was stopped goes on where it was; --smoke runs all arms in a minute.
"""

import argparse
import math
import multiprocessing
import multiprocessing.connection
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from negtune import AdvantageConfig, AdvantageTrainer, HFSampler, PreferenceConfig, PreferenceTrainer, SamplingParams
from negtune.cli.recipe import run_recipe
from negtune.credit import advantages_from_labels, labels_from_first_error
from negtune.data.arithmetic import ANSWER_PATTERN, START_DIFFICULTY, Difficulty, chains, first_wrong_step, prompt_row
from negtune.data.steps import split_lines, token_steps
from negtune.eval.compare import DO_NOTHING, Arm, Comparison, compare
from negtune.eval.efficiency import efficiency
from negtune.eval.solving import solve
from negtune.metrics.stats import mean_interval
from negtune.models.arithmetic import START_PROBLEMS, START_TRAINING, save_arithmetic
from negtune.models.load import load_model
from negtune.records import read_json, write_json, write_jsonl
from negtune.rollouts.collect import generate, verify
from negtune.rollouts.states import Solution, StateRollouts, solutions
from negtune.rollouts.step_rows import advantage_rows, pit_pairs
from negtune.rollouts.steps import Search, locate
from negtune.rollouts.store import RecordStore
from negtune.trainers.finetune import fine_tune
from negtune.trainers.steps import NonFiniteLossError
from negtune.verifiers.exact import ExactVerifier

NAME = "answer"
MAX_TOKENS = 80
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--problems", type=int, default=START_PROBLEMS, help="solved problems to fine-tune on")
parser.add_argument("--sft_epochs", type=float, default=START_TRAINING["epochs"])
parser.add_argument("--sft_rate", type=float, default=START_TRAINING["learning_rate"])
parser.add_argument("--min_steps", type=int, default=START_DIFFICULTY.min_steps)
parser.add_argument("--max_steps", type=int, default=START_DIFFICULTY.max_steps)
parser.add_argument("--samples", type=int, default=8, help="solutions of each new problem, before rollouts")
parser.add_argument("--explored", type=int, default=256, help="new problems, of which solutions are drawn")
parser.add_argument("--num_rollouts", type=int, default=8)
parser.add_argument("--steps", type=int, default=100, help="optimiser steps of every arm")
parser.add_argument("--batch", type=int, default=32, help="completions, or pairs, of a step")
parser.add_argument("--test", type=int, default=400, help="held-out problems of every seed")
parser.add_argument("--samples_of_test", type=int, default=4, help="of each of them, at temperature 1")
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
parser.add_argument("--arms", nargs="+", help="of them only these")
parser.add_argument("--curve", type=int, nargs="+", default=[], help="other numbers of solved problems to start from")
parser.add_argument("--curve_seeds", type=int, default=3, help="of the seeds, the first so many for the curve")
parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
parser.add_argument("--smoke", action="store_true")


class Start:
    """What all arms of one seed share: problems, the fine-tuned model, solutions, pits."""

    def __init__(self, args: argparse.Namespace, seed: int, problems: int) -> None:
        self.args, self.seed = args, seed
        self.folder = args.output_dir / (f"seed{seed}" if problems == args.problems else f"seed{seed}-{problems}")
        self.difficulty = Difficulty(args.min_steps, args.max_steps, 3 if args.smoke else 9)
        solved = chains(problems, seed=seed, difficulty=self.difficulty)
        new = chains(args.explored, seed=seed, split="validation", difficulty=self.difficulty)
        self.rows, self.new = [prompt_row(row) for row in solved], [prompt_row(row) for row in new]
        base = self.folder / "base"
        if not (base / "config.json").exists():
            save_arithmetic(base, seed)
        epochs = args.sft_epochs * args.problems / problems  # as many steps
        training = {**START_TRAINING, "epochs": epochs, "learning_rate": args.sft_rate}
        self.sft = str(fine_tune(str(base), self.rows, self.folder / "sft", seed=seed, disable_tqdm=True, **training))
        self.verifier = ExactVerifier(pattern=ANSWER_PATTERN)
        self.params = SamplingParams(max_tokens=MAX_TOKENS, seed=seed)
        self.explored = [{k: r[k] for k in ("prompt", "answer", "question")} for r in self.new]

    def sampler(self) -> Any:
        model, tokenizer = load_model(self.sft)
        return HFSampler(model, tokenizer, batch_size=256, policy=f"sft {self.seed}")

    def solved(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Accuracy on this seed's held-out problems."""
        n = self.args.samples_of_test
        rows = [prompt_row(r) for r in chains(self.args.test, seed=self.seed, split="test", difficulty=self.difficulty)]
        rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]
        sampler = HFSampler(model, tokenizer, batch_size=256)
        metrics = solve(sampler, self.verifier, rows, n=n, params=self.params).metrics
        return {name: metrics[name] for name in ("accuracy", f"pass@{n}")}

    # --- samples, each kind drawn once and kept ---

    def stores(self, name: str) -> tuple[RecordStore, RecordStore]:
        return RecordStore(self.folder / name), RecordStore(self.folder / name, "verdicts")

    def drawn(self, name: str, n: int) -> int:
        """Draw and score `n` solutions of every explored problem; returns their tokens."""
        done = self.folder / name / f"drawn{n}.json"
        if done.exists():
            return read_json(done)
        rollouts, verdicts = self.stores(name)
        with rollouts, verdicts:
            generate(rollouts, self.sampler(), self.explored, n, self.params, part=512)
            verify(rollouts, verdicts, self.verifier, name=NAME, part=512)
        write_json(done, sum(len(r["completion_ids"]) for r in RecordStore(self.folder / name)))
        return read_json(done)

    def searched(
        self, search: Search, name: str, outcomes: tuple[str, ...], first: int | None = None
    ) -> list[dict[str, Any]]:
        """Judged solutions; what the search cost is written beside them."""
        self.drawn("store", self.args.samples)
        done = self.folder / "store" / f"searched-{name}-{first}.json"
        if done.exists():
            return list(RecordStore(self.folder / "store", name))
        rollouts, verdicts = self.stores("store")
        sampler, folder = self.sampler(), self.folder / "store"
        with verdicts, RecordStore(folder, f"continuations-{name}") as drawn, RecordStore(folder, name) as judged:
            found = list(
                solutions(rollouts, verdicts, NAME, sampler.tokenizer, split_lines, outcomes=outcomes, per_prompt=4)
            )
            states = StateRollouts(sampler, self.verifier, rollouts, drawn, verdicts, self.params, name=NAME, part=512)
            locate(judged, found[:first], states, search)
        write_json(done, True)
        return list(RecordStore(folder, name))

    def budget(self) -> int:
        """Tokens that per-step DPO draws: solutions, and rollouts of a bisection."""
        path = self.folder / "budget.json"
        if not path.exists():
            self.pits()
            stores = [RecordStore(self.folder / "store", n) for n in ("rollouts", "continuations-binary")]
            write_json(path, sum(len(r["completion_ids"]) for store in stores for r in store))
        return read_json(path)

    def pits(self) -> list[dict[str, Any]]:
        return self.searched(Search("binary", self.args.num_rollouts), "binary", ("wrong",))

    def valued(self) -> tuple[list[dict[str, Any]], int]:
        """Values of all steps of as many solutions as `budget` allows, right and wrong ones as they come."""
        search, done = Search("all", self.args.num_rollouts), 0
        spent = self.drawn("store", self.args.samples)
        while True:
            done += 32
            judged = self.searched(search, "values", ("wrong", "correct"), first=done)
            drawn = RecordStore(self.folder / "store", "continuations-values")
            tokens = spent + sum(len(r["completion_ids"]) for r in drawn)
            if tokens >= self.budget() or len(judged) < done:
                return judged, tokens

    def more(self) -> tuple[list[dict[str, Any]], int]:
        """Solutions for the arms without rollouts from steps: as many tokens as `budget`."""
        first = self.drawn("store", self.args.samples)
        n = max(self.args.samples, round(self.args.samples * self.budget() / first))
        tokens = self.drawn("more", n)
        rollouts, verdicts = self.stores("more")
        outcome = {v["rollout"]: v["outcome"] for v in verdicts}
        return [{**r, "outcome": outcome[r["key"]]} for r in rollouts], tokens


# --- Arms: (start, rate) -> metrics -----------------------------------------------------------------------------------


def settings(start: Start, rate: float, name: str) -> dict[str, Any]:
    args = start.args
    return {
        **{"output_dir": str(start.folder / "runs" / f"{name} {rate:g}"), "learning_rate": rate},
        **{"max_steps": args.steps, "per_device_train_batch_size": args.batch, "seed": start.seed},
        **{"lr_scheduler_type": "linear", "warmup_steps": 0.1, "save_strategy": "no", "report_to": "none"},
        **{"logging_steps": max(1, args.steps // 4), "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0},
        **{"prefix_sharing": "off"},
    }


def finished(start: Start, trainer: Any, tokens: int) -> dict[str, float]:
    bad = False
    try:
        trainer.train()
    except NonFiniteLossError:
        bad = True
    bad = bad or any(math.isnan(row.get("loss", 0.0)) for row in trainer.state.log_history)
    found = {"accuracy": math.nan} if bad else start.solved(trainer.model, trainer.processing_class)
    return {**found, "tokens_sampled": tokens, "gradient_steps": trainer.state.global_step}


def with_advantages(start: Start, rate: float, name: str, rows: list, tokens: int, **more: Any) -> dict[str, float]:
    model, tokenizer = load_model(start.sft)
    args = AdvantageConfig(**{**settings(start, rate, name), **more})
    return finished(start, AdvantageTrainer(model, args, rows, processing_class=tokenizer), tokens)


def with_pairs(start: Start, rate: float, name: str, pairs: list, tokens: int, **more: Any) -> dict[str, float]:
    model, tokenizer = load_model(start.sft)
    args = PreferenceConfig(**{**settings(start, rate, name), "reference": "cached", **more})
    return finished(start, PreferenceTrainer(model, args, pairs, processing_class=tokenizer), tokens)


def sft(start: Start, rate: float, new: bool) -> dict[str, float]:
    """More of the same, or the true solutions of the new problems, which no other arm sees. Draws nothing; its budget
    counts as spent."""
    solved = start.new if new else start.rows
    rows = [{"prompt": r["prompt"], "completion": r["completion"], "advantage": 1.0} for r in solved]
    return with_advantages(start, rate, "sft new" if new else "sft", rows, start.budget())


def rft(start: Start, rate: float) -> dict[str, float]:
    """Distinct correct solutions of the model itself."""
    found, tokens = start.more()
    rows = {(r["prompt"], r["text"]): r for r in found if r["outcome"] == "correct"}.values()
    rows = [{"prompt_ids": r["prompt_ids"], "completion_ids": r["completion_ids"], "advantage": 1.0} for r in rows]
    return with_advantages(start, rate, "rft", rows, tokens)


def trajectory_dpo(start: Start, rate: float) -> dict[str, float]:
    """Every wrong solution against a correct one of the same problem, in turn."""
    found, tokens = start.more()
    pairs, by_prompt = [], {}
    for record in found:
        by_prompt.setdefault(record["prompt"], {}).setdefault(record["outcome"], []).append(record)
    for group in by_prompt.values():
        right, wrong = group.get("correct", []), group.get("wrong", [])
        pairs += [
            {
                "prompt_ids": w["prompt_ids"],
                "chosen_ids": right[i % len(right)]["completion_ids"],
                "rejected_ids": w["completion_ids"],
            }
            for i, w in enumerate(wrong[:4])
            if right
        ]
    return with_pairs(start, rate, "dpo", pairs, tokens, loss_type="dpo")


def per_step_dpo(start: Start, rate: float, loss_type: str = "step_dpo") -> dict[str, float]:
    judged = start.pits()
    folder = start.folder / "store"
    stores = [RecordStore(folder), RecordStore(folder, "continuations-binary")]
    tokenizer, verdicts = load_model(start.sft)[1], RecordStore(folder, "verdicts")
    pairs = list(pit_pairs(judged, stores, verdicts, NAME, tokenizer, split_lines))
    return with_pairs(start, rate, loss_type, pairs, start.budget(), loss_type=loss_type)


def advantage_mc(start: Start, rate: float) -> dict[str, float]:
    """Monte-Carlo advantages of all steps of right and wrong solutions."""
    judged, tokens = start.valued()
    return with_advantages(start, rate, "mc", list(advantage_rows(judged)), tokens, loss_type="topr")


def advantage_labels(start: Start, rate: float) -> dict[str, float]:
    """True step labels of as many solutions as the other arms draw: +1 up to the first error, -1 for it."""
    found, tokens = start.more()
    tokenizer, rows = load_model(start.sft)[1], []
    for record in found:
        if record["outcome"] == "unscored":
            continue
        solution = next(iter(cut([record], tokenizer)))
        wrong = first_wrong_step(record["columns"], record["text"])
        labels = labels_from_first_error(
            -1 if wrong is None else min(wrong, len(solution.steps) - 1), len(solution.steps)
        )
        rows.append(
            {
                **{name: record[name] for name in ("prompt_ids", "completion_ids")},
                **{"step_ends": solution.steps.ends, "step_advantages": advantages_from_labels(labels)},
                **{"behaviour_logps": record["logps"], "temperature": record["temperature"]},
            }
        )
    return with_advantages(start, rate, "labels", rows, tokens, loss_type="topr")


def on_policy(start: Start, rate: float, name: str, **more: Any) -> dict[str, float]:
    """Fresh samples at every step, as many tokens in all as the others draw before."""
    model, tokenizer = load_model(start.sft)
    args = AdvantageConfig(**{**settings(start, rate, name), **completions(start), **more})
    kwargs = {"sampler": partial(HFSampler, batch_size=256), "processing_class": tokenizer}
    kwargs |= {"reward_funcs": partial(plus_or_minus_one, start)}
    trainer = AdvantageTrainer(model, args, start.explored, **kwargs)
    found = finished(start, trainer, 0)
    return {**found, "tokens_sampled": trainer.on_policy.state.tokens}


def plus_or_minus_one(start: Start, prompts: list, completions: list, **columns: Any) -> list[float | None]:
    """The reward of arXiv 2506.01347: 1 for a right answer, -1 for a wrong one."""
    verdicts = start.verifier.verify(prompts, completions, answer=columns["answer"])
    return [None if v.score is None else 2 * v.score - 1 for v in verdicts]


def completions(start: Start) -> dict[str, Any]:
    """Settings of a step that draws its part of the budget."""
    drawn = start.drawn("store", start.args.samples)
    length = drawn / (start.args.samples * len(start.explored))
    batch = max(8, round(start.budget() / length / start.args.steps / 8) * 8)
    return {
        **{"per_device_train_batch_size": batch, "num_generations": 8, "max_completion_length": MAX_TOKENS},
        **{"max_empty_rounds": 0, "gradient_norms_every": 0, "attest_every": 0},
    }


def trl_grpo(start: Start, rate: float) -> dict[str, float]:
    """TRL's GRPOTrainer as it comes, on the same prompts and rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load_model(start.sft)
    tokens = Counter()

    def reward(prompts: list, completions: list, completion_ids: list, answer: list, **columns: Any) -> list:
        tokens["drawn"] += sum(map(len, completion_ids))
        return [v.score for v in start.verifier.verify(prompts, completions, answer=answer)]

    wanted = {**settings(start, rate, "grpo"), **completions(start)}
    wanted = {k: v for k, v in wanted.items() if k in GRPOConfig.__dataclass_fields__}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(**wanted, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(start.explored),
        reward_funcs=reward,
        processing_class=tokenizer,
    )
    found = finished(start, trainer, 0)
    return {**found, "tokens_sampled": tokens["drawn"]}


def cut(records: list[Mapping[str, Any]], tokenizer: Any) -> list[Solution]:
    return [
        Solution(
            r["key"], r["prompt"], r["prompt_ids"], r["completion_ids"], r["logps"], r["columns"], None,
            token_steps(r["completion_ids"], tokenizer, split_lines),
        )
        for r in records
    ]  # fmt: skip


def agreement(start: Start) -> dict[str, float]:
    """How often Monte-Carlo pits are the first wrong line, and what they cost, by strategy."""
    found = {}
    for strategy in ("all", "adaptive", "scan", "binary"):
        search = Search(strategy, start.args.num_rollouts)
        judged = start.searched(search, strategy, ("wrong",))
        pits = [r for r in judged if r["pit"] is not None]
        right = [r for r in pits if r["pit"] - 1 == first_wrong_step(r["columns"], "".join(r["steps"]))]
        found[f"{strategy}: agreement"] = len(right) / max(1, len(pits))
        found[f"{strategy}: pits"] = len(pits)
        found[f"{strategy}: rollouts per pit"] = sum(r["num_rollouts"] for r in pits) / max(1, len(pits))
        found[f"{strategy}: tokens per pit"] = sum(r["tokens"] for r in pits) / max(1, len(pits))
    return found


SUPERVISED, PREFERENCE, POLICY = (3e-5, 1e-4, 3e-4), (2e-6, 6e-6, 2e-5), (6e-6, 2e-5, 6e-5)
ARMS = {
    "continued SFT": (partial(sft, new=False), SUPERVISED),
    "SFT on new solutions": (partial(sft, new=True), (3e-4, 1e-3, 3e-3)),
    "RFT": (rft, SUPERVISED),
    "trajectory DPO": (trajectory_dpo, PREFERENCE),
    "per-step DPO": (per_step_dpo, PREFERENCE),
    "per-step DPO, whole continuation": (partial(per_step_dpo, loss_type="dpo"), PREFERENCE),
    "advantage, labels": (advantage_labels, SUPERVISED),
    "advantage, Monte-Carlo": (advantage_mc, POLICY),
    "NSR, on-policy": (partial(on_policy, name="nsr", loss_type="nsr", baseline="none"), POLICY),
    "W-REINFORCE, on-policy": (partial(on_policy, name="w", loss_type="w_reinforce", baseline="none"), POLICY),
    "GRPO (TRL)": (trl_grpo, POLICY),
}


CURVE = ("continued SFT", "RFT", "trajectory DPO", "per-step DPO")
SWEEP_SEED = 0
"""Rates are chosen on its problems, which no table shows."""


def prepare(start: Callable[[int], Start], seeds: list[int], workers: int) -> None:
    """Everything that runs share, on the disk, one process a seed."""

    def one(seed: int) -> None:
        start(seed).more()
        start(seed).valued()

    waiting, running = list(seeds), []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(multiprocessing.get_context("fork").Process(target=one, args=(waiting.pop(0),)))
            running[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in running])
        if any(process.exitcode for process in running):
            raise RuntimeError("the preparation of a seed failed; its message is above")
        running = [process for process in running if process.exitcode is None]


class Experiment:
    """All comparisons of one command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.starts: dict[tuple[int, int], Start] = {}
        aside = ("output_dir", "seeds", "arms", "workers", "curve", "curve_seeds")
        self.settings = {name: value for name, value in vars(args).items() if name not in aside}

    def start(self, problems: int, seed: int) -> Start:
        key = problems, seed
        if key not in self.starts:
            self.starts[key] = Start(self.args, seed, problems)
        return self.starts[key]

    def compare(self, problems: int, rates: Mapping[str, tuple[float, ...]], seeds: list[int]) -> Comparison:
        """Arms at these rates, from models that learnt from so many solved problems."""
        start = partial(self.start, problems)
        arms = [Arm(name, self._run(ARMS[name][0], start), of_arm) for name, of_arm in rates.items()]
        prepare(start, [SWEEP_SEED, *seeds] if any(len(r) > 1 for r in rates.values()) else seeds, self.args.workers)
        return compare(
            arms,
            lambda seed: start(seed).solved(*load_model(start(seed).sft)),
            seeds=seeds,
            sweep_seed=SWEEP_SEED,
            metric="accuracy",
            folder=self.args.output_dir,
            baseline="continued SFT" if "continued SFT" in rates else DO_NOTHING,
            settings={**self.settings, "problems": problems},
            worst=0.0,
            workers=self.args.workers,
        )

    def _run(self, run: Callable[[Start, float], dict[str, float]], start: Callable[[int], Start]) -> Callable:
        return lambda rate, seed: run(start(seed), rate)

    def curve(self, main: Comparison) -> dict[int, Comparison]:
        """By the number of solved problems to start from, that of `main` among them."""
        rates = {name: (main.rates[name],) for name in CURVE if name in main.rates}
        seeds = self.args.seeds[: self.args.curve_seeds]
        others = {n: self.compare(n, rates, seeds) for n in self.args.curve}
        return dict(sorted({self.args.problems: main, **others}.items()))


def curve_table(curve: Mapping[int, Comparison], seeds: list[int]) -> str:
    """Accuracy of each arm by number of problems, and how many times the data it is worth."""
    arms = [DO_NOTHING, *(name for name in CURVE if name in next(iter(curve.values())).rates)]
    lines = [f"| problems | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for n, found in curve.items():
        values = [[found.values(arm, found.metric)[seed] for seed in seeds] for arm in arms]
        lines.append(f"| {n} | " + " | ".join("{:.3f} ± {:.3f}".format(*mean_interval(v)) for v in values) + " |")
    lines += ["", "Times the data that fine-tuning alone needs for the same accuracy, by seed:", ""]
    for arm in arms[1:]:
        for n, found in curve.items():
            factors = []
            for seed in seeds:
                alone = {m: c.values(DO_NOTHING, c.metric)[seed] for m, c in curve.items()}
                factors.append(efficiency(alone, n, found.values(arm, found.metric)[seed]))
            lines.append(f"- {arm}, {n}: " + ", ".join(_said(factor) for factor in factors))
    return "\n".join(lines)


def _said(factor: float) -> str:
    """inf: better than fine-tuning alone on the most problems; NaN: worse than on the fewest."""
    return "below the curve" if math.isnan(factor) else "above the curve" if math.isinf(factor) else f"{factor:.2f}"


def refuse(args: argparse.Namespace) -> None:
    """Raise ValueError for what would end, or mislead, an hour later."""
    unknown = [arm for arm in args.arms or () if arm not in ARMS]
    if unknown:
        raise ValueError(f"--arms {unknown[0]!r} is none of {', '.join(map(repr, ARMS))}")
    if SWEEP_SEED in args.seeds:
        raise ValueError(f"--seeds {SWEEP_SEED} chose the rates and cannot confirm them; take others")
    if len(set(args.seeds)) < len(args.seeds) or len(set(args.curve)) < len(args.curve):
        raise ValueError("--seeds and --curve name each number once")
    for name in ("problems", "explored", "samples", "num_rollouts", "steps", "batch", "test", "workers", "curve_seeds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")


def main() -> None:
    args = parser.parse_args()
    refuse(args)
    torch.set_num_threads(1)
    if args.smoke:
        args.problems, args.explored, args.samples, args.num_rollouts = 100, 24, 4, 8
        args.min_steps, args.max_steps, args.sft_epochs, args.sft_rate = 1, 2, 30, 5e-3
        args.steps, args.batch, args.test, args.seeds = 3, 8, 8, args.seeds[:2]
        args.curve, args.curve_seeds = args.curve[:1], 2
    experiment = Experiment(args)
    wanted = {name: rates for name, (_, rates) in ARMS.items() if not args.arms or name in args.arms}
    found = experiment.compare(args.problems, wanted, args.seeds)
    text = found.markdown()
    located = [{"seed": seed, **agreement(experiment.start(args.problems, seed))} for seed in args.seeds]
    write_jsonl(args.output_dir / "pits.jsonl", located)
    text += "\nMonte-Carlo pits against the first wrong line (mean over seeds):\n\n"
    text += "\n".join(f"- {k}: {sum(r[k] for r in located) / len(located):.3g}" for k in located[0] if k != "seed")
    if args.curve:
        curve = experiment.curve(found)
        text += "\n\nAccuracy by number of solved problems to start from:\n\n"
        text += curve_table(curve, args.seeds[: args.curve_seeds])
        draw(curve, args.seeds[: args.curve_seeds], args.output_dir / "curve.png")
    (args.output_dir / "compare.md").write_text(text + "\n")
    print(text)


def draw(curve: Mapping[int, Comparison], seeds: list[int], file: Path) -> None:
    """Accuracy against the number of problems, one line per arm, seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    arms = [DO_NOTHING, *(name for name in CURVE if name in next(iter(curve.values())).rates)]
    for arm in arms:
        values = {n: [c.values(arm, c.metric)[seed] for seed in seeds] for n, c in curve.items()}
        means = [sum(v) / len(v) for v in values.values()]
        (line,) = axes.plot(list(values), means, label="SFT alone" if arm == DO_NOTHING else arm)
        for n, of_seeds in values.items():
            axes.plot([n] * len(of_seeds), of_seeds, ".", color=line.get_color(), alpha=0.5)
    axes.set(xscale="log", xlabel="solved problems to start from", ylabel="accuracy on held-out problems")
    axes.set_xticks(list(curve), [str(n) for n in curve])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
