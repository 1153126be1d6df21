"""On-policy samples, negative gradients, mode seeking: what each of them buys on a bandit, with matched controls.

Paper:    Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data, https://arxiv.org/abs/2404.14367,
          its didactic bandit. R1 peaks where the reference rarely goes, R2 near its mode.
What:     (a) offline; (b) on-policy for as many steps, and (f) as many samples; (c) a filter on reward gaps for every
          method; (d) RWR's temperature; (e) three learning rates for every method; (g) forward and reverse KL on a
          table of logits; (h) what becomes of the best samples' own probability; (i) wider rewards.
Quoted:   100 states, 10 samples each, 200 steps; IPO with margin 10; on-policy 15 steps a round. In the authors' code
          the gap filter of .2 is on for IPO alone, and learning rates differ between methods (.001 to .01).
Expected: the paper: on-policy samples and negative gradients win on R1. Under the controls the filter makes up most of
          IPO's lead over Pref-FT, sharp RWR is above both, and on-policy samples help IPO but hardly Best-of-N.
Differs:  analytic reference, own seeds; RWR's weights are not cut at 10 unless the row says so.
Measured: recipes/LOG.md
Command:  python recipes/preference/bandit.py --output_dir runs/bandit       (40 minutes on one core; --smoke: seconds)

Every finished run is a line of runs.jsonl, and the same command goes on after a kill. results.jsonl has a line per
setting, tables.md the tables, bandit.png the plots.
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bandit_plots import draw
from bandit_tables import DO_NOTHING, grid, tables

from negtune.cli.recipe import run_recipe
from negtune.eval.bandit import REWARDS, mode_seeking
from negtune.eval.bandit_training import LOG_EVERY, Setting, train
from negtune.records import append_jsonl, read_jsonl, write_jsonl

EARLY = 150
"""Gradient steps of ten on-policy rounds: where `early` reads the reward."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more")
parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
parser.add_argument("--smoke", action="store_true", help="few methods at small sizes, to see that it runs")


def main() -> None:
    args = parser.parse_args()
    if len(set(args.seeds)) < max(2, len(args.seeds)) or args.workers < 1:
        raise ValueError(f"need two seeds or more, each once, and a worker, got {args.seeds} and {args.workers}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    wanted = [table.small() if args.smoke else table for table in tables()]
    settings = list(dict.fromkeys(setting for table in wanted for setting in table.settings()))
    found = runs(settings, args)
    modes = list(descents([10.0] if args.smoke else [0.3, 1.0, 3.0, 10.0]))
    lines = [{**asdict(setting), "seeds": args.seeds, "outcomes": ends(found[setting])} for setting in settings]
    write_jsonl(args.output_dir / "results.jsonl", lines + modes)
    text = "\n".join([table.markdown(found) for table in wanted] + [mode_table(modes)])
    (args.output_dir / "tables.md").write_text(text)
    print(text)
    draw(found, modes, args.output_dir / "bandit.png")


def runs(settings: list[Setting], args: argparse.Namespace) -> dict[Setting, dict[str, list]]:
    """Metrics of every setting, a value per seed; what runs.jsonl holds is not run again."""
    path = args.output_dir / "runs.jsonl"
    try:
        done = {key_of(row): row for row in (read_jsonl(path) if path.exists() else [])}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of this version ({error}); move it away, or take another folder") from error
    trained = {setting: small(setting) if args.smoke else setting for setting in settings}
    jobs = list(dict.fromkeys((setting, seed) for seed in args.seeds for setting in trained.values()))
    missing = [job for job in jobs if job not in done]
    for number, row in enumerate(finished(missing, args.workers), start=1):
        append_jsonl(path, [row])
        done[key_of(row)] = row
        print(f"{number}/{len(missing)} {row['setting']['method']} {row['outcome']['reward']:.3f}", flush=True)
    outcomes = {setting: [done[trained[setting], seed]["outcome"] for seed in args.seeds] for setting in settings}
    return {s: {name: [outcome[name] for outcome in rows] for name in rows[0]} for s, rows in outcomes.items()}


def ends(metrics: dict[str, list]) -> dict[str, list]:
    """All but the curves."""
    return {name: values for name, values in metrics.items() if name != "rewards"}


def small(setting: Setting) -> Setting:
    return replace(setting, states=4, samples=4, rounds=min(2, setting.rounds), steps=3)


def key_of(row: dict[str, Any]) -> tuple[Setting, int]:
    return Setting(**row["setting"]), row["seed"]


def finished(jobs: list[tuple[Setting, int]], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(one, jobs)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(one, jobs)


def one(job: tuple[Setting, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    setting, seed = job
    start = time.perf_counter()
    outcome = train(setting, seed)
    early = outcome.rewards[: EARLY // LOG_EVERY + 1][-1]
    numbers = asdict(outcome) | {"early": early, "margin": outcome.margin, "displaced": float(outcome.displaced)}
    short = {
        name: [round(v, 4) for v in value] if name == "rewards" else float(f"{value:.5g}")
        for name, value in numbers.items()
    }
    seconds = round(time.perf_counter() - start, 2)
    return {"setting": asdict(setting), "seed": seed, "outcome": short, "seconds": seconds}


def descents(lrs: list[float]) -> Iterator[dict[str, Any]]:
    """Steps of exact gradient descent to half and to 95 % of the target's reward."""
    for name in ("R1", "R2"):
        for beta in (0.1, 0.05):
            for lr in lrs:
                ways = {"forward": False, "reverse": True}
                found = {w: mode_seeking(REWARDS[name], beta=beta, reverse=r, lr=lr) for w, r in ways.items()}
                steps = {f"{way}, {share:g}": f.steps_to(share) for way, f in found.items() for share in (0.5, 0.95)}
                yield {"target": f"{name} beta {beta:g}", "lr": lr, **steps}


def mode_table(modes: list[dict[str, Any]]) -> str:
    """Doing nothing stands at the reference's share of the target's reward."""
    start = {}
    for name in ("R1", "R2"):
        for beta in (0.1, 0.05):
            found = mode_seeking(REWARDS[name], beta=beta, reverse=True, steps=1)
            start[f"{name} beta {beta:g}"] = found.rewards[0] / found.goal
    lines = [[f"{t}, {DO_NOTHING}", "", *["never"] * 4, f"(stands at {share:.2f})"] for t, share in start.items()]
    for row in modes:
        steps = [row[f"{way}, {share}"] for share in ("0.95", "0.5") for way in ("forward", "reverse")]
        lines.append([row["target"], f"{row['lr']:g}", *map(str, steps), f"{steps[1] / steps[0]:.3f}"])
    head = ["target", "lr", "forward, 95 %", "reverse, 95 %", "forward, 50 %", "reverse, 50 %", "reverse/forward, 95 %"]
    return "### g. Mode seeking: steps to a share of the target's reward\n\n" + grid(head, lines)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
