"""Unlearning objectives side by side on TOFU: one fine-tuned model, equal rows and steps, rate swept per arm.

Arms: retain-only (the do-nothing baseline: forget weight 0), NPO+RT with the paper's coefficients, NPO+RT with the
retain term weighted up to the scale of the summed forget term, GA+RT, SimNPO+RT. Every arm gets the same rates at the
first seed. The rate whose model lies nearest to the retain-only oracle in the plane (forget probability, retain
probability) is then run at the other seeds, and all seeds of it are measured in full, generated answers included. That
rule was fixed before the runs; `summary.json` has every row, chosen or not, so that another rule can be applied.

    python benchmarks/tofu_arms.py --data_dir FOLDER --output_dir runs/tofu --jobs 2

A job is one process with `--threads` threads, kept as `jobs/HASH_OF_ITS_SETTINGS.json`: a killed benchmark goes on
where it was, and changed settings never meet old results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    "real_authors/probability": "real authors prob",
    "world_facts/probability": "world facts prob",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", default="runs/tofu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--forget_split", default="forget01")
    parser.add_argument("--retain_rows", type=int, default=160)
    parser.add_argument("--eval_rows", type=int, default=24)
    parser.add_argument("--finetune_epochs", type=float, default=5)
    parser.add_argument("--finetune_learning_rate", type=float, default=2e-4)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="full fine-tuning in place of LoRA r16")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--one", help="internal: run one job")
    args = parser.parse_args()
    if args.one:
        run_one(args, json.loads(args.one))
        return
    run_jobs(args, [{"kind": "stage", "stage": stage} for stage in ("full", "retain")])
    (baselines,) = run_jobs(args, [{"kind": "baselines"}])
    sweep = run_jobs(args, [arm_job(args, arm, lr, args.seeds[0]) for arm in args.arms for lr in args.learning_rates])
    chosen = {arm: chosen_rate(arm, sweep, baselines) for arm in args.arms}
    rest = run_jobs(args, [arm_job(args, arm, chosen[arm], seed) for arm in args.arms for seed in args.seeds[1:]])
    again = [row["job"] for row in [*sweep, *rest] if row["job"]["learning_rate"] == chosen[row["job"]["arm"]]]
    full = run_jobs(args, [{**job, "kind": "full"} for job in again])
    write_results(args, baselines, [*sweep, *rest], full)


# --- jobs -------------------------------------------------------------------------------------------------------------


def arm_job(args: argparse.Namespace, arm: str, learning_rate: float, seed: int) -> dict[str, Any]:
    return {
        **{"kind": "arm", "arm": arm, "learning_rate": learning_rate, "seed": seed, "loss": ARMS[arm]},
        **{"epochs": args.epochs, "batch_size": args.batch_size, "full": args.full},
    }


def chosen_rate(arm: str, sweep: list[dict[str, Any]], baselines: dict[str, Any]) -> float:
    """The learning rate whose model lies nearest to the oracle; see the module's description."""
    oracle = baselines["arms"]["oracle"]
    rows = [row for row in sweep if row["job"]["arm"] == arm]
    return min(rows, key=lambda row: distance(row["metrics"], oracle))["job"]["learning_rate"]


def distance(metrics: dict[str, float], oracle: dict[str, float]) -> float:
    names = ("forget/probability", "retain/probability")
    return math.dist([metrics[name] for name in names], [oracle[name] for name in names])


def task_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What every job depends on."""
    names = ("model", "forget_split", "retain_rows", "eval_rows", "finetune_epochs", "finetune_learning_rate")
    return {name: getattr(args, name) for name in names}


def job_name(args: argparse.Namespace, job: dict[str, Any]) -> str:
    settings = json.dumps({**task_settings(args), **job}, sort_keys=True)
    return f"{job['kind']}_{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def run_jobs(args: argparse.Namespace, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each job wrote, in order; finished jobs are not repeated."""
    folder = Path(args.output_dir, "jobs")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}

    def launch(job: dict[str, Any]) -> dict[str, Any]:
        path = folder / f"{job_name(args, job)}.json"
        if not path.exists():
            print(time.strftime("%H:%M:%S"), job, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
            with path.with_suffix(".log").open("w") as log:
                subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return json.loads(path.read_text())

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(launch, jobs))


def run_one(args: argparse.Namespace, job: dict[str, Any]) -> None:
    from negtune.data.tofu import tofu_task
    from negtune.eval.run import machine, peak_rss_mib, versions
    from negtune.records import write_json

    start = time.time()
    task = tofu_task(
        args.forget_split, args.data_dir, retain_rows=args.retain_rows, eval_rows=args.eval_rows, plain=True
    )
    result = {"stage": run_stage, "baselines": run_baselines, "arm": run_arm, "full": run_full}[job["kind"]](
        args, job, task
    )
    result |= {"job": job, "seconds": round(time.time() - start, 1), "peak_rss_mib": peak_rss_mib()}
    result |= {"versions": versions(), "machine": machine()}
    write_json(Path(args.output_dir, "jobs", f"{job_name(args, job)}.json"), result)


def stage_folder(args: argparse.Namespace, stage: str) -> Path:
    return Path(args.output_dir, "stages", stage)


def run_stage(args: argparse.Namespace, job: dict[str, Any], task: Any) -> dict[str, Any]:
    from negtune.trainers.finetune import fine_tune

    fine_tune(
        args.model,
        getattr(task, job["stage"]),
        stage_folder(args, job["stage"]),
        epochs=args.finetune_epochs,
        learning_rate=args.finetune_learning_rate,
        batch_size=8,
        max_length=256,
    )
    return {}


def run_baselines(args: argparse.Namespace, job: dict[str, Any], task: Any) -> dict[str, Any]:
    from negtune.eval.unlearning import evaluate, oracle_truth_ratios
    from negtune.models.load import load_model

    settings = {"batch_size": 16, "max_new_tokens": 64}
    oracle = evaluate(*load_model(stage_folder(args, "retain")), task.sets, **settings)
    truth = oracle_truth_ratios(oracle.records)
    tuned = evaluate(*load_model(stage_folder(args, "full")), task.sets, oracle=truth, **settings)
    answers = {"fine-tuned": two_answers(tuned), "oracle": two_answers(oracle)}
    return {"truth": truth, "arms": {"fine-tuned": tuned.metrics, "oracle": oracle.metrics}, "answers": answers}


def run_arm(args: argparse.Namespace, job: dict[str, Any], task: Any) -> dict[str, Any]:
    """Unlearn, save, and score without generation."""
    from peft import LoraConfig

    from negtune import UnlearningConfig, UnlearningTrainer
    from negtune.eval.unlearning import evaluate
    from negtune.models.load import load_model

    model, tokenizer = load_model(stage_folder(args, "full"))
    trainer = UnlearningTrainer(
        model=model,
        args=UnlearningConfig(
            output_dir=str(trained_folder(args, job)),
            **{"learning_rate": job["learning_rate"], "num_train_epochs": job["epochs"], "seed": job["seed"]},
            **{"per_device_train_batch_size": job["batch_size"], "lr_scheduler_type": "linear", "warmup_steps": 0.1},
            **{"weight_decay": 0.01, "logging_steps": 5, "save_strategy": "no", "report_to": "none"},
            **{"reference": "cached", "reference_cache_dir": str(Path(args.output_dir, "reference"))},
            **{"max_length": 256, **job["loss"]},
        ),
        train_dataset={"forget": task.forget, "retain": task.retain},
        processing_class=tokenizer,
        peft_config=None if job["full"] else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    start = time.time()
    trainer.train()
    seconds = round(time.time() - start, 1)
    trainer.save_model(str(trained_folder(args, job)))
    kept = [{name: row[name] for name in ("prompt", "completion")} for row in task.sets["retain"]]
    sets = {"forget": task.sets["forget"], "retain": kept}
    metrics = evaluate(trainer.model, tokenizer, sets, oracle=truth_ratios(args), generate=False, batch_size=16).metrics
    return {"metrics": metrics, "steps": trainer.state.global_step, "train_seconds": seconds}


def run_full(args: argparse.Namespace, job: dict[str, Any], task: Any) -> dict[str, Any]:
    """Score the saved model on all sets, with generated answers."""
    from peft import PeftModel

    from negtune.eval.unlearning import evaluate
    from negtune.models.load import load_model

    folder = trained_folder(args, {**job, "kind": "arm"})
    model, tokenizer = load_model(folder if job["full"] else stage_folder(args, "full"))
    if not job["full"]:
        model = PeftModel.from_pretrained(model, folder)
    outcome = evaluate(model, tokenizer, task.sets, oracle=truth_ratios(args), batch_size=16, max_new_tokens=64)
    return {"metrics": outcome.metrics, "answers": two_answers(outcome)}


def trained_folder(args: argparse.Namespace, job: dict[str, Any]) -> Path:
    return Path(args.output_dir, "trained", job_name(args, job))


def truth_ratios(args: argparse.Namespace) -> dict[str, float]:
    path = Path(args.output_dir, "jobs", f"{job_name(args, {'kind': 'baselines'})}.json")
    return json.loads(path.read_text())["truth"]


def two_answers(outcome: Any) -> list[dict[str, Any]]:
    """The first two generated answers of the forget and the retain set."""
    return [
        {key: record[key] for key in ("set", "prompt", "gold", "generation")}
        for record in outcome.records
        if record["row"] in (0, 1) and record["set"] in ("forget", "retain")
    ]


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(
    args: argparse.Namespace, baselines: dict[str, Any], runs: list[dict[str, Any]], full: list[dict[str, Any]]
) -> None:
    """`table.md`, `summary.json`, `plane.png`."""
    folder = Path(args.output_dir)
    table = "\n\n".join([measured_table(args, baselines, full), sweep_table(args, runs, baselines)])
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    keep = ("job", "metrics", "answers", "steps", "train_seconds", "seconds", "peak_rss_mib")
    summary = {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("one", "data_dir")},
        "baselines": {name: baselines[name] for name in ("arms", "answers")},
        "runs": [{name: row[name] for name in keep if name in row} for row in runs],
        "full": [{name: row[name] for name in keep if name in row} for row in full],
        **{name: baselines[name] for name in ("versions", "machine")},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_plane(folder / "plane.png", args, runs, baselines)
    print(table)


def measured_table(args: argparse.Namespace, baselines: dict[str, Any], full: list[dict[str, Any]]) -> str:
    """One row per arm: mean over seeds and its 95 % t interval; of forget quality, a p-value, every seed."""
    lines = [f"| arm | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| fine-tuned | {' | '.join(cells([baselines['arms']['fine-tuned']]))} |")
    for arm in args.arms:
        rows = [row for row in full if row["job"]["arm"] == arm]
        lines.append(
            f"| {arm}, {rows[0]['job']['learning_rate']:g} | {' | '.join(cells([r['metrics'] for r in rows]))} |"
        )
    lines.append(f"| oracle | {' | '.join(cells([baselines['arms']['oracle']]))} |")
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


def sweep_table(args: argparse.Namespace, runs: list[dict[str, Any]], baselines: dict[str, Any]) -> str:
    """First seed, every rate: forget probability / retain probability / forget quality (distance to the oracle)."""
    lines = [f"| arm | {' | '.join(f'{lr:g}' for lr in args.learning_rates)} |"]
    lines.append("|---" * (len(args.learning_rates) + 1) + "|")
    for arm in args.arms:
        line = []
        for lr in args.learning_rates:
            job = job_name(args, arm_job(args, arm, lr, args.seeds[0]))
            m = next(row["metrics"] for row in runs if job_name(args, row["job"]) == job)
            far = distance(m, baselines["arms"]["oracle"])
            line.append(
                f"{m['forget/probability']:.3f} / {m['retain/probability']:.3f} / {m['forget_quality']:.2g} ({far:.2f})"
            )
        lines.append(f"| {arm} | {' | '.join(line)} |")
    return "\n".join(lines)


def draw_plane(path: Path, args: argparse.Namespace, runs: list[dict[str, Any]], baselines: dict[str, Any]) -> None:
    """Retain against forget probability: one line per arm through its rates, at the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for arm, marker in zip(args.arms, "osD^v", strict=False):
        rows = [row for row in runs if row["job"]["arm"] == arm and row["job"]["seed"] == args.seeds[0]]
        rows.sort(key=lambda row: row["job"]["learning_rate"])
        points = [(row["metrics"]["forget/probability"], row["metrics"]["retain/probability"]) for row in rows]
        axes.plot(*zip(*points, strict=True), marker=marker, label=arm, linewidth=1.2, markersize=5)
    for name, marker in (("fine-tuned", "P"), ("oracle", "*")):
        metrics = baselines["arms"][name]
        point = metrics["forget/probability"], metrics["retain/probability"]
        axes.scatter(*point, marker=marker, s=110, color="black", zorder=3, label=name)
    axes.set(xlabel="forget probability (lower: more forgotten)", ylabel="retain probability (higher: more kept)")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
