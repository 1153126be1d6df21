"""Answers to mathematics, compared with the gold answer by value.

`answers` finds what the completion commits to; numbers and words are compared here, exactly; everything else goes to
`math-verify`, which stands on sympy and can take for ever, so it runs in workers that are killed.
"""

from __future__ import annotations

import logging
import re
import time
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from negtune.verifiers.answers import Mode, find_answer, find_gold, find_word
from negtune.verifiers.verdict import Completion, Verdict, text_of
from negtune.verifiers.workers import Failed, WorkerPool


class MathVerifier:
    """Correct if the completion commits to one answer and it equals the gold answer.

    Column of `verify`: the gold answers, under `column`; whole solutions that end in `#### 18` or hold `\\boxed{18}`
    are fine.

    Args:
        mode: where the answer stands; see `answers.find_answer`.
        column: name of the gold answers' column.
        tolerance: relative difference up to which a decimal number equals the exact one.
        seconds: for one comparison that needs sympy; beyond that the completion is unscored.
        workers: processes for these; the number of cores by default.

    Raises:
        ModuleNotFoundError: `math-verify` is not installed (`pip install 'negtune[verify]'`).
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        column: str = "answer",
        tolerance: float = 1e-6,
        seconds: float = 5.0,
        workers: int | None = None,
    ) -> None:
        import math_verify

        del math_verify  # asked for here, not when the first completion needs it
        if mode not in ("auto", "boxed", "last_number", "choice"):
            raise ValueError(f"mode must be auto, boxed, last_number or choice, got {mode!r}")
        self.mode, self.column, self.tolerance = mode, column, tolerance
        self._pool = WorkerPool(equal_by_sympy, seconds=seconds, workers=workers)
        self._golds: dict[str, str] = {}

    def check_gold(self, golds: Sequence[Any]) -> None:
        """Raise ValueError, naming the row, for a gold answer that no completion could ever equal."""
        new = [(row, gold) for row, gold in enumerate(golds) if not isinstance(gold, str) or gold not in self._golds]
        for row, gold in new:
            if not isinstance(gold, str | int | float) or isinstance(gold, bool) or not str(gold).strip():
                raise ValueError(f"row {row}: the gold answer is {gold!r}; give text or a number, or drop the row")
        found = {str(gold): find_gold(str(gold)) for _, gold in new}
        hard = [text for text, answer in found.items() if _needs_sympy(answer)]
        parsed = dict(zip(hard, self._pool.map([(found[text], found[text]) for text in hard]), strict=True))
        for row, gold in new:
            text = str(gold)
            answer = found[text]
            if self.mode == "last_number" and _number(answer) is None:
                raise ValueError(f"row {row}: the gold answer {answer!r} is no number, which mode=last_number needs")
            if self.mode == "choice" and not re.fullmatch(r"\(?[A-Za-z]\)?", answer):
                raise ValueError(f"row {row}: the gold answer {answer!r} is no letter, which mode=choice needs")
            if parsed.get(text, True) is not True or answer.count("{") != answer.count("}"):
                raise ValueError(f"row {row}: the gold answer {answer!r} cannot be read as mathematics; correct it")
        self._golds |= found

    def verify(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[Verdict]:
        """One verdict per completion. Raises ValueError for a gold answer that is missing or unreadable."""
        if self.column not in columns:
            raise ValueError(f"column {self.column!r} is missing; name the gold answers' column with column=")
        self.check_gold(columns[self.column])
        golds = [self._golds[str(gold)] for gold in columns[self.column]]
        start = time.perf_counter()
        answers = [self._find(text_of(completion), gold) for completion, gold in zip(completions, golds, strict=True)]
        equal: list[Any] = [
            None if answer is None else self._equal(answer, gold) for answer, gold in zip(answers, golds, strict=True)
        ]
        hard = [i for i, value in enumerate(equal) if value is NotImplemented]
        for i, value in zip(hard, self._pool.map([(answers[i], golds[i]) for i in hard]), strict=True):
            equal[i] = value
        seconds = (time.perf_counter() - start) / max(1, len(completions))
        return [_verdict(*row, seconds) for row in zip(answers, golds, equal, strict=True)]

    def close(self) -> None:
        """End the workers. Also at the end of a `with` block."""
        self._pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _find(self, completion: str, gold: str) -> str | None:
        """With mode=auto the gold answer says what kind of answer to look for: a letter, yes or no, or any."""
        if self.mode != "auto":
            return find_answer(completion, self.mode)
        pair = next((pair for pair in _PAIRS if gold.strip(". ").lower() in pair), None)
        if pair is not None:
            return find_word(completion, pair)
        return find_answer(completion, "choice" if re.fullmatch(r"\(?[A-Z]\)?", gold) else "auto")

    def _equal(self, answer: str, gold: str) -> Any:
        """True, False, or NotImplemented where sympy has to decide."""
        if _words(answer) == _words(gold):
            return True
        ours, theirs = _number(answer), _number(gold)
        if ours is not None and theirs is not None:
            if _unit(answer) and _unit(gold) and _unit(answer) != _unit(gold):
                return False
            return abs(ours - theirs) <= Fraction(self.tolerance) * abs(theirs)
        if not _needs_sympy(gold) and theirs is None:
            return False
        return NotImplemented


def equal_by_sympy(pair: tuple[str, str]) -> bool | None:
    """Whether `math-verify` finds (answer, gold) equal; None if it cannot read the gold answer."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we keep the time
    answer, gold = (parse(f"${_latex(text)}$", parsing_timeout=0) for text in pair)
    if not gold:
        return None
    return bool(answer) and verify(gold, answer, timeout_seconds=0)


def _verdict(answer: str | None, gold: str, equal: Any, seconds: float) -> Verdict:
    if answer is None:
        return Verdict("wrong", reason="no single answer found", seconds=seconds)
    if isinstance(equal, Failed):
        return Verdict("unscored", reason=equal.reason, seconds=equal.seconds)
    return Verdict("correct" if equal else "wrong", reason=f"{answer!r} against {gold!r}", seconds=seconds)


_PAIRS = (("yes", "no"), ("true", "false"))
_SUPERSCRIPTS = str.maketrans({d: f"^{i}" for i, d in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})


def _plain(text: str) -> str:
    """Without LaTeX wrappers that change nothing, and in plain characters (½, full-width digits, superscripts)."""
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).replace("⁄", "/")
    text = text.replace("−", "-").replace("\\!", "").replace("\\,", "").replace("\\ ", " ")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\left|\\right", "", text)
    return text.replace("\\%", "%").replace("\\$", "").replace("$", "").strip().rstrip(".").strip()


def _latex(text: str) -> str:
    return _plain(text).replace("π", "\\pi ").replace("%", "\\%").replace("√", "\\sqrt ").replace("∞", "\\infty ")


_VALUE = re.compile(
    r"(?P<number>[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"(?:\s*/\s*(?P<below>\d+))?\s*(?P<percent>%?)"
    r"\s*(?P<unit>[A-Za-z°][A-Za-z°²³ /^]*)?"
)


def _number(text: str) -> Fraction | None:
    """The exact value of a number, a fraction of whole numbers or a percentage, with a unit behind it or not."""
    plain = re.sub(r"^([-+]?)\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1\2/\3", _plain(text))
    match = _VALUE.fullmatch(plain)
    if match is None or not match["number"].strip("+-") or match["number"].strip("+-")[:1] in "eE":
        return None
    try:
        exact = Decimal(match["number"].replace(",", ""))
        if abs(exact.adjusted()) > 1000:  # its fraction would fill the memory
            return None
        value = Fraction(exact)
        value = value / int(match["below"]) if match["below"] else value
    except (InvalidOperation, ZeroDivisionError, OverflowError):
        return None
    return value / 100 if match["percent"] else value


def _unit(text: str) -> str:
    match = _VALUE.fullmatch(_plain(text))
    return " ".join((match["unit"] or "").lower().split()).removesuffix("s") if match else ""


def _words(text: str) -> str:
    """For comparison as text: case, articles, spaces and outer punctuation do not count."""
    plain = re.sub(r"\b(?:the|a|an)\b\s+", "", _plain(text).lower())
    return re.sub(r"\s+", "", plain).strip(".,;:!\"'`* ") if len(plain) > 1 else plain


def _needs_sympy(gold: str) -> bool:
    """Whether a gold answer is mathematics beyond a number and plain words."""
    return _number(gold) is None and not re.fullmatch(r"[A-Za-z][A-Za-z ,.'-]*", _plain(gold))
