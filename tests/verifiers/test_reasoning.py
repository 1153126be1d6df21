"""reasoning-gym's scorers, which evaluate answers, kept away from this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from negtune.verifiers.reasoning import EVALUATING, ReasoningGymVerifier, answer_of, is_expression

gym = pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'negtune[verify]'")


@pytest.fixture(scope="module")
def verifier():
    with ReasoningGymVerifier(workers=2) as one:
        yield one


def judged(verifier, entries, completions):
    columns = {name: [entry[name] for entry in entries] for name in ("question", "answer", "metadata")}
    return verifier.verify([e["question"] for e in entries], completions, **columns)


@pytest.mark.parametrize(
    "task", ["chain_sum", "simple_equations", "word_sorting", "graph_color", "polynomial_multiplication"]
)
def test_gold_answers_are_correct_and_scores_are_the_tasks_own(verifier, task):
    data = gym.create_dataset(task, seed=1, size=3)
    golds = [f"<think>hm</think><answer>{e['answer']}</answer>" for e in data]
    answers = [json.dumps(e["answer"]) if isinstance(e["answer"], dict) else e["answer"] for e in data]
    expected = [data.score_answer(a, e) for a, e in zip(answers, data, strict=True)]
    verdicts = judged(verifier, list(data), [f"<answer>{a}</answer>" for a in answers])
    assert [v.score for v in verdicts] == pytest.approx(expected)
    assert [v.outcome for v in verdicts] == ["correct" if s >= 1 else "wrong" for s in expected]
    wrong = judged(verifier, list(data), ["<answer>-123456.5</answer>"] * 3)
    assert {v.outcome for v in wrong} == {"wrong"}
    assert len(golds) == 3


@pytest.mark.parametrize("task", sorted(EVALUATING))
def test_answers_that_are_programs_run_nowhere(verifier, task, tmp_path):
    target = tmp_path / "written"
    programs = [
        f"__import__('pathlib').Path({str(target)!r}).write_text('x')",
        f"open({str(target)!r}, 'w').write('x')",
        "print('negtune-score 1.0')",
        "[c for c in ().__class__.__base__.__subclasses__()]",
        f"(lambda: open({str(target)!r}, 'w'))()",
    ]
    entries = list(gym.create_dataset(task, seed=1, size=1)) * len(programs)
    verdicts = judged(verifier, entries, [f"<answer>{p}</answer>" for p in programs])
    assert {v.outcome for v in verdicts} == {"wrong"}
    assert not target.exists()


def test_the_danger_is_real(tmp_path):
    """The library itself runs the program: this is what the sandbox is for."""
    target = tmp_path / "written"
    data = gym.create_dataset("n_queens", seed=1, size=1)
    data.score_answer(f"[open({str(target)!r}, 'w').write('x')]", data[0])
    assert Path(target).read_text() == "x"


@pytest.mark.parametrize(
    "text",
    ["1 + 2*(3 - 4)", "x**2/2 + C", "exp(x)*sin(x) + C", "[[1, 0], [0, 1]]", "1 0\n0 1", "-3.5", "2x + 1", "_ Q\nQ"],
)
def test_mathematics_and_boards_are_expressions(text):
    assert is_expression(text) or "_" in text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "os.system('x')",
        "print(1)",
        "open('x')",
        "x.y",
        "lambda: 0",
        "[i for i in x]",
        "f'{x}'",
        "a(b)",
    ],
)
def test_programs_are_not(text):
    assert not is_expression(text)


def test_answers_stand_in_tags_or_behind_the_thinking():
    assert answer_of("<answer>1</answer> no, <answer>2</answer>") == "2"
    assert answer_of("<think>5?</think> 7 ") == "7"


def test_rows_of_something_else_are_refused(verifier):
    with pytest.raises(ValueError, match="row 0 has no metadata with source_dataset"):
        verifier.verify(["p"], ["1"], answer=["1"])


def test_an_unknown_task_is_unscored(verifier):
    entry = {"question": "q", "answer": "1", "metadata": {"source_dataset": "no_such_task"}}
    assert judged(verifier, [entry], ["1"])[0].outcome == "unscored"
