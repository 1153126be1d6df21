"""Sample a model on grade-school mathematics and on procedural tasks, and score what it says. One command, resumable.

Data        GSM8K questions (Hub id, or a folder with test.jsonl.gz) and reasoning-gym items, which are made here.
Expected    A store of rollouts with log-probabilities, verdicts beside it, and the share of correct ones with its
            interval. Kill it and start it again: nothing is drawn or scored twice.
Measured    See recipes/README.md.
Differences None: this is no paper's method, but what the on-policy recipes start from.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/rollouts/sample_and_verify.py \
        --config recipes/rollouts/sample_and_verify.yaml

With several processes (ddp.yaml; `torchrun` on a CPU) each draws and scores its share.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import TrlParser

from negtune.cli.recipe import run_recipe
from negtune.cli.rollouts import Progress, print_stats
from negtune.data.gsm8k import load_gsm8k
from negtune.models.load import load_model
from negtune.rollouts.attest import policy_name
from negtune.rollouts.collect import generate, verify
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import Sampler, SamplingParams
from negtune.rollouts.store import RecordStore
from negtune.verifiers.math import MathVerifier
from negtune.verifiers.reasoning import ReasoningGymVerifier

ASK = "Solve the problem step by step. End with a line '#### ' and the number alone.\n\n"
TAGS = "Give the final answer between <answer> and </answer>.\n\n"


@dataclass
class Arguments:
    model: str = field(default="smollm2", metadata={"help": "Folder, hub id, smollm2 or tiny."})
    engine: str = field(default="hf", metadata={"help": "hf or vllm."})
    gsm8k: str = field(
        default="openai/gsm8k", metadata={"help": "Hub id, or a folder with test.jsonl or test.jsonl.gz."}
    )
    tasks: str = field(default="chain_sum,basic_arithmetic", metadata={"help": "Of reasoning-gym, with commas."})
    rows: int = field(default=200, metadata={"help": "Questions of each kind."})
    num_generations: int = field(default=1, metadata={"help": "Completions of each question."})
    max_tokens: int = field(default=200, metadata={"help": "Of a completion; longer ones are unscored."})
    temperature: float = field(default=1.0, metadata={"help": "Of the draw."})
    seed: int = field(default=0, metadata={"help": "Of the draw and of the tasks."})
    batch_size: int = field(default=64, metadata={"help": "Completions between two writes."})
    output_dir: str = field(default="runs/rollouts", metadata={"help": "Folder of the stores."})
    smoke: bool = field(default=False, metadata={"help": "Tiny random model, three questions: does it run?"})


def main() -> None:
    (args,) = TrlParser((Arguments,)).parse_args_and_config()
    if args.smoke:
        args.model, args.rows, args.max_tokens = "tiny", 3, 4
    waits = timedelta(days=1)  # for the slowest process
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=waits)
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    sampler = make_sampler(args, state)
    for name, rows, verifier in (
        ("gsm8k", gsm8k(args), MathVerifier()),
        ("reasoning_gym", reasoning_gym(args), ReasoningGymVerifier()),
    ):
        folder, i = Path(args.output_dir, name), state.process_index
        share = {"process_index": i, "processes": state.num_processes, "part": args.batch_size}
        with RecordStore(folder, process_index=i) as rollouts, progress(state, f"{name}: rollouts") as bar:
            generate(rollouts, sampler, rows, args.num_generations, params, **share, progress=bar)
        state.wait_for_everyone()
        with (
            verifier,
            RecordStore(folder, "verdicts", process_index=i) as verdicts,
            progress(state, f"{name}: verdicts") as bar,
        ):
            verify(RecordStore(folder), verdicts, verifier, name=type(verifier).__name__, **share, progress=bar)
        state.wait_for_everyone()
        if state.is_main_process:
            print(f"\n{name}")
            print_stats(folder)
    sampler.close()


def progress(state: PartialState, what: str) -> Progress:
    return Progress(what, shown=state.is_main_process)


def make_sampler(args: Arguments, state: PartialState) -> Sampler:
    model, tokenizer = load_model(args.model)
    policy = policy_name(model, args.model)
    if args.engine == "hf":
        return HFSampler(model.to(state.device), tokenizer, batch_size=args.batch_size, policy=policy)
    from negtune.rollouts.vllm import VLLMSampler

    longest = min(1024, model.config.max_position_embeddings)  # vLLM takes memory for as many
    return VLLMSampler(model, tokenizer, policy=policy, max_model_len=longest)


def gsm8k(args: Arguments) -> list[dict[str, Any]]:
    """Chat prompts with the data set's solutions, which end in `#### answer`."""
    if args.smoke:
        items = [{"question": f"Mia has {i} apples and buys 2. How many?", "answer": f"#### {i + 2}"} for i in range(3)]
    else:
        items = load_gsm8k(args.gsm8k, "test")[: args.rows]
    return [{"prompt": [{"role": "user", "content": ASK + i["question"]}], "answer": i["answer"]} for i in items]


def reasoning_gym(args: Arguments) -> list[dict[str, Any]]:
    """The same number of items of each task."""
    import reasoning_gym

    tasks = args.tasks.split(",")
    items = [
        i for t in tasks for i in reasoning_gym.create_dataset(t, seed=args.seed, size=-(-args.rows // len(tasks)))
    ]
    return [{"prompt": [{"role": "user", "content": TAGS + i["question"]}], **i} for i in items[: args.rows]]


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
