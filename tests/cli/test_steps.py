"""`negtune steps`, as typed: from a store of solutions to pairs and rows that trainers take."""

from __future__ import annotations

import pytest

from negtune.cli.main import main
from negtune.data.advantages import tokenize_advantages
from negtune.data.preference import tokenize_pairs
from negtune.models.load import load_tokenizer
from negtune.records import read_jsonl, write_jsonl

EXACT = ["--verifier", "exact", "--pattern", r"(\w+)\Z"]


@pytest.fixture
def store(tmp_path, chain_folder, prompts, monkeypatch) -> list[str]:
    """Flags of the draw, in a folder with a store of scored solutions."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("prompts.jsonl", [{**row, "answer": "good"} for row in prompts])
    draw = ["--model", chain_folder, "--max_tokens", "24", "--batch_size", "64"]
    generate = ["rollouts", "generate", "--store", "s", "--prompts", "prompts.jsonl", "--num_generations", "12", *draw]
    assert main(generate) == 0
    assert main(["rollouts", "verify", "--store", "s", *EXACT]) == 0
    return draw


def test_from_solutions_to_pairs_and_rows(store, chain_folder, capsys):
    locate = ["steps", "locate", "--store", "s", *EXACT, *store]
    assert main([*locate, "--strategy", "binary", "--num_rollouts", "12", "--name", "binary"]) == 0
    said = capsys.readouterr().out
    assert "rollouts and" in said
    assert "per located pit" in said
    assert main([*locate, "--num_rollouts", "8", "--solutions", "all"]) == 0
    pairs = ["steps", "pairs", "--store", "s", *EXACT, "--model", chain_folder, "--name", "binary"]
    assert main([*pairs, "--output", "pairs.jsonl"]) == 0
    assert main(["steps", "advantages", "--store", "s", "--output", "rows.jsonl"]) == 0
    tokenizer = load_tokenizer(chain_folder)
    rows = tokenize_pairs(read_jsonl("pairs.jsonl"), tokenizer, max_length=None, overlong="error")
    assert len(rows) > 3
    assert {"chosen_step", "rejected_step"} <= set(rows.column_names)
    assert len(tokenize_advantages(read_jsonl("rows.jsonl"), tokenizer, max_length=None, overlong="error")) > 10
    before = capsys.readouterr()
    assert main([*locate, "--strategy", "binary", "--num_rollouts", "12", "--name", "binary"]) == 0
    assert "0 rollouts drawn, 0 tokens" in capsys.readouterr().out, before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_rollouts", "0"], "num_rollouts=0"),
        (["--strategy", "binary", "--rule", "argmin"], "rule=argmin needs the values"),
        (["--best_of", "9"], "best_of=9 needs as many rollouts"),
    ],
)
def test_flags_that_cannot_work_are_one_line(store, capsys, flags, words):
    assert main(["steps", "locate", "--store", "s", *EXACT, *store, *flags]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_what_is_missing_is_named(store, capsys):
    assert main(["steps", "stats", "--store", "s"]) == 1
    assert "no searched solutions named steps; run negtune steps locate" in capsys.readouterr().err
    assert main(["steps", "locate", "--store", "nothing", *EXACT, *store]) == 1
    assert "draw some with negtune rollouts generate" in capsys.readouterr().err
    assert main(["steps", "locate", "--store", "s", "--verifier", "math", *store]) == 1
    assert "no wrong solution with a verdict of math-auto:answer" in capsys.readouterr().err
