"""Texts of which some are in others: crops, extracts and quotations of passages, and texts that contain a passage.

What is in what is known, since every query is made from a passage. A cosine cannot say it: a passage and a text that
holds it are as close one way round as the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from negtune.data.completions import RowError
from negtune.data.retrieval import SYNTHETIC_WORDS, text_key

SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n+")
SMALLER, LARGER = ("crop", "extract", "quoted"), ("superset",)
KINDS = (*SMALLER, *LARGER)
BEFORE = (
    "I was reading this the other day and wanted to share it with everybody here before I forget:",
    "Could somebody please have a look at the following and tell me what you think of it?",
    "Good morning all, I hope that you are well; please find below what I wrote to you about last week.",
    "Here is the part that I meant, copied word for word, so that we are all talking about the same thing:",
    "Not sure whether this has come up before, and sorry if it has, but this is what it says:",
)
AFTER = (
    "Thank you very much in advance for your time, and have a nice day. Best wishes from all of us here.",
    "Please let me know if there is anything else that I can do, and do not hesitate to write to me again.",
    "This message and its attachments are confidential; if you have received it in error, please delete it.",
    "What do you think? Let me know in the comments below, and follow me for more of the same every day.",
    "I will be back in the office on Monday; for anything urgent please write to my colleagues instead.",
)


@dataclass(frozen=True)
class ContainmentTask:
    """Queries made of passages, and the documents among which their passages are, or are not.

    Attributes:
        queries, documents: id to text.
        kinds: query id to one of `KINDS`. A query that is in its passage: `crop`, one stretch of its words; `extract`,
            some of its sentences; `quoted`, a crop between lines of small talk, often the longer of the two texts.
            One that contains it: `superset`, the passage and part of a neighbour.
        inside: query id to the documents that the query is in.
        around: query id to the documents that are in the query.
    """

    queries: dict[str, str]
    documents: dict[str, str]
    kinds: dict[str, str]
    inside: dict[str, set[str]]
    around: dict[str, set[str]]


def passages_of(text: str, *, least: int = 60, most: int = 120) -> list[str]:
    """Plain text in passages of whole sentences, in order and without overlap; repeated ones are there once.

    Args:
        text: lines are never joined.
        least, most: words of a passage; sentences that fit no passage are left out.
    """
    if not 1 <= least <= most:
        raise ValueError(f"need 1 <= least <= most words of a passage, got {least} and {most}")
    found: dict[str, str] = {}
    for line in re.split(r"\n+", text):
        words: list[str] = []
        for sentence in SENTENCE_END.split(line):
            new = sentence.split()
            if len(words) + len(new) > most:
                words = []
            if len(new) <= most:
                words += new
            if len(words) >= least:
                passage, words = " ".join(words), []
                found.setdefault(text_key(passage), passage)
    return list(found.values())


def containment_task(passages: Sequence[str], *, absent: float = 0.25, seed: int = 0) -> ContainmentTask:
    """One query of each kind for every passage.

    Args:
        passages: different texts, at least 4; neighbours in the list lend each other their words.
        absent: share of the passages that are not among the documents: their queries have no answer, as most queries of
            the image similarity challenge.
        seed: of all draws.

    Raises:
        RowError: too few passages, two that are equal or in each other, or one too short to be cropped.
        ValueError: `absent` leaves no document.
    """
    _check(passages)
    if not 0 <= absent < 1:
        raise ValueError(f"absent is the share of passages left out, 0 or more and below 1, got {absent}")
    draw = random.Random(seed)
    left_out = set(draw.sample(range(len(passages)), round(absent * len(passages))))
    if len(left_out) == len(passages):
        raise ValueError(f"absent={absent} leaves none of {len(passages)} passages; lower it or give more passages")
    documents = {f"p{i}": passage for i, passage in enumerate(passages) if i not in left_out}
    queries: dict[str, str] = {}
    kinds: dict[str, str] = {}
    inside: dict[str, set[str]] = {}
    around: dict[str, set[str]] = {}
    for i in range(len(passages)):
        known = {f"p{i}"} & documents.keys()
        for kind, text in _made(passages, i, draw).items():
            query_id = f"{kind}-{i}"
            queries[query_id], kinds[query_id] = text, kind
            inside[query_id] = known if kind in SMALLER else set()
            around[query_id] = known if kind in LARGER else set()
    return ContainmentTask(queries, documents, kinds, inside, around)


def containment_rows(passages: Sequence[str], *, copies: int = 1, seed: int = 0) -> list[dict[str, str]]:
    """Pairs to train on, `smaller` and `larger`, of every kind for every passage, `copies` times with other draws.

    Raises:
        RowError: as `containment_task`.
    """
    _check(passages)
    draw, rows = random.Random(seed), []
    for _ in range(copies):
        for i, passage in enumerate(passages):
            for kind, text in _made(passages, i, draw).items():
                smaller, larger = (text, passage) if kind in SMALLER else (passage, text)
                rows.append({"smaller": smaller, "larger": larger})
    return draw.sample(rows, len(rows))


def synthetic_passages(n: int = 64, seed: int = 0) -> list[str]:
    """Passages of made-up words in sentences: each is about 12 words of its own, which it repeats.

    Args:
        n: 4 to 512. seed: equal seeds give equal passages.
    """
    if not 4 <= n <= 512:
        raise ValueError(f"synthetic_passages takes 4 to 512, got {n}")
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        topic = draw.sample(SYNTHETIC_WORDS, 12)
        sentences = [" ".join(draw.choices(topic, k=draw.randint(6, 9))) for _ in range(6)]
        made.append(" ".join(f"{sentence}." for sentence in sentences))
    return made


def shingle_containment(
    queries: Mapping[str, str], documents: Mapping[str, str], size: int = 3
) -> dict[str, dict[str, float]]:
    """Share of the query's runs of `size` words that are in the document too, for each query and document.

    What near-duplicate detection does without a model: exact for literal copies, blind to any other words.
    Andrei Broder, On the resemblance and containment of documents, https://doi.org/10.1109/SEQUEN.1997.666900
    """
    if size < 1:
        raise ValueError(f"size counts words and must be at least 1, got {size}")
    parts = {document_id: _shingles(text, size) for document_id, text in documents.items()}
    scores = {}
    for query_id, text in queries.items():
        own = _shingles(text, size)
        scores[query_id] = {d: len(own & other) / max(1, len(own)) for d, other in parts.items()}
    return scores


def _shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def _made(passages: Sequence[str], i: int, draw: random.Random) -> dict[str, str]:
    """A text of each kind for one passage."""
    words, neighbour = passages[i].split(), passages[(i + 1) % len(passages)].split()
    sentences = [s for s in SENTENCE_END.split(passages[i]) if s]
    kept = sorted(draw.sample(range(len(sentences)), max(1, round(len(sentences) * draw.uniform(0.3, 0.7)))))
    extract = " ".join(sentences[j] for j in kept) if len(sentences) > 1 else _crop(words, draw)
    more = _crop(neighbour, draw)
    return {
        "crop": _crop(words, draw),
        "extract": extract,
        "quoted": " ".join([draw.choice(BEFORE), _crop(words, draw), draw.choice(AFTER)]),
        "superset": " ".join([passages[i], more] if draw.random() < 0.5 else [more, passages[i]]),
    }


def _crop(words: Sequence[str], draw: random.Random) -> str:
    """A stretch of 30 to 70 % of the words."""
    length = max(1, round(len(words) * draw.uniform(0.3, 0.7)))
    start = draw.randrange(len(words) - length + 1)
    return " ".join(words[start : start + length])


def _check(passages: Sequence[str]) -> None:
    if len(passages) < 4:
        raise RowError(f"need at least 4 passages, got {len(passages)}; give a longer text or shorter passages")
    keys = [text_key(passage) for passage in passages]
    for i, key in enumerate(keys):
        if len(key.split()) < 4:
            raise RowError(f"passage {i} has fewer than 4 words and cannot be cropped; leave it out")
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key in seen:
            raise RowError(f"passages {seen[key]} and {i} are equal; leave one of them out")
        seen[key] = i
