"""Online DPO against TRL's experimental OnlineDPOTrainer: two answers to each prompt, one step on each round.

Both draw with transformers' generate, LoRA on all linear layers, the same prompts, batch, limit and reward. Every run
in a process of its own; the first round is left out (it warms up). Measured: seconds per round, seconds per pair that
says something (two finished answers with different scores), peak memory, and pairs that were trained on although they
say nothing: ties, and pairs with an answer that was cut, whose score nobody knows.

    python benchmarks/online_dpo.py --prompts FOLDER --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from side_by_side import in_fresh_process, row, table, write_result
from transformers import TrainerCallback

from negtune import HFSampler, PreferenceConfig, PreferenceTrainer
from negtune.data.instructions import load_instructions, synthetic
from negtune.eval.run import peak_rss_mib
from negtune.models.load import load_model
from negtune.verifiers.shape import OneSentence
from negtune.verifiers.verdict import text_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--prompts", help="instructions; default: made-up ones")
parser.add_argument("--batch", type=int, default=8, help="prompts of a round")
parser.add_argument("--rounds", type=int, default=4, help="timed, after one that is not")
parser.add_argument("--max_tokens", type=int, default=32)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
parser.add_argument("--name", default="online_dpo", help="of the JSON in benchmarks/results")
parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)


def fewest_characters(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Of text, not of tokens: TRL hands out completions with their padding, of which all are equally long."""
    return [-float(len(text_of(completion))) for completion in completions]


REWARDS = {"fewest characters": fewest_characters, "one sentence (0 or 1)": OneSentence()}


class Watch(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class Scores:
    """A reward function that remembers the scores of every prompt, call by call, and whether the answers had an end."""

    __name__ = "scores"

    def __init__(self, reward: Any, eos: int) -> None:
        self.reward, self.eos, self.calls = reward, eos, []

    def __call__(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list:
        found = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids)
        groups: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for prompt, score, ids in zip(prompts, found, completion_ids, strict=True):
            groups[json.dumps(prompt)].append((score, self.eos in ids))
        self.calls.append(groups)
        return found

    def pairs(self) -> dict[str, int]:
        """After the first round: pairs of two finished answers that differ in score, ties, and pairs with a cut one."""
        two = [pair for groups in self.calls[1:] for pair in groups.values() if len(pair) == 2]
        cut = sum(not (a[1] and b[1]) for a, b in two)
        tied = sum(a[1] and b[1] and a[0] == b[0] for a, b in two)
        return {"told": len(two) - cut - tied, "tied": tied, "cut": cut}


def one(args: argparse.Namespace, arm: str, file: str) -> None:
    who, reward, seed = arm.split("|")
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    texts = (
        [r["prompt"] for r in synthetic(200)] if args.prompts is None else load_instructions(args.prompts, longest=150)
    )
    chat = tokenizer.chat_template is not None and args.model != "tiny"
    needed = args.batch * (args.rounds + 1)
    asked = [t + " Answer in a few words." for t in texts[int(seed) * 7 :]][:needed]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": t}] if chat else t} for t in asked])
    scores, watch = Scores(REWARDS[reward], tokenizer.eos_token_id), Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (ours if who == "ours" else peer)(args, model, tokenizer, data, scores, folder, int(seed))
        trainer.add_callback(watch)
        trainer.train()
    found = scores.pairs()
    trained = 0 if who == "ours" else found["tied"] + found["cut"]
    seconds = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
    result = {"seconds": seconds, **found, "peak_mib": peak_rss_mib(), "trained_on_nothing": trained}
    Path(file).write_text(json.dumps(result), encoding="utf-8")


def settings(args: argparse.Namespace, folder: str, seed: int) -> dict[str, Any]:
    return {
        **{"output_dir": folder, "per_device_train_batch_size": args.batch, "max_steps": args.rounds + 1, "seed": seed},
        **{
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
        },
        **{"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False, "beta": 0.1},
        "dataloader_pin_memory": False,
    }


def ours(args: Any, model: Any, tokenizer: Any, data: Dataset, reward: Any, folder: str, seed: int) -> Any:
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(
            **settings(args, folder, seed),
            **{"num_generations": 2, "max_completion_length": args.max_tokens, "dynamic_sampling": False},
            **{"displacement_pairs": 0, "max_empty_rounds": 0, "max_length": None},
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter(),
        sampler=lambda model, tokenizer: HFSampler(model, tokenizer, batch_size=2 * args.batch),
        reward_funcs=reward,
    )


def peer(args: Any, model: Any, tokenizer: Any, data: Dataset, reward: Any, folder: str, seed: int) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    return OnlineDPOTrainer(
        model=model,
        args=OnlineDPOConfig(
            **settings(args, folder, seed), max_new_tokens=args.max_tokens, temperature=1.0, missing_eos_penalty=None
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter(),
        reward_funcs=reward,
    )


def adapter() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    args = parser.parse_args()
    if args.one:
        one(args, *args.one)
        return
    rows = []
    for reward in REWARDS:
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for seed in args.seeds:  # in turn, so that a slow hour of the machine is shared
            for who in found:
                found[who].append(in_fresh_process(f"{who}|{reward}|{seed}", args.threads))
        rows += rows_of(reward, found)
    print(table(rows))
    print(write_result(args.name, rows))


def rows_of(reward: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    seconds = {who: [statistics.mean(r["seconds"]) for r in runs] for who, runs in found.items()}
    told = {who: sum(r["told"] for r in runs) for who, runs in found.items()}
    spent = {who: sum(sum(r["seconds"]) for r in runs) for who, runs in found.items()}
    ties = {who: sum(r["trained_on_nothing"] for r in runs) for who, runs in found.items()}
    mean = {who: statistics.mean(values) for who, values in seconds.items()}
    peak = {who: max(r["peak_mib"] for r in runs) for who, runs in found.items()}
    return [
        row(f"{reward}: a round", mean["ours"], mean["peer"], "s", by_seed=seconds),
        row(
            f"{reward}: a pair that says something",
            **{"ours": spent["ours"] / max(1, told["ours"]), "peer": spent["peer"] / max(1, told["peer"])},
            **{"unit": "s", "reach": 1.5, "pairs": told},
        ),
        row(f"{reward}: peak memory of the process", peak["ours"], peak["peer"], "MiB", reach=1.0),
        row(f"{reward}: trained on although tied or cut", ties["ours"], ties["peer"], "pairs"),
    ]


if __name__ == "__main__":
    main()
