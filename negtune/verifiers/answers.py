"""Find the one answer that a completion commits to.

Pure text work. A completion that reasons in <think> tags, hedges between several answers, or only mentions a number
while denying it, commits to nothing: no answer is found, and a verifier calls that wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

Mode = Literal["auto", "boxed", "last_number", "choice"]

_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+"
_DENIAL = re.compile(r"\b(?:not|n't|cannot|never|neither|isn't|wasn't|wrong|incorrect|guess|unlikely)\b|n't\b", re.I)
_STATED = re.compile(
    r"(?:\banswer|\bresult|\bsolution|\btotal|\bfinal value)s?\b[^.:=\n]{0,40}?"
    r"(?:\bis\b|\bare\b|\bequals\b|:|=)\s*[:=]?\s*(.+)",
    re.I,
)
_LETTER = re.compile(r"\(([A-Z])\)|(?<![A-Za-z])([A-Z])(?=\s*(?:[.,;:!)*]|$|\bor\b|\band\b))")
"""A choice, and no pronoun or article: in brackets, or before a stop."""
_HASHES = re.compile(r"^####\s*+(.*\S)", re.MULTILINE)
_CONTRAST = re.compile(r"(?:,|(?<!\s))\s++(?:not|rather than|instead of|and not)\s")
"""Tried once for each run of white space, however long it is."""
_CHOICE_STATED = re.compile(r"\b(?:answer|option|choice|correct)\b[^.\n]{0,30}?(?:\bis\b|:|=)?\s*(.+)", re.I)


def find_answer(text: str, mode: Mode = "auto") -> str | None:
    """The answer `text` commits to, or None.

    Args:
        text: a completion.
        mode: `boxed` takes `\\boxed{}` only; `last_number` the last number; `choice` a letter A to Z; `auto` the
            first of these that is there: `\\boxed{}`, `#### answer`, "the answer is", a bold text, a text of one line,
            the last number of a last sentence that denies nothing.
    """
    text = _committed(text).strip()
    if mode == "choice":
        return _choice(text)
    if mode == "last_number":
        return _last(re.findall(_NUMBER, text))
    boxed = boxes(text)
    if boxed:
        last = _canonical(text[boxed[-1]])
        return text[boxed[-1]] if all(_canonical(text[box]) == last for box in boxed) else None
    if mode == "boxed":
        return None
    for find in (_hashes, _stated, _bold, _single_line, _last_number_undenied):
        found = find(text)
        if found is not None:
            return found or None
    return None


def find_word(text: str, words: Sequence[str]) -> str | None:
    """Which one of a few words (yes and no) `text` commits to: where an answer is stated, else in all of it."""
    text = _committed(text)
    for part in (*(text[box] for box in boxes(text)[-1:]), _stated(text) or "", text):
        found = {word for word in words if re.search(rf"\b{word}\b", part, re.I)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def find_gold(text: str) -> str:
    """The answer of a solution written by the data set's authors: `\\boxed{}`, `#### answer`, or the text itself."""
    boxed = boxes(text)
    if boxed:
        return text[boxed[-1]]
    return _hashes(text) or text.strip()


def after_thinking(text: str) -> str:
    """What follows the reasoning: nothing, if that does not end."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def answer_blocks(text: str) -> list[str]:
    """What stands between each `<answer>` and the next `</answer>`, in one pass however many are never closed."""
    blocks, start = [], None
    for tag in re.finditer(r"<(/?)answer>", text, re.IGNORECASE):
        if not tag[1]:
            start = tag.end() if start is None else start
        elif start is not None:
            blocks.append(text[start : tag.start()])
            start = None
    return blocks


def boxes(text: str) -> list[slice]:
    """Where each `\\boxed{}` that is closed and not empty has its content, in one pass however many are never closed.

    Slices, since boxes in boxes hold far more text together than there is.
    """
    opened: list[int] = []
    closed: dict[int, int] = {}
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            closed[opened.pop()] = brace.start()
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text) if match.end() in closed]
    found = (_without_space(text, start, closed[start]) for start in starts)
    return [box for box in found if box.start < box.stop]


def _without_space(text: str, start: int, stop: int) -> slice:
    while start < stop and text[start].isspace():
        start += 1
    while start < stop and text[stop - 1].isspace():
        stop -= 1
    return slice(start, stop)


def _committed(text: str) -> str:
    """What follows the reasoning; inside <answer> tags, if all pairs of them hold the same."""
    text = after_thinking(text)
    tagged = answer_blocks(text)
    if tagged:
        return tagged[0] if len({_canonical(t) for t in tagged}) == 1 else ""
    return text


def _hashes(text: str) -> str | None:
    return _last(_HASHES.findall(text))


def _stated(text: str) -> str | None:
    """What follows the last "the answer is", up to the end of its sentence; "" for more than one answer or none."""
    found = None
    for line in text.splitlines():
        for match in _STATED.finditer(line):
            if not _DENIAL.search(line[max(0, match.start() - 20) : match.start(1)]):
                found = _trimmed(match[1])
    if found is None:
        return None
    found = _CONTRAST.split(found, maxsplit=1)[0]
    if re.search(r"\bor\b", found) or _DENIAL.search(found):
        return ""
    return found if len(found.split()) <= 4 or "$" in found else _first_value(found) or ""


def _trimmed(text: str) -> str:
    """Without the sentence's end and without markup around the whole."""
    inner = re.match(r"\$(.+?)\$", text)
    if inner:
        return inner[1]
    sentence = re.split(r"(?<!\d)\.(?=\s|$)|\.(?=\s*$)|[;!?]\s|\s(?:because|since|which|so)\s", text)[0]
    return sentence.strip().strip("*`_ ").removesuffix(".").strip()


def _first_value(text: str) -> str | None:
    match = re.search(_NUMBER, text)
    return match[0] if match else None


def _bold(text: str) -> str | None:
    found = [b.strip().rstrip(".") for b in re.findall(r"\*\*(.+?)\*\*", text)]
    return found[-1] if found and len(found[-1].split()) <= 4 and not found[-1].endswith(":") else None


def _single_line(text: str) -> str | None:
    if not text or "\n" in text or len(text.split()) > 4 or text.endswith((":", "?")) or _DENIAL.search(text):
        return None
    return _trimmed(text)


def _last_number_undenied(text: str) -> str | None:
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(_NUMBER, s)]
    if not sentences or _DENIAL.search(sentences[-1]) or sentences[-1].rstrip().endswith("?"):
        return None
    return _last(re.findall(_NUMBER, sentences[-1]))


def _choice(text: str) -> str | None:
    """One letter: boxed, stated, or alone. Several different ones are no choice."""
    for part in _choice_parts(text):
        letters = {a or b for a, b in _LETTER.findall(part)}
        if len(letters) == 1:
            return letters.pop()
        if letters:
            return None
    return text.strip("() .").upper() if re.fullmatch(r"\(?[A-Za-z]\)?\.?", text) else None


def _choice_parts(text: str) -> Iterator[str]:
    boxed = boxes(text)
    if boxed:
        yield "; ".join(text[box] for box in boxed)  # each box ends like the text does
        return
    stated = [m[1] for line in text.splitlines() for m in _CHOICE_STATED.finditer(line) if not _DENIAL.search(m[0])]
    if stated:
        yield re.split(r"[.;\n]", stated[-1])[0]
    yield from reversed([line for line in text.splitlines() if line.strip()][-1:])


def _canonical(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _last(found: list[str]) -> str | None:
    return found[-1] if found else None
