"""How far a judge of relevance can be trusted, where the truth is known.

A judge says `positive`, `negative`, or `drop` (unclear: leave the document out); None where it failed to judge, which
is no verdict and counts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from negtune.metrics.verification import Rate, wilson

VERDICTS = ("positive", "drop", "negative")
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class JudgeAudit:
    """Verdicts against the truth, shares with 95 % Wilson intervals.

    The intervals take documents as independent. Precision depends on how many of the documents are relevant, and does
    not carry over from judged documents to unjudged ones; recall is nearer to doing so.

    Args:
        table: truth to verdict (`failed` for None) to how many.
        agreement: verdicts `positive` and `negative` that are the truth, of all of these.
        precision: of the documents given this verdict, those of which it is true.
        recall: of the documents of which this is true and that got any verdict, those given it.
        dropped: verdicts `drop`, of all verdicts.
        failed: documents without a verdict, of all.
    """

    table: dict[str, dict[str, int]]
    agreement: Rate
    precision: dict[str, Rate]
    recall: dict[str, Rate]
    dropped: Rate
    failed: Rate

    def lines(self) -> list[str]:
        """The table and the shares, for a person."""
        columns = [*VERDICTS, "failed"]
        rows = [f"{'truth':>10}" + "".join(f"{name:>10}" for name in columns)]
        rows += [f"{truth:>10}" + "".join(f"{row[name]:>10}" for name in columns) for truth, row in self.table.items()]
        shares = {"agreement": self.agreement}
        shares |= {f"precision {side}": self.precision[side] for side in SIDES}
        shares |= {f"recall {side}": self.recall[side] for side in SIDES}
        shares |= {"dropped": self.dropped, "failed": self.failed}
        return rows + [f"{name}: {share_of(rate)}" for name, rate in shares.items()]


def judge_audit(truth: Sequence[bool], verdicts: Sequence[str | None]) -> JudgeAudit:
    """Compare verdicts with the truth, True for a relevant document.

    Raises:
        ValueError: not one verdict for each, or something that is no verdict.
    """
    if len(truth) != len(verdicts):
        raise ValueError(f"need one verdict for each truth, got {len(truth)} and {len(verdicts)}")
    table = {side: dict.fromkeys([*VERDICTS, "failed"], 0) for side in SIDES}
    for relevant, verdict in zip(truth, verdicts, strict=True):
        if verdict is not None and verdict not in VERDICTS:
            raise ValueError(f"{verdict!r} is none of {', '.join(VERDICTS)}")
        table["positive" if relevant else "negative"][verdict or "failed"] += 1
    said = {verdict: sum(row[verdict] for row in table.values()) for verdict in (*VERDICTS, "failed")}
    right = {side: table[side][side] for side in SIDES}
    judged = {side: sum(table[side][verdict] for verdict in VERDICTS) for side in SIDES}
    return JudgeAudit(
        table,
        agreement=wilson(sum(right.values()), said["positive"] + said["negative"]),
        precision={side: wilson(right[side], said[side]) for side in SIDES},
        recall={side: wilson(right[side], judged[side]) for side in SIDES},
        dropped=wilson(said["drop"], sum(judged.values())),
        failed=wilson(said["failed"], len(truth)),
    )


def share_of(rate: Rate) -> str:
    """`.750 (.301 to .954) of 4`, or that there is no case."""
    if not rate.of:
        return "no case"
    return f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f}) of {rate.of}"
