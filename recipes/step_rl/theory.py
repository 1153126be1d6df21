"""What training on wrong steps can and cannot explain: the didactic experiments, without a language model.

Paper:    RL on Incorrect Synthetic Data, https://arxiv.org/abs/2406.14532; Rewarding Progress (process advantage
          verifiers), https://arxiv.org/abs/2410.08146; the squeezing effect, https://arxiv.org/abs/2407.10490
What:     (i) a planted sub-sequence with exact values: which effective reward learns faster, at which learning rate;
          offline, positives against per-step and trajectory pairs; (ii) a cue that agrees with the answer in training
          only: SFT, more SFT, RFT; (iii) entropy after pushing one token down or up; (iv) per-step DPO's optimum;
          (v) paths in star graphs: which way of going on repairs the guess of the first step.
Expected: (i) Q + A of a prover is faster at one learning rate, and no more than outcome reward at a larger one;
          offline nothing separates; (ii) RFT leans on the cue, more SFT does not; (iv) pi_ref exp(A/beta)/Z;
          (v) the paper: per-step DPO repairs an under-trained model and only matches SFT from an over-trained one.
Differs:  (i) tables and 64 sequences a step, own seeds; (ii) own specification, see `Fork`; (v) own small transformer
          and sizes; every arm has the same steps, sampled tokens and number of learning rates, continued SFT included.
Measured: recipes/LOG.md
Command:  python recipes/step_rl/theory.py --output_dir runs/step_theory     (half an hour; --smoke: seconds)
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from negtune.eval.planted import (
    REWARDS,
    expected_gradient_norm,
    iterations_to,
    offline_successes,
    random_automaton,
    reinforce_successes,
)
from negtune.eval.star_graph import ARMS, Sizes, prepare
from negtune.eval.step_theory import Fork, entropy_change, minimise_step_dpo, shortcut_experiment, tilted
from negtune.losses.unlearning import grad_ascent, nll
from negtune.metrics.stats import mean_interval

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True, help="receives PART.json of every part, and theory.png")
parser.add_argument("--parts", nargs="+", choices=["planted", "closed_forms", "star_graph"], default=None)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="star_graph takes the first three")
parser.add_argument("--tune_seed", type=int, default=100, help="star_graph: the seed that chooses learning rates")
parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")


def planted(args) -> dict:
    lrs, iterations = ([16.0], 10) if args.smoke else ([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], 350)
    found: dict = {"online": {}, "offline": {}}
    for lr in lrs:
        for name, reward in REWARDS.items():
            runs = [
                reinforce_successes(random_automaton(seed), reward, lr=lr, seed=seed, iterations=iterations)
                for seed in args.seeds
            ]
            row = {f"{level:g}": [iterations_to(run, level) for run in runs] for level in (0.5, 0.9)}
            found["online"][f"{name} @ {lr:g}"] = row | {"successes": runs[0]}
            print(f"planted  lr {lr:4g}  {name:20} iterations to 50 %: {row['0.5']}  to 90 %: {row['0.9']}")
    norms = {name: expected_gradient_norm(random_automaton(0), name) for name in ("Q", "Q + A of the prover")}
    found["gradient_norm"] = norms
    print(f"planted  norm of the expected gradient at the start: {norms}")
    for responses, steps in [(50, 20)] if args.smoke else [(100, 300), (1000, 300)]:
        offline_lrs = [10.0] if args.smoke else [1.0, 10.0, 100.0, 1000.0]
        rows = [offline_successes(seed, responses=responses, lrs=offline_lrs, steps=steps) for seed in args.seeds]
        for name in rows[0]:
            successes = [row[name] for row in rows]
            found["offline"][f"{name}, {responses} responses, {steps} steps"] = successes
            print(f"offline  {responses} responses, {steps} steps  {name:26} {interval(successes)}")
    return found


def closed_forms(args) -> dict:
    found: dict = {}
    settings = {"L=5 d=3": Fork(), "no decay": Fork(weight_decay=0.0), "L=10 d=3": Fork(10), "L=10 d=4": Fork(10, 4)}
    for setting, task in list(settings.items())[: 1 if args.smoke else None]:
        results = [shortcut_experiment(task, seed) for seed in args.seeds]
        for name in results[0].success:
            successes = [result.success[name] for result in results]
            marks = [result.weights[name][1] for result in results]
            found[f"shortcut {setting}, {name}"] = {"success": successes, "mark": marks}
            print(f"shortcut {setting:8} {name:14} success {interval(successes)}  weight of the mark {interval(marks)}")
    logits = torch.tensor([2, 1, 0, -1, -2], dtype=torch.float64)
    for direction, objective in (("down", grad_ascent), ("up", nll)):
        for token in (0, 3):
            change = entropy_change(logits, token, objective, lr=0.5)
            found[f"entropy, token {token} {direction}"] = change
            print(f"squeeze  token {token} pushed {direction}: entropy {change:+.4f}")
    for beta in (0.1, 0.5, 1.0):
        worst = 0.0
        for seed in args.seeds:
            generator = torch.Generator().manual_seed(seed)
            reference = torch.randn(6, generator=generator, dtype=torch.float64).softmax(-1)
            advantages = torch.randn(6, generator=generator, dtype=torch.float64)
            off = minimise_step_dpo(reference, advantages, beta=beta) - tilted(reference, advantages, beta=beta)
            worst = max(worst, off.abs().max().item())
        found[f"tilt, beta {beta:g}"] = worst
        print(f"tilt     beta {beta:g}: per-step DPO is off pi_ref exp(A/beta)/Z by at most {worst:.1e}")
    return found


def star_graph(args) -> dict:
    lrs, sizes = [3e-5, 1e-4, 3e-4, 1e-3], Sizes()
    if args.smoke:
        lrs, sizes = [1e-3], Sizes(100, 100, 50, under_steps=4, over_steps=8, steps=10)
    tune, runs = prepare(args.tune_seed, sizes), [prepare(seed, sizes) for seed in args.seeds[:3]]
    found: dict = {}
    for start in tune.starts:
        seen = [run.seen[start].first for run in runs]
        before = [run.before[start] for run in runs]
        found[start] = {"first_on_sft_graphs": seen, "before": [asdict(each) for each in before]}
        print(f"star {start}: first step right on SFT's graphs {interval(seen)}, on others ", end="")
        print(f"{interval([each.first for each in before])}, paths {interval([each.success for each in before])}")
        for name, arm in ARMS.items():
            swept = {lr: tune.scores(start, arm, lr=lr, steps=sizes.steps) for lr in lrs}
            chosen = max(lrs, key=lambda lr: swept[lr].success)
            after = [run.scores(start, arm, lr=chosen, steps=sizes.steps) for run in runs]
            found[f"{start}, {name}"] = {
                "swept": {f"{lr:g}": asdict(each) for lr, each in swept.items()},
                "lr": chosen,
                "after": [asdict(each) for each in after],
            }
            sweep = ", ".join(f"{lr:g}: {each.success:.3f}" for lr, each in swept.items())
            print(f"star {start}, {name:24} first {interval([each.first for each in after])}", end="")
            print(f"  paths {interval([each.success for each in after])}  at lr {chosen:g} of ({sweep})", flush=True)
    return found


def interval(numbers: list[float]) -> str:
    if len(numbers) < 2:
        return f"{numbers[0]:.3f}"
    mean, half = mean_interval(numbers)
    return f"{mean:.3f} ± {half:.3f}"


PARTS = {"planted": planted, "closed_forms": closed_forms, "star_graph": star_graph}


def main() -> None:
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        (args.output_dir / f"{part}.json").write_text(json.dumps(PARTS[part](args), indent=1))
    plot(args.output_dir)


def plot(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").exists()}
    figure, axes = pyplot.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    for name, row in found.get("planted", {}).get("online", {}).items():
        if name.startswith(("outcome @", "Q + A")):
            axes[0].plot(row["successes"], label=name, linestyle="--" if name.startswith("outcome") else "-")
    axes[0].set(title="planted: success of the first seed", xlabel="iteration", xscale="symlog")
    forms = {name[9:]: row for name, row in found.get("closed_forms", {}).items() if name.startswith("shortcut L")}
    axes[1].barh(list(forms), [sum(row["success"]) / len(row["success"]) for row in forms.values()])
    axes[1].set(title="shortcut: success at test")
    arms = {name: row["after"] for name, row in found.get("star_graph", {}).items() if "after" in row}
    axes[2].barh(list(arms), [sum(each["success"] for each in after) / len(after) for after in arms.values()])
    axes[2].set(title="star graphs: right paths at test")
    axes[0].legend(fontsize=6)
    figure.savefig(folder / "theory.png", dpi=120)


if __name__ == "__main__":
    main()
