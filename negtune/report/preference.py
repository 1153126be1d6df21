"""What a report says of policies that were tuned on preferences: reward gained, and how far the policy went for it."""

from __future__ import annotations

from negtune.report.folder import Metrics
from negtune.report.tables import change, compared_arms, difference, interval, number

REWARD = "reward"
WHAT, WORKED, COST = "What was to be preferred?", "Did it work?", "What did it cost?"
WORDS = {"verb": "earns", "what": "reward"}


def headline(metrics: Metrics) -> str:
    """Rewards of all arms in one sentence."""
    parts = [f"{arm} {number(metrics.value(arm, REWARD))}{interval(metrics, arm, REWARD)}" for arm in metrics.arms]
    return f"Reward on held-out prompts: {'; '.join(parts)}." if parts else "Nothing was measured."


def worked(metrics: Metrics) -> list[str]:
    """Each arm against the one to start from: better, worse, or not told apart."""
    start, others = compared_arms(metrics)
    sentences = [said for arm in others if (said := difference(metrics, arm, str(start), **WORDS)) is not None]
    return sentences or ["Not known: it takes two arms, and the difference between them, to tell."]


def cost(metrics: Metrics) -> list[str]:
    """How far from the start, and what became of the completions."""
    start, others = compared_arms(metrics)
    if start is None:
        return []
    found = [
        f"{arm}: {number(metrics.value(arm, 'kl'))} nats a completion from the reference (KL)."
        for arm in others
        if metrics.value(arm, "kl") is not None
    ]
    names = [name for name in ("length", "truncated", "unscored") if name in {*metrics.primary, *metrics.others}]
    return found + [f"{arm}: {change(metrics, name, start, arm)}." for arm in others for name in names]
