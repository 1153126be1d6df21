"""What every recipe does before its own work."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from trl import TrlParser

from negtune.cli.recipe import parsed


@dataclass
class Arguments:
    """Flags of a recipe that can be resumed."""

    smoke: bool = False
    steps: int = 8
    resume_from_checkpoint: str | None = None


def parse(monkeypatch, *flags: str) -> Arguments:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    return parsed(TrlParser((Arguments,)), {"steps": 2})[0]


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    for smoke in ([], ["--smoke"]):
        with pytest.raises(
            OSError, match=r"--resume_from_checkpoint .*checkpoint-7 is no folder; with --save_strategy"
        ):
            parse(monkeypatch, *smoke, "--resume_from_checkpoint", str(tmp_path / "checkpoint-7"))
    assert parse(monkeypatch, "--resume_from_checkpoint", str(tmp_path)).resume_from_checkpoint == str(tmp_path)


def test_a_flag_that_is_not_understood_is_told_of_in_few_lines(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--steps", "many")
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert "--help lists the flags" in usage
    assert "argument --steps: invalid int value: 'many'" in error
