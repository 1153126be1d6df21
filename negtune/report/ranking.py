"""What a report says of rankers: how good each is, and whether that is more than chance."""

from __future__ import annotations

from negtune.report.folder import Metrics
from negtune.report.tables import change, compared_arms, difference, interval, number

WHAT, WORKED, COST = "What was it to find?", "Did it work?", "What did it cost?"


def headline(metrics: Metrics) -> str:
    """The first metric of all arms in one sentence."""
    name = _first(metrics)
    parts = [f"{arm} {number(metrics.value(arm, name))}{interval(metrics, arm, name)}" for arm in metrics.arms]
    return f"{name} on held-out queries: {'; '.join(parts)}." if parts else "Nothing was measured."


def worked(metrics: Metrics) -> list[str]:
    """Each arm against the one to start from: better, worse, or not told apart."""
    start, others = compared_arms(metrics)
    words = {"verb": "finds", "what": _first(metrics)}
    sentences = [said for arm in others if (said := difference(metrics, arm, str(start), **words)) is not None]
    return sentences or ["Not known: it takes two arms, and the difference between them, to tell."]


def cost(metrics: Metrics) -> list[str]:
    """What became of the other metrics, recall first of all: a list that is ranked better may be found less often."""
    start, others = compared_arms(metrics)
    if start is None:
        return []
    names = [name for name in metrics.primary if "recall" in name and not name.endswith(("_low", "_high"))]
    return [f"{arm}: {change(metrics, name, start, arm)}." for arm in others for name in names]


def _first(metrics: Metrics) -> str:
    return metrics.primary[0] if metrics.primary else "ndcg@10"
