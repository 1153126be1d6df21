"""Which metrics of rankers a report shows, and which way they should go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from negtune.metrics.runs import RankingResult
from negtune.metrics.stats import bootstrap_interval, paired_difference

KNOWN = ("ndcg", "dcg", "mrr", "map", "micro_ap", "recall", "precision", "judged", "accuracy", "direction")


def better(name: str) -> Literal["higher", "lower"] | None:
    """Higher for every metric of a ranking, with its stage before it (`rerank/ndcg@10`), and for differences."""
    bare = name.rpartition("/")[-1].partition("@")[0]
    return "higher" if bare in KNOWN or name.startswith("minus ") else None


def primary(names: Iterable[str]) -> list[str]:
    """The metrics that a report shows first: in the order they were added, with the bounds of their intervals."""
    return [name for name in names if better(name) or name.endswith(("_low", "_high"))]


def with_interval(result: RankingResult, first: str) -> dict[str, float]:
    """Means of a result, the one called `first` before the others and with its 95 % bootstrap interval over queries."""
    values = list(result.per_query[first].values())
    low, high = bootstrap_interval(values) if len(values) > 1 else (float("nan"), float("nan"))
    others = {name: value for name, value in result.means.items() if name != first}
    return {first: result.means[first], f"{first}_low": low, f"{first}_high": high, **others}


def against(ours: Mapping[str, float], theirs: Mapping[str, float], other: str) -> dict[str, float]:
    """`minus <other>`: the paired difference per query with its 95 % bootstrap interval."""
    shared: Sequence[str] = [query for query in ours if query in theirs]
    mean, low, high = paired_difference([ours[q] for q in shared], [theirs[q] for q in shared])
    return {f"minus {other}": mean, f"minus {other}_low": low, f"minus {other}_high": high}
