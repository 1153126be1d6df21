"""Plots of a run, each drawn for a light and a dark page.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; lines also differ in marker and dash, and
every line and bar carries its name or its number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from negtune.report.folder import Metrics, RunFolder
from negtune.report.tables import bounds, is_bound, label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2  # inches: small enough that 10 pt text stays readable on a phone
DPI = 200
STEPS = "optimiser step"
MARKERS = {"forget": ("o", "-"), "retain": ("s", "--")}


@dataclass(frozen=True)
class Theme:
    """Colours of one page background."""

    background: str
    ink: str
    faint: str
    sides: dict[str, str]
    arms: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    faint="#d5d9de",
    sides={"forget": "#d55e00", "retain": "#0072b2"},
    arms=("#9aa0a6", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#1f2328"),
)
DARK = Theme(
    background="#15181c",
    ink="#e3e6ea",
    faint="#3a4048",
    sides={"forget": "#ff8a3d", "retain": "#56b4e9"},
    arms=("#8b929a", "#56b4e9", "#e69f00", "#2fc79a", "#e29bc4", "#ff8a3d", "#2f8fd0", "#e3e6ea"),
)


@dataclass(frozen=True)
class Plot:
    """One figure: `name` is its file stem, `description` what a reader who cannot see it should know."""

    name: str
    title: str
    description: str
    light: bytes
    dark: bytes


Draw = Callable[[Theme], "Figure"]


def draw_plots(folder: RunFolder) -> list[Plot]:
    """Every plot that the folder has numbers for; an empty list without numbers. Needs matplotlib."""
    history = folder.history
    candidates = (
        *(_probability(history), _ranking(history), _rounds(history), _likelihood(history)),
        *(_arms(folder.metrics), _weight(history)),
    )
    return [
        Plot(name, title, description, _png(draw, LIGHT), _png(draw, DARK))
        for name, title, description, draw in filter(None, candidates)
    ]


def series(history: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged name, in order of step; rows without it are skipped."""
    points = {
        int(row["step"]): float(row[name])
        for row in history
        if _is_number(row.get("step")) and _is_number(row.get(name))
    }
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _probability(history: list[dict[str, Any]]) -> tuple[str, str, str, Draw] | None:
    """Probability of both sides over steps: evaluation rows bold, training batches faint behind them.

    A single evaluation is no curve: then the training batches are drawn, if there are any.
    """
    evaluated = {side: series(history, f"eval/{side}/probability") for side in MARKERS}
    trained = {side: series(history, f"{side}/probability") for side in MARKERS}
    main = evaluated if _longest(evaluated) >= min(2, _longest(trained)) else trained
    if not any(steps for steps, _ in main.values()):
        return None
    source = "evaluation" if main is evaluated else "training batches"

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, [3.0])
        if main is evaluated:
            for side, (steps, values) in trained.items():
                axes.plot(steps, values, color=theme.sides[side], alpha=0.35, linewidth=1)
        for side, (steps, values) in main.items():
            marker, dash = MARKERS[side]
            axes.plot(steps, values, dash, marker=marker, markersize=5, linewidth=2, color=theme.sides[side])
        axes.set(xlabel=STEPS, ylabel="mean answer probability (0 to 1)", ylim=(-0.02, 1.04))
        _label_ends(axes, {side: (s, v, theme.sides[side]) for side, (s, v) in main.items() if s})
        return figure

    ends = ", ".join(f"{side} {number(v[0])} to {number(v[-1])}" for side, (s, v) in main.items() if s)
    faint = " Thin lines: training batches." if main is evaluated and any(s for s, _ in trained.values()) else ""
    description = f"Mean probability of the answers at each step ({source}): {ends}.{faint}"
    return "probability", "Probability of forget and retain answers over steps", description, draw


def _ranking(history: list[dict[str, Any]]) -> tuple[str, str, str, Draw] | None:
    """The metric of training lists, ranked by score and on average over samples, and what evaluations found."""
    lines = {"ranked by score": series(history, "reward/greedy"), "sampled": series(history, "reward/expected")}
    searched = next((name for row in history for name in row if name.startswith("eval/ndcg")), None)
    if searched is not None:
        lines[f"{searched.removeprefix('eval/')} of the corpus"] = series(history, searched)
    lines = {name: points for name, points in lines.items() if points[0]}
    if not lines:
        return None
    styles = dict(zip(lines, (("retain", "-", "o"), ("forget", "--", "s"), ("retain", ":", "D")), strict=False))

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, [3.0])
        for name, (steps, values) in lines.items():
            colour, dash, marker = styles[name]
            axes.plot(steps, values, dash, marker=marker, markersize=4, linewidth=2, color=theme.sides[colour])
        axes.set(xlabel=STEPS, ylabel="metric of a ranking (0 to 1)", ylim=(-0.02, 1.04))
        _label_ends(axes, {name: (s, v, theme.sides[styles[name][0]]) for name, (s, v) in lines.items()})
        return figure

    ends = ", ".join(f"{name} {number(v[0])} to {number(v[-1])}" for name, (_, v) in lines.items())
    return "ranking", "What rankings are worth over steps", f"Training lists, and evaluations where made: {ends}.", draw


def _rounds(history: list[dict[str, Any]]) -> tuple[str, str, str, Draw] | None:
    """What fresh samples earn over steps, and how many of their prompts teach nothing."""
    (steps, rewards), (places, idle) = series(history, "rounds/reward"), series(history, "rounds/no_signal")
    if not steps:
        return None

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(theme, [2.2, 1.4] if places else [2.2], share_steps=True)
        axes[0].plot(steps, rewards, "-", marker="o", markersize=4, linewidth=2, color=theme.sides["retain"])
        axes[0].set_ylabel("mean reward")
        _label_ends(axes[0], {"reward": (steps, rewards, theme.sides["retain"])})
        if places:
            axes[1].plot(places, idle, "--", marker="s", markersize=3.5, linewidth=2, color=theme.sides["forget"])
            axes[1].set(ylabel="without signal", ylim=(-0.04, 1.04))
            _label_ends(axes[1], {"prompts": (places, idle, theme.sides["forget"])})
        axes[-1].set_xlabel(STEPS)
        return figure

    told = f"Mean reward of the samples that were drawn: {number(rewards[0])} to {number(rewards[-1])}"
    if places:
        told += f"; share of prompts whose samples teach nothing: {number(idle[0])} to {number(idle[-1])}"
    return "rounds", "What fresh samples earn over steps", f"{told}.", draw


def _likelihood(history: list[dict[str, Any]]) -> tuple[str, str, str, Draw] | None:
    """Log-probability of what is pushed up and what is pushed down, over steps."""
    for up, down in (("positive", "negative"), ("chosen", "rejected")):
        lines = {side: series(history, f"{side}/logp") for side in (up, down)}
        lines = {side: points for side, points in lines.items() if points[0]}
        if lines:
            break
    else:
        return None
    styles = {up: ("retain", "--", "s"), down: ("forget", "-", "o")}

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, [3.0])
        for side, (steps, values) in lines.items():
            colour, dash, marker = styles[side]
            axes.plot(steps, values, dash, marker=marker, markersize=4, linewidth=2, color=theme.sides[colour])
        axes.set(xlabel=STEPS, ylabel="log-probability per token (nats)")
        _label_ends(axes, {side: (s, v, theme.sides[styles[side][0]]) for side, (s, v) in lines.items()})
        return figure

    ends = ", ".join(f"{side} {number(v[0])} to {number(v[-1])}" for side, (_, v) in lines.items())
    title = f"How likely {up} and {down} tokens are over steps"
    return "likelihood", title, f"Mean log-probability per token in training batches: {ends}.", draw


def _arms(metrics: Metrics) -> tuple[str, str, str, Draw] | None:
    """One group of bars per primary metric and one bar per arm; metrics beyond [0, 1] get a scale of their own."""
    names = [name for name in metrics.primary if _values(metrics, name) and not is_bound(metrics, name)]
    names = [name for name in names if not name.startswith("minus ")]  # the bars show it
    if not names:
        return None
    shares = [name for name in names if all(0 <= v <= 1 for v in _values(metrics, name))]
    panels = ([shares] if shares else []) + [[name] for name in names if name not in shares]
    thickness = 0.2 if len(metrics.arms) < 6 else 0.16

    def draw(theme: Theme) -> Figure:
        heights = [len(panel) * (len(metrics.arms) * thickness + 0.22) for panel in panels]
        figure, all_axes = _figure(theme, [height + 0.55 for height in heights], legend_rows=_legend_rows(metrics))
        for axes, panel in zip(all_axes, panels, strict=True):
            _bars(axes, metrics, panel, theme, limits=(0.0, 1.0) if panel == shares else None)
        handles = [bars[0] for bars in all_axes[0].containers]
        legend = figure.legend(
            handles, list(metrics.arms), loc="outside upper left", ncols=_legend_columns(metrics), frameon=False
        )
        for text in legend.get_texts():
            text.set_color(theme.ink)
        return figure

    title = "Metrics of each arm" if len(metrics.arms) != 2 else f"Metrics {' and '.join(metrics.arms)}"
    lines = " Lines are 95 % intervals." if any(_ends(metrics, name) for name in names) else ""
    return "before_after", title, f"One group per metric, one bar per arm.{lines}", draw


def _weight(history: list[dict[str, Any]]) -> tuple[str, str, str, Draw] | None:
    """Quantiles of NPO's weight W and the retain KL over steps, whichever were logged."""
    names = sorted(
        {name for row in history for name in row if re.fullmatch(r"forget/weight_p\d+", name)}, key=_quantile
    )
    quantiles = {_quantile(name): series(history, name) for name in names}
    quantiles = {q: points for q, points in quantiles.items() if points[0]}
    steps, kl = series(history, "eval/retain/kl")
    if not steps:
        steps, kl = series(history, "retain/kl")
    panels = bool(quantiles) + bool(steps)
    if not panels:
        return None

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(theme, [1.9] * panels, share_steps=True)
        if quantiles:
            _quantile_lines(axes[0], quantiles, theme)
        if steps:
            axes[-1].plot(steps, kl, "--", marker="s", markersize=3.5, linewidth=2, color=theme.sides["retain"])
            axes[-1].set_ylabel("retain KL (nats per token)", fontsize=9)
            axes[-1].set_ylim(bottom=min(0, *kl))
        axes[-1].set_xlabel(STEPS)
        return figure

    parts = []
    if quantiles:
        parts.append("W weighs the gradient of each forget row: 1 (dotted) is gradient ascent, 0 leaves it alone")
    if steps:
        parts.append(f"retain KL to the reference ends at {number(kl[-1])} nats per token")
    title = {(True, True): "NPO weight W and retain KL", (True, False): "NPO weight W", (False, True): "Retain KL"}
    description = "; ".join(parts)
    return "weight", title[bool(quantiles), bool(steps)], f"{description[0].upper()}{description[1:]}.", draw


def _bars(axes: Axes, metrics: Metrics, names: list[str], theme: Theme, limits: tuple[float, float] | None) -> None:
    thickness = 0.8 / len(metrics.arms)
    low, high = limits or _spread([*_values(metrics, names[0]), *_ends(metrics, names[0])])
    for index, arm in enumerate(metrics.arms):
        color = theme.arms[index % len(theme.arms)]
        hatch = "//" if index >= len(theme.arms) else None
        places = [row + (index - (len(metrics.arms) - 1) / 2) * thickness for row in range(len(names))]
        values = [metrics.value(arm, name) for name in names]
        axes.barh(places, [v or 0 for v in values], thickness * 0.88, color=color, hatch=hatch, label=arm)
        for place, value, name in zip(places, values, names, strict=True):
            ends = bounds(metrics, arm, name)
            if ends is not None:
                axes.plot(ends, [place, place], color=theme.ink, linewidth=1)
            left = max(value or 0, ends[1] if ends else 0, 0) + (high - low) * 0.01
            style = "normal" if value is not None else "italic"
            axes.text(left, place, number(value), va="center", fontsize=8, color=theme.ink, style=style)
    axes.set_yticks(range(len(names)), [_two_lines(name) for name in names])
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(
        low - (0.02 * (high - low) if low < 0 else 0), high + (high - low) * (0.16 if limits is None else 0.14)
    )
    if limits:
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    else:
        axes.locator_params(axis="x", nbins=4, integer=False)
        axes.xaxis.set_major_formatter(lambda value, _: number(round(value, 9)))
    axes.set_xlabel("value (0 to 1)" if limits else f"{label(names[0])} (own scale)")
    axes.grid(axis="y", visible=False)


def _quantile_lines(axes: Axes, quantiles: dict[int, tuple[list[int], list[float]]], theme: Theme) -> None:
    low, high = min(quantiles), max(quantiles)
    color = theme.sides["forget"]
    if len(quantiles) > 1 and quantiles[low][0] == quantiles[high][0]:
        axes.fill_between(quantiles[low][0], quantiles[low][1], quantiles[high][1], color=color, alpha=0.2, linewidth=0)
    middle = min(quantiles, key=lambda q: abs(q - 50))
    for quantile, (steps, values) in quantiles.items():
        width = 2 if quantile == middle else 0.8
        axes.plot(steps, values, color=color, linewidth=width)
    axes.axhline(1, color=theme.ink, linewidth=0.8, linestyle=":")
    ends = {f"p{q}": (steps, values, color) for q, (steps, values) in quantiles.items()}
    axes.set_ylabel("NPO weight W")
    axes.set_ylim(bottom=0)
    _label_ends(axes, {name: ends[name] for name in dict.fromkeys([f"p{high}", f"p{middle}", f"p{low}"])})


def _label_ends(axes: Axes, lines: dict[str, tuple[list[int], list[float], str]]) -> None:
    """Write `name value` right of each line's last point, pushed apart where two would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.08 * (top - bottom)
    place = bottom - gap
    for name, (_steps, values, color) in sorted(lines.items(), key=lambda item: item[1][1][-1]):
        place = max(values[-1], place + gap)
        axes.annotate(
            f"{name} {number(values[-1])}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def _figure(
    theme: Theme, heights: list[float], *, legend_rows: int = 0, share_steps: bool = False
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(
        figsize=(WIDTH, sum(heights) + 0.25 * legend_rows), layout="constrained", facecolor=theme.background
    )
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=share_steps, height_ratios=heights)
    for axes in grid[:, 0]:
        axes.set_facecolor(theme.background)
        axes.tick_params(colors=theme.ink, labelsize=9)
        axes.xaxis.label.set_color(theme.ink)
        axes.yaxis.label.set_color(theme.ink)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.faint)
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("0.", ".", 1)))
    return figure, list(grid[:, 0])


def _png(draw: Draw, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    figure = draw(theme)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # the same run gives the same bytes
    return buffer.getvalue()


def _legend_columns(metrics: Metrics) -> int:
    return max(1, 46 // (max(map(len, metrics.arms)) + 6))


def _legend_rows(metrics: Metrics) -> int:
    return -(-len(metrics.arms) // _legend_columns(metrics))


def _longest(sides: dict[str, tuple[list[int], list[float]]]) -> int:
    return max(len(steps) for steps, _ in sides.values())


def _two_lines(name: str) -> str:
    side, slash, quantity = name.partition("/")
    return f"{label(side)}\n{label(quantity)}" if slash else label(name)


def _values(metrics: Metrics, name: str) -> list[float]:
    values = [metrics.value(arm, name) for arm in metrics.arms]
    return [float(value) for value in values if value is not None]


def _ends(metrics: Metrics, name: str) -> list[float]:
    """Of the intervals of a metric, all arms."""
    return [end for arm in metrics.arms for end in bounds(metrics, arm, name) or ()]


def _spread(values: list[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    return (low, high) if high > low else (low, low + 1)


def _quantile(name: str) -> int:
    return int(name.rpartition("_p")[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
