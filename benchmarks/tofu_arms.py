"""Unlearning objectives side by side on TOFU: one fine-tuned model, equal rows and steps, rate swept per arm.

Arms: retain-only (the do-nothing baseline: forget weight 0), NPO+RT with the paper's coefficients, NPO+RT with the
retain term weighted up to the scale of the summed forget term, GA+RT, SimNPO+RT with coefficients 1 (not the published
ones). NPO so has two arms, that is one dial more than the others.

1. Sweep: every arm at the same rates, one seed, all retain rows in the retain term. The rate whose model lies nearest
   to the retain-only oracle in the plane (forget probability, retain probability) goes on. The oracle is known to this
   choice, as it is not in real life.
2. Confirmation: that rate at other seeds, with the last `--held_out` retain rows kept out of the unlearning. The
   fine-tuned model and the oracle know them, no step of these runs sees them, no choice was made on them
   (`retain_unseen`): they tell keeping from learning again. Everything is measured, generated answers included.

    python benchmarks/tofu_arms.py --data_dir FOLDER --output_dir runs/tofu --jobs 2

A job is one process with `--threads` threads, kept as `jobs/KIND_HASH.json` under the hash of all its settings and
rows: a killed benchmark goes on where it was, and changed settings never meet old results.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "retain-only": {"loss_type": "grad_ascent", "forget_weight": 0.0},
    "NPO+RT": {"loss_type": "npo", "beta": 0.1},
    "NPO+RT, retain x40": {"loss_type": "npo", "beta": 0.1, "retain_weight": 40.0},
    "GA+RT": {"loss_type": "grad_ascent"},
    "SimNPO+RT": {"loss_type": "simnpo", "beta": 2.5},
}
COLUMNS = {
    "forget_quality": "forget quality",
    "model_utility": "model utility",
    "forget/probability": "forget prob",
    "forget/rouge": "forget ROUGE",
    "retain/probability": "retain prob",
    "retain/rouge": "retain ROUGE",
    "retain_unseen/probability": "unseen retain prob",
    "retain_unseen/rouge": "unseen retain ROUGE",
    "real_authors/probability": "real authors prob",
    "world_facts/probability": "world facts prob",
}


TRAINING = {
    **{"lr_scheduler_type": "linear", "warmup_steps": 0.1, "weight_decay": 0.01, "max_length": 256},
    **{"reference": "cached", "logging_steps": 5, "save_strategy": "no", "report_to": "none"},
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
STAGE = {"batch_size": 8, "max_length": 256}
SCORING = {"batch_size": 16, "max_new_tokens": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", default="runs/tofu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--forget_split", default="forget01")
    parser.add_argument("--retain_rows", type=int, default=160)
    parser.add_argument("--held_out", type=int, default=40)
    parser.add_argument("--eval_rows", type=int, default=24)
    parser.add_argument("--finetune_epochs", type=float, default=5.0)
    parser.add_argument("--finetune_learning_rate", type=float, default=2e-4)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4, 1.6e-3])
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--sweep_seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the confirmation; 2 at least")
    parser.add_argument("--full", action="store_true", help="full fine-tuning in place of LoRA")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--one", help="internal: run one job")
    args = parser.parse_args()
    if args.sweep_seed in args.seeds:
        parser.error("--seeds must not hold --sweep_seed: the rate was chosen on it")
    if args.one:
        run_one(args, json.loads(args.one))
        return
    load_task(args), _slots(args.jobs)  # once, before there are threads
    run_jobs(args, [stage_job("full"), stage_job("retain")])
    tuned, oracle = run_jobs(args, [baseline_job("full"), baseline_job("retain")])
    baselines = {"fine-tuned": tuned, "oracle": oracle}

    def one_arm(arm: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        sweep = run_jobs(args, [arm_job(args, "sweep", arm, lr, args.sweep_seed) for lr in args.learning_rates])
        rate = chosen_rate(args, arm, sweep, oracle)
        return sweep, run_jobs(args, [arm_job(args, "confirm", arm, rate, seed) for seed in args.seeds])

    with ThreadPoolExecutor(len(args.arms)) as pool:
        sweeps, confirmed = zip(*pool.map(one_arm, args.arms), strict=True)
    write_results(args, baselines, list(chain(*sweeps)), list(chain(*confirmed)))


# --- jobs -------------------------------------------------------------------------------------------------------------


def stage_job(stage: str) -> dict[str, Any]:
    return {"kind": "stage", "stage": stage, **STAGE}


def baseline_job(stage: str) -> dict[str, Any]:
    return {"kind": "baseline", "stage": stage, "scoring": SCORING}


def arm_job(args: argparse.Namespace, kind: str, arm: str, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        **{"kind": kind, "arm": arm, "learning_rate": learning_rate, "seed": seed, "loss": ARMS[arm]},
        **{"epochs": args.epochs, "per_device_train_batch_size": args.batch_size, "training": TRAINING},
        **{"lora": None if args.full else LORA, "held_out": args.held_out if kind == "confirm" else 0},
    }


def chosen_rate(args: argparse.Namespace, arm: str, sweep: list[dict[str, Any]], oracle: dict[str, Any]) -> float:
    """The learning rate whose model lies nearest to the oracle; says so when that is an end of the grid."""
    rows = [row for row in sweep if row["job"]["arm"] == arm]
    rate = min(rows, key=lambda row: distance(row["metrics"], oracle["metrics"]))["job"]["learning_rate"]
    if rate in (min(args.learning_rates), max(args.learning_rates)):
        print(f"{arm}: the chosen rate {rate:g} is an end of the grid", flush=True)
    return rate


def distance(metrics: dict[str, float] | None, oracle: dict[str, float]) -> float:
    """In the plane (forget probability, retain probability); infinite for a run that diverged."""
    names = ("forget/probability", "retain/probability")
    return math.inf if metrics is None else math.dist([metrics[n] for n in names], [oracle[n] for n in names])


def job_name(args: argparse.Namespace, job: dict[str, Any]) -> str:
    names = ("model", "forget_split", "retain_rows", "eval_rows", "finetune_epochs", "finetune_learning_rate")
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in load_task(args).full]
    settings = {**{name: getattr(args, name) for name in names}, "rows": rows, **job}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{job['kind']}_{digest[:12]}"


@functools.cache
def _task(forget_split: str, data_dir: str, retain_rows: int, eval_rows: int) -> Any:
    from negtune.data.tofu import tofu_task

    return tofu_task(forget_split, data_dir, retain_rows=retain_rows, eval_rows=eval_rows, plain=True)


def load_task(args: argparse.Namespace) -> Any:
    return _task(args.forget_split, args.data_dir, args.retain_rows, args.eval_rows)


def run_jobs(args: argparse.Namespace, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each job wrote, in order; finished jobs are not repeated. At most `--jobs` run at a time in all threads."""
    folder = Path(args.output_dir, "jobs")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}

    def launch(job: dict[str, Any]) -> dict[str, Any]:
        with _slots(args.jobs):
            return launch_now(job)

    def launch_now(job: dict[str, Any]) -> dict[str, Any]:
        path = folder / f"{job_name(args, job)}.json"
        if not path.exists():
            print(time.strftime("%H:%M:%S"), path.stem, job.get("arm"), job.get("learning_rate"), flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
            with path.with_suffix(".log").open("w") as log:
                subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return json.loads(path.read_text())

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(launch, jobs))


@functools.cache
def _slots(count: int) -> threading.Semaphore:
    return threading.Semaphore(count)


def run_one(args: argparse.Namespace, job: dict[str, Any]) -> None:
    from negtune.eval.run import machine, peak_rss_mib, versions
    from negtune.records import write_json

    start = time.time()
    kinds = {"stage": run_stage, "baseline": run_baseline, "sweep": run_sweep, "confirm": run_confirm}
    result = {"job": job, **kinds[job["kind"]](args, job)}
    result |= {"seconds": round(time.time() - start, 1), "peak_rss_mib": peak_rss_mib()}
    result |= {"versions": versions(), "machine": machine()}
    write_json(Path(args.output_dir, "jobs", f"{job_name(args, job)}.json"), result)


def stage_folder(args: argparse.Namespace, stage: str) -> Path:
    return Path(args.output_dir, "stages", job_name(args, stage_job(stage)))


def run_stage(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    from negtune.trainers.finetune import fine_tune

    rows, folder = getattr(load_task(args), job["stage"]), stage_folder(args, job["stage"])
    rate = {"epochs": args.finetune_epochs, "learning_rate": args.finetune_learning_rate}
    fine_tune(args.model, rows, folder, **rate, **STAGE)
    return {}


def run_baseline(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    from negtune.eval.unlearning import evaluate, oracle_truth_ratios
    from negtune.models.load import load_model

    outcome = evaluate(*load_model(stage_folder(args, job["stage"])), all_sets(args), **SCORING)
    truth = oracle_truth_ratios(outcome.records)
    return {"truth": truth, "metrics": outcome.metrics, "answers": two_answers(outcome)}


def run_sweep(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Unlearn, and score forget and retain rows without generation."""
    sets = load_task(args).sets
    return unlearn(args, job, {"forget": sets["forget"], "retain": answers_only(sets["retain"])}, generate=False)


def run_confirm(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Unlearn with some retain rows held out, and score everything."""
    return unlearn(args, job, all_sets(args), generate=True)


def answers_only(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without paraphrases and wrong answers, which cost six more forward passes a row."""
    return [{name: row[name] for name in ("prompt", "completion")} for row in rows]


def unlearn(args: argparse.Namespace, job: dict[str, Any], sets: dict[str, Any], generate: bool) -> dict[str, Any]:
    """Metrics of one run; None where it diverged."""
    from peft import LoraConfig

    from negtune import UnlearningConfig, UnlearningTrainer
    from negtune.eval.unlearning import evaluate
    from negtune.models.load import load_model
    from negtune.trainers.unlearning import NonFiniteLossError

    task, (model, tokenizer) = load_task(args), load_model(stage_folder(args, "full"))
    retain = task.retain[: len(task.retain) - job["held_out"]]
    trainer = UnlearningTrainer(
        model=model,
        args=UnlearningConfig(
            output_dir=str(Path(args.output_dir, "trained", job_name(args, job))),
            reference_cache_dir=str(Path(args.output_dir, "reference")),
            **{"learning_rate": job["learning_rate"], "num_train_epochs": job["epochs"], "seed": job["seed"]},
            **{"per_device_train_batch_size": job["per_device_train_batch_size"], **job["training"], **job["loss"]},
        ),
        train_dataset={"forget": task.forget, "retain": retain},
        processing_class=tokenizer,
        peft_config=LoraConfig(**job["lora"]) if job["lora"] else None,
    )
    start = time.time()
    try:
        trainer.train()
    except NonFiniteLossError as error:
        return {"metrics": None, "diverged": str(error)}
    seconds = round(time.time() - start, 1)
    scoring = {**SCORING, "oracle": oracle_truth(args), "generate": generate}
    outcome = evaluate(trainer.model, tokenizer, sets, **scoring)
    found = {"metrics": outcome.metrics, "steps": trainer.state.global_step, "train_seconds": seconds}
    return {**found, "answers": two_answers(outcome)} if generate else found


def all_sets(args: argparse.Namespace) -> dict[str, Any]:
    """The task's evaluation sets, the retain set without held-out rows, and some of these, evenly spaced."""
    task = load_task(args)
    held = task.retain[len(task.retain) - args.held_out :]
    held_prompts = {row["prompt"] for row in held}
    retain = [row for row in task.sets["retain"] if row["prompt"] not in held_prompts]
    step = max(1, len(held) / args.eval_rows)
    unseen = [held[int(i * step)] for i in range(min(args.eval_rows, len(held)))]
    return {**task.sets, "retain": retain, "retain_unseen": unseen}


def oracle_truth(args: argparse.Namespace) -> dict[str, float]:
    path = Path(args.output_dir, "jobs", f"{job_name(args, baseline_job('retain'))}.json")
    return json.loads(path.read_text())["truth"]


def two_answers(outcome: Any) -> list[dict[str, Any]]:
    """The first two generated answers of the forget and the retain sets."""
    return [
        {key: record[key] for key in ("set", "prompt", "gold", "generation")}
        for record in outcome.records
        if record["row"] in (0, 1) and record["set"] in ("forget", "retain", "retain_unseen")
    ]


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(
    args: argparse.Namespace, baselines: dict[str, Any], sweep: list[dict[str, Any]], confirmed: list[dict[str, Any]]
) -> None:
    """`table.md`, `summary.json` (with every run in the folder, of this grid or not), `plane.png`."""
    import numpy as np

    from negtune.metrics.unlearning import forget_quality

    folder, truth = Path(args.output_dir), baselines["oracle"]["truth"]
    tuned = baselines["fine-tuned"]["truth"]
    p_value = forget_quality(np.array([tuned[key] for key in truth]), np.array(list(truth.values()))).p_value
    baselines["fine-tuned"]["metrics"]["forget_quality"] = p_value
    tables = [confirmed_table(args, baselines, confirmed), paired_table(args, confirmed), sweep_table(args, sweep)]
    text = "\n\n".join(tables)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("jobs/*.json"))]
    keep = ("job", "metrics", "diverged", "answers", "steps", "train_seconds", "seconds", "peak_rss_mib")
    summary = {
        "arguments": {
            name: value for name, value in vars(args).items() if name not in ("one", "data_dir", "output_dir")
        },
        "runs": [{name: row[name] for name in keep if name in row} for row in runs],
        **{name: baselines["oracle"][name] for name in ("versions", "machine")},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_plane(folder / "plane.png", args, sweep, baselines)
    print(text)


def confirmed_table(args: argparse.Namespace, baselines: dict[str, Any], confirmed: list[dict[str, Any]]) -> str:
    """One row per arm: mean over seeds and its 95 % t interval where there are several; of forget quality, a p-value,
    every seed."""
    lines = [f"| arm, rate | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| fine-tuned | {' | '.join(cells([baselines['fine-tuned']['metrics']]))} |")
    for arm in args.arms:
        rows = [row for row in confirmed if row["job"]["arm"] == arm]
        name = f"{arm}, {rows[0]['job']['learning_rate']:g}"
        if any(row["metrics"] is None for row in rows):
            lines.append(f"| {name} | diverged |")
            continue
        lines.append(f"| {name} | {' | '.join(cells([row['metrics'] for row in rows]))} |")
    lines.append(f"| oracle | {' | '.join(cells([baselines['oracle']['metrics']]))} |")
    return "\n".join(lines)


def paired_table(args: argparse.Namespace, confirmed: list[dict[str, Any]], against: str = "GA+RT") -> str:
    """Difference of each arm to `against` at the same seed: mean and 95 % t interval."""
    from negtune.metrics.stats import mean_interval

    names = ["forget/probability", "retain/probability", "retain_unseen/probability"]
    lines = [f"| minus {against} | {' | '.join(COLUMNS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    found = {(row["job"]["arm"], row["job"]["seed"]): row["metrics"] for row in confirmed}
    for arm in args.arms:
        pairs = [(found[arm, seed], found.get((against, seed))) for seed in args.seeds]
        if arm == against or any(a is None or b is None for a, b in pairs):
            continue
        differences = [mean_interval([a[name] - b[name] for a, b in pairs]) for name in names]
        lines.append(f"| {arm} | {' | '.join(f'{mean:+.3f} ± {half:.3f}' for mean, half in differences)} |")
    return "\n".join(lines)


def cells(rows: list[dict[str, float]]) -> list[str]:
    from negtune.metrics.stats import mean_interval

    out = []
    for name in COLUMNS:
        values = [row[name] for row in rows if name in row]
        if not values:
            out.append("1 (itself)")
        elif name == "forget_quality" or len(values) == 1:
            out.append(" / ".join(f"{value:.3g}" for value in sorted(values)))
        else:
            mean, half = mean_interval(values)
            out.append(f"{mean:.3f} ± {half:.3f}")
    return out


def sweep_table(args: argparse.Namespace, sweep: list[dict[str, Any]]) -> str:
    """Every rate: forget probability / retain probability / forget quality."""
    lines = [f"| sweep | {' | '.join(f'{lr:g}' for lr in args.learning_rates)} |"]
    lines.append("|---" * (len(args.learning_rates) + 1) + "|")
    found = {(row["job"]["arm"], row["job"]["learning_rate"]): row["metrics"] for row in sweep}
    names = ("forget/probability", "retain/probability", "forget_quality")
    for arm in args.arms:
        metrics = [found[arm, lr] for lr in args.learning_rates]
        line = ["diverged" if m is None else " / ".join(f"{m[name]:.3g}" for name in names) for m in metrics]
        lines.append(f"| {arm} | {' | '.join(line)} |")
    return "\n".join(lines)


def draw_plane(path: Path, args: argparse.Namespace, sweep: list[dict[str, Any]], baselines: dict[str, Any]) -> None:
    """Retain against forget probability of the sweep: one line per arm through its rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for arm, marker in zip(args.arms, "osD^v", strict=False):
        rows = [row for row in sweep if row["job"]["arm"] == arm and row["metrics"]]
        rows.sort(key=lambda row: row["job"]["learning_rate"])
        points = [(row["metrics"]["forget/probability"], row["metrics"]["retain/probability"]) for row in rows]
        axes.plot(*zip(*points, strict=True), marker=marker, label=arm, linewidth=1.2, markersize=5)
    for name, marker in (("fine-tuned", "P"), ("oracle", "*")):
        metrics = baselines[name]["metrics"]
        point = metrics["forget/probability"], metrics["retain/probability"]
        axes.scatter(*point, marker=marker, s=110, color="black", zorder=3, label=name)
    axes.set(xlabel="forget probability (lower: more forgotten)", ylabel="retain probability (higher: more kept)")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
