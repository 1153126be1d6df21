"""Made-up arithmetic chains: as many distinct problems as wanted, solutions with known errors, a judge of every step.

A problem reads "Start with 4. Add 3. Multiply by 2. What is the result?", its solution one line per step and a last
line that both verifiers of answers read (`ExactVerifier(pattern=ANSWER_PATTERN)`, `MathVerifier()`):

    4 + 3 = 7
    7 * 2 = 14
    #### 14

Since each step is known, so is the first wrong one of any solution: the truth that estimates of it are held against.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Operation = tuple[str, int]
"""Sign and right-hand number: `("+", 3)`."""

VERBS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}
FUNCTIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SPLITS: dict[str, range] = {"train": range(192), "validation": range(192, 224), "test": range(224, 256)}
"""First bytes of the question's SHA-256 that fall into each split: three quarters, an eighth, an eighth."""
ANSWER_PATTERN = r"#### *(-?[0-9]+)\s*\Z"
"""Finds the final answer where a solution ends with it."""

_NUMBER = r"-?[0-9]{1,18}"  # a model may write thousands of digits, which `int` refuses
_QUESTION = re.compile(r"Start with ([0-9]+)\.((?: (?:Add|Subtract|Multiply by) [0-9]+\.)+) What is the result\?")
_CLAUSE = re.compile(r"(Add|Subtract|Multiply by) ([0-9]+)\.")
_STEP = re.compile(rf"\s*({_NUMBER})\s*([-+*])\s*({_NUMBER})\s*=\s*({_NUMBER})\s*")
_ANSWER = re.compile(rf"\s*####\s*({_NUMBER})\s*")
_LARGEST_ERROR = 5
_MOST_MISSES = 10_000


@dataclass(frozen=True)
class Difficulty:
    """Which chains are drawn. The defaults are near chains that a model of 135M parameters solves in part.

    Args:
        min_steps, max_steps: operations in a chain; every length between them is drawn equally often, as long as there
            are new chains of it.
        largest: the first number and all right-hand numbers are drawn from 1 to this.
        limit: no result is below 0 or above this.
        operations: signs to draw from, of `+-*`; one that stands there twice is drawn more often.
    """

    min_steps: int = 2
    max_steps: int = 4
    largest: int = 9
    limit: int = 200
    operations: str = "++-*"

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"need 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}")
        if not 1 <= self.largest <= self.limit:
            raise ValueError(f"need 1 <= largest <= limit, got largest={self.largest}, limit={self.limit}")
        if not self.operations or set(self.operations) - set(VERBS):
            raise ValueError(f"operations must be some of {''.join(VERBS)}, got {self.operations!r}")


DEFAULT_DIFFICULTY = Difficulty()
START_DIFFICULTY = Difficulty(min_steps=3, max_steps=5)
"""Of the model that `negtune.models.arithmetic.START_TRAINING` gives: long enough for errors at many places."""


def chains(n: int, *, seed: int = 0, split: str = "train", difficulty: Difficulty = DEFAULT_DIFFICULTY) -> list[Row]:
    """`n` distinct problems of one split with their solutions.

    The split of a question follows from its text alone, so no question is in two splits, whatever the seeds and
    difficulties. The first rows of a longer list are the shorter list of the same seed. Lists of one split and two
    seeds may share questions.

    Args:
        n: number of problems.
        seed: of the draws.
        split: `train`, `validation` (to choose settings on) or `test`.
        difficulty: which chains are drawn.

    Returns:
        Rows with `question`, `steps` (`["4 + 3 = 7", ...]`), `answer` (text) and `n_steps`.

    Raises:
        ValueError: an unknown split, or too few different questions of this difficulty.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng, rows = random.Random(seed), dict[str, Row]()
    misses = 0
    while len(rows) < n:
        row = _draw(rng, difficulty)
        if row and split_of(row["question"]) == split and row["question"] not in rows:
            rows[row["question"]] = row
            misses = 0
            continue
        misses += 1
        if misses > _MOST_MISSES:
            raise ValueError(
                f"{difficulty} gives about {len(rows)} different {split} questions, {n} were asked for; ask for fewer, "
                "or allow more steps or larger numbers"
            )
    return list(rows.values())


def split_of(question: str) -> str:
    """The split that a question belongs to."""
    first = hashlib.sha256(question.encode()).digest()[0]
    return next(name for name, bytes_of_split in SPLITS.items() if first in bytes_of_split)


def parse_question(question: str) -> tuple[int, list[Operation]]:
    """The first number and the operations in order. Raises ValueError for a text that is no chain."""
    found = _QUESTION.fullmatch(question)
    if found is None:
        raise ValueError(f"{question[:100]!r} is no chain; one reads 'Start with 4. Add 3. What is the result?'")
    signs = {verb: sign for sign, verb in VERBS.items()}
    return int(found[1]), [(signs[verb], int(number)) for verb, number in _CLAUSE.findall(found[2])]


def prompt_row(row: Mapping[str, Any]) -> Row:
    """`row` with the plain-text columns `prompt` (the question and a newline) and `completion` (its steps as text)."""
    return {**row, "prompt": f"{row['question']}\n", "completion": solution_text(row["steps"])}


def solution_text(steps: Sequence[str]) -> str:
    """One step per line, then `#### ` and the result of the last step."""
    return "\n".join([*steps, f"#### {steps[-1].rpartition(' ')[2]}"])


def corrupt(row: Mapping[str, Any], *, rng: random.Random) -> Row:
    """The problem with a solution that goes wrong at one step, chosen evenly, and is carried on faithfully.

    The wrong result is 1 to 5 off, and not below 0; later results may be, and may leave the difficulty's limit. Since
    no operation by a number from 1 on maps two numbers to one, the final result is wrong too.

    Args:
        row: a row of `chains`.
        rng: draws the step and the error.

    Returns:
        The row with other `steps`, and `labels` (per step: 1 before the error, 0 from it on), `first_error` (index of
        the wrong step) and `final_correct` (False). `answer` stays the true one.
    """
    value, operations = parse_question(row["question"])
    wrong, steps = rng.randrange(len(operations)), list[str]()
    for i, (sign, number) in enumerate(operations):
        result = FUNCTIONS[sign](value, number)
        if i == wrong:
            offsets = [d for d in range(-_LARGEST_ERROR, _LARGEST_ERROR + 1) if d != 0 and result + d >= 0]
            result += rng.choice(offsets)
        steps.append(_step(value, sign, number, result))
        value = result
    labels = [int(i < wrong) for i in range(len(operations))]
    return {**row, "steps": steps, "labels": labels, "first_error": wrong, "final_correct": False}


def first_wrong_step(row: Mapping[str, Any], completion: str) -> int | None:
    """Index of the first line of a solution that is not what it should be; None if all are right.

    Lines are counted from 0 without blank ones: the steps `0 ... n_steps - 1`, then the answer at `n_steps`. A line is
    wrong if it cannot be read, if its arithmetic is wrong, if it uses another number or operation than the question
    asks for there (`3 + 4` for `4 + 3` is fine), if it is missing, or if it follows the answer. A step that is right
    by itself but goes on from a wrong result is later than the first wrong one, so it is never asked about.

    Args:
        row: with the `question`.
        completion: the solution, whoever wrote it.
    """
    value, operations = parse_question(row["question"])
    lines = [line for line in completion.split("\n") if line.strip()]
    for i, (sign, number) in enumerate(operations):
        result = FUNCTIONS[sign](value, number)
        if i >= len(lines) or not _is_right(lines[i], value, sign, number, result):
            return i
        value = result
    answer = _ANSWER.fullmatch(lines[len(operations)]) if len(lines) > len(operations) else None
    if answer is None or int(answer[1]) != value:
        return len(operations)
    return len(operations) + 1 if len(lines) > len(operations) + 1 else None


def _draw(rng: random.Random, difficulty: Difficulty) -> Row | None:
    """One chain, every step drawn from those that stay in 0 ... limit; None where there is none."""
    value = first = rng.randint(1, difficulty.largest)
    clauses, steps = list[str](), list[str]()
    for _ in range(rng.randint(difficulty.min_steps, difficulty.max_steps)):
        allowed = [
            (sign, number)
            for sign in difficulty.operations
            for number in range(1, difficulty.largest + 1)
            if 0 <= FUNCTIONS[sign](value, number) <= difficulty.limit
        ]
        if not allowed:
            return None
        sign, number = rng.choice(allowed)
        result = FUNCTIONS[sign](value, number)
        clauses.append(f"{VERBS[sign]} {number}.")
        steps.append(_step(value, sign, number, result))
        value = result
    question = f"Start with {first}. {' '.join(clauses)} What is the result?"
    return {"question": question, "steps": steps, "answer": str(value), "n_steps": len(steps)}


def _step(value: int, sign: str, number: int, result: int) -> str:
    return f"{value} {sign} {number} = {result}"


def _is_right(line: str, value: int, sign: str, number: int, result: int) -> bool:
    found = _STEP.fullmatch(line)
    if found is None:
        return False
    written = (int(found[1]), found[2], int(found[3]), int(found[4]))
    swapped = (number, sign, value, result)
    return written == (value, sign, number, result) or (sign != "-" and written == swapped)
