"""Text comparison."""

from __future__ import annotations

import pytest

from negtune.verifiers.exact import ExactVerifier


def outcomes(verifier, completions, golds):
    return [v.outcome for v in verifier.verify(["p"] * len(completions), completions, answer=golds)]


def test_text_is_compared_without_outer_space():
    assert outcomes(ExactVerifier(), [" yes\n", "Yes"], ["yes", "yes"]) == ["correct", "wrong"]
    assert outcomes(ExactVerifier(ignore_case=True), ["Yes"], ["yes"]) == ["correct"]


def test_the_last_match_of_a_pattern_counts_and_its_group():
    verifier = ExactVerifier(pattern=r"Answer: (\w+)")
    assert outcomes(verifier, ["Answer: a. Answer: b", "b", "Answer: a"], ["b"] * 3) == ["correct", "wrong", "wrong"]
    assert outcomes(ExactVerifier(pattern=r"\d+"), ["1 then 2"], [2]) == ["correct"]


def test_missing_golds_and_broken_patterns_are_refused():
    with pytest.raises(ValueError, match="row 1: the gold text is None"):
        outcomes(ExactVerifier(), ["a", "b"], ["a", None])
    with pytest.raises(ValueError, match="no regular expression"):
        ExactVerifier(pattern="(")
    with pytest.raises(ValueError, match="column 'answer' is missing"):
        ExactVerifier().verify(["p"], ["a"])
