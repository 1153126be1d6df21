"""Stages that fill stores: resumed, shared between processes, and honest about what could not be scored."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from negtune.models.tiny import tiny_lm, tiny_tokenizer
from negtune.rollouts.collect import generate, verify
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import SamplingParams, requests_for
from negtune.rollouts.store import RecordStore
from negtune.verifiers.math import MathVerifier
from negtune.verifiers.verdict import TooManyUnscored, Verdict

ROWS = [{"prompt": f"Question {i}?", "answer": str(i)} for i in range(5)]
PARAMS = SamplingParams(max_tokens=4)


@pytest.fixture
def sampler():
    return HFSampler(tiny_lm(dtype=torch.float64), tiny_tokenizer())


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_gives_what_one_run_gives(tmp_path, sampler):
    def stop_after_two(done, total, tokens):
        if done >= 4:
            raise Interrupted

    with RecordStore(tmp_path / "a") as store, pytest.raises(Interrupted):
        generate(store, sampler, ROWS, 2, PARAMS, part=2, progress=stop_after_two)
    assert len(RecordStore(tmp_path / "a")) == 4
    with RecordStore(tmp_path / "a") as store:
        assert generate(store, sampler, ROWS, 2, PARAMS, part=3) == 6
        assert generate(store, sampler, ROWS, 2, PARAMS) == 0
    with RecordStore(tmp_path / "b") as store:
        generate(store, sampler, ROWS, 2, PARAMS)
    assert list(RecordStore(tmp_path / "a")) == list(RecordStore(tmp_path / "b"))


def test_two_processes_draw_what_one_draws(tmp_path, sampler):
    with RecordStore(tmp_path / "one") as store:
        generate(store, sampler, ROWS, 3, PARAMS)
    for i in range(2):
        with RecordStore(tmp_path / "two", process_index=i) as store:
            generate(store, sampler, ROWS, 3, PARAMS, process_index=i, processes=2)
    found, expected = ({r["key"]: r for r in RecordStore(tmp_path / name)} for name in ("two", "one"))
    assert found == expected
    assert len(found) == 15


def test_settings_and_policy_are_part_of_what_a_rollout_is(tmp_path, sampler):
    with RecordStore(tmp_path) as store:
        generate(store, sampler, ROWS, 1, PARAMS)
        assert generate(store, sampler, ROWS, 1, SamplingParams(max_tokens=5)) == 5
        sampler.policy = "1"
        assert generate(store, sampler, ROWS, 1, PARAMS) == 5


class Answers:
    """Correct where the answer is even; fails on 3."""

    def __init__(self):
        self.calls = 0

    def verify(self, prompts, completions, answer):
        self.calls += len(completions)
        return [
            Verdict("unscored", reason="broken")
            if a == "3"
            else Verdict("correct" if int(a) % 2 == 0 else "wrong", reason=c)
            for a, c in zip(answer, completions, strict=True)
        ]


def finished(store: RecordStore, reasons: list[str], prefix: str = "") -> None:
    store.append(
        [
            {
                **{"key": f"k{i}", "prompt": "p", "prefix": prefix, "text": f"text {i}", "finish_reason": reason},
                **{"columns": {"answer": str(i % 5)}, "error": "engine died"},
            }
            for i, reason in enumerate(reasons)
        ]
    )


def test_cut_and_failed_completions_are_unscored_and_nothing_is_scored_twice(tmp_path):
    verifier = Answers()
    with RecordStore(tmp_path) as rollouts, RecordStore(tmp_path, "verdicts") as verdicts:
        finished(rollouts, ["stop", "length", "error", "stop", "stop"], prefix="So: ")
        assert verify(rollouts, verdicts, verifier, name="even", part=2) == 5
        assert verifier.calls == 3
        found = {r["rollout"]: (r["outcome"], r["score"], r["reason"]) for r in verdicts}
        assert found == {
            "k0": ("correct", 1.0, "So: text 0"),
            "k1": ("unscored", None, "cut at its length"),
            "k2": ("unscored", None, "engine died"),
            "k3": ("unscored", None, "broken"),
            "k4": ("correct", 1.0, "So: text 4"),
        }
        assert verify(rollouts, verdicts, verifier, name="even") == 2  # what was failed on, by the engine or by it
        assert verifier.calls == 4
        assert verify(rollouts, verdicts, verifier, name="other") == 5
        assert len(verdicts) == 10


class Mended(Answers):
    def verify(self, prompts, completions, answer):
        self.calls += len(completions)
        return [Verdict("wrong") for _ in answer]


def test_a_mended_verifier_scores_what_the_broken_one_failed_on(tmp_path):
    with RecordStore(tmp_path) as rollouts, RecordStore(tmp_path, "verdicts") as verdicts:
        finished(rollouts, ["stop"] * 10)
        verify(rollouts, verdicts, Answers(), name="even")
        mended = Mended()
        assert verify(rollouts, verdicts, mended, name="even") == mended.calls == 2
        assert verify(rollouts, verdicts, mended, name="even") == 0
    outcomes = [r["outcome"] for r in RecordStore(tmp_path, "verdicts")]
    assert sorted(outcomes) == ["correct"] * 6 + ["wrong"] * 4


def test_a_completion_that_the_engine_failed_to_give_is_drawn_again(tmp_path, sampler):
    class Failing(HFSampler):
        broken = True

        def draw(self, requests, params):
            drawn = super().draw(requests, params)
            return [replace(r, finish_reason="error", error="abort") if self.broken else r for r in drawn]

    failing = Failing(sampler.model, sampler.tokenizer)
    with RecordStore(tmp_path) as store:
        assert generate(store, failing, ROWS, 1, PARAMS) == 5
        failing.broken = False
        assert generate(store, failing, ROWS, 1, PARAMS) == 5
        assert generate(store, failing, ROWS, 1, PARAMS) == 0
    assert {r["finish_reason"] for r in RecordStore(tmp_path)} <= {"stop", "length"}
    assert len(list(RecordStore(tmp_path))) == 5


def test_an_answer_that_was_changed_after_the_draw_is_refused(tmp_path, sampler):
    with RecordStore(tmp_path) as store:
        generate(store, sampler, ROWS, 1, PARAMS)
        changed = [*ROWS[:3], {**ROWS[3], "answer": "12"}]
        with pytest.raises(ValueError, match="row 4: answer is '12', but was '3' when"):
            generate(store, sampler, changed, 2, PARAMS)
        assert generate(store, sampler, ROWS[:2], 2, PARAMS) == 2


def test_a_gold_answer_that_cannot_be_read_is_named_by_its_prompt(tmp_path):
    with (
        MathVerifier(workers=1) as verifier,
        RecordStore(tmp_path) as rollouts,
        RecordStore(tmp_path, "verdicts") as verdicts,
    ):
        finished(rollouts, ["stop"] * 4)
        rollouts.append([{**next(iter(rollouts)), "key": "bad", "prompt": "What?", "columns": {"answer": ""}}])
        with pytest.raises(ValueError, match="rollout bad of 'What\\?'.*the gold answer is ''"):
            verify(rollouts, verdicts, verifier, name="math")


def test_what_is_scored_begins_with_the_prefix_however_that_was_given(tmp_path, sampler):
    ids = sampler.tokenizer("So: ", add_special_tokens=False)["input_ids"]
    rows = [{"prompt": "p", "prefix": prefix, "answer": "0"} for prefix in ("So: ", ids)]

    class Texts(Answers):
        def verify(self, prompts, completions, answer):
            return [Verdict("wrong", reason=c) for c in completions]

    with RecordStore(tmp_path) as rollouts, RecordStore(tmp_path, "verdicts") as verdicts:
        rollouts.append([{**r, "finish_reason": "stop"} for r in _records(sampler, rows)])
        verify(rollouts, verdicts, Texts(), name="texts")
        assert all(r["reason"].startswith("So: ") for r in verdicts)


def _records(sampler, rows):
    requests = requests_for([r["prompt"] for r in rows], 1, [r["prefix"] for r in rows])
    return [{**asdict(r), "columns": {"answer": "0"}} for r in sampler.draw(requests, PARAMS)]


def test_a_broken_verifier_stops_the_stage_and_keeps_what_it_said(tmp_path):
    with RecordStore(tmp_path) as rollouts, RecordStore(tmp_path, "verdicts") as verdicts:
        finished(rollouts, ["stop"] * 100)
        with pytest.raises(TooManyUnscored, match="10 of 50"):
            verify(rollouts, verdicts, Answers(), name="even", part=50, max_unscored=0.1)
        assert len(verdicts) == 50
