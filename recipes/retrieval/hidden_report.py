"""Tables and the plot of hidden_positives.py."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hidden_task import BY_RANK, UNIFORM, WHOLE, Cell
from search_task import file_name

from negtune.eval.compare import DO_NOTHING, Comparison
from negtune.metrics.stats import detectable_difference, holm, mean_interval, paired_difference, permutation_test
from negtune.records import read_json

METRIC = "ndcg@10"
COLORS = ("#0072b2", "#56b4e9", "#1f2328", "#e69f00", "#cc79a7", "#009e73", "#9aa0a6", "#d55e00")
MARKERS = "oDs^vPx*"


def summary(grid: Any, found: Mapping[Cell, Comparison], folder: Path) -> str:
    """All cells that are done."""
    lines = [
        "# Positives hidden from training",
        f"{grid.encoder}, {grid.steps} steps of {grid.batch} queries, lists of {grid.n_documents} with at most "
        f"{grid.max_positives} relevant. nDCG@10 of search on test queries with all their labels, seeds "
        f"{', '.join(map(str, grid.seeds))}: each its own split. Rates {numbers(grid.rates)} and scales "
        f"{numbers(grid.scales)} swept in the first cell of each data set on seed {grid.sweep_seed}, by "
        f"{grid.folds}-fold cross-validation of the training queries with all their labels, and taken over by the "
        "other cells.",
        "± and intervals: 95 %. By seed: Student t of paired differences; the seeds' test queries overlap, so that it "
        "is an interval for these queries. By query: bootstrap of queries, each the mean over the seeds that tested "
        "it; p: permutation of signs, Holm-corrected for the arms of the table. False: share of the lists' negatives "
        "that are hidden positives. Judges: share of hidden candidates they found, and of their new positives the "
        "right ones.",
    ]
    own = {data: settings for data in grid.data if (settings := grid.own(data))}
    lines += [f"{data} has its own {', '.join(f'{k}: {v}' for k, v in one.items())}." for data, one in own.items()]
    for cell, comparison in sorted(found.items(), key=lambda item: _order(grid, item[0])):
        whole = found.get(Cell(cell.data))
        lines += [f"## {cell.name}", _table(grid, cell, comparison, whole, folder)]
        controls = _controls(grid, cell, comparison, folder)
        lines += [controls] if controls else []
    for data in grid.data:
        cells = sorted((c for c in found if c.data == data and c.way != WHOLE), key=lambda cell: _order(grid, cell))
        if cells and Cell(data) in found:
            lines += [f"## {data}: what hiding costs", _costs(grid, cells, found, folder)]
    return "\n\n".join(lines) + "\n"


def numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def by_query(comparison: Comparison, arm: str, cell: Cell, folder: Path) -> dict[str, float]:
    """Query id to the mean over the seeds in which it was tested."""
    seen: dict[str, list[float]] = defaultdict(list)
    for run in (run for run in comparison.confirmed if run.arm == arm):
        file = folder / "per_query" / cell.name / f"{file_name(arm, run.rate, run.seed, run.option)}.json"
        for query_id, value in (read_json(file) if file.exists() else {}).items():
            seen[query_id].append(value)
    return {query_id: sum(values) / len(values) for query_id, values in seen.items()}


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[str, float, float]:
    """Mean and interval as text, p, and what could have been found."""
    shared = [query_id for query_id in theirs if query_id in ours]
    differences = [round(ours[q] - theirs[q], 12) for q in shared]  # of equal numbers rounding has one sign
    mean, low, high = paired_difference([ours[q] for q in shared], [theirs[q] for q in shared])
    text = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    return text, permutation_test(differences), detectable_difference(differences)


def _order(grid: Any, cell: Cell) -> tuple[int, int, float]:
    return list(grid.data).index(cell.data), (WHOLE, UNIFORM, BY_RANK).index(cell.way), cell.hidden


def _table(grid: Any, cell: Cell, comparison: Comparison, whole: Comparison | None, folder: Path) -> str:
    base = comparison.baseline
    rows = [(arm, comparison, cell, arm) for arm in comparison.arms]
    if whole is not None and cell.way != WHOLE:
        rows.append((f"{base}, nothing hidden", whole, Cell(cell.data), base))
    theirs, reference = comparison.values(base, METRIC), by_query(comparison, base, cell, folder)
    texts, ps, by_seed, by_queries = [], [], [], []
    for title, where, place, arm in rows:
        values = where.values(arm, METRIC)
        mean, half = where.interval(values)
        rate = f"{where.rates[arm]:g}, {where.options[arm]['scale']:g}" if arm in where.rates else ""
        differences, other, minus = "", "", None
        if title != base:
            minus = [values[seed] - theirs[seed] for seed in values if seed in theirs]
            difference, width = mean_interval(minus)
            differences = f"{difference:+.4f} ± {width:.4f}"
            other, p, detectable = paired(by_query(where, arm, place, folder), reference)
            ps.append(p)
            by_seed.append(detectable_difference(minus))
            by_queries.append(detectable)
        texts.append([title, rate, f"{mean:.4f} ± {half:.4f}", differences, other, "", *_facts(where, arm)])
    corrected = iter(holm(ps))
    for text in texts:
        text[5] = f"{next(corrected):.4f}" if text[3] else ""
    head = ["arm", "rate, scale", "nDCG@10", f"minus {base}, by seed", "by query", "p", "false", "found, right"]
    hidden = comparison.values(DO_NOTHING, "hidden").values()
    facts = f"Hidden: {statistics.mean(hidden):.1%} of the training queries' positives. " if hidden else ""
    facts += (
        f"Smallest true difference to {base} that is found (80 % power, 5 %, one arm alone; median over arms): "
        f"{statistics.median(by_seed):.4f} by seed, {statistics.median(by_queries):.4f} by query."
    )
    return f"{_markdown(head, texts)}\n\n{facts}"


def _facts(comparison: Comparison, arm: str) -> list[str]:
    means = {
        name: statistics.mean(values.values())
        for name in ("lists/false_negatives", "lists/found", "lists/found_right")
        if (values := comparison.values(arm, name))
    }
    false = f"{means['lists/false_negatives']:.1%}" if "lists/false_negatives" in means else ""
    judged = "lists/found" in means and means["lists/found"] == means["lists/found"]
    return [false, f"{means['lists/found']:.1%}, {means['lists/found_right']:.1%}" if judged else ""]


def _controls(grid: Any, cell: Cell, comparison: Comparison, folder: Path) -> str:
    """Arms whose own control is not the baseline."""
    texts, ps = [], []
    for arm in comparison.arms[1:]:
        control = grid.arms[arm].get("control")
        if control not in comparison.arms:
            continue
        ours, theirs = comparison.values(arm, METRIC), comparison.values(control, METRIC)
        mean, half = mean_interval([ours[seed] - theirs[seed] for seed in ours])
        by = (by_query(comparison, name, cell, folder) for name in (arm, control))
        other, p, detectable = paired(*by)
        ps.append(p)
        texts.append([arm, control, f"{mean:+.4f} ± {half:.4f}", other, "", f"{detectable:.4f}"])
    for text, p in zip(texts, holm(ps), strict=True):
        text[4] = f"{p:.4f}"
    return (
        _markdown(["arm", "minus its control", "by seed", "by query", "p", "detectable by query"], texts)
        if texts
        else ""
    )


def _costs(grid: Any, cells: list[Cell], found: Mapping[Cell, Comparison], folder: Path) -> str:
    """Of each arm what it has where nothing is hidden, minus what it has in a cell; is it what the baseline loses?"""
    whole = Cell(cells[0].data)
    arms = [arm for arm in found[whole].arms[1:] if all(arm in found[cell].arms for cell in cells)]
    rows = [[arm] for arm in arms]
    for cell in cells:
        costs = {}
        for arm in arms:
            before, behind = by_query(found[whole], arm, whole, folder), by_query(found[cell], arm, cell, folder)
            costs[arm] = {query_id: before[query_id] - behind[query_id] for query_id in before}
        others = [arm for arm in arms if arm != grid.baseline]
        corrected = dict(zip(others, holm([paired(costs[a], costs[grid.baseline])[1] for a in others]), strict=True))
        for row, arm in zip(rows, arms, strict=True):
            row.append(
                f"{statistics.mean(costs[arm].values()):+.4f}"
                + (f" ({corrected[arm]:.3f})" if arm in corrected else "")
            )
    head = ["arm", *(f"{cell.way}, {cell.hidden:.0%}" for cell in cells)]
    note = f"In brackets: p of the difference to what it costs {grid.baseline}, by query, Holm-corrected in a column."
    return f"{_markdown(head, rows)}\n\n{note}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def draw(grid: Any, found: Mapping[Cell, Comparison], file: Path) -> None:
    """Quality against the share of hidden labels, a panel for each data set and way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {(cell.data, cell.way) for cell in found if cell.way != WHOLE}
    if not panels:
        return
    sets = [data for data in grid.data if any(data == one for one, _ in panels)]
    ways = [way for way in (UNIFORM, BY_RANK) if any(way == one for _, one in panels)]
    size = (5 * len(ways), 3.4 * len(sets) + 0.9)
    figure, axes = pyplot.subplots(
        len(sets), len(ways), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, data in enumerate(sets):
        for column, way in enumerate(ways):
            ax = axes[row][column]
            if (data, way) not in panels:
                ax.set_visible(False)
                continue
            for i, arm in enumerate(grid.drawn):
                points = _points(found, data, way, arm)
                style = {
                    "marker": MARKERS[i % 8],
                    "color": COLORS[i % 8],
                    "ms": 5,
                    "lw": 2.2 if arm == grid.baseline else 1.4,
                }
                ax.plot([100 * x for x, _ in points], [y for _, y in points], label=arm, **style)
            said = "uniformly" if way == UNIFORM else "by BM25 rank"
            nothing = _points(found, data, way, DO_NOTHING)
            start = f" (do nothing {nothing[0][1]:.3f})" if nothing and DO_NOTHING not in grid.drawn else ""
            ax.set_title(f"{data}, hidden {said}{start}", fontsize=10, loc="left")
            ax.set_xlabel("% of the training positives hidden")
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        left = next(ax for ax in axes[row] if ax.get_visible())
        left.set_ylabel("nDCG@10, all test labels")
        left.tick_params(labelleft=True)
    shown = next(ax for ax in axes.flat if ax.get_visible())  # all have the same lines
    handles, labels = shown.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(ways), frameon=False, fontsize=9)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def _points(found: Mapping[Cell, Comparison], data: str, way: str, arm: str) -> list[tuple[float, float]]:
    """Share and mean."""
    points = []
    for cell, comparison in found.items():
        if cell.data == data and cell.way in (way, WHOLE) and arm in comparison.arms:
            points.append((cell.hidden, statistics.mean(comparison.values(arm, METRIC).values())))
    return sorted(points)
