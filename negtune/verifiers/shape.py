"""Rewards that read the shape of a completion: how long it is, and whether it is one sentence.

The length rewards are those of "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data"
(https://arxiv.org/abs/2404.14367): the best completion is rare under the reference (`min_length`) or typical of it
(`mode_length`). TRL's signature; a completion's length is that of its tokens, EOS included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from negtune.verifiers.verdict import Completion, text_of

_SENTENCE = re.compile(r"[A-Z][^.!?\n]*[.!?]")


class MinLength:
    """-length/limit: the shorter the better.

    Args:
        limit: tokens that count as -1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float]:
        return [-len(ids) / self.limit for ids in completion_ids]


class ModeLength:
    """-|length - mode|/limit: the closer to the typical length the better.

    Args:
        mode: tokens of a typical completion.
        limit: tokens of deviation that count as -1.
    """

    def __init__(self, mode: int, limit: int) -> None:
        self.mode, self.limit = mode, limit

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float]:
        return [-abs(len(ids) - self.mode) / self.limit for ids in completion_ids]


class OneSentence:
    """1 for exactly one sentence, from a capital letter to its only full stop, exclamation or question mark; else 0."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(_SENTENCE.fullmatch(text_of(completion).strip()) is not None) for completion in completions]
