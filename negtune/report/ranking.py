"""What a report says of rankers: how good each is, and whether that is more than chance."""

from __future__ import annotations

from negtune.report.folder import Metrics
from negtune.report.tables import change, compared_arms, difference, interval, label, number

WHAT, WORKED, COST = "What was it to find?", "Did it work?", "What did it cost?"
FEW = 4
"""So many arms have a place in the headline, and so many sentences say what was lost."""
EXPLAINED = {
    "rerank/": "rerank: the first hundred of BM25 in the order of the model",
    "guaranteed/": "guaranteed: the same with all relevant documents put in, which no search promises",
    "inside/": "inside: is the query inside the document",
    "around/": "around: is the document inside the query",
    "direction": "direction: share of true pairs that score higher the right way round than the wrong way, ties half",
    "micro_ap": "micro AP: average precision of the pairs of all queries in one ranking; alone the mean of both ways",
    "recall@p90": "recall@p90: recall at the threshold where 9 of 10 pairs are true",
}
"""What a reader who has not seen the recipe asks, by a part of the metric's name."""


def headline(metrics: Metrics) -> str:
    """The first metric of all arms in one sentence; of many arms the first, the last, and the best."""
    name, arms = _first(metrics), list(metrics.arms)
    best = ""
    if len(arms) > FEW:
        best = max(arms, key=lambda arm: metrics.value(arm, name) or 0)
        arms = list(dict.fromkeys([arms[0], best, arms[-1]]))
    parts = [
        f"{f'best of {len(metrics.arms)}, ' if arm == best else ''}{arm} {number(metrics.value(arm, name))}"
        f"{interval(metrics, arm, name)}"
        for arm in arms
    ]
    return f"{label(name)} on held-out queries: {'; '.join(parts)}." if parts else "Nothing was measured."


def worked(metrics: Metrics) -> list[str]:
    """Each arm against the ones that it was compared with: better, worse, or not told apart."""
    words = {"verb": "finds", "what": label(_first(metrics))}
    pairs = [(arm, other) for arm in metrics.arms for other in metrics.arms]
    sentences = [said for arm, other in pairs if (said := difference(metrics, arm, other, **words)) is not None]
    return sentences or ["Not known: it takes two arms, and the difference between them, to tell."]


def cost(metrics: Metrics) -> list[str]:
    """What became of the other metrics, recall first of all: a list that is ranked better may be found less often."""
    start, others = compared_arms(metrics)
    if start is None:
        return []
    names = [name for name in metrics.primary if "recall" in name and not name.endswith(("_low", "_high"))]
    said = [f"{arm}: {change(metrics, name, start, arm)}." for arm in others for name in names]
    if len(said) <= FEW:
        return said
    lost = [sentence for sentence in said if sentence.endswith("(worse).")]
    rest = len(lost) - FEW
    return [*lost[:FEW], *([f"{rest} more are in the table below."] if rest > 0 else [])] or ["No recall fell."]


def explained(metrics: Metrics) -> str | None:
    """What the names in the table mean, as far as they are not in every textbook."""
    found = [text for part, text in EXPLAINED.items() if any(part in name for name in metrics.primary)]
    return f"{'; '.join(found)}." if found else None


def _first(metrics: Metrics) -> str:
    return metrics.primary[0] if metrics.primary else "ndcg@10"
