"""Instructions without answers: prompts that a policy answers itself.

Layouts read: Self-Instruct's (`instruction`, `instances` with an `input`; https://github.com/yizhongw/self-instruct),
and rows with a column `prompt` or `instruction`. `synthetic` makes prompts up, with answers of many lengths.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from negtune.data.completions import RowError
from negtune.data.gsm8k import from_hub
from negtune.records import stream_jsonl

_THINGS = ("boat", "tree", "lamp", "river", "clock", "garden", "letter", "bridge", "window", "road")
_WORDS = ("old", "red", "slow", "bright", "small", "long", "quiet", "warm")


def load_instructions(source: str | Path, *, longest: int | None = 300) -> list[str]:
    """Texts of instructions, each once, in order.

    Args:
        source: JSON lines file, a folder of such files, or a Hub id (its split `train`).
        longest: characters; longer ones are left out. None: no limit.

    Raises:
        OSError: there is no such file, folder or Hub data set.
        RowError: a row without instruction, or nothing left; names it.
    """
    path = Path(source).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if path.exists():
        rows: Iterable[Any] = (row for file in files for row in stream_jsonl(file))
    else:
        way_out = "give a file or folder of JSON lines with a column instruction or prompt, or a Hub id"
        rows = from_hub(str(source), "train", way_out)
    texts = [_text(row, f"{source} row {i}") for i, row in enumerate(rows)]
    kept = [text for text in dict.fromkeys(texts) if longest is None or len(text) <= longest]
    if not kept:
        raise RowError(f"{source} has no instruction of at most {longest} characters among {len(texts)} rows")
    return kept


def synthetic(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` made-up instructions (`prompt`) with an answer (`completion`) of 1 to 12 words."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        thing = draw.choice(_THINGS)
        words = [draw.choice(_WORDS) for _ in range(draw.choice((0, 1, 1, 2, 2, 2, 3, 4, 6, 11)))]
        rows.append({"prompt": f"Describe {thing} {i}.", "completion": " ".join([*words, thing]) + "."})
    return rows


def _text(row: Mapping[str, Any], name: str) -> str:
    text = row.get("instruction") or row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{name} has no instruction; it needs a text column instruction or prompt, it has {sorted(row)}")
    instances = row.get("instances")
    given = instances[0].get("input") if isinstance(instances, list) and instances else row.get("input")
    return f"{text.strip()}\n{given.strip()}" if isinstance(given, str) and given.strip() else text.strip()
