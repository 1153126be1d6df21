"""Run model-written Python against tests, in the sandbox.

Two kinds of task: tests (asserts, unittest classes, `test_...` functions, HumanEval's `check(candidate)`), and programs
that read standard input and print.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Literal

from negtune.verifiers.sandbox.launch import LEVELS, Limits, Sandbox, SandboxError, strongest_level
from negtune.verifiers.verdict import Completion, Outcome, Verdict, text_of

logger = logging.getLogger(__name__)

SandboxLevel = Literal["auto", "bubblewrap", "namespaces", "rlimits"]


class CodeVerifier:
    """Verdicts on Python code: correct if all its tests pass.

    Columns of `verify`, one entry per completion:

    - `tests`: source of the tests, or a list of statements (MBPP's `test_list`). The code's names are visible, and
      `from solution import name` works. `entry_point` names the function asked for; HumanEval's `check` needs it.
    - or `inputs` and `outputs`: standard input and expected standard output of each run of the code as a program.
      Trailing white space does not count.
    - `code_prefix`: put before the completion's code (HumanEval's prompt).

    The code and its tests run in two processes that exchange plain values only, so code that prints "passed", exits,
    patches `assert` or returns an object that equals everything is wrong like any other. Wrong are failed tests, errors
    and exceeded limits; unscored are tests that do not run, and failures of the sandbox itself.

    Args:
        seconds: CPU time for the code, and as much for its tests; on the clock four times that.
        memory_mib: address space of either process.
        workers: jobs at a time; the number of cores by default.
        sandbox: `auto` takes bubblewrap, else namespaces of our own; `rlimits` (resource limits and no more: the code
            can read and write your files) has to be asked for.
        packages: whether the code may import this environment's packages. They are read-only.
        preload: modules imported once for all jobs. Importing numpy takes 0.1 s each time otherwise.
        module: under which name the tests may import the code.

    Raises:
        ValueError: no sandbox of the asked kind works here; the message says why, and what can be done.
    """

    def __init__(
        self,
        *,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        workers: int | None = None,
        sandbox: SandboxLevel = "auto",
        packages: bool = True,
        preload: Sequence[str] = (),
        module: str = "solution",
    ) -> None:
        if seconds <= 0 or memory_mib < 64:
            raise ValueError(f"need seconds > 0 and memory_mib >= 64, got {seconds} and {memory_mib}")
        self.limits = Limits(seconds, memory_mib)
        self.module = module
        self.level = sandbox_level(sandbox)
        count = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="negtune-code")
        self._sandboxes: SimpleQueue[Sandbox] = SimpleQueue()
        self._all = [Sandbox(self.level, packages=packages, preload=preload) for _ in range(count)]
        for one in self._all:
            self._sandboxes.put(one)

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        """One verdict per completion, in order; completions are judged in parallel."""
        rows = [
            {name: values[i] for name, values in columns.items() if name in _COLUMNS} for i in range(len(completions))
        ]
        for i, row in enumerate(rows):
            if not row.get("tests") and not ("inputs" in row and "outputs" in row):
                raise ValueError(f"row {i} has no tests; give a column tests, or the columns inputs and outputs")
        return list(self._pool.map(self._verify_one, completions, rows))

    def close(self) -> None:
        """End all processes. Also at the end of a `with` block."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for one in self._all:
            one.close()

    def __enter__(self) -> CodeVerifier:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _verify_one(self, completion: Completion, row: Mapping[str, Any]) -> Verdict:
        start = time.perf_counter()
        code = (row.get("code_prefix") or "") + extract_code(text_of(completion))
        sandbox = self._sandboxes.get()
        try:
            outcome, reason = self._run(sandbox, code, row)
        except SandboxError as error:
            outcome, reason = "unscored", f"sandbox: {error}"
        finally:
            self._sandboxes.put(sandbox)
        return Verdict(outcome, reason=reason, seconds=time.perf_counter() - start)

    def _run(self, sandbox: Sandbox, code: str, row: Mapping[str, Any]) -> tuple[Outcome, str]:
        if row.get("tests"):
            tests = row["tests"] if isinstance(row["tests"], str) else "\n".join(row["tests"])
            found = sandbox.run_tests(code, tests, row.get("entry_point"), self.module, self.limits)
            return found["outcome"], found["reason"]
        for number, (given, expected) in enumerate(zip(row["inputs"], row["outputs"], strict=True), start=1):
            printed, ended = sandbox.run_program(code, given, self.limits)
            if ended:
                return "wrong", f"input {number}: {ended}"
            if _lines(printed) != _lines(expected):
                return "wrong", f"input {number}: printed {printed[:100]!r}, expected {expected[:100]!r}"
        return "correct", ""


_COLUMNS = ("tests", "entry_point", "inputs", "outputs", "code_prefix")


def extract_code(text: str) -> str:
    """The last fenced block of `text` (an unfinished one counts), or all of it if there is none."""
    blocks = re.findall(
        r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE | re.IGNORECASE
    )
    return blocks[-1] if blocks else text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def sandbox_level(asked: str) -> str:
    """The level that `asked` means here. Raises ValueError where it does not work, or `auto` finds no isolation."""
    if asked not in ("auto", *LEVELS):
        raise ValueError(f"sandbox must be auto, {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {asked!r}")
    level, why = strongest_level()
    if asked == "auto" and level == "rlimits":
        raise ValueError(
            f"model-written code cannot be isolated here ({why}). Install bubblewrap or allow user namespaces; "
            "sandbox='rlimits' runs it with resource limits only, where it can read and write your files"
        )
    if asked != "auto" and LEVELS.index(asked) < LEVELS.index(level):
        raise ValueError(f"sandbox={asked} does not work here ({why}); sandbox={level} does")
    chosen = level if asked == "auto" else asked
    logger.info("code sandbox: %s%s", chosen, f" ({why})" if why and chosen == level else "")
    if chosen == "rlimits":
        logger.warning(
            "code sandbox: resource limits only; the code can read and write your files and see your processes"
        )
    return chosen
