"""A judge against the truth, by hand."""

from __future__ import annotations

import pytest

from negtune.metrics.judgement import judge_audit
from negtune.metrics.verification import wilson


def test_every_share_by_hand():
    truth = [True] * 6 + [False] * 5
    verdicts = ["positive"] * 3 + ["drop", "negative", None] + ["negative"] * 2 + ["positive", "drop", None]
    found = judge_audit(truth, verdicts)
    assert found.table == {
        "positive": {"positive": 3, "drop": 1, "negative": 1, "failed": 1},
        "negative": {"positive": 1, "drop": 1, "negative": 2, "failed": 1},
    }
    assert found.agreement == wilson(5, 7)
    assert found.precision == {"positive": wilson(3, 4), "negative": wilson(2, 3)}
    assert found.recall == {"positive": wilson(3, 5), "negative": wilson(2, 4)}
    assert (found.dropped, found.failed) == (wilson(2, 9), wilson(2, 11))
    lines = found.lines()
    assert lines[1].split() == ["positive", "3", "1", "1", "1"]
    assert "precision positive: 0.750 (0.301 to 0.954) of 4" in lines


def test_failures_are_no_verdicts():
    found = judge_audit([True, False], [None, None])
    assert found.agreement.of == found.precision["positive"].of == found.recall["negative"].of == found.dropped.of == 0
    assert found.failed == wilson(2, 2)
    assert "agreement: no case" in found.lines()


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        (["positive"], "need one verdict for each truth, got 2 and 1"),
        (["positive", "yes"], "'yes' is none of positive"),
    ],
)
def test_what_is_no_verdict_is_refused(verdicts, message):
    with pytest.raises(ValueError, match=message):
        judge_audit([True, False], verdicts)
