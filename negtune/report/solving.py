"""What a report says of policies that solve problems: how often each arm does, and whether that is more than chance."""

from __future__ import annotations

from negtune.report.folder import Metrics
from negtune.report.tables import change, compared_arms, difference, interval, number

ACCURACY = "accuracy"
WHAT, WORKED, COST = "What was it to learn?", "Did it work?", "What did it cost?"
WORDS = {"verb": "solves", "what": "accuracy"}


def headline(metrics: Metrics) -> str:
    """Accuracies of all arms in one sentence."""
    parts = [f"{arm} {number(metrics.value(arm, ACCURACY))}{interval(metrics, arm, ACCURACY)}" for arm in metrics.arms]
    return f"Accuracy on held-out problems: {'; '.join(parts)}." if parts else "Nothing was measured."


def worked(metrics: Metrics) -> list[str]:
    """Each arm against each one before it: better, worse, or not told apart."""
    arms = list(metrics.arms)
    sentences = [
        said
        for i, arm in enumerate(arms)
        for other in arms[:i]
        if (said := difference(metrics, arm, other, **WORDS)) is not None
    ]
    return sentences or ["Not known: it takes two arms, and the differences between them, to tell."]


def cost(metrics: Metrics) -> list[str]:
    """What of the start was lost beside accuracy: many tries (pass@k), and completions that end."""
    start, others = compared_arms(metrics)
    names = [name for name in metrics.primary if name.startswith("pass@")][-1:]
    names += [name for name in ("truncated", "length") if name in {*metrics.primary, *metrics.others}]
    if start is None:
        return []
    return [f"{arm}: {change(metrics, name, start, arm)}." for arm in others for name in names]
