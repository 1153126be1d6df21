"""First wrong step by rollouts, against people's marks: how often they agree, and what four ways to search cost.

Paper       ProcessBench, https://arxiv.org/abs/2412.06559 (GSM8K part, F1 of the accuracies on erroneous and on correct
            solutions); bisection after OmegaPRM, https://arxiv.org/abs/2406.06592
Data        ProcessBench and GSM8K, whose answers the rollouts are held against: Hub ids or folders. The steps are
            ProcessBench's own, one behind the other with a line end between them.
Rule        A state is dead if none of its rollouts ends well; the step before the first dead state is the wrong one; no
            dead state: -1, all right. The state behind the last step is worth how the solution ended. A solution whose
            bare prompt is dead gets no answer, which counts as wrong, as no step is to blame for what fails anyway.
            "told the outcome": the same, and -1 wherever the final answer is right, which is what bisection needs.
Expected    PRMs trained on Monte-Carlo labels: F1 40.1 on all of ProcessBench, with human labels 56.5 (Qwen's lessons
            on PRMs, https://arxiv.org/abs/2501.07301). A model of 135M solves few of the problems: little.
Measured    recipes/LOG.md

    python recipes/step_rl/processbench.py --data Qwen/ProcessBench --gsm8k openai/gsm8k --model smollm2 --rows 40 \
        --num_rollouts 8 --output_dir runs/processbench

Rollouts are kept: all four searches cost what `all` does, and the same command goes on after a stop. --smoke: made-up
chains and a model that learns them, in seconds.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stages import ASK, resumable
from trl import TrlParser

from negtune.cli.recipe import run_recipe
from negtune.cli.rollouts import Progress
from negtune.data.arithmetic import ANSWER_PATTERN, Difficulty, chains, prompt_row
from negtune.data.completions import prompt_token_ids
from negtune.data.gsm8k import load_gsm8k
from negtune.data.processbench import load_processbench, synthetic_processbench, with_answers
from negtune.data.steps import encoded_steps, joined_with
from negtune.eval import first_error
from negtune.eval.first_error import benchmark, markdown, searches
from negtune.models.load import load_model
from negtune.records import write_json
from negtune.rollouts.attest import policy_name
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import Sampler, SamplingParams
from negtune.rollouts.states import Solution, StateRollouts
from negtune.rollouts.steps import Search, locate
from negtune.rollouts.store import RecordStore
from negtune.trainers.finetune import fine_tune
from negtune.verifiers.exact import ExactVerifier
from negtune.verifiers.math import MathVerifier

STRATEGIES = ("all", "adaptive", "scan", "binary")
ELSEWHERE = ("data", "gsm8k", "rows", "sample_batch_size", "output_dir")
"""Settings that may change between two runs of one folder."""
EASY = Difficulty(min_steps=1, max_steps=2, largest=3)


@dataclass
class Arguments:
    data: str = field(default="Qwen/ProcessBench", metadata={"help": "Hub id, or folder with gsm8k.jsonl(.gz)."})
    gsm8k: str = field(default="openai/gsm8k", metadata={"help": "Hub id, or folder with train and test.jsonl(.gz)."})
    model: str = field(default="smollm2", metadata={"help": "Folder or hub id of a chat model, or smollm2."})
    sft_rows: int = field(default=128, metadata={"help": "GSM8K training solutions to fine-tune on first; 0: none."})
    sft_epochs: float = field(default=1.0, metadata={"help": "Over them."})
    sft_learning_rate: float = field(default=1e-4, metadata={"help": "Of the fine-tuning."})
    sft_batch_size: int = field(default=8, metadata={"help": "Of the fine-tuning."})
    engine: str = field(default="hf", metadata={"help": "hf or vllm."})
    rows: int = field(default=40, metadata={"help": "Solutions, drawn at random; all if there are fewer."})
    num_rollouts: int = field(default=8, metadata={"help": "From one state."})
    threshold: float = field(default=0.0, metadata={"help": "A state of at most this value is dead."})
    max_tokens: int = field(default=200, metadata={"help": "Of a rollout; longer ones are unscored."})
    temperature: float = field(default=0.7, metadata={"help": "Of the draw."})
    sample_batch_size: int = field(default=64, metadata={"help": "Rollouts between two writes."})
    seed: int = field(default=0, metadata={"help": "Of the rows, the fine-tuning and the draw."})
    output_dir: str = field(default="runs/processbench", metadata={"help": "Folder of model, rollouts and results."})
    smoke: bool = field(default=False, metadata={"help": "Made-up chains and a tiny model: does it run?"})

    def __post_init__(self) -> None:
        if self.rows < 1 or self.sft_rows < 0:
            raise ValueError(
                f"need --rows of at least 1 and --sft_rows of at least 0, got {self.rows}, {self.sft_rows}"
            )
        if self.engine not in ("hf", "vllm"):
            raise ValueError(f"--engine must be hf or vllm, got {self.engine!r}")


def main() -> None:
    (args,) = TrlParser((Arguments,)).parse_args_and_config()
    torch.set_num_threads(1)
    if args.smoke:
        args.model, args.rows, args.num_rollouts, args.max_tokens = "arithmetic", 12, 8, 32
        args.sft_rows, args.sft_epochs, args.sft_learning_rate, args.sft_batch_size = 128, 16, 5e-3, 16
    search = {strategy: Search(strategy, args.num_rollouts, threshold=args.threshold) for strategy in STRATEGIES}
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    rows = made_up(args) if args.smoke else drawn(args)
    folder = Path(args.output_dir, "store")
    resumable(folder, {name: value for name, value in vars(args).items() if name not in ELSEWHERE})
    model, tokenizer = load_model(start_model(args))
    found = [solution(row, tokenizer) for row in rows]
    sampler = make_sampler(args, model, tokenizer, found)
    verifier = ExactVerifier(pattern=ANSWER_PATTERN) if args.smoke else MathVerifier()
    judged = {strategy: [] for strategy in STRATEGIES}
    with (
        verifier,
        RecordStore(folder, "continuations") as continuations,
        RecordStore(folder, "verdicts") as verdicts,
        Progress("rollouts") as bar,
    ):
        states = StateRollouts(
            sampler, verifier, RecordStore(folder), continuations, verdicts, params, name="answer",
            part=args.sample_batch_size, progress=bar,
        )  # fmt: skip
        for strategy in STRATEGIES:
            with RecordStore(folder, strategy) as store:
                locate(store, found, states, search[strategy], part=len(found))
                by_row = {record["rollout"]: record for record in store}
            judged[strategy] = [by_row[row["id"]] for row in rows]
    sampler.close()
    unscored = [record["outcome"] == "unscored" for record in verdicts]
    report(args, rows, judged, sum(unscored) / max(1, len(unscored)))


# --- Data and model ---------------------------------------------------------------------------------------------------


def drawn(args: Arguments) -> list[dict[str, Any]]:
    """Some of ProcessBench's rows, with the answers of GSM8K."""
    everything = load_processbench(args.data)
    rows = with_answers(everything, [*load_gsm8k(args.gsm8k, "test"), *load_gsm8k(args.gsm8k, "train")])
    print(f"{len(everything)} solutions; {len(everything) - len(rows)} left out: {args.gsm8k} lacks their problem")
    random.Random(args.seed).shuffle(rows)  # so that more --rows hold the fewer
    return [{**row, "prompt": as_prompt(row["problem"])} for row in rows[: args.rows]]


def made_up(args: Arguments) -> list[dict[str, Any]]:
    rows = synthetic_processbench(args.rows, seed=args.seed, difficulty=EASY)
    return [{**row, "prompt": f"{row['problem']}\n"} for row in rows]


def as_prompt(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": ASK + problem}]


def start_model(args: Arguments) -> str:
    """Folder or name of the model that rollouts are drawn from."""
    if not args.sft_rows:
        return args.model
    if args.smoke:
        rows = [prompt_row(row) for row in chains(args.sft_rows, seed=args.seed, difficulty=EASY)]
    else:
        solved = load_gsm8k(args.gsm8k, "train")[: args.sft_rows]
        rows = [
            {"prompt": as_prompt(i["question"]), "completion": [{"role": "assistant", "content": i["answer"]}]}
            for i in solved
        ]
    sft = fine_tune(
        args.model,
        rows,
        Path(args.output_dir, "sft"),
        epochs=args.sft_epochs,
        learning_rate=args.sft_learning_rate,
        batch_size=args.sft_batch_size,
        seed=args.seed,
    )
    return str(sft)


def solution(row: Mapping[str, Any], tokenizer: Any) -> Solution:
    """A solution that somebody else wrote, as if it stood in the open assistant turn."""
    ids, steps = encoded_steps(joined_with(row["steps"], "\n"), tokenizer)
    prompt_ids, columns = prompt_token_ids(row["prompt"], tokenizer), {"answer": row["answer"]}
    return Solution(row["id"], row["prompt"], prompt_ids, ids, [], columns, row["final_answer_correct"], steps)


def make_sampler(args: Arguments, model: Any, tokenizer: Any, found: Sequence[Solution]) -> Sampler:
    policy = policy_name(model, args.model)
    if args.engine == "hf":
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return HFSampler(model, tokenizer, batch_size=args.sample_batch_size, policy=policy)
    from negtune.rollouts.vllm import VLLMSampler

    longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in found) + args.max_tokens
    longest = min(longest, model.config.max_position_embeddings)  # vLLM takes memory for as many
    return VLLMSampler(model, tokenizer, policy=policy, max_model_len=longest)


# --- Results ----------------------------------------------------------------------------------------------------------


def report(args: Arguments, rows: Sequence[Mapping[str, Any]], judged: Mapping[str, list], unscored: float) -> None:
    """Print the tables, and write them to processbench.md and, with what was found of every row, processbench.json."""
    every = [first_error.live(record) for record in judged["all"]]
    wrong = [not row["final_answer_correct"] and row["label"] >= 0 for row in rows]
    tables = {}
    for name, chosen in (("all rows", [True] * len(rows)), ("rows with a live prompt", every)):
        both = [a and b for a, b in zip(chosen, wrong, strict=True)]
        for title, table, some in (("ProcessBench", benchmark, chosen), ("wrong final answer", searches, both)):
            labels = [row["label"] for row in pick(rows, some)]
            tables[f"{title}, {name} ({len(labels)})"] = table({s: pick(judged[s], some) for s in judged}, labels)
    numbers = counts(rows, judged, sum(every), unscored)
    text = "\n\n".join(
        ["\n".join(f"{k}: {v:.3g}" for k, v in numbers.items()), *(f"{t}\n\n{markdown(r)}" for t, r in tables.items())]
    )
    print(text)
    Path(args.output_dir, "processbench.md").write_text(text + "\n", encoding="utf-8")
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "gsm8k", "output_dir")}
    of_rows = [of_row(row, {s: judged[s][i] for s in judged}) for i, row in enumerate(rows)]
    found = {"arguments": settings, "counts": numbers, "tables": tables, "rows": of_rows}
    write_json(Path(args.output_dir, "processbench.json"), found)


def pick(items: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [item for item, wanted in zip(items, chosen, strict=True) if wanted]


def counts(rows: Sequence[Mapping], judged: Mapping[str, list], live: int, unscored: float) -> dict[str, Any]:
    reasons = Counter(record["reason"] for record in judged["all"])
    return {
        "rows": len(rows),
        "erroneous": sum(row["label"] >= 0 for row in rows),
        "erroneous, right final answer": sum(row["label"] >= 0 and row["final_answer_correct"] for row in rows),
        "live prompts": live,
        "share of rollouts cut or unscored": unscored,
        **{f"first pit: {reason}": n for reason, n in reasons.most_common()},
    }


def of_row(row: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {s: {k: r[k] for k in ("pit", "reason", "num_rollouts", "tokens")} for s, r in records.items()}
    return {
        **{name: row[name] for name in ("id", "label", "final_answer_correct")},
        **{"tallies": records["all"]["tallies"], "found": found},
    }


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
