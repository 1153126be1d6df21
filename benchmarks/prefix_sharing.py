"""A DPO step of negtune against TRL's `DPOTrainer`: same weights, same pairs, same optimiser, float32 in both
(bf16 autocast in both on a GPU).

a. ordinary pairs: a question, a right and a wrong solution.
b. per-step pairs: a question and the first steps of its solution, then the right or a wrong next step.
r. the same with the whole rest of the solution.
c. trees: one long prompt with eight answers, as four disjoint pairs in one batch (TRL trains on the same four).

Wrong solutions are right ones with other numbers. The reference is computed on the fly in both (adapter switched off,
or a frozen copy), or cached in both. The two take turns, `--rounds` times, each time in a fresh process; seconds are
medians over optimiser steps, the first of every process left out. There is no ratio unless the losses of the first
three steps agree to 1e-4.

    python benchmarks/prefix_sharing.py --data_dir FOLDER

On two cores and by default this takes about twenty minutes, most of it TRL's steps on the trees.

FOLDER has GSM8K's `train.jsonl.gz`; without it synthetic sums of the same shape are used.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from side_by_side import row, table, write_result
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from negtune import PreferenceConfig, PreferenceTrainer
from negtune.eval.run import peak_rss_mib
from negtune.models.load import load_model

CASES = {
    "a": ("ordinary pairs", 2, 1.5),
    "b": ("per-step pairs", 2, 2.5),
    "r": ("per-step pairs, whole rest", 2, None),
    "c": ("trees of eight branches", 4, 4.0),
}
"""Name, pairs a step, reach."""
MODES = {
    "LoRA, adapter off": {"lora": True, "cached": False},
    "LoRA, cached": {"lora": True, "cached": True},
    "full, frozen copy": {"lora": False, "cached": False},
    "full, cached": {"lora": False, "cached": True},
}
DEFAULT_CASES, DEFAULT_MODES = ["a", "b", "c"], ["LoRA, adapter off", "LoRA, cached", "full, frozen copy"]
ANSWERS = ("chosen", "rejected")
AGREEMENT = 2e-2 if torch.cuda.is_available() else 1e-4
"""Largest difference of a step's losses: float32 on a CPU, where neither rounds any, and bf16 autocast on a GPU."""


class Clock(TrainerCallback):
    """Seconds of each optimiser step but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with GSM8K's train.jsonl.gz; default: synthetic sums")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, choices=list(CASES))
    parser.add_argument("--modes", nargs="+", default=DEFAULT_MODES, choices=list(MODES))
    parser.add_argument("--steps", type=int, default=3, help="of each process, at least 3; the first is not timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=4, metavar=("WHO", "CASE", "MODE", "FILE"), help="internal: one process's part")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.steps < 3:
        parser.error("--steps must be at least 3: the losses of three steps are compared")
    if args.one:
        run_one(args, *args.one)
        return
    rows = []
    for case in args.cases:
        rows += [compare(args, case, mode) for mode in args.modes]
        write_result("prefix_sharing" + ("_cuda" if torch.cuda.is_available() else ""), rows)
        print(table(rows[-len(args.modes) :]), flush=True)
    print(table(rows))


def compare(args: argparse.Namespace, case: str, mode: str) -> dict[str, Any]:
    """Seconds a step of both trainers on the same pairs in the same order; no number unless their losses agree."""
    name, size, reach = CASES[case]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "one.json")
        for _ in range(args.rounds):
            for who, runs in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--one", who, case, mode, str(file)]
                subprocess.run(command, check=True)
                runs.append(json.loads(file.read_text()))
    first = {who: runs[0] for who, runs in found.items()}
    apart = max(abs(a - b) for a, b in zip(*(run["losses"][:3] for run in first.values()), strict=True))
    if not apart <= AGREEMENT or first["ours"]["trained"] != first["peer"]["trained"]:
        raise SystemExit(f"{case}, {mode}: not the same training, so nothing to compare: {json.dumps(first, indent=1)}")
    seconds = {who: [s for run in runs for s in run["seconds"]] for who, runs in found.items()}
    middle = {who: median(values) for who, values in seconds.items()}
    more = {key: value for key, value in first["ours"].items() if key.startswith("tokens/")}
    tokens = more.pop("tokens/row") * 2 * size
    return row(
        f"{case}: {name}; {mode}",
        middle["ours"],
        middle["peer"],
        "s/step",
        reach if "full" not in mode else None,
        pairs_per_step=size,
        losses={who: run["losses"] for who, run in first.items()},
        row_tokens_per_second={who: tokens / value for who, value in middle.items()},
        peak_mib={who: max(run["peak_mib"] for run in runs) for who, runs in found.items()},
        trained=first["ours"]["trained"],
        seconds=seconds,
        **more,
    )


def run_one(args: argparse.Namespace, who: str, case: str, mode: str, file: str) -> None:
    """Train with one of the two and write what it took."""
    for noisy in ("transformers", "trl", "negtune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    size = CASES[case][1]
    pairs = PAIRS[case](problems(args.data_dir), size * args.steps)
    torch.manual_seed(0)  # the adapter's first weights
    with tempfile.TemporaryDirectory() as folder:
        trainer = (ours if who == "ours" else peer)(args, MODES[mode], size, pairs, folder)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths = [len(trainer.processing_class(p["prompt"] + p[side])["input_ids"]) for p in pairs for side in ANSWERS]
    on_gpu = torch.cuda.is_available()
    result = {
        "losses": [entry["loss"] for entry in logged],
        "seconds": clock.seconds,
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_rss_mib(),
        "tokens/row": sum(lengths) / len(lengths),
        **{key: logged[0][key] for key in ("tokens/shared", "tokens/padding") if key in logged[0]},
    }
    Path(file).write_text(json.dumps(result), encoding="utf-8")


def shared_settings(args: argparse.Namespace, size: int, folder: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        **{"output_dir": folder, "per_device_train_batch_size": size, "max_steps": args.steps, "beta": 0.1},
        **{"learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "seed": 0},
        **{"save_strategy": "no", "disable_tqdm": True, "bf16": on_gpu, "gradient_checkpointing": False},
        **{
            "use_cpu": not on_gpu,
            "max_length": 2048,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": on_gpu,
        },
    }


def ours(args: Any, settings: dict[str, bool], size: int, pairs: list[dict[str, str]], folder: str) -> Any:
    model, tokenizer = load_model(args.model)
    kind = "cached" if settings["cached"] else "adapter" if settings["lora"] else "copy"
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(**shared_settings(args, size, folder), reference=kind),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=adapter() if settings["lora"] else None,
    )


def peer(args: Any, settings: dict[str, bool], size: int, pairs: list[dict[str, str]], folder: str) -> Any:
    model, tokenizer = load_model(args.model)
    copy = None
    if not settings["lora"] and not settings["cached"]:
        copy, _ = load_model(args.model)
    return DPOTrainer(
        model=model,
        ref_model=copy,
        args=DPOConfig(**shared_settings(args, size, folder), precompute_ref_log_probs=settings["cached"]),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=adapter() if settings["lora"] else None,
    )


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


# --- pairs ------------------------------------------------------------------------------------------------------------


def problems(folder: str | None) -> list[dict[str, str]]:
    """`question` and `answer` (one step per line)."""
    if folder is not None:
        with gzip.open(Path(folder, "train.jsonl.gz"), "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        return [{**item, "answer": re.sub(r"<<.*?>>", "", item["answer"])} for item in found]
    draw, made = random.Random(0), []
    for _ in range(400):
        numbers = [draw.randint(2, 60) for _ in range(7)]
        steps, total = [], numbers[0]
        for number in numbers[1:]:
            steps.append(
                f"Adding the {number} apples to the {total} before gives {total} + {number} = {total + number}."
            )
            total += number
        question = f"Mia picks {', then '.join(map(str, numbers))} apples. How many apples does she have in the end?"
        made.append({"question": question, "answer": "\n".join([*steps, f"#### {total}"])})
    return made


def spoiled(text: str, seed: int) -> str:
    """The same text with other numbers."""
    draw = random.Random(seed)
    return re.sub(r"\d+", lambda match: str(int(match[0]) + draw.randint(1, 9)), text)


def ordinary(items: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Question: {item['question']}\nAnswer:",
            "chosen": f" {item['answer']}",
            "rejected": f" {spoiled(item['answer'], i)}",
        }
        for i, item in enumerate(items[:count])
    ]


def per_step(items: list[dict[str, str]], count: int, *, whole_rest: bool = False) -> list[dict[str, str]]:
    """The last step (with the result line, `whole_rest`) is the pair; all before it is shared. Five steps or more."""
    pairs = []
    for i, item in enumerate(item for item in items if item["answer"].count("\n") >= 5):
        *first, last, result = item["answer"].split("\n")
        rest = f"{last}\n{result}" if whole_rest else last
        steps = "\n".join(first)
        pairs.append(
            {
                "prompt": f"Question: {item['question']}\nAnswer: {steps}\n",
                "chosen": rest,
                "rejected": spoiled(rest, i),
            }
        )
        if len(pairs) == count:
            break
    return pairs


def trees(items: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """A prompt of two solved problems and a question; four right answers in other words, four wrong ones."""
    pairs: list[dict[str, str]] = []
    short = [item for item in items if len(item["question"] + item["answer"]) < 420] or items
    for start in range(0, count, 4):
        *solved, asked = short[start : start + 3]
        examples = "".join(f"Question: {item['question']}\nAnswer: {item['answer']}\n\n" for item in solved)
        for opening in (" ", " Let us see. ", " Step by step: ", " First of all, "):
            pairs.append(
                {
                    "prompt": f"{examples}Question: {asked['question']}\nAnswer:",
                    "chosen": opening + asked["answer"],
                    "rejected": opening + spoiled(asked["answer"], len(pairs)),
                }
            )
    return pairs[:count]


PAIRS = {"a": ordinary, "b": per_step, "r": partial(per_step, whole_rest=True), "c": trees}


if __name__ == "__main__":
    main()
