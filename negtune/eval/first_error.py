"""Where rollouts say that a solution went wrong, against where people say it: judges, their agreement, their cost.

A judge answers with the index of a step (from 0) or -1: all are right. Its answer is held as a chance for each, so that
judges that guess are scored exactly, without drawing. A judge that gives no answer has no chances: it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from negtune.credit import Tally, state_values
from negtune.metrics.first_error import processbench_scores
from negtune.metrics.stats import bootstrap_interval

Answer = Mapping[int, float]
Record = Mapping[str, Any]
"""A solution whose states were explored: see `negtune.rollouts.steps.judgement`."""

NO_ANSWER: Answer = {}
NO_ERROR: Answer = {-1: 1.0}


# --- Judges -----------------------------------------------------------------------------------------------------------


def first_dead(record: Record) -> Answer:
    """The step before the first dead state; -1 if none is dead; no answer if the bare prompt is.

    The state behind the last step is worth how the solution ended. So a right final answer does not settle the matter,
    and the last step is blamed if it alone is left to be.
    """
    threshold = record["search"]["threshold"]
    values = state_values([Tally(*tally) for tally in record["tallies"]], record["outcome"])
    if values[0] is None or values[0] <= threshold:
        return NO_ANSWER
    dead = (i for i, value in enumerate(values) if value is not None and value <= threshold)
    return {next(dead, 0) - 1: 1.0}


def first_pit(record: Record) -> Answer:
    """What `credit.first_pit` says: -1 wherever the final answer is right."""
    if record["reason"] == "correct":
        return NO_ERROR
    return NO_ANSWER if record["pit"] is None else {record["pit"] - 1: 1.0}


def always_right(record: Record) -> Answer:
    return NO_ERROR


def first_step(record: Record) -> Answer:
    return {0: 1.0}


def any_step(record: Record) -> Answer:
    """Each step alike."""
    n = len(record["steps"])
    return dict.fromkeys(range(n), 1 / n)


def any_answer(record: Record) -> Answer:
    """Each step, and -1, alike."""
    n = len(record["steps"])
    return dict.fromkeys(range(-1, n), 1 / (n + 1))


def told_outcome(judge: Callable[[Record], Answer]) -> Callable[[Record], Answer]:
    """-1 where the final answer is right, else what `judge` says."""
    return lambda record: NO_ERROR if record["outcome"] else judge(record)


BLIND: Mapping[str, Callable[[Record], Answer]] = {
    "always -1": always_right,
    "always the first step": first_step,
    "any step": any_step,
    "any step or -1": any_answer,
    "first step, told the outcome": told_outcome(first_step),
    "any step, told the outcome": told_outcome(any_step),
}
"""What can be said without a rollout."""

# --- How good, how dear -----------------------------------------------------------------------------------------------


def hits(answers: Sequence[Answer], labels: Sequence[int], *, within: int = 0) -> list[float]:
    """Chance of each answer to be at most `within` steps from the label; -1 is next to no step."""
    return [
        math.fsum(p for step, p in answer.items() if abs(step - label) <= within and (step < 0) == (label < 0))
        for answer, label in zip(answers, labels, strict=True)
    ]


def agreement(answers: Sequence[Answer], labels: Sequence[int]) -> dict[str, float]:
    """`answered`, and over all rows `exact` (with `_low`, `_high`, a bootstrap interval) and `within_one`."""
    exact = hits(answers, labels)
    found = {
        "answered": _mean([float(bool(answer)) for answer in answers]),
        "exact": _mean(exact),
        "within_one": _mean(hits(answers, labels, within=1)),
    }
    if len(exact) > 1:
        found["exact_low"], found["exact_high"] = bootstrap_interval(exact)
    return found


def cost(records: Sequence[Record], of: Sequence[Record]) -> dict[str, float]:
    """`rollouts` and `tokens` that a search looked at, per solution, and `_ratio` to those of another search."""
    found = {}
    for name, column in (("rollouts", "num_rollouts"), ("tokens", "tokens")):
        ours, theirs = (_mean([record[column] for record in some]) for some in (records, of))
        found |= {name: ours, f"{name}_ratio": ours / theirs if theirs else math.nan}
    return found


def live(record: Record) -> bool:
    """Whether a rollout from the bare prompt ends well, in more than the threshold's share."""
    value = Tally(*record["tallies"][0]).value
    return value is not None and value > record["search"]["threshold"]


# --- Tables: judges down, numbers across ------------------------------------------------------------------------------

Table = Mapping[str, Mapping[str, float]]
COLUMNS = ("answered", "error_accuracy", "correct_accuracy", "f1", "exact", "within_one", "rollouts", "rollouts_ratio")
COLUMNS += ("tokens", "tokens_ratio")


def benchmark(judged: Mapping[str, Sequence[Record]], labels: Sequence[int]) -> Table:
    """ProcessBench's scores of the blind judges and of every search, and the share of rows that got an answer.

    Args:
        judged: by strategy, `all` among them: the same solutions, explored in different ways.
        labels: of those solutions.

    `first_dead` needs the states of right solutions too, which `binary` does not look at.
    """
    answers = {name: [judge(record) for record in judged["all"]] for name, judge in BLIND.items()}
    for strategy, records in judged.items():
        if strategy != "binary":
            answers[f"rollouts, {strategy}"] = [first_dead(record) for record in records]
    for strategy, records in judged.items():
        answers[f"rollouts, {strategy}, told the outcome"] = [first_pit(record) for record in records]
    return {
        name: {"answered": _mean([float(bool(a)) for a in some]), **processbench_scores(hits(some, labels), labels)}
        for name, some in answers.items()
    }


def searches(judged: Mapping[str, Sequence[Record]], labels: Sequence[int]) -> Table:
    """`agreement` of every search with the labels of solutions that end wrong, and its `cost` against `all`."""
    table = {
        name: agreement([BLIND[name](record) for record in judged["all"]], labels)
        for name in ("always the first step", "any step")
    }
    for strategy, records in judged.items():
        table[strategy] = agreement([first_pit(r) for r in records], labels) | cost(records, judged["all"])
    return table


def markdown(table: Table) -> str:
    """What there is of `COLUMNS`, intervals in brackets."""
    columns = [c for c in COLUMNS if any(c in row for row in table.values())]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(row, column) for column in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


def _cell(row: Mapping[str, float], column: str) -> str:
    if column not in row:
        return ""
    if column in ("rollouts", "tokens"):
        return f"{row[column]:.1f}"
    if f"{column}_low" not in row:
        return _short(row[column])
    return f"{_short(row[column])} [{_short(row[f'{column}_low'])}, {_short(row[f'{column}_high'])}]"


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.2f}"


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values) if values else math.nan
