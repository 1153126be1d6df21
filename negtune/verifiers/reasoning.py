"""Answers to reasoning-gym's procedural tasks, scored by the task's own `score_answer`, in the code sandbox.

Not a formality: several of its tasks call `eval` or sympy's `parse_expr` on the answer (countdown, n_queens, the
integrals ...), so what a model writes would run inside the training process. Scoring happens in a sandboxed process of
its own; and for those tasks an answer that is anything but numbers, names, operators and calls of functions of
mathematics is wrong before anybody evaluates it, since evaluated code could also print a score.
"""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from negtune.verifiers.code import SandboxLevel, sandbox_level
from negtune.verifiers.sandbox.launch import Limits, Sandbox, SandboxError
from negtune.verifiers.verdict import Completion, Verdict, text_of

EVALUATING = frozenset(
    {
        *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "puzzle24", "countdown"),
        *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
    }
)
"""Tasks of reasoning-gym 0.1.25 that evaluate the answer."""
FUNCTIONS = frozenset("sin cos tan asin acos atan sinh cosh tanh exp log ln sqrt abs Abs pi E C".split())
_MARK = "negtune-score"
_SCORER = f"""
import json, sys
given = json.load(sys.stdin)
import reasoning_gym
score = reasoning_gym.get_score_answer_fn(given["entry"]["metadata"]["source_dataset"])
print("{_MARK}", float(score(answer=given["answer"], entry=given["entry"])))
"""


class ReasoningGymVerifier:
    """Correct if the task's own scorer gives at least `threshold`; the score is kept, partial credit included.

    Columns of `verify` are those of a reasoning-gym entry: `answer`, `metadata` with `source_dataset`, and `question`
    if it is there. The answer of a completion stands in its last `<answer>` tag, or is all of it behind `</think>`.

    Args:
        threshold: score from which an answer is correct.
        seconds: CPU time for one answer.
        workers: answers at a time; the number of cores by default.
        sandbox: as in `CodeVerifier`.

    Raises:
        ModuleNotFoundError: `reasoning-gym` is not installed (`pip install 'negtune[verify]'`).
        ValueError: no sandbox of the asked kind works here.
    """

    def __init__(
        self,
        *,
        threshold: float = 1.0,
        seconds: float = 10.0,
        workers: int | None = None,
        sandbox: SandboxLevel = "auto",
    ) -> None:
        import importlib.util

        if importlib.util.find_spec("reasoning_gym") is None:
            raise ModuleNotFoundError("No module named 'reasoning_gym'", name="reasoning_gym")
        self.threshold, self.limits = threshold, Limits(seconds, 2048)
        count = workers or os.cpu_count() or 1
        level = sandbox_level(sandbox)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="negtune-reasoning")
        self._all = [Sandbox(level, preload=["reasoning_gym"]) for _ in range(count)]
        self._free: SimpleQueue[Sandbox] = SimpleQueue()
        for one in self._all:
            self._free.put(one)

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        """One verdict per completion. Raises ValueError for a row that is no reasoning-gym entry."""
        entries = []
        for row in range(len(completions)):
            entry = {name: columns[name][row] for name in ("question", "answer", "metadata") if name in columns}
            if not isinstance(entry.get("metadata"), Mapping) or "source_dataset" not in entry["metadata"]:
                raise ValueError(f"row {row} has no metadata with source_dataset; give the columns of reasoning-gym")
            entries.append(entry)
        return list(self._pool.map(self._one, map(text_of, completions), entries))

    def close(self) -> None:
        """End all processes. Also at the end of a `with` block."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for one in self._all:
            one.close()

    def __enter__(self) -> ReasoningGymVerifier:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _one(self, text: str, entry: Mapping[str, Any]) -> Verdict:
        start = time.perf_counter()
        answer, task = answer_of(text), entry["metadata"]["source_dataset"]
        if task in EVALUATING and not is_expression(answer):
            return Verdict("wrong", reason=f"{answer[:100]!r} is no expression", seconds=time.perf_counter() - start)
        sandbox = self._free.get()
        try:
            given = json.dumps({"answer": answer, "entry": entry}, default=str)
            printed, ended = sandbox.run_program(_SCORER, given, self.limits)
        except SandboxError as error:
            printed, ended = "", f"sandbox: {error}"
        finally:
            self._free.put(sandbox)
        seconds = time.perf_counter() - start
        lines = [line for line in printed.splitlines() if line.startswith(_MARK)]
        if ended or len(lines) != 1:
            return Verdict(
                "unscored", reason=f"the scorer of {task} failed: {ended or printed[:200]!r}", seconds=seconds
            )
        score = float(lines[0].split()[1])
        outcome = "correct" if score >= self.threshold else "wrong"
        return Verdict(outcome, score, f"{answer[:100]!r} scores {score:g} in {task}", seconds)


def answer_of(text: str) -> str:
    """What stands in the last `<answer>` tag, else everything behind `</think>`."""
    tagged = re.findall(r"<answer>\s?(.*?)\s?</answer>", text, re.DOTALL)
    return (tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


def is_expression(answer: str) -> bool:
    """Whether an answer is made of literals, single-letter names, operators and calls of `FUNCTIONS` only.

    Text that is no Python at all (a board of digits, a polynomial with implicit products) cannot be evaluated either,
    if it has no brackets after a word, no dots after a name and no underscores.
    """
    if len(answer) > 10_000:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return not re.search(r"_|[A-Za-z]\w*\s*\.|\w\w\s*[(\[]|\blambda\b|:=|`", answer)
    allowed = (
        ast.Expression,
        ast.Constant,
        ast.List,
        ast.Tuple,
        ast.BinOp,
        ast.UnaryOp,
        ast.operator,
        ast.unaryop,
        ast.Load,
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if node.id not in FUNCTIONS and not re.fullmatch(r"[A-Za-z]", node.id):
                return False
        elif isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords:
                return False
        elif not isinstance(node, allowed):
            return False
    return True
