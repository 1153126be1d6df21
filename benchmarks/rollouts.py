"""Samplers side by side: how exact, how fast to follow the training, how many tokens a second, what proof costs.

One fresh process per arm, one after the other, on the same prompts: `--prompts` questions, `--n` completions each of
at most `--tokens` tokens; the tokens that were drawn are counted.

- exactness: largest difference of a token's log-probability, engine against trainer, after an update; sync seconds and
  bytes handed over;
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import row, table, write_result

ARMS = (
    "HFSampler, LoRA",
    "VLLMSampler, LoRA",
    "VLLMSampler, full",
    "VLLMSampler, LoRA, bfloat16",
    "VLLMSampler, no prefix cache",
)
ROUND = 64 * 4 * 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clean", type=int, default=10, help="rounds without a fault")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FILE"), help="internal: one process's part")
    args = parser.parse_args()
    if args.one:
        Path(args.one[1]).write_text(json.dumps(run_one(args, args.one[0])), encoding="utf-8")
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            file = Path(folder, "one.json")
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", arm, str(file)], check=True, env=environment
            )
            found[arm] = json.loads(file.read_text())
            print(arm, json.dumps(found[arm]), flush=True)
    rows = compared(found)
    print(write_result("rollouts", [*rows, *({"case": arm, **values} for arm, values in found.items())]))
    print(table(rows))


def compared(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    hf, lora, full, bf16, uncached = (found.get(arm) for arm in ARMS)
    if lora and full:
        rows.append(
            row("adapter swap against all weights: seconds", lora["sync_seconds"], full["sync_seconds"], "s", 1.0)
        )
        rows.append(
            row("adapter swap against all weights: bytes", lora["sync_bytes"], full["sync_bytes"], "bytes", 5.0)
        )
    if lora and hf:
        rows.append(
            row("vLLM against generate: questions", lora["seconds_per_token"], hf["seconds_per_token"], "s/token")
        )
        rows.append(row("the same, shared prefix", lora["shared_per_token"], hf["shared_per_token"], "s/token"))
    if lora and uncached:
        rows.append(
            row(
                "shared prefix: cache on against off", lora["shared_per_token"], uncached["shared_per_token"], "s/token"
            )
        )
    for arm, values in (("float32", lora), ("bfloat16", bf16)):
        if values:
            share = values["attest_seconds"] / (ROUND * values["seconds_per_token"])
            rows.append(row(f"attestation, {arm}: share of a round of 64 x 4 x 128 tokens", share, 0.02, "of it", 1.0))
    return rows


def run_one(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    os.environ |= {
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
    }
    import torch
    from peft import LoraConfig, get_peft_model

    from negtune.models.load import load_model
    from negtune.rollouts.attest import attest, difference, policy_logps
    from negtune.rollouts.hf import HFSampler
    from negtune.rollouts.sampler import SamplingParams

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, tokenizer = load_model(args.model, dtype=torch.bfloat16 if "bfloat16" in arm else torch.float32)
    if "full" not in arm:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if arm.startswith("HF"):
        sampler: Any = HFSampler(model, tokenizer, batch_size=64)
    else:
        from negtune.rollouts.vllm import VLLMSampler

        cache = {"enable_prefix_caching": "no prefix cache" not in arm}
        sampler = VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=1024, **cache)
    params = SamplingParams(max_tokens=args.tokens)
    questions = [[{"role": "user", "content": f"What is {i} times {i + 7}? Explain."}] for i in range(args.prompts)]
    shared = "You are careful. " * 50
    long = [[{"role": "system", "content": shared}, *question] for question in questions]
    sampler.sample(questions[:2], params=SamplingParams(max_tokens=4))  # what is compiled or allocated once

    def train_a_bit(size: float = 1e-3) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * size)

    def seconds_per_token(prompts: list, n: int) -> tuple[float, list]:
        start = time.perf_counter()
        rollouts = sampler.sample(prompts, n=n, params=params)
        return (time.perf_counter() - start) / sum(len(r.completion_ids) for r in rollouts), rollouts

    train_a_bit(0.02 if "full" not in arm else 1e-3)
    syncs = []
    for version in range(3):
        start = time.perf_counter()
        sampler.update(model, str(version))
        syncs.append(time.perf_counter() - start)
    per_token, rollouts = seconds_per_token(questions, args.n)
    engine = torch.cat([torch.tensor(r.logps, dtype=torch.float64) for r in rollouts[: 4 * args.n]])
    apart = difference(engine, policy_logps(model, tokenizer, rollouts[: 4 * args.n], 1.0))
    shared_per_token, _ = seconds_per_token(long, 1)
    clean = []
    for version in range(args.clean):
        train_a_bit(1e-3)
        sampler.update(model, f"clean {version}")
        clean.append(attest(sampler, model, tokenizer, tolerance=float("inf")))
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "max_difference": apart.max().item(),
        "mean_difference": apart.mean().item(),
        "sync_seconds": sorted(syncs)[1],
        "sync_bytes": 0 if arm.startswith("HF") else sum(p.numel() * p.element_size() for p in trained),
        "seconds_per_token": per_token,
        "shared_per_token": shared_per_token,
        "attest_seconds": sorted(a.seconds for a in clean)[len(clean) // 2],
        "clean_rounds": len(clean),
        "clean_mean_difference": max(a.mean_difference for a in clean),
        "clean_max_difference": max(a.max_difference for a in clean),
    }


if __name__ == "__main__":
    main()
