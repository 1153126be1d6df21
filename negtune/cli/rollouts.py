"""Draw completions from a model, score them, and count: stores that survive a crash and go on where they were.

Rows are JSONL with `prompt` (text or chat messages), optionally `prefix`, and the columns a verifier needs. Started by
`torchrun --no-python negtune ...` or `accelerate launch -m negtune.cli.main ...` every process takes its share.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from negtune.records import read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `negtune rollouts generate`, `verify` and `stats`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _generate_arguments(add_action(actions, "generate", "draw completions", generate))
    _verify_arguments(add_action(actions, "verify", "score the completions of a store", verify))
    add_action(actions, "stats", "what a store holds", stats)


def add_verifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that name a verifier; shared with `negtune verify`."""
    parser.add_argument("--verifier", required=True, choices=["math", "code", "exact", "reasoning_gym"])
    parser.add_argument("--column", default="answer", metavar="NAME", help="of the gold answers (default: %(default)s)")
    parser.add_argument(
        "--mode",
        default="auto",
        choices=["auto", "boxed", "last_number", "choice"],
        help="math: where the answer stands",
    )
    parser.add_argument(
        "--pattern", metavar="REGEX", help="exact: what its last match finds is compared, not the whole completion"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="for one completion (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--sandbox",
        default="auto",
        choices=["auto", "bubblewrap", "namespaces", "rlimits"],
        help="code: rlimits isolates nothing and has to be asked for (default: %(default)s)",
    )


def add_action(actions: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A verb's action, with the flags that all have."""
    action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
    action.set_defaults(run=run, parser=action)
    action.add_argument("--debug", action="store_true", help="show the traceback of an error")
    action.add_argument("--store", required=True, metavar="DIR", help="folder of the rollouts and verdicts")
    return action


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", required=True, metavar="FILE", help="rows with a prompt")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N rows only")
    parser.add_argument(
        "--num_generations", type=count, default=1, metavar="N", help="completions of each row (default: %(default)s)"
    )
    add_sampling_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, the engine and the draw; shared with `negtune steps`."""
    parser.add_argument("--model", required=True, metavar="ID", help="folder, hub id, smollm2 or tiny")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to put on the model")
    parser.add_argument("--max_tokens", type=count, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="0: all tokens (default: %(default)s)")
    parser.add_argument("--min_p", type=float, default=0.0, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a completion")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=count, default=32, metavar="N", help="completions at a time (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights")
    parser.add_argument("--engine", default="hf", choices=["hf", "vllm", "server"], help="(default: %(default)s)")
    parser.add_argument("--max_model_len", type=count, metavar="N", help="vllm: prompt and completion together")
    parser.add_argument("--url", metavar="URL", help="server: of a vLLM server, http://host:port")
    parser.add_argument("--api_key_env", metavar="NAME", help="server: environment variable with the key for it")
    parser.add_argument("--adapter_dir", metavar="DIR", help="server: where it finds adapters, if on another machine")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights; needs negtune[quant]")


def count(text: str) -> int:
    """A flag's whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add_verifier_arguments(parser)
    add_unscored_argument(parser)


def add_unscored_argument(parser: argparse.ArgumentParser) -> None:
    """How often a verifier may fail; shared with `negtune steps`."""
    parser.add_argument(
        "--max_unscored", type=float, default=0.2, metavar="SHARE", help="stop beyond (default: %(default)s)"
    )


def generate(args: argparse.Namespace) -> int:
    """Draw what the store does not have yet."""
    check_engine(args)
    rows = _read_prompts(args.prompts)[: args.limit]
    from negtune.rollouts import collect
    from negtune.rollouts.store import RecordStore

    params = sampling_params(args)
    index, processes = collect.launched_processes()
    sampler = make_sampler(args)
    try:
        with (
            RecordStore(args.store, process_index=index) as store,
            Progress("rollouts", shown=index == 0) as progress,
        ):
            drawn = collect.generate(
                store,
                sampler,
                rows,
                args.num_generations,
                params,
                part=args.batch_size,
                process_index=index,
                processes=processes,
                progress=progress,
            )
            by = f"process {index}: " if processes > 1 else ""
            said = f"{by}{drawn} drawn, {len(store)} in {args.store}"
    finally:
        sampler.close()
    print(said)
    return 0


def sampling_params(args: argparse.Namespace) -> Any:
    """The `SamplingParams` that the flags say."""
    from negtune.rollouts.sampler import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        stop=tuple(args.stop),
        seed=args.seed,
    )


def _read_prompts(path: str) -> list[dict[str, Any]]:
    """Rows whose prompt is text or chat messages.

    Raises:
        ValueError: none, or one without such a prompt; names the row.
    """
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        prompt = row.get("prompt")
        if not prompt:
            raise ValueError(f"{path}, row {number}: no prompt; the row has {', '.join(row) or 'nothing'}")
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise ValueError(
                f"{path}, row {number}: the prompt must be text or a list of messages with role and content, it is "
                f"{str(prompt)[:100]}"
            )
    return rows


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("role")) and isinstance(value.get("content"), str)


def check_engine(args: argparse.Namespace) -> None:
    """Raise ValueError for flags of another engine than the one that is asked for."""
    if (args.url is None) == (args.engine == "server"):
        raise ValueError("--engine server needs --url http://host:port, and --url needs --engine server")
    if args.max_model_len and args.engine != "vllm":
        raise ValueError("--max_model_len is for --engine vllm; the model's or server's own holds elsewhere")
    if args.engine == "server" and args.load_in_4bit:
        raise ValueError("--load_in_4bit has no meaning for a server, which has its own weights; drop it")
    if args.engine == "server" and args.dtype and not args.adapter:
        raise ValueError("--dtype has no meaning for a server, which has its own; drop it")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        raise ValueError(f"--api_key_env {args.api_key_env}: no such environment variable")


def make_sampler(args: argparse.Namespace) -> Any:
    """The engine, proven to have the model's weights where it has a copy of them."""
    if args.engine == "hf":
        from negtune.cli.evaluate import load
        from negtune.rollouts.hf import HFSampler

        model, tokenizer = load(args.model, args, adapter=args.adapter, load_in_4bit=args.load_in_4bit)
        return HFSampler(model, tokenizer, batch_size=args.batch_size, policy=_policy(args, model))
    if args.engine == "server" and not args.adapter:
        from negtune.models.load import load_tokenizer, resolve

        return _server_sampler(args, resolve(args.model), load_tokenizer(args.model), f"{args.model} as served")
    from negtune.models.load import load_model
    from negtune.rollouts.attest import attest

    model, tokenizer = load_model(args.model, dtype=args.dtype, adapter=args.adapter, load_in_4bit=args.load_in_4bit)
    make = _server_sampler if args.engine == "server" else _vllm_sampler
    sampler = make(args, model, tokenizer, _policy(args, model))
    attest(sampler, model, tokenizer, temperature=args.temperature)
    return sampler


def _policy(args: argparse.Namespace, model: Any) -> str:
    from negtune.rollouts.attest import policy_name

    return policy_name(model, args.model, args.adapter, args.dtype, "nf4" if args.load_in_4bit else None)


def _vllm_sampler(args: argparse.Namespace, model: Any, tokenizer: Any, policy: str) -> Any:
    import torch

    from negtune.rollouts.vllm import VLLMSampler

    engine: dict[str, Any] = {"max_model_len": args.max_model_len} if args.max_model_len else {}
    if torch.cuda.is_available():
        engine["gpu_memory_utilization"] = 0.9  # nobody trains beside it
    if args.load_in_4bit:
        engine["quantization"] = "bitsandbytes"
    return VLLMSampler(model, tokenizer, policy=policy, **engine)


def _server_sampler(args: argparse.Namespace, model: Any, tokenizer: Any, policy: str) -> Any:
    from negtune.rollouts.server import VLLMServerSampler

    key = os.environ[args.api_key_env] if args.api_key_env else None
    return VLLMServerSampler(
        model,
        tokenizer,
        args.url,
        policy=policy,
        folder=args.adapter_dir,
        api_key=key,
        concurrency=args.batch_size,
    )


def verify(args: argparse.Namespace) -> int:
    """Score what has no verdict of this verifier yet."""
    from negtune.rollouts import collect
    from negtune.rollouts.store import RecordStore

    index, processes = collect.launched_processes()
    rollouts = RecordStore(args.store)
    if not len(rollouts):
        raise ValueError(f"{args.store} has no rollouts; draw some with negtune rollouts generate")
    with (
        make_verifier(args) as verifier,
        RecordStore(args.store, "verdicts", process_index=index) as verdicts,
        Progress("verdicts", shown=index == 0) as progress,
    ):
        scored = collect.verify(
            rollouts,
            verdicts,
            verifier,
            name=verifier_name(args),
            max_unscored=args.max_unscored,
            process_index=index,
            processes=processes,
            progress=progress,
        )
    if processes > 1:
        print(f"process {index}: {scored} scored; what all have: negtune rollouts stats --store {args.store}")
        return 0
    print(f"{scored} scored")
    return stats(args)


def stats(args: argparse.Namespace) -> int:
    """Print what the store holds."""
    print_stats(args.store)
    return 0


def print_stats(store: str | Path) -> None:
    """Counts of a store: prompts, tokens, how completions ended, and verdicts with 95 % intervals."""
    from negtune.metrics.verification import wilson
    from negtune.rollouts.store import RecordStore

    ends: Counter[str] = Counter()
    tokens, prompts, policies = 0, set(), Counter()
    for record in RecordStore(store):
        ends[record["finish_reason"]] += 1
        tokens += len(record["completion_ids"])
        prompts.add(hash(str(record["prompt"])))
        policies[record["policy"]] += 1
    total = sum(ends.values())
    if not total:
        raise ValueError(f"{store} has no rollouts; draw some with negtune rollouts generate")
    print(f"{total} rollouts of {len(prompts)} prompts, {tokens} tokens, {tokens / total:.1f} a completion")
    print("ended: " + ", ".join(f"{reason} {count}" for reason, count in ends.most_common()))
    print("policy: " + ", ".join(f"{policy} {count}" for policy, count in policies.most_common()))
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in RecordStore(store, "verdicts"):
        outcomes[record["verifier"]][record["outcome"]] += 1
    for verifier, counts in outcomes.items():
        rate = wilson(counts["correct"], counts["correct"] + counts["wrong"])
        share = f"; correct of scored {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]" if rate.of else ""
        print(f"{verifier}: correct {counts['correct']}, wrong {counts['wrong']}, unscored {counts['unscored']}{share}")


def make_verifier(args: argparse.Namespace) -> Any:
    """The verifier that the flags name."""
    if args.pattern and args.verifier != "exact":
        raise ValueError("--pattern is for --verifier exact; drop it")
    if args.verifier == "code":
        from negtune.verifiers.code import CodeVerifier

        return CodeVerifier(seconds=args.seconds, workers=args.workers, sandbox=args.sandbox)
    if args.verifier == "reasoning_gym":
        from negtune.verifiers.reasoning import ReasoningGymVerifier

        return ReasoningGymVerifier(seconds=args.seconds, workers=args.workers, sandbox=args.sandbox)
    if args.verifier == "exact":
        from negtune.verifiers.exact import ExactVerifier

        return ExactVerifier(args.column, pattern=args.pattern)
    from negtune.verifiers.math import MathVerifier

    return MathVerifier(args.mode, column=args.column, seconds=args.seconds, workers=args.workers)


def verifier_name(args: argparse.Namespace) -> str:
    """Name of a verifier with the settings that change what it says."""
    mode = f"-{args.mode}" if args.verifier == "math" else f"-{args.pattern}" if args.pattern else ""
    return f"{args.verifier}{mode}:{args.column}" if args.verifier in ("math", "exact") else args.verifier


class Progress:
    """One line on the terminal: done, tokens a second, time left; in a `with` block. Nothing where no one watches.

    Args:
        what: is done.
        shown: False in all processes but one.
    """

    def __init__(self, what: str, *, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task(what, total=None, rate="")
        self._tokens, self._start = 0, time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()  # which gives the terminal its cursor back

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """See `negtune.rollouts.collect.Progress`."""
        self._bar.start()
        self._tokens += tokens
        rate = f"{self._tokens / (time.perf_counter() - self._start):.0f} tokens/s" if self._tokens else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate)
