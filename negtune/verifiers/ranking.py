"""Rewards for models that write a ranking: `[2] > [1] > [3]` against graded judgements of the documents.

RankGPT's format (https://arxiv.org/abs/2304.09542), bare or in `<answer>` tags as in Rank-R1
(https://arxiv.org/abs/2503.06034) and REARANK (https://arxiv.org/abs/2505.20046). The rewards have TRL's signature and
read columns of the data set: `gains`, one per document in the order shown; `ideal_gains`, of all documents that were
judged relevant, if some of them are not shown; `documents`, if it is there, to compare lengths.

Wrong and unscored are kept apart. A finished completion without a ranking is wrong: it gets what nDCG 0 gets, and
format 0. A prompt without a relevant document has no nDCG: None. A completion that was cut is the trainers' business:
they leave it out, whatever it scored (`mask_truncated_completions`, on by default in `StepGRPOTrainer`,
`AdvantageTrainer` and `PreferenceTrainer`). TRL's `GRPOTrainer` has the switch too, off by default, and there the
rewards of cut completions still count in the baseline of their group.

Only completions are parsed. A document that says "[3] > [1]" cannot rank itself, though it may talk a model into it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch

from negtune.metrics.ranking import ideal_value, place_rewards
from negtune.verifiers.answers import after_thinking, answer_blocks
from negtune.verifiers.verdict import Completion, text_of

_IDENTIFIER = re.compile(r"\[\s*+([0-9]++)\s*+\]")
_BETWEEN = re.compile(r"[\s>,]*+")
_NOTHING_TO_GAIN = 1e-9
"""A shown order whose nDCG is this near to 1 is ideal; the rest is rounding."""


@dataclass(frozen=True)
class Permutation:
    """What a model wrote as a ranking, nothing mended. Documents are counted from 0: `[1]` is document 0.

    Args:
        n: documents that were shown.
        order: those it ranks, best first, each where it comes first.
        repeated: those it names again, once for every time.
        unknown: identifiers of no document, as written.
    """

    n: int
    order: tuple[int, ...]
    repeated: tuple[int, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[int, ...]:
        """Documents it does not rank, in the order shown."""
        ranked = set(self.order)
        return tuple(i for i in range(self.n) if i not in ranked)

    @property
    def complete(self) -> bool:
        """Every document once, and nothing else."""
        return len(self.order) == self.n and not self.repeated and not self.unknown

    @property
    def repaired(self) -> tuple[int, ...]:
        """All documents: those ranked, then those missing in the order shown; as RankGPT does."""
        return self.order + self.missing

    @property
    def share(self) -> float:
        """Documents ranked, of all that were shown or written too much: 1 exactly where complete."""
        return len(self.order) / (self.n + len(self.repeated) + len(self.unknown))


def parse_permutation(text: str, n: int) -> Permutation | None:
    """The ranking of `n` documents that `text` commits to, or None.

    It stands behind the reasoning (`</think>`), in the last `<answer>` block if there is one. A ranking is a run of
    identifiers `[i]` in ASCII digits with space, `>` and commas between them: the longest run, of equally long ones the
    last. A single `[i]` amid other words is a mention and no ranking. Takes time linear in the text.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"a ranking needs n >= 1 documents, got n={n}")
    text = after_thinking(text)
    text = (answer_blocks(text)[-1:] or [text])[0].strip()
    run: list[re.Match[str]] = max(reversed(_runs(text)), key=len, default=[])
    if not run or (len(run) == 1 and run[0][0] != text):
        return None
    return _permutation([match[1] for match in run], n)


@dataclass(frozen=True)
class RankingReward:
    """rank_weight · (nDCG@k, or its relative gain) + format_weight · format, with TRL's signature.

    See `ndcg_reward`, `relative_gain_reward`, `format_reward` and `ranking_reward`, which make it.

    Args:
        name: under which TRL logs it.
        k: places that count.
        relative: the gain over the shown order in place of nDCG itself.
        rank_weight: at 0 judgements play no part, and nothing is unscored.
        format_weight: of `Permutation.share`.

    Raises:
        ValueError: k < 1, a weight that is negative or no number, or both 0.
    """

    name: str
    k: int = 10
    relative: bool = False
    rank_weight: float = 1.0
    format_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"need k >= 1 places, got k={self.k}")
        weights = (self.rank_weight, self.format_weight)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"rank_weight and format_weight must be >= 0 and not both 0, got {weights}")

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        gains: Sequence[Sequence[float]] | None = None,
        ideal_gains: Sequence[Sequence[float] | None] | None = None,
        documents: Sequence[Sequence[str] | None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """One reward per completion; None where no document is relevant.

        Args:
            prompts: not looked at.
            completions: texts or messages.
            gains: of each document in the order shown, linear (for 2^grade - 1, give that).
            ideal_gains: of every document judged relevant, those shown among them; None: those shown are all.
            documents: what was shown.

        Raises:
            ValueError: a row whose gains are missing, not as many as its documents, negative or no numbers, or better
                than its ideal gains.
        """
        if gains is None:
            raise ValueError("column 'gains' is missing; give the data set one list per prompt, a gain per document")
        shown = [_checked(row, "gains", i) for i, row in enumerate(gains)]
        judged = [
            shown[i] if row is None else _checked(row, "ideal_gains", i)
            for i, row in enumerate(ideal_gains or [None] * len(shown))
        ]
        _check_against(shown, judged, documents or [None] * len(shown))
        found = [parse_permutation(text_of(c), len(g)) for c, g in zip(completions, shown, strict=True)]
        formats = [0.0 if ranking is None else ranking.share for ranking in found]
        if self.rank_weight == 0:
            return [self.format_weight * share for share in formats]
        ranks = [None if rank is None else self.rank_weight * rank for rank in self._ranks(found, shown, judged)]
        return [
            None if rank is None else rank + self.format_weight * share
            for rank, share in zip(ranks, formats, strict=True)
        ]

    def _ranks(
        self,
        found: Sequence[Permutation | None],
        shown: Sequence[Sequence[float]],
        judged: Sequence[Sequence[float]],
    ) -> list[float | None]:
        scored = [i for i, gains in enumerate(judged) if any(gains)]
        if not scored:
            return [None] * len(found)
        ranked = [[shown[i][j] for j in _order(found[i])] for i in scored]
        after, before = _ndcgs(ranked, [shown[i] for i in scored], [judged[i] for i in scored], self.k)
        values: list[float | None] = [None] * len(found)
        for i, s, s0 in zip(scored, after, before, strict=True):
            values[i] = relative_gain(s, s0) if self.relative else s
        return values


def relative_gain(ndcg: float, shown: float) -> float:
    """(S - S0)/(1 - S0): the share of what could be gained over the shown order; 0 where nothing could.

    Not bounded below: a completion of nDCG 0 has -S0/(1 - S0), -9 where S0 is .9. Where S0 = 1 a worse order would have
    minus infinity; it has 0, so that only the format tells completions apart.
    """
    return 0.0 if 1 - shown < _NOTHING_TO_GAIN else (ndcg - shown) / (1 - shown)


def ndcg_reward(k: int = 10) -> RankingReward:
    """nDCG@k of the repaired ranking, 0 without one. Errors: see `RankingReward`."""
    return RankingReward(f"ndcg@{k}", k)


def relative_gain_reward(k: int = 10) -> RankingReward:
    """`relative_gain` of nDCG@k over the order in which the documents were shown, as REARANK rewards.

    For one prompt it is a rising straight line in nDCG. So with TRL's `scale_rewards="group"` (the default) it gives
    the advantages that nDCG gives, but for the 1e-4 in TRL's divisor; it differs with `"batch"` or `"none"`, or added
    to other rewards.
    Errors: see `RankingReward`.
    """
    return RankingReward(f"relative_gain@{k}", k, relative=True)


def format_reward() -> RankingReward:
    """`Permutation.share`: 1 for every document exactly once, less for each missing, repeated or unknown, 0 for none.

    It says nothing of the tags. The papers reward or gate the format in ways of their own (ReasonRank's code gives a
    response without answer -1 and an incomplete ranking 0); this one rises with every mistake less.
    Errors: see `RankingReward`.
    """
    return RankingReward("ranking_format", rank_weight=0.0, format_weight=1.0)


def ranking_reward(k: int = 10, *, relative: bool = True, format_weight: float = 1.0) -> RankingReward:
    """Rank and format in one: `relative_gain_reward` (or `ndcg_reward`) + format_weight · `format_reward`.

    REARANK adds such terms; its weights are not known here, and 1 is a choice of this package: since a repaired ranking
    keeps all of its rank reward, repeats cost next to nothing at a small one (recipes/LOG.md). A completion without
    a ranking gets less than any with one, its nDCG and its format both being 0, unless the weight is 0.
    Errors: see `RankingReward`.
    """
    return RankingReward(f"ranking@{k}", k, relative, 1.0, format_weight)


def ranking_prompt(
    query: str, documents: Sequence[str], *, max_words: int | None = 300, chat: bool = True
) -> list[dict[str, str]] | str:
    """Ask for a ranking of numbered passages, for models to answer in the format that `parse_permutation` reads.

    Each passage stands on one line, so that none can begin a line of its own with another's number. What it says is
    not made harmless beyond that.

    Args:
        query: what is searched for.
        documents: passages, in the order of `gains`.
        max_words: of a passage; None: all. Text without spaces is one word.
        chat: one user message; False: its text.

    Raises:
        ValueError: no documents, or max_words < 1.
    """
    if not documents:
        raise ValueError("a ranking needs documents, got none")
    if max_words is not None and max_words < 1:
        raise ValueError(f"max_words must be at least 1, or None for whole passages, got {max_words}")
    passages = "\n".join(f"[{i}] {' '.join(text.split()[:max_words])}" for i, text in enumerate(documents, 1))
    content = (
        f"Rank these {len(documents)} passages by how well they answer the query.\n\n"
        f"Query: {' '.join(query.split())}\n\n{passages}\n\n"
        f"Give the numbers of all {len(documents)} passages, each once, the best first, in this form:\n"
        "<answer>[i] > [j] > ...</answer>"
    )
    return [{"role": "user", "content": content}] if chat else content


def _runs(text: str) -> list[list[re.Match[str]]]:
    """Identifiers, together as long as only separators stand between them."""
    runs: list[list[re.Match[str]]] = []
    for match in _IDENTIFIER.finditer(text):
        if runs and _BETWEEN.fullmatch(text, runs[-1][-1].end(), match.start()):
            runs[-1].append(match)
        else:
            runs.append([match])
    return runs


def _permutation(identifiers: Sequence[str], n: int) -> Permutation:
    order: dict[int, None] = {}
    repeated: list[int] = []
    unknown: list[str] = []
    for identifier in identifiers:
        digits = identifier.lstrip("0")
        value = int(digits) if digits and len(digits) <= len(str(n)) else 0  # int() refuses thousands of digits
        if not 1 <= value <= n:
            unknown.append(identifier)
        elif value - 1 in order:
            repeated.append(value - 1)
        else:
            order[value - 1] = None
    return Permutation(n, tuple(order), tuple(repeated), tuple(unknown))


def _order(found: Permutation | None) -> tuple[int, ...]:
    """What counts as ranked: nothing, if no document is named, or the shown order could be had for `[0]`."""
    return () if found is None or not found.order else found.repaired


def _ndcgs(
    ranked: Sequence[Sequence[float]], shown: Sequence[Sequence[float]], judged: Sequence[Sequence[float]], k: int
) -> list[list[float]]:
    """nDCG@k of the ranking and of the shown order, one list each."""
    longest = max(map(len, [*shown, *judged]))
    k = min(k, longest)
    ideal = ideal_value(_padded(judged, longest), "ndcg", k)
    orders = torch.stack([_padded([row[:k] for row in rows], k) for rows in (ranked, shown)])
    return place_rewards(orders, "ndcg", ideal).sum(-1).tolist()


def _padded(rows: Sequence[Sequence[float]], width: int) -> torch.Tensor:
    """A gain of 0 changes no nDCG."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


def _checked(gains: Any, column: str, row: int) -> list[float]:
    if not isinstance(gains, Sequence) or isinstance(gains, str) or not gains:
        raise ValueError(f"row {row}: {column} is {gains!r}; give a list with one gain per document, or drop the row")
    for gain in gains:
        if not isinstance(gain, Real) or not 0 <= gain < math.inf:
            raise ValueError(f"row {row}: {column} has {gain!r}; a gain is a number >= 0")
    return [float(gain) for gain in gains]


def _check_against(
    shown: Sequence[Sequence[float]], judged: Sequence[Sequence[float]], documents: Sequence[Sequence[str] | None]
) -> None:
    for i, (gains, ideal, passages) in enumerate(zip(shown, judged, documents, strict=True)):
        if passages is not None and len(passages) != len(gains):
            raise ValueError(f"row {i}: {len(gains)} gains for {len(passages)} documents; give one for each")
        best = zip_longest(sorted(gains, reverse=True), sorted(ideal, reverse=True), fillvalue=0.0)
        if any(gain > limit * (1 + 1e-6) for gain, limit in best):
            raise ValueError(f"row {i}: gains beat ideal_gains; list there all judged documents, those shown too")
