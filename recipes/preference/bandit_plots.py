"""The picture of the bandit recipe: curves at equal budgets, and one panel per control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bandit_tables import DO_NOTHING, LR, LRS, MANY, OFFLINE, ON_PAIRS, ON_POLICY, Found

from negtune.eval.bandit import TAUS, THRESHOLDS
from negtune.eval.bandit_training import LOG_EVERY, Setting
from negtune.metrics.stats import mean_interval
from negtune.report.plots import LIGHT

STYLES = {
    "Pref-FT": (LIGHT.arms[0], "o"),
    "Best-of-N": (LIGHT.arms[1], "s"),
    "IPO": (LIGHT.arms[2], "^"),
    "DPO": (LIGHT.arms[3], "D"),
    "RWR tau 0.1": (LIGHT.arms[4], "v"),
    "REINFORCE": (LIGHT.arms[5], "P"),
    "PPO": (LIGHT.arms[6], "X"),
}


def draw(found: Found, modes: Sequence[Mapping[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 12.5), layout="constrained")
    for panel, reward in zip(axes[0], ("R1", "R2"), strict=True):
        _curves(panel, found, reward)
    _filters(axes[1, 0], found)
    _temperatures(axes[1, 1], found)
    _displacement(axes[2, 0], found)
    _modes(axes[2, 1], modes)
    for panel in axes.flat:
        panel.grid(color=LIGHT.faint, linewidth=0.6)
        panel.set_axisbelow(True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _curves(panel, found: Found, reward: str) -> None:
    for method, (color, _) in STYLES.items():
        for sizes, line in ((MANY, "--"), (ON_POLICY, "-")):
            curves = found.get(Setting(reward, method, LR, **sizes), {}).get("rewards")
            if curves:
                means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                panel.plot([LOG_EVERY * i for i in range(len(means))], means, line, color=color)
    where = {"R1": "R1, peak where the reference is thin", "R2": "R2, peak near the reference's mode"}[reward]
    panel.set(title=f"{where}: 450 steps,\n300 samples a state, lr {LR:g}", xlabel="gradient steps", ylabel="reward")
    panel.set_ylim(0, 1.03)
    colors = {method: color for method, (color, _) in STYLES.items()}
    if reward == "R2":
        _legend(panel, colors, {"on-policy": "-", "offline": "--"}, loc="lower right", ncols=2)


def _filters(panel, found: Found) -> None:
    places = [0.0, *THRESHOLDS]
    for method in ON_PAIRS:
        names = [method if t == 0 else f"{method}, filter {t:g}" for t in places]
        _points(panel, found, [Setting("R1", name, LR, **OFFLINE) for name in names], method)
    _nothing(panel, found)
    panel.set_xticks(range(len(places)), ["none", *(f"{t:g}" for t in THRESHOLDS)])
    panel.legend(loc="lower right", fontsize=8, frameon=False)
    panel.set(title=f"R1 offline: filter on reward gaps, lr {LR:g}", xlabel="smallest gap of a pair", ylabel="reward")


def _temperatures(panel, found: Found) -> None:
    for lr, color in zip(LRS, LIGHT.arms[1:], strict=False):
        settings = [Setting("R1", f"RWR tau {tau:g}", lr, **OFFLINE) for tau in TAUS]
        _points(panel, found, settings, "RWR tau 0.1", label=f"RWR, lr {lr:g}", color=color)
    for method, line in (("IPO, filter 0.2", "-."), ("DPO, filter 0.2", ":")):
        values = found.get(Setting("R1", method, LR, **OFFLINE))
        if values:
            level = mean_interval(values["reward"])[0]
            panel.axhline(level, color=LIGHT.ink, linestyle=line, linewidth=1, label=f"{method}, lr {LR:g}")
    _nothing(panel, found)
    panel.set_xticks(range(len(TAUS)), [f"{tau:g}" for tau in TAUS])
    panel.legend(loc="center right", fontsize=8, frameon=False)
    panel.set(title="R1 offline: temperature of RWR", xlabel="tau", ylabel="reward")


def _displacement(panel, found: Found) -> None:
    for method, (color, marker) in STYLES.items():
        settings = [Setting("R2", method, lr, **OFFLINE) for lr in LRS]
        kept = [(i, found[s]["best"]) for i, s in enumerate(settings) if s in found]
        if kept:
            means = [mean_interval(values)[0] for _, values in kept]
            panel.plot([i for i, _ in kept], means, "-", marker=marker, color=color, label=method)
    panel.axhline(-20, color=LIGHT.ink, linestyle=":", linewidth=1, label="flagged below, if the margin is positive")
    panel.set_yscale("symlog", linthresh=1)
    panel.set_xticks(range(len(LRS)), [f"{lr:g}" for lr in LRS])
    panel.legend(loc="center left", fontsize=8, frameon=False)
    panel.set(title="R2 offline: the best samples themselves", xlabel="learning rate", ylabel="log pi/pi_ref (nats)")


def _modes(panel, modes: Sequence[Mapping[str, Any]]) -> None:
    targets = dict.fromkeys(row["target"] for row in modes)
    colors, lines = dict(zip(targets, LIGHT.arms[1:], strict=False)), {"forward KL": "--", "reverse KL": "-"}
    for target, color in colors.items():
        rows = [row for row in modes if row["target"] == target]
        for way, line in lines.items():
            steps = [row[f"{way.split()[0]}, 0.95"] for row in rows]
            panel.plot([row["lr"] for row in rows], steps, line, marker="o", color=color)
    _legend(panel, colors, lines, loc="upper right")
    panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="gradient steps")
    panel.set_title("Mode seeking: steps to 95 % of the target's reward")


def _legend(panel, colors: Mapping[str, str], lines: Mapping[str, str], **where: Any) -> None:
    """Colours and line styles apart: no entry for every combination."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [Line2D([], [], color=LIGHT.ink, linestyle=line, label=name) for name, line in lines.items()]
    panel.legend(handles=handles, fontsize=8, frameon=False, **where)


def _points(panel, found: Found, settings: list[Setting], style: str, label: str = "", color: str = "") -> None:
    """Means and intervals of the settings that were run, at their number."""
    kept = [(i, *mean_interval(found[setting]["reward"])) for i, setting in enumerate(settings) if setting in found]
    if not kept:
        return
    own, marker = STYLES[style]
    places, means, halves = zip(*kept, strict=True)
    panel.errorbar(places, means, halves, marker=marker, color=color or own, capsize=3, label=label or style)


def _nothing(panel, found: Found) -> None:
    values = found.get(Setting("R1", DO_NOTHING, 0.0, **OFFLINE))
    if values:
        level = mean_interval(values["reward"])[0]
        panel.axhline(level, color=LIGHT.arms[0], linestyle="--", linewidth=1, label=DO_NOTHING)
    panel.set_ylim(0, 1.03)
