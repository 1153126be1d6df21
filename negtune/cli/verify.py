"""Say how often a verifier errs on completions whose truth is known, before a model is trained on what it says.

Rows are JSONL with `completion`, a column with the truth (true or false), and the columns the verifier needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from negtune.cli.rollouts import add_verifier_arguments, make_verifier
from negtune.records import read_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `negtune verify audit`."""
    parser.add_argument("task", metavar="TASK", choices=["audit"], help="audit")
    parser.add_argument("--rollouts", required=True, metavar="FILE", help="labelled completions")
    parser.add_argument("--truth", required=True, metavar="NAME", help="column: whether the completion is correct")
    parser.add_argument("--by", metavar="NAME", help="column of difficulty, or anything else to split by")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N", help="examples of each error (default: %(default)s)"
    )
    add_verifier_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print false positive and false negative rates with 95 % Wilson intervals, and examples."""
    rows = read_rows(args.rollouts, args.truth, args.by)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    completions = columns.pop("completion")
    prompts = columns.pop("prompt", [""] * len(rows))
    with make_verifier(args) as verifier:
        verdicts = verifier.verify(prompts, completions, **columns)
    accepted = [{"correct": True, "wrong": False, "unscored": None}[v.outcome] for v in verdicts]
    truth = [bool(value) for value in columns[args.truth]]
    print(f"{'':<20}{'rows':>7}{'false positive':>26}{'false negative':>26}{'unscored':>10}")
    print(line("all", accepted, truth))
    if args.by:
        for value in sorted(set(map(str, columns[args.by]))):
            chosen = [i for i, found in enumerate(columns[args.by]) if str(found) == value]
            print(line(value, [accepted[i] for i in chosen], [truth[i] for i in chosen]))
    for name, wanted in (("false positive", (True, False)), ("false negative", (False, True)), ("unscored", (None,))):
        shown = [i for i in range(len(rows)) if (accepted[i], truth[i])[: len(wanted)] == wanted][: args.show]
        for i in shown:
            print(f"{name}, row {i + 1}: {verdicts[i].reason.strip().splitlines()[-1] if verdicts[i].reason else ''}")
    return 0


def read_rows(path: str, truth: str, by: str | None) -> list[dict[str, Any]]:
    """Rows of a file, each with a completion and its truth."""
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows, start=1):
        if row.get("completion") is None:
            raise ValueError(f"{path}, row {number}: no completion; the row has {', '.join(row) or 'nothing'}")
        if not isinstance(row.get(truth), bool):
            raise ValueError(f"{path}, row {number}: {truth} must be true or false, it is {row.get(truth)!r}")
        if by and by not in row:
            raise ValueError(f"{path}, row {number}: no {by}; the row has {', '.join(row)}")
    return rows


def line(name: str, accepted: Sequence[bool | None], truth: Sequence[bool]) -> str:
    """One row of the table."""
    from negtune.metrics.verification import Rate, verifier_errors

    def cell(rate: Rate) -> str:
        return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]" if rate.of else "no case"

    errors = verifier_errors(accepted, truth)
    return (
        f"{name[:19]:<20}{len(truth):>7}{cell(errors.false_positive):>26}{cell(errors.false_negative):>26}"
        f"{errors.unscored.count:>10}"
    )
