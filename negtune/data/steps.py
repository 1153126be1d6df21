"""A solution cut into steps: as text, and on token boundaries from which a model can go on.

A splitter turns a completion into step texts that join to it again; white space stays where the next step's first
token is whole. On tokens a step ends with the first token behind its last character, so that a prefix of steps is a
prefix of the completion's ids: it is handed to a sampler as ids, never as text, stays inside the open assistant turn,
and has no EOS. Only the last step of a finished completion ends with the EOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

Splitter = Callable[[str], Sequence[str]]


class StepError(ValueError):
    """Steps that do not fit the completion; the message says where."""


def split_lines(text: str) -> list[str]:
    """One step per line that is not blank; blank lines belong to the step before (to the first, at the start)."""
    pieces = re.findall(r"[^\n]*\n|[^\n]+$", text)
    steps: list[str] = []
    for piece in pieces:
        if steps and (not piece.strip() or not steps[-1].strip()):
            steps[-1] += piece
        else:
            steps.append(piece)
    return steps


def split_sentences(text: str, *, shortest: int = 20, share: float = 0.3, few: int = 3) -> list[str]:
    """Lines, and sentences where those are `few` or fewer; then pieces that are too short join the one before.

    The rules of Self-Explore for MATH (https://arxiv.org/abs/2404.10346): too short is less than `shortest` characters,
    or than `share` of the mean piece. A too short first piece joins the second. Spaces between two sentences begin the
    second, as in most tokenizers' words; line ends close the first.
    """
    pieces = split_lines(text)
    if len(pieces) <= few:
        pieces = [sentence for piece in pieces for sentence in _sentences(piece)]
    if not pieces:
        return []
    least = max(shortest, share * sum(map(len, pieces)) / len(pieces))
    steps = [pieces[0]]
    for piece in pieces[1:]:
        if len(piece.strip()) < least or len(steps[0].strip()) < least:
            steps[-1] += piece
        else:
            steps.append(piece)
    return steps


def _sentences(line: str) -> list[str]:
    """Cut behind a full stop, question or exclamation mark that white space follows."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]]*(?=[ \t]+\S)|[.!?][\"')\]]*\n+(?=.)", line)]
    return [line[a:b] for a, b in pairwise([0, *ends, len(line)]) if a < b]


SPLITTERS: dict[str, Splitter] = {"lines": split_lines, "sentences": split_sentences}


def split_steps(text: str, splitter: Splitter) -> list[str]:
    """What `splitter` makes of `text`, checked. Raises `StepError` unless the steps join to the text and none is blank.

    A text without a visible character has no steps.
    """
    if not text.strip():
        return []
    steps = list(splitter(text))
    check_steps(steps, text)
    return steps


def check_steps(steps: Sequence[str], text: str) -> None:
    """Raise `StepError`, with the place, unless `steps` join to `text` and none is blank."""
    for i, step in enumerate(steps, start=1):
        if not isinstance(step, str) or not step.strip():
            raise StepError(f"step {i} of {len(steps)} is blank; join it to its neighbour")
    joined = "".join(steps)
    if joined == text:
        return
    at = next((i for i, (a, b) in enumerate(zip(joined, text, strict=False)) if a != b), min(len(joined), len(text)))
    raise StepError(
        f"the {len(steps)} steps do not join to the completion: at character {at} they have {joined[at : at + 20]!r}, "
        f"it has {text[at : at + 20]!r}; a splitter must keep every character, white space too"
    )


def joined_with(steps: Sequence[str], separator: str) -> list[str]:
    """Given steps, each but the last closed by `separator`, so that they join to the completion."""
    return [*(step + separator for step in steps[:-1]), *steps[-1:]]


@dataclass(frozen=True)
class TokenSteps:
    """Steps on the tokens of a completion.

    Args:
        ends: index behind the last token of each step; the last is the number of tokens, a final EOS included.
        texts: what those tokens say; may differ from the splitter's by part of a token.
    """

    ends: list[int]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ends)

    def prefix(self, completion_ids: Sequence[int], steps: int) -> list[int]:
        """Ids of the first `steps` steps; of 0 steps: none. Not of all steps: behind those nothing is left to draw."""
        if not 0 <= steps < len(self):
            raise ValueError(f"a prefix has 0 to {len(self) - 1} of {len(self)} steps, got {steps}")
        return list(completion_ids[: self.ends[steps - 1]]) if steps else []

    def numbers(self) -> list[int]:
        """Step number, from 0, of every token."""
        return [i for i, (a, b) in enumerate(pairwise([0, *self.ends])) for _ in range(a, b)]


def token_steps(completion_ids: Sequence[int], tokenizer: Any, splitter: Splitter | list[str]) -> TokenSteps:
    """Steps of a completion that a model drew, or that a row was tokenised to.

    A step ends with the first token at whose end its text is whole, so that ids of a prefix and of what follows are
    those of the whole. The text of a prefix alone may be tokenised otherwise (GPT-2's rules make one token of two line
    ends, but two where a letter follows): hand on the ids. Two steps that would end with the same token are one.

    Args:
        completion_ids: with or without a final EOS.
        tokenizer: of the ids.
        splitter: function, or the step texts themselves.

    Raises:
        StepError: steps that do not join to the completion's text.
    """
    ids = list(completion_ids)
    text = _text(ids, tokenizer)
    steps = _given(splitter, text) if isinstance(splitter, list) else split_steps(text, splitter)
    if not steps:
        return TokenSteps([len(ids)], [text]) if ids else TokenSteps([], [])
    ends: list[int] = []
    characters = 0
    for step in steps[:-1]:
        characters += len(step)
        end = _token_end(ids, text, characters, tokenizer)
        if end < len(ids) and _text(ids[end:], tokenizer).strip() and end > (ends[-1] if ends else 0):
            ends.append(end)
    ends.append(len(ids))
    cuts = [len(_text(ids[:end], tokenizer)) for end in ends[:-1]]
    return TokenSteps(ends, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])])


def encoded_steps(steps: Sequence[str], tokenizer: Any) -> tuple[list[int], TokenSteps]:
    """Ids of given step texts that join to a finished completion, and the steps on them.

    Steps are encoded one by one, so that each ends with a token wherever the tokenizer would have cut the whole. The
    final EOS belongs to the last.
    """
    parts = [list(tokenizer(step, add_special_tokens=False)["input_ids"]) for step in steps]
    parts[-1].append(tokenizer.eos_token_id)
    return [i for part in parts for i in part], TokenSteps(list(accumulate(map(len, parts))), list(steps))


def _given(steps: Sequence[str], text: str) -> list[str]:
    """Steps of a row, on the text that its tokens say: a chat template may have stripped the turn."""
    joined = "".join(steps)
    if joined != text and joined.strip() and joined.strip() == text.strip():
        moved = joined.index(joined.strip()) - text.index(text.strip())
        ends = [max(0, end - moved) for end in accumulate(map(len, steps))][:-1]
        steps = [text[a:b] for a, b in pairwise([0, *ends, len(text)])]
    check_steps(steps, text)
    return list(steps)


def _token_end(ids: list[int], text: str, characters: int, tokenizer: Any) -> int:
    """Fewest tokens that spell `text[:characters]` and do not end within a character."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(_text(ids[:middle], tokenizer)) < characters:
            low = middle + 1
        else:
            high = middle
    spelled = (_text(ids[:end], tokenizer) for end in range(low, len(ids)))
    whole = (len(prefix) >= characters and text.startswith(prefix) for prefix in spelled)
    return next((end for end, found in enumerate(whole, start=low) if found), len(ids))


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
