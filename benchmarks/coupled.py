"""What a step of CET costs: against plain steps of a cross-encoder, of sentence-transformers and of RankingTrainer.

Optimiser steps of whole trainers on the same made-up lists, all arms in turn, for several rounds; a step is what lies
between the ends of two steps: batch, scores that the weights are made of, losses, backward, clipping, AdamW. The first
step of a round is not counted. Seconds are those of this process on the CPU, so that waiting for others counts less;
`load` says how many there were. Peak memory: of making the trainer and two steps, in a process of its own.

bce         sentence-transformers' CrossEncoderTrainer with BinaryCrossEntropyLoss, as many pairs a step.
ranking     RankingTrainer, rank_net, the same lists: the peer of everything below.
official    CoupledTrainer, two cross-encoders as published: should cost two steps of the peer.
em          the same, mode em.
features    CoupledTrainer, mode em, selection by features: should cost one.

    python benchmarks/coupled.py
    python benchmarks/coupled.py --dropout 0.1

Ratios are of medians over steps, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import RESULTS, in_fresh_process, peak_private_mib, row, table, write_result
from transformers import TrainerCallback

ARMS = ("bce", "ranking", "official", "em", "features")
MODELS = {"official": 2, "em": 2}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--encoder", default="minilm", help="a fresh head on it; or tiny")
parser.add_argument("--queries", type=int, default=2, help="of a step")
parser.add_argument("--list", type=int, default=8, help="documents of each of them")
parser.add_argument("--words", type=int, default=64, help="of a document")
parser.add_argument("--dropout", type=float, default=0.0, help="of both models; the checkpoint's own is 0.1")
parser.add_argument("--steps", type=int, default=3, help="counted, of a round")
parser.add_argument("--rounds", type=int, default=8)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--name", default="coupled")
parser.add_argument("--folder", type=Path, default=RESULTS)
parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)


class Clock(TrainerCallback):
    """CPU seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ends).tolist()


def cross_encoder(args: argparse.Namespace) -> Any:
    """The encoder with a fresh head."""
    from sentence_transformers import CrossEncoder

    from negtune.retrieval.encoder import encoder_folder

    drop = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    settings = {"num_labels": 1, "config_kwargs": drop, "local_files_only": True, "device": "cpu"}
    return CrossEncoder(str(encoder_folder(args.encoder)), **settings)


def lists_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many as a round takes; all texts of one length, so that no arm pads."""
    words = np.array("heart cell protein risk lower study patient growth signal factor binding response".split())
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(args.queries * (args.steps + 1)):
        documents = [" ".join(rng.choice(words, args.words)) for _ in range(args.list)]
        gains = [1.0] + [0.0] * (args.list - 1)
        rows.append({"query": " ".join(rng.choice(words, 12)), "documents": documents, "gains": gains})
    return rows


def trainer_of(arm: str, args: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    from negtune import CoupledConfig, CoupledTrainer, RankingConfig, RankingTrainer

    rows, model = lists_of(args), cross_encoder(args)
    shared = {"output_dir": folder, "max_steps": args.steps + 1, "learning_rate": 1e-6, "use_cpu": True}
    shared |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1000}
    if arm == "bce":
        pairs = [
            {"query": one["query"], "document": document, "label": gain}
            for one in rows
            for document, gain in zip(one["documents"], one["gains"], strict=True)
        ]
        settings = CrossEncoderTrainingArguments(**shared, per_device_train_batch_size=args.queries * args.list)
        return CrossEncoderTrainer(
            model, settings, train_dataset=Dataset.from_list(pairs), loss=BinaryCrossEntropyLoss(model)
        )
    shared |= {"per_device_train_batch_size": args.queries}
    if arm == "ranking":
        return RankingTrainer(model, RankingConfig(**shared, loss_type="rank_net"), train_dataset=rows)
    if arm == "features":
        for one in rows:
            one["selection_features"] = [[float(place), 1.0 / (1 + place)] for place in range(args.list)]
        return CoupledTrainer(model, CoupledConfig(**shared, mode="em"), train_dataset=rows)
    return CoupledTrainer(model, CoupledConfig(**shared, mode=arm), train_dataset=rows, selection=cross_encoder(args))


def one_round(arm: str, args: argparse.Namespace) -> list[float]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(arm, args, folder)
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds


def memory(arm: str, args: argparse.Namespace) -> float:
    args.steps = 1
    few = argparse.Namespace(**{**vars(args), "encoder": "tiny", "words": 4})
    one_round(arm, few)  # imports are no arm's; a large model here would leave its heap to the one that is measured
    return peak_private_mib(lambda: one_round(arm, args))


def ratio_of(ours: list[float], peer: list[float], times: int) -> tuple[float, float]:
    """95 % bootstrap interval of median(times * peer) / median(ours) over steps."""
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(np.array(side), (2000, len(side))), axis=1) for side in (peer, ours)]
    low, high = np.quantile(times * drawn[0] / drawn[1], [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        Path(args.one[1]).write_text(json.dumps(memory(args.one[0], args)))
        return
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    loads = []
    for _ in range(args.rounds):
        for arm in ARMS:
            seconds[arm] += one_round(arm, args)
        loads.append(os.getloadavg()[0])
    peak = {arm: in_fresh_process(arm, args.threads) for arm in ARMS}
    median = {arm: statistics.median(found) for arm, found in seconds.items()}
    case = f"{args.queries} x {args.list} pairs, {args.encoder}, dropout {args.dropout:g}"
    rows = []
    for arm in ARMS[1:]:
        peer, times = ("bce" if arm == "ranking" else "ranking"), MODELS.get(arm, 1)
        low, high = ratio_of(seconds[arm], seconds[peer], times)
        name = f"{arm} against {times if times > 1 else 'one'} of {peer}, {case}"
        more = {"low": low, "high": high, "steps": len(seconds[arm]), "smallest": min(seconds[arm])}
        rows.append(row(f"step: {name}", median[arm], times * median[peer], "s", 1 / 1.1, **more))
        rows.append(row(f"peak private memory: {name}", peak[arm], times * peak[peer], "MiB"))
    for one in rows:
        one["load"] = statistics.median(loads)
    print(table(rows))
    print(write_result(args.name, rows, args.folder))


if __name__ == "__main__":
    main()
