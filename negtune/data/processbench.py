"""ProcessBench: solutions written by many models, the first wrong step of each marked by people; and a made-up twin.

Zheng et al. 2024, https://arxiv.org/abs/2412.06559. It has no reference answers: those come from GSM8K, by the text of
the problem. A row is `id`, `problem`, `steps`, `final_answer_correct`, `label` (index of the first wrong step, or -1)
and, once joined, `answer`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from negtune.data.arithmetic import DEFAULT_DIFFICULTY, Difficulty, chains, corrupt, solution_text
from negtune.data.completions import RowError
from negtune.data.gsm8k import split_records, text_of

HUB_ID = "Qwen/ProcessBench"
NO_ERROR = -1

Row = dict[str, Any]


def load_processbench(source: str | Path = HUB_ID) -> list[Row]:
    """The GSM8K part.

    Args:
        source: Hub id, or a folder with gsm8k.jsonl or gsm8k.jsonl.gz.

    Raises:
        OSError: no such folder or file, or the Hub cannot be reached.
        RowError: a row that lacks a column or cannot be right, by number and id.
    """
    found: dict[str, Row] = {}
    for i, record in enumerate(split_records(source, "gsm8k", "--data", HUB_ID), 1):
        row = _checked(record, f"{source} row {i}")
        if row["id"] in found:
            raise RowError(f"{source} row {i}: the id {row['id']} stands there twice; drop one")
        found[row["id"]] = row
    if not found:
        raise RowError(f"{source} is empty; download it again")
    return list(found.values())


def with_answers(rows: Sequence[Row], solved: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows whose problem is among the solved ones, white space aside, with its `answer`; the others are left out.

    Raises:
        RowError: there is none.
    """
    answers = {_words(item["question"]): item["answer"] for item in solved}
    found = [{**row, "answer": answers[_words(row["problem"])]} for row in rows if _words(row["problem"]) in answers]
    if not found:
        raise RowError(f"none of the {len(rows)} problems has an answer; --gsm8k must hold the problems of --data")
    return found


def synthetic_processbench(n: int, *, seed: int = 0, difficulty: Difficulty = DEFAULT_DIFFICULTY) -> list[Row]:
    """Chains of the test split in ProcessBench's columns: every second one goes wrong at a known step."""
    draw, rows = random.Random(seed), list[Row]()
    for i, right in enumerate(chains(n, seed=seed, split="test", difficulty=difficulty)):
        row = corrupt(right, rng=draw) if i % 2 else {**right, "first_error": NO_ERROR, "final_correct": True}
        rows.append(
            {
                "id": f"chain-{i}",
                "problem": row["question"],
                "steps": solution_text(row["steps"]).split("\n"),
                "final_answer_correct": row["final_correct"],
                "label": row["first_error"],
                "answer": row["answer"],
            }
        )
    return rows


def _checked(record: Any, where: str) -> Row:
    row = {"id": text_of(record, "id", where)}
    where = f"{where} ({row['id']})"
    row |= {"problem": text_of(record, "problem", where)}
    steps, correct, label = (record.get(name) for name in ("steps", "final_answer_correct", "label"))
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise RowError(f"{where}: steps must be a list of at least one text, none of them blank; mend or drop the row")
    if not isinstance(correct, bool):
        raise RowError(f"{where}: final_answer_correct must be true or false, got {correct!r}; mend or drop the row")
    if not isinstance(label, int) or isinstance(label, bool) or not NO_ERROR <= label < len(steps):
        raise RowError(
            f"{where}: label must be -1 or one of the {len(steps)} steps counted from 0, got {label!r}; mend or drop "
            "the row"
        )
    return {**row, "steps": steps, "final_answer_correct": correct, "label": label}


def _words(text: str) -> str:
    return " ".join(text.split())
