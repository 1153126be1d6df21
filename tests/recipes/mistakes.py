"""What a recipe says of a mistake, without a process of its own: to import torch takes longer than to refuse a flag."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from negtune.cli.recipe import run_recipe


def mistake(main: Callable[[], None], monkeypatch, capsys, flags: list[str]) -> str:
    """The one line before it leaves with 1."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    with pytest.raises(SystemExit) as left:
        run_recipe(main)
    assert left.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    return said[0]
