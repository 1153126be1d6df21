"""What training on wrong steps can and cannot explain: the didactic experiments, without a language model.

Paper:    RL on Incorrect Synthetic Data, https://arxiv.org/abs/2406.14532; Rewarding Progress (process advantage
          verifiers), https://arxiv.org/abs/2410.08146; the squeezing effect, https://arxiv.org/abs/2407.10490
What:     (i) a planted sub-sequence with exact values: which effective reward learns faster, at which learning rate;
          offline, positives against per-step and trajectory pairs; (ii) a cue that agrees with the answer in training
          only: SFT, more SFT, RFT; (iii) entropy after pushing one token down or up; (iv) per-step DPO's optimum.
Expected: (i) Q + A of a prover is faster at one learning rate, and no more than outcome reward at a larger one;
          offline nothing separates; (ii) RFT leans on the cue, more SFT does not; (iv) pi_ref exp(A/beta)/Z.
Differs:  (i) tables, 64 sequences an iteration, own seeds; (ii) own specification, see `Fork`.
Measured: recipes/LOG.md
Command:  python recipes/step_rl/theory.py --output_dir runs/step_theory     (two CPU minutes; --smoke: seconds)
"""

import argparse
import json
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
from negtune.eval.step_theory import Fork, entropy_change, minimise_step_dpo, shortcut_experiment, tilted
from negtune.losses.unlearning import grad_ascent, nll
from negtune.metrics.stats import mean_interval

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True, help="receives theory.json and theory.png")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")

FORKS = {"L=5 d=3": Fork(), "no decay": Fork(weight_decay=0.0), "L=10 d=3": Fork(10), "L=10 d=4": Fork(10, 4)}


def main() -> None:
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    parts = [online(args), offline(args), shortcut(args), closed_forms(args)]
    results = {name: row for part in parts for name, row in part.items()}
    (args.output_dir / "theory.json").write_text(json.dumps(results, indent=1))
    plot(*parts[:3], args.output_dir / "theory.png")


def online(args) -> dict[str, dict]:
    found = {}
    for lr in [16.0] if args.smoke else [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]:
        for name, reward in REWARDS.items():
            runs = [reinforce_successes(random_automaton(s), reward, lr=lr, seed=s) for s in args.seeds]
            half, most = ([iterations_to(run, level) for run in runs] for level in (0.5, 0.9))
            found[f"{name} @ {lr:g}"] = {"to 50 %": half, "to 90 %": most, "successes": runs[0]}
            print(f"planted  lr {lr:4g}  {name:20} iterations to 50 %: {half}  to 90 %: {most}")
    norms = {name: expected_gradient_norm(random_automaton(0), name) for name in ("Q", "Q + A of the prover")}
    print(f"planted  norm of the expected gradient at the start: {norms}")
    return found | {"gradient norm": norms}


def offline(args) -> dict[str, list[float]]:
    found = {}
    lrs, steps = ([10.0], 20) if args.smoke else ([1.0, 10.0, 100.0, 1000.0], 300)
    for responses in [50] if args.smoke else [100, 1000]:
        rows = [offline_successes(seed, responses=responses, lrs=lrs, steps=steps) for seed in args.seeds]
        for name in rows[0]:
            found[f"{responses} responses, {name}"] = successes = [row[name] for row in rows]
            print(f"offline  {responses} responses  {name:26} {interval(successes)}")
    return found


def shortcut(args) -> dict[str, dict]:
    found = {}
    for setting, task in list(FORKS.items())[: 1 if args.smoke else None]:
        results = [shortcut_experiment(task, seed) for seed in args.seeds]
        for name in results[0].success:
            successes, marks = zip(*((each.success[name], each.weights[name][1]) for each in results), strict=True)
            found[f"{setting}, {name}"] = {"success": successes, "weight of the mark": marks}
            print(f"shortcut {setting:8} {name:14} success {interval(successes)}  weight of the mark {interval(marks)}")
    return found


def closed_forms(args) -> dict[str, float]:
    found = {}
    logits = torch.tensor([2, 1, 0, -1, -2], dtype=torch.float64)
    for token in (0, 3):
        found[f"entropy, token {token} down"] = entropy_change(logits, token, grad_ascent, lr=0.5)
        found[f"entropy, token {token} up"] = entropy_change(logits, token, nll, lr=0.5)
    for beta in (0.1, 0.5, 1.0):
        found[f"distance from the tilt, beta {beta:g}"] = max(distance_from_tilt(beta, seed) for seed in args.seeds)
    for name, number in found.items():
        print(f"{name:32} {number:+.4g}")
    return found


def distance_from_tilt(beta: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).softmax(-1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    found = minimise_step_dpo(reference, advantages, beta=beta)
    return (found - tilted(reference, advantages, beta=beta)).abs().max().item()


def interval(numbers) -> str:
    return f"{numbers[0]:.3f}" if len(numbers) < 2 else "{:.3f} ± {:.3f}".format(*mean_interval(numbers))


def plot(online, offline, shortcut, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    for name, row in online.items():
        if name.startswith(("outcome @", "Q + A")):
            axes[0].plot(row["successes"], label=name, linestyle="--" if name.startswith("outcome") else "-")
    axes[0].set(title="planted: success of the first seed", xlabel="iteration", xscale="symlog")
    axes[0].legend(fontsize=6)
    for axis, bars, title in (
        (axes[1], offline, "planted, offline: success"),
        (axes[2], {name: row["success"] for name, row in shortcut.items()}, "shortcut: success at test"),
    ):
        axis.barh(list(bars), [sum(successes) / len(successes) for successes in bars.values()])
        axis.tick_params(axis="y", labelsize=6)
        axis.set(title=title)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
