"""Paths in star graphs: does training on wrong first steps repair the guess that next-token prediction settles for?

Paper:    RL on Incorrect Synthetic Data, https://arxiv.org/abs/2406.14532; the task: https://arxiv.org/abs/2403.06963
What:     a transformer of 150,000 parameters learns to follow edges and guesses the arm; go on from there, under- or
          over-trained, by more SFT, RFT, per-step DPO or pushing wrong first steps down.
Expected: the paper: per-step DPO repairs an under-trained model, and only matches SFT from an over-trained one.
Differs:  own small model and sizes (the paper's could not be found); every arm, continued SFT included, has the same
          steps, rows per step, graphs and number of learning rates; arms that draw answers draw equally many.
Measured: recipes/LOG.md
Command:  python recipes/step_rl/star_graph.py --output_dir runs/star_graph     (half an hour of CPU; --smoke: seconds)
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from negtune.eval.star_graph import ARMS, Sizes, prepare
from negtune.metrics.stats import mean_interval

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True, help="receives star_graph.json and star_graph.png")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--tune_seed", type=int, default=100, help="chooses the learning rate of every arm")
parser.add_argument("--lrs", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4, 1e-3])
parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")

SMOKE = Sizes(sft_graphs=100, pool_graphs=100, test_graphs=50, under_steps=4, over_steps=8, steps=10, rows=8)


def main() -> None:
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    sizes = SMOKE if args.smoke else Sizes()
    tune, runs = prepare(args.tune_seed, sizes), [prepare(seed, sizes) for seed in args.seeds]
    found: dict[str, dict] = {}
    for start in tune.starts:
        seen, before = [run.seen[start] for run in runs], [run.before[start] for run in runs]
        found[start] = {"seen": [asdict(each) for each in seen], "after": [asdict(each) for each in before]}
        print(f"{start}: first step right on SFT's graphs {interval(seen, 'first')}, ", end="")
        print(f"on others {interval(before, 'first')}, paths {interval(before, 'success')}")
        for name, arm in ARMS.items():
            swept = {lr: tune.after(start, arm, sizes, lr=lr) for lr in args.lrs}
            lr = max(swept, key=lambda each: swept[each].success)
            after = [run.after(start, arm, sizes, lr=lr) for run in runs]
            sweep = {f"{each:g}": asdict(score) for each, score in swept.items()}
            found[f"{start}, {name}"] = {"swept": sweep, "lr": lr, "after": [asdict(each) for each in after]}
            print(f"{start}, {name:24} first {interval(after, 'first')}  others {interval(after, 'others')}", end="  ")
            tried = ", ".join(f"{each}: {score['success']:.3f}" for each, score in sweep.items())
            print(f"paths {interval(after, 'success')}  at lr {lr:g} of ({tried})", flush=True)
    (args.output_dir / "star_graph.json").write_text(json.dumps(found, indent=1))
    plot(found, args.output_dir / "star_graph.png")


def interval(scores: list, name: str) -> str:
    numbers = [getattr(score, name) for score in scores]
    if len(numbers) < 2:
        return f"{numbers[0]:.3f}"
    return "{:.3f} ± {:.3f}".format(*mean_interval(numbers))


def plot(found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for place, row in enumerate(found.values()):
        axis.plot([score["success"] for score in row["after"]], [place] * len(row["after"]), "o")
    axis.set_yticks(range(len(found)), list(found))
    axis.set(title="star graphs: right paths at test, one point per seed", xlim=(0, 1))
    axis.invert_yaxis()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
