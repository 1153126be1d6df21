"""How often a completion is the same when other prompts stand beside it in the batch.

Prompts and seeds of a round do not depend on the number of processes. What is drawn still can: an engine's logits
differ in their last bits from batch to batch, and where two tokens are as good as tied the other one is drawn. The same
completions are drawn whole, as the shares of 2 and of 4 processes, and one prompt at a time; counted are those that are
equal to the last token, and the tokens in front of the first difference in the others.

    python benchmarks/sampling_agreement.py            (in the environment that has vLLM: .venv-vllm)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from side_by_side import in_fresh_process, write_result

ARMS = {
    "HFSampler, float64": ("hf", "float64"),
    "HFSampler, float32": ("hf", "float32"),
    "HFSampler, bfloat16": ("hf", "bfloat16"),
    "VLLMSampler, float32": ("vllm", "float32"),
    "VLLMSampler, bfloat16": ("vllm", "bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FILE"), help="internal: one process's part")
    args = parser.parse_args()
    if args.one:
        Path(args.one[1]).write_text(json.dumps(run_one(args, *ARMS[args.one[0]])), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    for arm in args.arms:
        rows += [{"arm": arm, **row} for row in in_fresh_process(arm, args.threads)]
        path = write_result("sampling_agreement", rows)
    print(path)
    print("| sampler | drawn as | equal completions | tokens before the first difference in the others |")
    print("|---|---|---|---|")
    for row in rows:
        before = "" if row["tokens_before"] is None else row["tokens_before"]
        print(f"| {row['arm']} | {row['drawn']} | {row['equal']} of {row['of']} | {before} |")


def run_one(args: argparse.Namespace, engine: str, dtype: str) -> list[dict[str, Any]]:
    import torch

    from negtune.models.load import load_model
    from negtune.rollouts.hf import HFSampler
    from negtune.rollouts.sampler import SamplingParams, requests_for, share_of
    from negtune.rollouts.vllm import VLLMSampler

    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, dtype=getattr(torch, dtype))
    sampler: Any = (
        HFSampler(model, tokenizer, batch_size=64)
        if engine == "hf"
        else VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=1024)
    )
    params = SamplingParams(max_tokens=args.tokens)
    questions = [[{"role": "user", "content": f"What is {i} times {i + 7}? Explain."}] for i in range(args.prompts)]
    requests = requests_for(questions, args.n)
    whole = {r.key: r.completion_ids for r in sampler.draw(requests, params)}
    rows = []
    for parts, drawn in ((2, "shares of 2"), (4, "shares of 4"), (len(requests) // args.n, "one prompt at a time")):
        pieces = [share_of(requests, i, parts) for i in range(parts)]
        if drawn == "one prompt at a time":
            pieces = [requests[i : i + args.n] for i in range(0, len(requests), args.n)]
        found = {r.key: r.completion_ids for piece in pieces for r in sampler.draw(piece, params)}
        pairs = [(ids, found[key]) for key, ids in whole.items()]
        others = sorted(_first_difference(a, b) for a, b in pairs if a != b)
        rows.append(
            {
                "drawn": drawn,
                "equal": len(pairs) - len(others),
                "of": len(pairs),
                "tokens_before": others[len(others) // 2] if others else None,
            }
        )
    return rows


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main()
