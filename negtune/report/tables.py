"""Numbers as people read them, the table of metrics by arm, and the sentences that answer "did it work?"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from negtune.report.folder import Metrics

FORGET, RETAIN = "forget/probability", "retain/probability"
NOT_MEASURED = "not measured"
ARROWS = {"lower": "↓", "higher": "↑"}
ACRONYMS = {"kl": "KL", "nll": "NLL", "auc": "AUC", "ks": "KS", "rouge": "ROUGE"}
ARROW_WORDS = "↓ lower is better, ↑ higher is better; the best value of a row is bold."


@dataclass(frozen=True)
class Cell:
    """One value of a table; `best` marks the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Arms as columns, metrics as rows. A row is its label and one cell per arm."""

    arms: list[str]
    rows: list[tuple[str, list[Cell]]]


def number(value: int | float | None) -> str:
    """Two or three significant digits, no leading zero: `.93`, `6.1e-05`, `1.25`, `1,234`, `not measured`.

    Values just below 1 keep the digits that tell them from 1.
    """
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if size < 1e-3 or size >= 1e6:
        return f"{value:.1e}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.3g}"
    return _fraction(size, "-" if value < 0 else "")


def label(name: str) -> str:
    """`real_authors/rouge_recall` -> `real authors ROUGE recall`."""
    return " ".join(ACRONYMS.get(word, word) for word in name.replace("/", " ").replace("_", " ").split())


def duration(seconds: int | float) -> str:
    """`8 s`, `1 min 35 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def metrics_table(metrics: Metrics, names: Sequence[str]) -> Table:
    """One row per name with an arrow for its direction; the best value is marked where the arms differ.

    `name_low` and `name_high` are no rows but the interval behind `name`.
    """
    rows = []
    for name in names:
        if is_bound(metrics, name):
            continue
        values = [metrics.value(arm, name) for arm in metrics.arms]
        best = _best(values, metrics.better.get(name))
        arrow = ARROWS.get(metrics.better.get(name, ""), "")
        cells = [
            Cell(number(value) + interval(metrics, arm, name), number(value) == best)
            for arm, value in zip(metrics.arms, values, strict=True)
        ]
        rows.append((f"{label(name)}\N{NO-BREAK SPACE}{arrow}".strip(), cells))
    return Table(list(metrics.arms), rows)


def bounds(metrics: Metrics, arm: str, name: str) -> tuple[float, float] | None:
    """The ends of a metric's interval, if both are known."""
    low, high = metrics.value(arm, f"{name}_low"), metrics.value(arm, f"{name}_high")
    return None if low is None or high is None else (low, high)


def is_bound(metrics: Metrics, name: str) -> bool:
    """Whether a name is an end of another metric's interval."""
    stem, _, end = name.rpartition("_")
    return end in ("low", "high") and any(bounds(metrics, arm, stem) for arm in metrics.arms)


def interval(metrics: Metrics, arm: str, name: str) -> str:
    """` (.58 to .71)`, or nothing."""
    found = bounds(metrics, arm, name)
    return "" if found is None else f" ({number(found[0])} to {number(found[1])})"


def difference(metrics: Metrics, arm: str, other: str, *, verb: str, what: str) -> str | None:
    """A sentence on the paired difference `minus other` of `arm`: whether it does (`verb`) more or less by `what`."""
    name = f"minus {other}"
    value, ends = metrics.value(arm, name), bounds(metrics, arm, name)
    if value is None or ends is None:
        return None
    said = f"{verb} {'more' if value > 0 else 'less'} than"
    if ends[0] <= 0 <= ends[1]:
        said = "is not told apart from"
    return f"{arm} {said} {other}: {what} differs by {number(value)}, 95 % interval{interval(metrics, arm, name)}."


def compared_arms(metrics: Metrics) -> tuple[str | None, list[str]]:
    """The arm to start from (`before`, else the first) and those it is compared with (`after`, else all others)."""
    arms = list(metrics.arms)
    if not arms:
        return None, []
    start = "before" if "before" in arms else arms[0]
    if "after" in arms and start != "after":
        return start, ["after"]
    return start, [arm for arm in arms if arm != start]


def forget_and_other_names(metrics: Metrics) -> tuple[list[str], list[str]]:
    """The primary names that tell whether it worked, and those that tell what it cost; the plain probability first."""
    names = sorted(metrics.primary, key=lambda name: name not in (FORGET, RETAIN))
    forget = [name for name in names if name.startswith("forget")]
    return forget, [name for name in names if name not in forget]


def headline(metrics: Metrics) -> str:
    """What happened to both sides in one sentence: `Mean probability of the forget answers .57 → 6.1e-05; ...`.

    With several arms it is the sentence of the one that left the forget answers least probable.
    """
    start, others = compared_arms(metrics)
    if start is None:
        return "Nothing was measured: there are no metrics in this folder."
    measured = [(value, arm) for arm in others if (value := metrics.value(arm, FORGET)) is not None]
    if len(others) > 1 and measured:
        _, lowest = min(measured)
        return f"Lowest of {len(others)} arms, {lowest}: {both_sides(metrics, start, lowest)}"
    sentence = both_sides(metrics, start, others[0] if len(others) == 1 else None)
    return sentence[0].upper() + sentence[1:]


def both_sides(metrics: Metrics, start: str, arm: str | None) -> str:
    """`mean probability of the forget answers .57 → 6.1e-05; of the retained ones .58 → .93.`; one arm, one number."""
    parts = []
    for name, whose in ((FORGET, "forget answers"), (RETAIN, "retained ones")):
        values = [metrics.value(start, name), *([metrics.value(arm, name)] if arm else [])]
        if any(value is not None for value in values):
            parts.append(f"of the {whose} {' → '.join(map(number, values))}")
    if not parts:
        return "neither forget nor retain probability was measured."
    return f"mean probability {'; '.join(parts)}."


def change(metrics: Metrics, name: str, start: str, arm: str) -> str:
    """`forget probability fell from .57 to 6.1e-05 (better)`, or what was not measured."""
    old, new = metrics.value(start, name), metrics.value(arm, name)
    if old is None or new is None:
        return f"{label(name)} was {NOT_MEASURED} for {start if old is None else arm}"
    if number(old) == number(new):
        return f"{label(name)} stayed at {number(new)}"
    verb = "fell" if new < old else "rose"
    wanted = metrics.better.get(name)
    verdict = "" if wanted is None else " (better)" if (wanted == "lower") == (new < old) else " (worse)"
    return f"{label(name)} {verb} from {number(old)} to {number(new)}{verdict}"


def _fraction(size: float, sign: str) -> str:
    """Two significant digits of a number in [.001, 1), more where two would round it up to 1."""
    for digits in range(2, 7):
        rounded = float(f"{size:.{digits}g}")
        if rounded < 1:
            decimals = max(digits - 1 - math.floor(math.log10(rounded)), 2)
            return sign + f"{rounded:.{decimals}f}"[1:]
    return sign + "1"


def _best(values: Sequence[int | float | None], direction: str | None) -> str | None:
    """The best value as it is printed, so that two that look equal are both bold; None where all look equal."""
    measured = [value for value in values if value is not None and not math.isnan(value)]
    if direction is None or len(set(map(number, measured))) < 2:
        return None
    return number(min(measured) if direction == "lower" else max(measured))
