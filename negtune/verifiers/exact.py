"""Verifiers that compare text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from negtune.verifiers.verdict import Completion, Verdict, text_of


class ExactVerifier:
    """Correct if the completion, or what a pattern finds in it, is the gold text.

    Args:
        column: of the gold texts.
        pattern: regular expression; its last match in the completion is compared, or the first group of it. None: the
            whole completion. Without a match the completion is wrong.
        ignore_case: whether case counts.

    Space at both ends never counts.
    """

    def __init__(self, column: str = "answer", *, pattern: str | None = None, ignore_case: bool = False) -> None:
        self.column, self.ignore_case = column, ignore_case
        try:
            self.pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        """One verdict per completion. Raises ValueError for a missing gold text."""
        if self.column not in columns:
            raise ValueError(f"column {self.column!r} is missing; name the gold texts' column with column=")
        return [
            self._one(text_of(completion), gold, row)
            for row, (completion, gold) in enumerate(zip(completions, columns[self.column], strict=True))
        ]

    def _one(self, text: str, gold: Any, row: int) -> Verdict:
        if gold is None or not str(gold).strip():
            raise ValueError(f"row {row}: the gold text is {gold!r}; give one, or drop the row")
        found = self._found(text)
        if found is None:
            return Verdict("wrong", reason="the pattern does not match")
        same = self._plain(found) == self._plain(str(gold))
        return Verdict("correct" if same else "wrong", reason=f"{found.strip()[:100]!r} against {str(gold)[:100]!r}")

    def _found(self, text: str) -> str | None:
        if self.pattern is None:
            return text
        matches = list(self.pattern.finditer(text))
        return matches[-1][1 if self.pattern.groups else 0] if matches else None

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()

    def __enter__(self) -> ExactVerifier:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass
