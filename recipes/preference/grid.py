"""A grid of ways to tune on a policy's own samples, compared fairly: one table, and reward against KL.

Paper       Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data, https://arxiv.org/abs/2404.14367
Axes        Every arm is a trainer with settings. steps_per_round is how on-policy it is: 1 draws at every step, as many
            as there are steps draws everything from the start (offline); reuse is the number of passes over a round;
            loss_type, selection and pair_selection say whether what is worse is pushed down.
Controls    Equal prompts, samples and optimiser steps; ties left out; cut answers scored as they stand, in training as
            in the measurement; the learning rate swept per arm on a seed and prompts of its own, chosen by reward -
            kl_price KL; doing nothing in the table, intervals over seeds.
Expected    The paper: on-policy samples and a negative gradient help where good answers are rare under the start
            (min_length) and not where they are typical of it (mode_length).
Measured    recipes/LOG.md

    python recipes/preference/grid.py --grid recipes/preference/grid.yaml --output_dir runs/grid

A grid that was stopped goes on where it was; --smoke runs all arms on a tiny model in a minute or two.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from task import Grid, Task, read_grid

from negtune import AdvantageConfig, AdvantageTrainer, HFSampler, PreferenceConfig, PreferenceTrainer
from negtune.cli.recipe import run_recipe
from negtune.eval.compare import DO_NOTHING, Arm, Comparison, compare
from negtune.ops import needs_of
from negtune.trainers.guards import GuardStop
from negtune.trainers.preference_checks import check_fresh
from negtune.trainers.rounds import NoSignalError
from negtune.trainers.steps import NonFiniteLossError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--grid", type=Path, default=Path(__file__).with_suffix(".yaml"), help="YAML file; see grid.yaml")
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--prompts", help="instructions: JSON lines, a folder of such, or a Hub id; instead of the file's")
parser.add_argument("--reward", help="min_length, mode_length or one_sentence; instead of the file's")
parser.add_argument("--suffix", help="behind every instruction; instead of the file's")
parser.add_argument("--arms", nargs="+", help="of the file's only these")
parser.add_argument("--rates", type=float, nargs="+", help="learning rates to sweep, instead of the file's")
parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
parser.add_argument("--threads", type=int, default=1, help="of one run")
parser.add_argument("--smoke", action="store_true")

OF_THE_GRID = {
    **{"num_generations": "num_generations", "max_completion_length": "max_tokens", "max_steps": "steps"},
    **{"learning_rate": "rates", "seed": "seeds", "mask_truncated_completions": "mask_truncated_completions"},
    **{"per_device_train_batch_size": "prompts_per_step", "gradient_accumulation_steps": "micro_batch"},
}
"""Settings that an arm has no say in, and what says them."""
TRAINERS: dict[str, tuple[Any, Any]] = {
    "preference": (PreferenceTrainer, PreferenceConfig),
    "advantage": (AdvantageTrainer, AdvantageConfig),
}


def config(grid: Grid, arm: Mapping[str, Any], rate: float, seed: int, folder: Path) -> Any:
    """Settings of a run: the arm's, on top of what all share."""
    given = arm_settings(arm)
    for name, theirs in OF_THE_GRID.items():
        if name in given:
            raise ValueError(f"{name} is the same for all arms: leave it out, and set {theirs} of the grid")
    if given.get("steps_per_round") == "all":
        given["steps_per_round"] = grid.steps
    rows = grid.prompts_per_step
    if arm["trainer"] == "preference":
        rows *= given.get("pairs_per_prompt", 1)
        given = {"dynamic_sampling": False, "displacement_pairs": 0, **given}  # Task.measured follows its own
    elif given.get("selection") != "best":
        rows *= grid.num_generations
    micro_batches = next(n for n in range(math.ceil(rows / grid.micro_batch), rows + 1) if rows % n == 0)
    _, config_class = TRAINERS[arm["trainer"]]
    unknown = sorted(set(given) - {f.name for f in fields(config_class)})
    if unknown:
        raise ValueError(f"{config_class.__name__} has no setting {unknown[0]!r}, which an arm of the grid has")
    settings = {
        **{"output_dir": str(folder), "learning_rate": rate, "seed": seed, "max_steps": grid.steps},
        **{"per_device_train_batch_size": rows // micro_batches, "num_generations": grid.num_generations},
        **{"gradient_accumulation_steps": micro_batches, "logging_steps": max(1, grid.steps // 4)},
        **{"max_completion_length": grid.max_tokens, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1},
        **{"weight_decay": 0.0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        **{"max_length": None, "mask_truncated_completions": grid.mask_truncated_completions},
        **{"max_empty_rounds": 0, "attest_every": 0, "gradient_norms_every": 0, **given},
    }
    return config_class(**settings)


def checked(grid: Grid, name: str, folder: Path) -> None:
    """Raise ValueError, with the name of the arm, for settings that no run of it could have."""
    arm = grid.arms[name]
    try:
        given = config(grid, arm, 1e-3, 0, folder)
        given.round_settings(1)
        if arm["trainer"] == "preference":
            check_fresh(given, needs_of(given.objective()), None)
            if given.on_policy_fraction < 1:
                raise ValueError("on_policy_fraction below 1 mixes in pairs, and a grid has prompts alone")
    except (TypeError, ValueError) as error:
        raise ValueError(f"arm {name!r}: {error}") from error


def trained(task: Task, name: str, rate: float, seed: int) -> dict[str, float]:
    """Metrics of one run of an arm."""
    arm = task.grid.arms[name]
    folder = task.folder / "runs" / f"{task.grid.reward} {name} {rate:g} {seed}".replace(" ", "_")
    args = config(task.grid, arm, rate, seed, folder)
    model, tokenizer = task.load()
    trainer = TRAINERS[arm["trainer"]][0](
        model=model,
        args=args,
        train_dataset=[{"prompt": prompt} for prompt in task.train],
        processing_class=tokenizer,
        peft_config=task.adapter(),
        sampler=lambda model, tokenizer: HFSampler(model, tokenizer, batch_size=task.grid.sample_batch),
        reward_funcs=task.reward,
    )
    bad = False
    try:
        trainer.train()
    except (NonFiniteLossError, NoSignalError, GuardStop):
        bad = True
    found = {"value": math.nan} if bad else task.measured(trainer.model, tokenizer, seed)
    spent = {"tokens_sampled": trainer.on_policy.state.tokens, "gradient_steps": trainer.state.global_step}
    return {**found, **spent, "samples": float(trainer.on_policy.state.completions)}


def run_of(task: Task, name: str) -> Callable[[float, int], Mapping[str, float]]:
    return lambda rate, seed: trained(task, name, rate, seed)


BELOW = {"va": "top", "ha": "right", "fontsize": 9}


def draw(found: Comparison, file: Path, reward: str) -> None:
    """Reward against KL: a dot for every run, large at the chosen rate; up and left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    markers = "osD^vP*X"
    for i, arm in enumerate(found.rates):
        marker = markers[i % len(markers)]
        chosen = [r for r in found.confirmed if r.arm == arm and not math.isnan(r.value("reward"))]
        swept = [r for r in found.sweep if r.arm == arm and not math.isnan(r.value("reward"))]
        (line,) = axes.plot(
            [r.value("kl") for r in chosen], [r.value("reward") for r in chosen], marker, ms=8, ls="", label=arm
        )
        color = line.get_color()
        axes.plot(
            [r.value("kl") for r in swept],
            [r.value("reward") for r in swept],
            marker,
            ms=4,
            ls="",
            color=color,
            alpha=0.5,
        )
    start = [r.value("reward") for r in found.confirmed if r.arm == DO_NOTHING]
    axes.axhline(sum(start) / len(start), color="grey", lw=1, ls="--")
    axes.annotate(
        "the start", (0.99, sum(start) / len(start)), xycoords=("axes fraction", "data"), color="grey", **BELOW
    )
    axes.set(xlabel="KL(policy || start), nats a completion", ylabel=f"{reward} reward on held-out prompts")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("prompts", "reward", "suffix", "rates", "seeds", "arms")}
    grid = read_grid(args.grid, smoke=args.smoke, **given)
    for name in grid.arms:
        checked(grid, name, args.output_dir / "runs")  # refused before anything runs
    task = Task(grid, args.output_dir)
    arms = [
        Arm(name, run_of(task, name), tuple(arm_rates(grid, name)), {"trainer": arm["trainer"], **arm_settings(arm)})
        for name, arm in grid.arms.items()
    ]
    found = compare(
        arms,
        lambda seed: task.measured(*task.load(), seed),
        seeds=grid.seeds,
        sweep_seed=grid.sweep_seed,
        metric="value",
        folder=args.output_dir,
        settings={**grid.deciding(), **vars(task.reward)},
        workers=args.workers,
    )
    text = f"# {grid.reward}\n\n{found.markdown()}"
    (args.output_dir / f"{grid.reward}.md").write_text(text)
    (args.output_dir / "grid.yaml").write_text(yaml.safe_dump(vars(grid), sort_keys=False))
    draw(found, args.output_dir / f"frontier_{grid.reward}.png", grid.reward)
    print(text)


def arm_settings(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Those of its config."""
    return {name: value for name, value in arm.items() if name not in ("trainer", "rates")}


def arm_rates(grid: Grid, name: str) -> list[float]:
    """Of the arm, or of all."""
    return grid.arms[name].get("rates", grid.rates)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
