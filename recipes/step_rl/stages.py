"""What the recipes of this folder share: problems, the fine-tuned model they start from, samples, verdicts, pits.

Every stage writes a file or a folder under `output_dir` and is skipped where that is complete, so that a run that was
stopped goes on where it was:

    sft/            fine-tuned model
    store/          rollouts-*.jsonl, verdicts-*.jsonl, continuations-*.jsonl, steps-*.jsonl
    pairs.jsonl     rows.jsonl
    policy/         checkpoints and the trained model or adapter
    metrics.json    accuracy and pass@k before and after
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from negtune.cli.rollouts import Progress, print_stats
from negtune.data.arithmetic import ANSWER_PATTERN, Difficulty, chains, prompt_row
from negtune.data.steps import SPLITTERS
from negtune.eval.solving import solve
from negtune.models.load import load_model
from negtune.records import read_json, strict, write_json
from negtune.rollouts import collect, steps
from negtune.rollouts.attest import attest, policy_name
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import Sampler, SamplingParams
from negtune.rollouts.states import StateRollouts, solutions
from negtune.rollouts.store import RecordStore
from negtune.trainers.finetune import fine_tune
from negtune.verifiers.exact import ExactVerifier
from negtune.verifiers.math import MathVerifier
from negtune.verifiers.verdict import Verifier

ASK = "Solve the problem step by step, one step per line. End with a line '#### ' and the number alone.\n\n"
VERIFIER = "answer"


@dataclass
class StepArguments:
    gsm8k: str | None = field(
        default=None, metadata={"help": "Hub id (openai/gsm8k) or folder; default: made-up arithmetic chains."}
    )
    min_steps: int = field(default=2, metadata={"help": "Of a chain."})
    max_chain: int = field(default=4, metadata={"help": "Most steps of a chain."})
    largest: int = field(default=9, metadata={"help": "Number in a chain."})
    sft_model: str | None = field(default=None, metadata={"help": "A fine-tuned model to start from; no SFT then."})
    sft_rows: int = field(default=480, metadata={"help": "Solutions to fine-tune on."})
    sft_epochs: float = field(default=1.0, metadata={"help": "Over them."})
    sft_learning_rate: float = field(default=1e-4, metadata={"help": "Of the fine-tuning."})
    sft_batch_size: int = field(default=12, metadata={"help": "Of the fine-tuning."})
    engine: str = field(default="hf", metadata={"help": "hf or vllm."})
    problems: int = field(default=64, metadata={"help": "To draw solutions of."})
    samples: int = field(default=8, metadata={"help": "Solutions of each problem."})
    strategy: str = field(default="binary", metadata={"help": "all, adaptive, scan or binary; see rollouts.steps."})
    num_rollouts: int = field(default=8, metadata={"help": "From one state, at most."})
    threshold: float = field(default=0.0, metadata={"help": "A state of at most this value is dead."})
    best_of: int = field(default=1, metadata={"help": "Values under best-of-K; the paper takes 5."})
    split: str = field(default="lines", metadata={"help": "What a step is: lines or sentences."})
    max_tokens: int = field(default=64, metadata={"help": "Of a completion."})
    test_problems: int = field(default=100, metadata={"help": "Held out, to evaluate on."})
    test_samples: int = field(default=8, metadata={"help": "Of each, at temperature 1; pass@k up to this k."})
    sample_batch_size: int = field(default=64, metadata={"help": "Completions between two writes."})
    smoke: bool = field(default=False, metadata={"help": "Tiny model, few problems: does it run?"})


def shrink(stage: StepArguments, args: Any) -> None:
    """Sizes that run in seconds."""
    stage.sft_rows, stage.sft_epochs, stage.sft_learning_rate, stage.sft_batch_size = 128, 16, 5e-3, 16
    stage.min_steps, stage.max_chain, stage.largest = 1, 2, 3
    stage.problems, stage.samples, stage.num_rollouts = 16, 4, 4
    stage.test_problems, stage.test_samples, stage.max_tokens = 8, 2, 32
    args.max_steps = 2


def rows_of(stage: StepArguments, split: str, n: int, *, chat: bool, seed: int) -> list[dict[str, Any]]:
    """Problems with `prompt`, `completion` and `answer`."""
    if stage.gsm8k is None:
        found = chains(
            n, seed=seed, split=split, difficulty=Difficulty(stage.min_steps, stage.max_chain, stage.largest)
        )
        rows = [prompt_row(row) for row in found]
        if not chat:
            return rows
        return [_as_chat(row, ASK + row["question"], row["completion"]) for row in rows]
    items = _gsm8k(stage.gsm8k, "train" if split == "train" else "test", n)
    return [_as_chat({"answer": i["answer"]}, ASK + i["question"], i["answer"]) for i in items]


def _as_chat(row: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {**row, "prompt": [prompt], "completion": [completion]}


def _gsm8k(source: str, split: str, n: int) -> list[dict[str, Any]]:
    file = Path(source, f"{split}.jsonl.gz")
    if not file.exists():
        from datasets import load_dataset

        return list(load_dataset(source, "main", split=f"{split}[:{n}]"))
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(n), strict=False)]


def make_verifier(stage: StepArguments) -> Verifier:
    """Of the final answer."""
    return ExactVerifier(pattern=ANSWER_PATTERN) if stage.gsm8k is None else MathVerifier()


def start_model(stage: StepArguments, base: str, folder: Path, seed: int) -> str:
    """Folder of the model that solutions are drawn from."""
    if stage.sft_model is not None:
        return stage.sft_model
    rows = rows_of(stage, "train", stage.sft_rows, chat=is_chat(base), seed=seed)
    sft = fine_tune(
        base,
        rows,
        folder / "sft",
        epochs=stage.sft_epochs,
        learning_rate=stage.sft_learning_rate,
        batch_size=stage.sft_batch_size,
        seed=seed,
    )
    return str(sft)


def is_chat(base: str) -> bool:
    """The model that learns chains from nothing reads plain text."""
    return base != "arithmetic"


def make_sampler(stage: StepArguments, model: Any, tokenizer: Any, policy: str) -> Sampler:
    """The engine, with these weights."""
    if stage.engine == "hf":
        return HFSampler(model.to(PartialState().device), tokenizer, batch_size=stage.sample_batch_size, policy=policy)
    from negtune.rollouts.vllm import VLLMSampler

    longest = min(1024, model.config.max_position_embeddings)  # vLLM takes memory for as many
    return VLLMSampler(model, tokenizer, policy=policy, max_model_len=longest)


def collected(
    stage: StepArguments, name: str, folder: Path, *, chat: bool, seed: int, outcomes: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Judged solutions of the training problems, and how the model does on held-out ones."""
    state, store = PartialState(), folder / "store"
    model, tokenizer = load_model(name)
    sampler = make_sampler(stage, model, tokenizer, policy_name(model, name))
    if stage.engine == "vllm":
        attest(sampler, model, tokenizer)
    params = SamplingParams(max_tokens=stage.max_tokens, seed=seed)
    share = {"process_index": state.process_index, "processes": state.num_processes}
    prompts = [_without_answer(row) for row in rows_of(stage, "train", stage.problems, chat=chat, seed=seed + 1)]
    verifier, i = make_verifier(stage), state.process_index
    with RecordStore(store, process_index=i) as rollouts, bar(state, "rollouts") as progress:
        part = stage.sample_batch_size
        collect.generate(rollouts, sampler, prompts, stage.samples, params, part=part, progress=progress, **share)
    state.wait_for_everyone()
    with RecordStore(store, "verdicts", process_index=i) as verdicts, bar(state, "verdicts") as progress:
        collect.verify(RecordStore(store), verdicts, verifier, name=VERIFIER, progress=progress, **share)
    state.wait_for_everyone()
    if state.is_main_process:
        print_stats(store)
    search = steps.Search(
        strategy=stage.strategy,
        num_rollouts=stage.num_rollouts,
        threshold=stage.threshold,
        best_of=stage.best_of,
    )
    with (
        RecordStore(store, "verdicts", process_index=i) as verdicts,
        RecordStore(store, "continuations", process_index=i) as continuations,
        RecordStore(store, "steps", process_index=i) as judged,
        bar(state, "solutions") as progress,
    ):
        splitter = SPLITTERS[stage.split]
        found = list(
            solutions(
                RecordStore(store), verdicts, VERIFIER, tokenizer, splitter, outcomes=outcomes, policy=sampler.policy
            )
        )  # fmt: skip
        states = StateRollouts(
            sampler, verifier, RecordStore(store), continuations, verdicts, params, name=VERIFIER,
            part=stage.sample_batch_size,
        )  # fmt: skip
        steps.locate(judged, found, states, search, progress=progress, **share)
    state.wait_for_everyone()
    metrics = evaluated(stage, sampler, chat=chat, seed=seed)
    sampler.close()
    keys = {solution.key for solution in found}
    return [record for record in RecordStore(store, "steps") if record["rollout"] in keys], metrics


def evaluated(stage: StepArguments, sampler: Sampler, *, chat: bool, seed: int) -> dict[str, float]:
    """Accuracy and pass@k on held-out problems."""
    rows = [_without_answer(row) for row in rows_of(stage, "test", stage.test_problems, chat=chat, seed=seed)]
    params = SamplingParams(max_tokens=stage.max_tokens, seed=seed + 1_000_000)
    return solve(sampler, make_verifier(stage), rows, n=stage.test_samples, params=params).metrics


def trained_policy(stage: StepArguments, base: str, folder: Path, *, chat: bool, seed: int) -> dict[str, float]:
    """`evaluated` on what training left in `folder`."""
    adapter = folder if (folder / "adapter_config.json").exists() else None
    model, tokenizer = load_model(base, adapter=adapter) if adapter else load_model(folder)
    sampler = make_sampler(stage, model, tokenizer, "trained")
    metrics = evaluated(stage, sampler, chat=chat, seed=seed)
    sampler.close()
    return metrics


def _without_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("completion", "steps", "n_steps")}


def bar(state: PartialState, what: str) -> Progress:
    return Progress(what, shown=state.is_main_process)


def resumable(folder: Path, settings: dict[str, Any]) -> str | None:
    """Where an interrupted training goes on. Raises ValueError if it had other settings."""
    file, now = folder / "settings.json", strict(settings)
    if file.exists() and read_json(file) != now:
        changed = [k for k, v in now.items() if read_json(file).get(k) != v]
        raise ValueError(
            f"{folder} is of a run with other settings ({', '.join(changed)}); choose another --output_dir, or "
            "delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, now)
    found = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    return str(found[-1].parent) if found else None


def settings_of(stage: StepArguments, args: Any, model_args: Any) -> dict[str, Any]:
    """What decides the trained policy."""
    named = ("loss_type", "loss_kwargs", "beta", "learning_rate", "max_steps", "num_train_epochs", "seed")
    named += ("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "reference")
    found = {name: getattr(args, name, None) for name in named}
    return {**vars(stage), **found, "lora": model_args.lora_r if model_args.use_peft else None}


def print_arms(arms: dict[str, dict[str, float]]) -> None:
    """One line per arm."""
    names = ["accuracy", "accuracy_low", "accuracy_high", *(n for n in next(iter(arms.values())) if "pass@" in n)]
    names += ["truncated"]
    print("\n" + f"{'':12}" + "".join(f"{name:>15}" for name in names))
    for arm, metrics in arms.items():
        print(f"{arm:12}" + "".join(f"{metrics.get(name, float('nan')):15.3f}" for name in names))
