"""Log-probabilities of completions from given hidden states: peak memory and time of LM head forward and backward.

Three ways through the same causal LM with no layers, so that nothing but the head is measured: the model's full logits
with TRL's `selective_log_softmax`, TRL's fused LM head (`add_fused_lm_head`), and negtune's tiles. Peaks are taken in a
fresh process each, above the hidden states; times alternate between the three in one process.

    python benchmarks/logprob_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from side_by_side import peak_above_mib, row, table, write_result
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import add_fused_lm_head
from trl.trainer.utils import selective_log_softmax

from negtune.models.forward import attach_scoring, scored_tokens
from negtune.ops import scatter_tokens, tiled_token_values, token_logps

CASES = {  # name: (is the head trained, share of the tokens that is scored, reach in memory, reach in time)
    "frozen head (LoRA), every token scored": (False, 1.0, 4.0, 1 / 1.15),
    "trained head, half the tokens scored": (True, 0.5, 4.0, 1 / 1.15),
    "trained head, every token scored": (True, 1.0, None, None),
}
ARMS = ("negtune", "full logits", "TRL fused head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "ARM"), help="internal: measure one peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak_above_mib(head_pass(args, *args.peak))))
        return
    rows = []
    for case, (_, _, memory, speed) in CASES.items():
        peaks = {arm: child(case, arm) for arm in ARMS}
        seconds = times({arm: head_pass(args, case, arm) for arm in ARMS}, args.repeats)
        worst = largest_difference(args, case)
        for peer in ARMS[1:]:
            reach = (memory, speed) if peer == "full logits" else (None, None)
            more = {"largest_difference": worst[peer], "arm": peer}
            rows.append(row(f"{case}; peer: {peer}", peaks["negtune"], peaks[peer], "MiB", reach[0], **more))
            rows.append(row(f"{case}; peer: {peer}", seconds["negtune"], seconds[peer], "s", reach[1], **more))
    print(table(rows))
    print(write_result("logprob_memory" + ("_cuda" if torch.cuda.is_available() else ""), rows))


def child(case: str, arm: str) -> float:
    """Peak memory of one arm, in a process that did nothing else.

    glibc keeps freed blocks up to a threshold that grows with use; fixed, so that every tensor goes back at once.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, *sys.argv, "--peak", case, arm]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def head_pass(args: argparse.Namespace, case: str, arm: str) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that computes log-probabilities and the gradient of their sum, weighted by constants."""
    trained, share, *_ = CASES[case]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch, hidden = problem(args, trained, share, device)
    inside = scored_tokens(batch).mask
    # Every arm lays its values out differently; weights are given to tokens, not to places.
    weights = torch.linspace(0.5, 1.5, int(inside.sum()), device=device)
    return partial(ONE_PASS[arm], model, batch, hidden, weights)


def problem(
    args: argparse.Namespace, trained: bool, share: float, device: str
) -> tuple[LlamaForCausalLM, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(device=device, dtype=getattr(torch, args.dtype)).requires_grad_(False)
    model.lm_head.weight.requires_grad_(trained)
    scored = int(args.length * share) - (share == 1.0)  # the first token has nothing that predicts it
    batch = {
        "input_ids": torch.randint(args.vocab_size, (args.batch_size, args.length), device=device),
        "attention_mask": torch.ones(args.batch_size, args.length, dtype=torch.long, device=device),
        "prompt_lengths": torch.full((args.batch_size,), args.length - scored, device=device),
        "completion_lengths": torch.full((args.batch_size,), scored, device=device),
    }
    hidden = torch.randn(args.batch_size, args.length, args.width, device=device).to(model.dtype).requires_grad_()
    # Mark the patched model's forward once here, so that no arm pays for it.
    attach_scoring(model)
    return model, batch, hidden


def finish(logps: Tensor, weights: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    (logps.float() * weights).sum().backward()
    assert hidden.grad is not None
    gradient, hidden.grad = hidden.grad, None
    return logps.detach(), gradient


def with_tiles(model: Any, batch: dict[str, Tensor], hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    tokens = scored_tokens(batch)

    def score(inside: Tensor, head: Any, layers: Any) -> dict[str, Tensor]:
        return {"logps": scatter_tokens(tiled_token_values(token_logps, inside, tokens.targets, head), tokens.mask)}

    out = model(inputs_embeds=hidden, score=score, at=(tokens.rows, tokens.columns))["logps"]
    result = finish(out[tokens.mask], weights, hidden)
    model.lm_head.weight.grad = None
    return result


def with_full_logits(model: Any, batch: dict[str, Tensor], hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(inputs_embeds=hidden, use_cache=False).logits[:, :-1]
    logps = selective_log_softmax(logits, batch["input_ids"][:, 1:])
    tokens = scored_tokens(batch)
    result = finish(logps[tokens.rows, tokens.columns - 1], weights, hidden)
    model.lm_head.weight.grad = None
    return result


def with_trl_fused_head(model: Any, batch: dict[str, Tensor], hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(model, "_fused"):
        add_fused_lm_head(model)
        model._fused = True
    tokens = scored_tokens(batch)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[tokens.rows, tokens.columns] = tokens.targets
    logps = model(inputs_embeds=hidden, labels=labels, fused_lm_head=True).log_probs
    result = finish(logps[tokens.rows, tokens.columns - 1], weights, hidden)
    model.lm_head.weight.grad = None
    return result


ONE_PASS = dict(zip(ARMS, (with_tiles, with_full_logits, with_trl_fused_head), strict=True))


def times(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns; the first turn is left out."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in spent.items()}


def largest_difference(args: argparse.Namespace, case: str) -> dict[str, float]:
    """Largest difference from negtune's log-probabilities, and from its gradient relative to the gradient's largest."""
    logps, gradient = head_pass(args, case, "negtune")()
    found = {}
    for arm in ARMS[1:]:
        other_logps, other_gradient = head_pass(args, case, arm)()
        of_logps = (other_logps - logps).abs().max().item()
        found[arm] = max(of_logps, ((other_gradient - gradient).abs().max() / gradient.abs().max()).item())
    return found


if __name__ == "__main__":
    main()
