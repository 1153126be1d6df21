"""Peak memory and seconds per step of the ways to run NPO+RT: same rows, same steps, one fresh process each.

Full fine-tuning (cached reference, so no second model; and with a frozen copy), LoRA with the adapter switched off as
reference, LoRA with cached reference, QLoRA; and LoRA by `forgetium`, where it is installed
(`pip install --no-deps forgetium==0.2.1 && pip install pydantic`). Peak RSS is read after loading as well: imports and
base weights are in both numbers, the difference is what training adds.

    python benchmarks/unlearning_memory.py --data_dir FOLDER --output_dir runs/memory
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from side_by_side import row, table, write_result

MODES = {
    "full, frozen copy": {"reference": "copy"},
    "full, cached reference": {"reference": "cached"},
    "LoRA, adapter off": {"reference": "adapter", "lora": True},
    "LoRA, cached reference": {"reference": "cached", "lora": True},
    "QLoRA (NF4), adapter off": {"reference": "adapter", "lora": True, "load_in_4bit": True},
}
PEER = "forgetium, LoRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with TOFU's files; default: the Hub")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=2, help="forget rows a step, and as many retain rows")
    parser.add_argument("--steps", type=int, default=6, help="the first is left out of the time")
    parser.add_argument("--output_dir", default="runs/memory")
    parser.add_argument("--one", help="internal: run one mode")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_one(args, args.one, folder)
        return
    results = []
    peer = [PEER] if importlib.util.find_spec("forgetium") else []
    for mode in [*MODES, *peer]:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", mode], check=True)
        results.append(json.loads((folder / "one.json").read_text()))
    print(write_result("unlearning_memory", [*compared(results), *results]))
    print(table(compared(results)))
    print("| mode | trained parameters | peak RSS MiB | after loading MiB | s/step (median) |\n|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['mode']} | {r['trained']:,} | {r['peak_rss_mib']:.0f} | {r['loaded_rss_mib']:.0f} | "
            f"{r['seconds_per_step']:.2f} |"
        )


def compared(results: list[dict]) -> list[dict]:
    """Our two LoRA modes against forgetium: peak, what training adds to it, and time."""
    found = {r["mode"]: r for r in results}
    if PEER not in found:
        return []
    peer, rows = found[PEER], []
    for mode in ("LoRA, adapter off", "LoRA, cached reference"):
        ours = found[mode]
        rows.append(row(f"{mode}: peak RSS", ours["peak_rss_mib"], peer["peak_rss_mib"], "MiB", 1 / 0.85))
        added = [r["peak_rss_mib"] - r["loaded_rss_mib"] for r in (ours, peer)]
        rows.append(row(f"{mode}: added by training", *added, "MiB"))
        rows.append(row(f"{mode}: time", ours["seconds_per_step"], peer["seconds_per_step"], "s/step"))
    return rows


def run_one(args: argparse.Namespace, mode: str, folder: Path) -> None:
    from negtune.eval.run import peak_rss_mib

    loaded, trained, gaps = run_peer(args) if mode == PEER else run_ours(args, mode, folder)
    result = {
        "mode": mode,
        "trained": trained,
        "loaded_rss_mib": loaded,
        "peak_rss_mib": peak_rss_mib(),
        "seconds_per_step": median(gaps),
        "step_seconds": gaps,
        "rows_per_step": [args.rows, args.rows],
    }
    (folder / "one.json").write_text(json.dumps(result), encoding="utf-8")


def run_peer(args: argparse.Namespace) -> tuple[float, int, list[float]]:
    """The same with forgetium: a deep copy is its reference."""
    from forgetium import ForgetRetainDataset
    from forgetium.core.config import UnlearningConfig as PeerConfig
    from forgetium.methods.npo import NPOUnlearner
    from peft import LoraConfig, get_peft_model

    from negtune.data.tofu import tofu_task
    from negtune.eval.run import peak_rss_mib
    from negtune.models.load import load_model

    class Timed(NPOUnlearner):
        times: list[float] = []

        def on_step_end(self, step: int, loss: float) -> None:
            self.times.append(time.perf_counter())

    task, count = tofu_task("forget01", args.data_dir, retain_rows=40, eval_rows=1), args.rows * args.steps
    model, tokenizer = load_model(args.model)
    loaded = peak_rss_mib()

    def as_text(rows: list[dict]) -> list[dict[str, str]]:
        chat = {"tokenize": False, "add_generation_prompt": True}
        return [
            {
                "prompt": tokenizer.apply_chat_template(r["prompt"], **chat),
                "response": r["completion"][0]["content"],
            }
            for r in rows[:count]
        ]

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    config = PeerConfig(learning_rate=1e-5, num_epochs=1, batch_size=args.rows, device="cpu", logging_steps=1, seed=0)
    unlearner = Timed(model, tokenizer, config, beta=0.1, retain_weight=1.0)
    unlearner.fit(ForgetRetainDataset(as_text(task.forget), as_text(task.retain)))
    gaps = [b - a for a, b in zip(Timed.times, Timed.times[1:], strict=False)]
    return loaded, sum(p.numel() for p in model.parameters() if p.requires_grad), gaps


def run_ours(args: argparse.Namespace, mode: str, folder: Path) -> tuple[float, int, list[float]]:
    from peft import LoraConfig
    from transformers import TrainerCallback

    from negtune import UnlearningConfig, UnlearningTrainer
    from negtune.data.tofu import tofu_task
    from negtune.eval.run import peak_rss_mib
    from negtune.models.load import load_model

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *_args, **_kwargs):
            self.times.append(time.perf_counter())

    settings = dict(MODES[mode])
    lora, four_bit = settings.pop("lora", False), settings.pop("load_in_4bit", False)
    task, count = tofu_task("forget01", args.data_dir, retain_rows=40, eval_rows=1), args.rows * args.steps
    model, tokenizer = load_model(args.model, load_in_4bit=four_bit)
    loaded = peak_rss_mib()
    trainer = UnlearningTrainer(
        model=model,
        args=UnlearningConfig(
            output_dir=str(folder / "run"),
            **{"max_steps": args.steps, "per_device_train_batch_size": args.rows, "learning_rate": 1e-5, "seed": 0},
            **{"logging_steps": 1000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
            **settings,
        ),
        train_dataset={"forget": task.forget[:count], "retain": task.retain[:count]},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if lora else None,
        callbacks=[Clock()],
    )
    trainer.train()
    gaps = [b - a for a, b in zip(Clock.times, Clock.times[1:], strict=False)]
    return loaded, sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), gaps


if __name__ == "__main__":
    main()
