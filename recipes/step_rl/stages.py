"""What the recipes of this folder share: problems, the fine-tuned model they start from, samples, verdicts, pits.

Every stage writes a file or a folder under `output_dir` and is skipped where that is complete, so that a run that was
stopped goes on where it was:

    sft/            fine-tuned model
    store/          rollouts-*.jsonl, verdicts-*.jsonl, continuations-*.jsonl, steps-all-*.jsonl (by strategy)
    pairs.jsonl     rows.jsonl
    policy/         per arm and rate: checkpoints and the trained model or adapter
    solved/         per arm and rate: how many of its samples solved each held-out problem
    metrics.json    accuracy and pass@k before and after
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from models import ENGINES, Models

from negtune.cli.rollouts import Progress, print_stats
from negtune.data.arithmetic import ANSWER_PATTERN, Difficulty, chains, prompt_row
from negtune.data.gsm8k import load_gsm8k
from negtune.data.steps import SPLITTERS
from negtune.records import read_json, strict, write_json
from negtune.rollouts import collect, steps
from negtune.rollouts.attest import policy_name
from negtune.rollouts.sampler import SamplingParams
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
    rule: str = field(
        default="all_fail",
        metadata={"help": "Which step is the pit, under all and adaptive: all_fail, two_consecutive, argmin, ..."},
    )
    best_of: int = field(default=1, metadata={"help": "Values under best-of-K; the paper takes 5."})
    min_distance: float = field(
        default=0.0, metadata={"help": "Edit distance of a pair's two steps, 0 to 1; nearer ones are left out."}
    )
    split: str = field(default="lines", metadata={"help": "What a step is: lines or sentences."})
    max_tokens: int = field(default=64, metadata={"help": "Of a completion."})
    test_problems: int = field(default=100, metadata={"help": "Held out, to evaluate on."})
    test_samples: int = field(default=8, metadata={"help": "Of each, at temperature 1; pass@k up to this k."})
    store: str | None = field(
        default=None, metadata={"help": "Folder of solutions and rollouts, to share it with another recipe."}
    )
    control: bool = field(
        default=True, metadata={"help": "Beside it fine-tune on the solved problems for as many steps more."}
    )
    rates: list[float] | None = field(
        default=None,
        metadata={"help": "Learning rates that every arm is tried at; the best on validation problems is shown."},
    )
    validation_problems: int = field(default=50, metadata={"help": "To choose among the rates."})
    sample_batch_size: int = field(default=64, metadata={"help": "Completions between two writes."})
    smoke: bool = field(default=False, metadata={"help": "Tiny model, few problems: does it run?"})

    def __post_init__(self) -> None:
        for name, known in {"engine": ENGINES, "split": SPLITTERS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")
        if self.engine == "vllm" and find_spec("vllm") is None:
            raise ValueError("--engine vllm needs vLLM: pip install 'negtune[vllm]', or take --engine hf")
        for name in ("sft_rows", "problems", "samples", "max_tokens", "test_problems", "test_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        _ = self.search

    @property
    def search(self) -> steps.Search:
        """For the first pit. Raises ValueError for settings that contradict each other."""
        return steps.Search(
            strategy=self.strategy,
            num_rollouts=self.num_rollouts,
            threshold=self.threshold,
            rule=self.rule,  # ty: ignore[invalid-argument-type]
            best_of=self.best_of,
            live_only=True,
        )


def shrink(stage: StepArguments, args: Any) -> None:
    """Sizes that run in seconds."""
    stage.sft_rows, stage.sft_epochs, stage.sft_learning_rate, stage.sft_batch_size = 128, 16, 5e-3, 16
    stage.min_steps, stage.max_chain, stage.largest = 1, 2, 3
    stage.problems, stage.samples, stage.num_rollouts = 16, 4, 4
    stage.test_problems, stage.test_samples, stage.max_tokens, stage.validation_problems = 8, 2, 32, 4
    args.max_steps, args.logging_steps = 2, 1


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
    items = _gsm8k(stage.gsm8k, split, n)
    return [_as_chat({"answer": i["answer"]}, ASK + i["question"], i["answer"]) for i in items]


def _as_chat(row: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {**row, "prompt": [prompt], "completion": [completion]}


def _gsm8k(source: str, split: str, n: int) -> list[dict[str, Any]]:
    """The first `n` rows; those of the validation split are the last of the training rows."""
    name = "test" if split == "test" else "train"
    rows = load_gsm8k(source, name)
    return rows[-n:] if split == "validation" else rows[:n]


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


def collected(
    stage: StepArguments, models: Models, folder: Path, *, chat: bool, seed: int, outcomes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Judged solutions of the training problems."""
    state, store = PartialState(), store_of(stage, folder)
    model, tokenizer = models.load()
    sampler = models.sampler(model, tokenizer, policy_name(model, models.start))
    params = SamplingParams(max_tokens=stage.max_tokens, seed=seed)
    share = {"process_index": state.process_index, "processes": state.num_processes}
    prompts = [without_answer(row) for row in rows_of(stage, "train", stage.problems, chat=chat, seed=seed + 1)]
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
    judgements = f"steps-{stage.strategy}"
    with (
        RecordStore(store, "verdicts", process_index=i) as verdicts,
        RecordStore(store, "continuations", process_index=i) as continuations,
        RecordStore(store, judgements, process_index=i) as judged,
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
        steps.locate(judged, found, states, stage.search, progress=progress, **share)
    state.wait_for_everyone()
    keys = {solution.key for solution in found}
    return [record for record in RecordStore(store, judgements) if record["rollout"] in keys]


def store_of(stage: StepArguments, folder: Path) -> Path:
    """Where solutions, verdicts and rollouts lie."""
    return folder / "store" if stage.store is None else Path(stage.store)


def without_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A problem as the sampler and the verifier get it."""
    return {name: value for name, value in row.items() if name not in ("completion", "steps", "n_steps")}


def bar(state: PartialState, what: str) -> Progress:
    """Of the main process."""
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
