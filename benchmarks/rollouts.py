"""Samplers side by side: how exact, how fast to follow the training, how many tokens a second, what proof costs.

One fresh process per arm, one after the other, on the same prompts: `--prompts` questions, `--n` completions each of
at most `--tokens` tokens; the tokens that were drawn are counted. The file of results grows with every arm.

- exactness, for every engine and kind of training: largest difference of a token's log-probability, engine against
  trainer, after an update; sync seconds and bytes handed over; or the words with which the engine refuses;
- tokens a second, and with a shared prefix of 200 tokens before every question (one completion each), prefix cache on
  and off;
- attestation: seconds, as a share of a round of 64 x 4 x 128 tokens at the measured rate; and the largest mean
  difference in `--clean` rounds in which nothing was stale, which is the noise that a tolerance has to stay above.

    python benchmarks/rollouts.py            (in the environment that has vLLM: .venv-vllm)
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import RESULTS, in_fresh_process, row, table, write_result


@dataclass(frozen=True)
class Arm:
    """What one process measures.

    Args:
        engine: `hf`, `vllm` or `server`.
        training: `full`, `lora` or `qlora`.
        dtype: of the weights.
        cache: whether vLLM keeps prefixes.
        speed: whether tokens a second are measured, or exactness only (on a sixteenth of the completions).
        gathered: whether vLLM computes LoRA on a CPU as it does without us, from a copy of the adapter for every token.
    """

    engine: str
    training: str
    dtype: str = "float32"
    cache: bool = True
    speed: bool = False
    gathered: bool = False

    @property
    def name(self) -> str:
        how = (", no prefix cache" if not self.cache else "") + (", gathered" if self.gathered else "")
        return f"{self.engine} {self.training} {self.dtype}{how}"


ARMS = (
    Arm("hf", "lora", speed=True),
    Arm("vllm", "lora", speed=True),
    Arm("vllm", "lora", speed=True, gathered=True),
    Arm("hf", "full", speed=True),
    Arm("vllm", "full", speed=True),
    Arm("vllm", "full", speed=True, cache=False),
    Arm("server", "lora"),
    Arm("hf", "qlora"),
    Arm("vllm", "qlora"),
    Arm("server", "qlora"),
    Arm("server", "full"),
    Arm("vllm", "lora", "bfloat16"),
    Arm("vllm", "full", "bfloat16"),
    Arm("hf", "lora", "bfloat16"),
)
ROUND = 64 * 4 * 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clean", type=int, default=20, help="rounds without a fault")
    parser.add_argument("--threads", type=int, default=2)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="+", default=names, choices=names, metavar="ARM", help=", ".join(names))
    parser.add_argument("--add", action="store_true", help="keep the other arms of the file of results")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FILE"), help="internal: one process's part")
    args = parser.parse_args()
    if args.one:
        arm = next(arm for arm in ARMS if arm.name == args.one[0])
        Path(args.one[1]).write_text(json.dumps(run_one(args, arm)), encoding="utf-8")
        return
    found: dict[str, dict[str, Any]] = {}
    if args.add:
        rows = json.loads((RESULTS / "rollouts.json").read_text())["rows"]
        found = {row.pop("arm"): row for row in rows if "arm" in row}
    for arm in args.arms:
        found[arm] = in_fresh_process(arm, args.threads)
        print(arm, json.dumps(found[arm]), flush=True)
        path = write_result("rollouts", [*compared(found), *({"arm": arm, **found[arm]} for arm in found)])
    print(path)
    print(table(compared(found)))


def compared(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of pairs of arms, and what attestation costs; those that both arms have measured."""
    rows = []

    def compare(case: str, ours: str, peer: str, column: str, unit: str, reach: float | None = None) -> None:
        values = [found.get(name, {}).get(column) for name in (ours, peer)]
        if None not in values:
            rows.append(row(case, *values, unit, reach))

    lora, full = "vllm lora float32", "vllm full float32"
    compare("adapter swap against all weights: time", lora, full, "sync_seconds", "s", 1.0)
    compare("adapter swap against all weights: bytes", lora, full, "sync_bytes", "bytes", 5.0)
    for training in ("lora", "full"):
        ours, peer = f"vllm {training} float32", f"hf {training} float32"
        compare(f"vLLM against generate, {training}: questions", ours, peer, "seconds_per_token", "s/token")
        compare(f"vLLM against generate, {training}: shared prefix", ours, peer, "shared_per_token", "s/token")
    compare("one adapter as matrix products: questions", lora, f"{lora}, gathered", "seconds_per_token", "s/token")
    compare("one adapter as matrix products: shared prefix", lora, f"{lora}, gathered", "shared_per_token", "s/token")
    compare("shared prefix: cache on against off", full, f"{full}, no prefix cache", "shared_per_token", "s/token")
    for arm, values in found.items():
        if "seconds_per_token" in values and "attest_seconds" in values:
            share = values["attest_seconds"] / (ROUND * values["seconds_per_token"])
            rows.append(row(f"attestation, {arm}: share of a round of 64 x 4 x 128 tokens", share, 0.02, "of it", 1.0))
    return rows


def run_one(args: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from negtune.models.load import load_model
    from negtune.rollouts.attest import attest, difference, policy_logps
    from negtune.rollouts.sampler import SamplingParams

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arm.dtype)
    model, tokenizer = load_model(args.model, dtype=dtype, load_in_4bit=arm.training == "qlora")
    if arm.training != "full":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    params = SamplingParams(max_tokens=args.tokens)
    questions = [[{"role": "user", "content": f"What is {i} times {i + 7}? Explain."}] for i in range(args.prompts)]
    shared = "You are careful. " * 50
    long = [[{"role": "system", "content": shared}, *question] for question in questions]

    def train_a_bit(size: float = 1e-3) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * size)

    def seconds_per_token(prompts: list, n: int) -> tuple[float, list]:
        start = time.perf_counter()
        rollouts = sampler.sample(prompts, n=n, params=params)
        return (time.perf_counter() - start) / sum(len(r.completion_ids) for r in rollouts), rollouts

    with engine_of(args, arm, model, tokenizer) as sampler:
        if isinstance(sampler, ValueError):
            return {"refused": str(sampler)}
        sampler.sample(questions[:2], params=SamplingParams(max_tokens=4))  # what is compiled or allocated once
        train_a_bit(1e-3 if arm.training == "full" else 0.02)
        syncs = []
        for version in range(3):
            start = time.perf_counter()
            sampler.update(model, str(version))
            syncs.append(time.perf_counter() - start)
        few = max(4, args.prompts // 16)
        per_token, rollouts = seconds_per_token(questions if arm.speed else questions[:few], args.n)
        engine = torch.cat([torch.tensor(r.logps, dtype=torch.float64) for r in rollouts[: few * args.n]])
        apart = difference(engine, policy_logps(model, tokenizer, rollouts[: few * args.n], 1.0))
        trained = [p for p in model.parameters() if p.requires_grad]
        measured: dict[str, Any] = {
            "tokens": len(apart),
            "max_difference": apart.max().item(),
            "mean_difference": apart.mean().item(),
            "sync_seconds": sorted(syncs)[1],
            "sync_bytes": 0 if arm.engine == "hf" else sum(p.numel() * p.element_size() for p in trained),
        }
        if arm.speed:
            measured |= {"seconds_per_token": per_token, "shared_per_token": seconds_per_token(long, 1)[0]}
        clean = []
        for version in range(0 if arm.gathered else args.clean):
            train_a_bit(1e-3 if arm.training != "full" else 1e-4)
            sampler.update(model, f"clean {version}")
            clean.append(attest(sampler, model, tokenizer, tolerance=float("inf")))
    if not clean:
        return measured
    return measured | {
        "attest_seconds": sorted(a.seconds for a in clean)[len(clean) // 2],
        "clean_rounds": len(clean),
        "clean_mean_difference": max(a.mean_difference for a in clean),
        "clean_max_difference": max(a.max_difference for a in clean),
    }


@contextmanager
def engine_of(args: argparse.Namespace, arm: Arm, model: Any, tokenizer: Any) -> Iterator[Any]:
    """The arm's sampler, or the error with which it refuses the model."""
    from negtune.rollouts.hf import HFSampler
    from negtune.rollouts.server import VLLMServerSampler
    from negtune.rollouts.vllm import VLLMSampler
    from negtune.rollouts.worker import WorkerExtension

    if arm.gathered:
        WorkerExtension.multiply_by_one_adapter = lambda self: None  # ty: ignore[invalid-assignment]
    try:
        if arm.engine == "hf":
            yield HFSampler(model, tokenizer, batch_size=64)
        elif arm.engine == "vllm":
            yield VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=1024, enable_prefix_caching=arm.cache)
        else:
            with server(args, arm) as url:
                yield VLLMServerSampler(model, tokenizer, url)
    except ValueError as refusal:
        yield refusal


@contextmanager
def server(args: argparse.Namespace, arm: Arm) -> Iterator[str]:
    """vLLM's own server in a process of its own, on a port of this machine. Not started where it would be refused."""
    if arm.training != "lora":
        yield "http://127.0.0.1:9"
        return
    from negtune.models.load import resolve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve(args.model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", arm.dtype, "--enforce-eager"]
    command += ["--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "16"]
    command += ["--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"]
    process = subprocess.Popen(command, env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("the server ended") from None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
