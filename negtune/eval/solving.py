"""How often a policy solves problems: samples of held-out prompts, scored, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import gather_object

from negtune.credit import Tally, best_of
from negtune.metrics.stats import bootstrap_interval
from negtune.rollouts.sampler import Rollout, Sampler, SamplingParams
from negtune.verifiers.verdict import Verdict, Verifier, verdicts_of


@dataclass(frozen=True)
class Solved:
    """What was drawn and how it ended.

    Args:
        rollouts, verdicts: in order of the rows, `n` each; a cut completion is unscored and the verifier does not see
            it, unless asked for.
        tallies: one per row.
        metrics: `accuracy`, the mean over rows of the share of correct completions among the scored ones, those
            that were cut and not scored counted as not solved; `accuracy_low`, `accuracy_high`, its 95 % bootstrap
            interval over rows; `pass@k` (unbiased, 1 - C(n-c, k)/C(n, k)); `reward`, `unscored` (by the verifier),
            `truncated`; `length`, `tokens`.
    """

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    tallies: list[Tally]
    metrics: dict[str, float]


def solve(
    sampler: Sampler,
    verifier: Verifier,
    rows: Sequence[Mapping[str, Any]],
    *,
    n: int = 1,
    params: SamplingParams,
    ks: Sequence[int] | None = None,
) -> Solved:
    """Draw `n` completions of every row and score them.

    Args:
        sampler, verifier: see there.
        rows: `prompt`, and the columns that the verifier wants.
        n: completions of each.
        params: temperature 0 (and n = 1) for greedy accuracy.
        ks: of pass@k; powers of two up to `n` by default.

    In an evaluation a completion that never ends is a problem not solved: it counts as wrong here, and nowhere else.
    """
    return summary(answered(sampler, verifier, rows, n=n, params=params), ks)


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a metric of `solve` should go; None for those that have no good side."""
    if name in ("truncated", "unscored"):
        return "lower"
    return "higher" if name in ("accuracy", "reward") or name.startswith(("pass@", "minus ")) else None


def primary(names: Iterable[str]) -> list[str]:
    """The metrics that a report shows first, in its order, with the bounds of their intervals."""
    found = list(names)
    differences = [name for name in found if name.startswith("minus ")]
    passes = [name for name in found if name.startswith("pass@")]
    wanted = ["accuracy", "accuracy_low", "accuracy_high", *differences, *passes, "truncated", "unscored"]
    return [name for name in wanted if name in found]


def solve_together(
    sampler: Sampler,
    verifier: Verifier,
    rows: Sequence[Mapping[str, Any]],
    *,
    n: int,
    params: SamplingParams,
    score_truncated: bool = False,
) -> Solved:
    """`solve` by all processes of a launch, each its share of the rows; every process must call it and gets it all."""
    state = PartialState()
    mine = rows[state.process_index :: state.num_processes]
    parts = gather_object([answered(sampler, verifier, mine, n=n, params=params, score_truncated=score_truncated)])
    return summary([parts[i % len(parts)][i // len(parts)] for i in range(len(rows))])


LEFT_OUT = Verdict("unscored", reason="cut")
Answer = list[tuple[Rollout, Verdict]]
"""The completions of one row."""


def answered(
    sampler: Sampler,
    verifier: Verifier,
    rows: Sequence[Mapping[str, Any]],
    *,
    n: int,
    params: SamplingParams,
    score_truncated: bool = False,
) -> list[Answer]:
    """Scored completions of every row; with `score_truncated` also those that were cut, as they stand."""
    rows = list(rows)
    if not rows:
        return []
    rollouts = sampler.sample([row["prompt"] for row in rows], n, params)
    scored = ("stop", "length") if score_truncated else ("stop",)
    verdicts = _verdicts(verifier, rollouts, [row for row in rows for _ in range(n)], scored)
    pairs = list(zip(rollouts, verdicts, strict=True))
    return [pairs[start : start + n] for start in range(0, len(pairs), n)]


def summary(answers: Sequence[Answer], ks: Sequence[int] | None = None) -> Solved:
    """What `answered` found, with its metrics."""
    if not answers:
        raise ValueError("there is no row to solve")
    pairs, n = [pair for answer in answers for pair in answer], len(answers[0])
    tallies = []
    for answer in answers:
        correct = sum(v.outcome == "correct" for _, v in answer)
        wrong = sum(v.outcome == "wrong" or _left_out(r, v) for r, v in answer)
        tallies.append(Tally(correct, wrong, n - correct - wrong))
    scores = [v.score for _, v in pairs if v.score is not None]
    values = [float(t.value) for t in tallies if t.value is not None]
    lengths = [len(r.completion_ids) for r, _ in pairs]
    cut = sum(r.finish_reason == "length" for r, _ in pairs)
    failed = sum(v.score is None and not _left_out(r, v) for r, v in pairs)
    metrics = {
        "accuracy": _mean(values),
        "reward": _mean(scores),
        "unscored": failed / len(pairs),
        "truncated": cut / len(pairs),
        "length": _mean(lengths),
        "tokens": float(sum(lengths)),
    }
    if len(values) > 1:
        metrics["accuracy_low"], metrics["accuracy_high"] = bootstrap_interval(values)
    for k in ks or [2**i for i in range(n.bit_length())]:
        passed = [best_of(tally, k) for tally in tallies]
        metrics[f"pass@{k}"] = _mean([float(p) for p in passed if p is not None])
    return Solved([r for r, _ in pairs], [v for _, v in pairs], tallies, metrics)


def _left_out(rollout: Rollout, verdict: Verdict) -> bool:
    """Cut, and not shown to the verifier."""
    return rollout.finish_reason == "length" and verdict == LEFT_OUT


def _verdicts(
    verifier: Verifier, rollouts: Sequence[Rollout], owners: Sequence[Mapping[str, Any]], scored: Sequence[str]
) -> list[Verdict]:
    fit = [(r, row) for r, row in zip(rollouts, owners, strict=True) if r.finish_reason in scored]
    names = dict.fromkeys(name for row in owners for name in row if name not in ("prompt", "prefix"))
    columns = {name: [row.get(name) for _, row in fit] for name in names}
    texts = [r.text if isinstance(r.prompt, str) else [{"role": "assistant", "content": r.text}] for r, _ in fit]
    prompts, ids = [r.prompt for r, _ in fit], [r.completion_ids for r, _ in fit]
    found = iter(verdicts_of(verifier, prompts, texts, ids, columns) if fit else [])
    return [next(found) if r.finish_reason in scored else LEFT_OUT for r in rollouts]


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values) if values else float("nan")
