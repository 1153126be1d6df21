"""Made-up questions whose answers are in one of several documents, the others being about the same thing.

For retrievers that are judged by what a generator answers: the document that repeats the question answers nothing, so
that similarity of words misleads, and no generator can know the answers from elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

PLACES = ("lighthouse", "library", "bridge", "theatre", "mill", "chapel", "market hall", "observatory")
TOWNS = (
    "Kelmar",
    "Dorvan",
    "Sarnow",
    "Elbrin",
    "Tavost",
    "Miral",
    "Ostrel",
    "Vandry",
    "Corsik",
    "Haldan",
    "Perun",
    "Wessat",
)
FIRST = ("Oren", "Mila", "Tarek", "Sanna", "Ivo", "Lene", "Pavel", "Runa", "Deniz", "Yara")
LAST = ("Vale", "Hartog", "Lindqvist", "Moreau", "Katz", "Okoye", "Brandt", "Silva", "Novak", "Iversen")
STONES = ("granite", "brick", "limestone", "oak", "sandstone")


def synthetic_questions(n: int = 64, *, documents: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with `query`, `documents`, `answer` (a name) and `gains` (1 for the document with the answer).

    Args:
        n: questions, each about another building; at most 96.
        documents: of each list, at least 4: the answer, two that repeat the question, and others about the town.
        seed: of names and order.

    Raises:
        ValueError: more questions than buildings, or too few documents.
    """
    buildings = [(place, town) for place in PLACES for town in TOWNS]
    if not 1 <= n <= len(buildings):
        raise ValueError(f"need 1 <= n <= {len(buildings)} questions, got {n}")
    if not 4 <= documents <= 6:
        raise ValueError(f"need 4 to 6 documents a question, got {documents}")
    draw = random.Random(seed)
    return [_row(place, town, documents, draw) for place, town in draw.sample(buildings, n)]


def _row(place: str, town: str, documents: int, draw: random.Random) -> dict[str, Any]:
    builder = f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    answer = f"It was {builder} whose plans gave {town} its {place}, finished in {draw.randint(1700, 1960)}."
    others = [
        f"Who built the {place} of {town}? Visitors who ask who built the {place} of {town} are told to come back "
        "later.",
        f"The guide to {town} has a page on the {place} of {town} and on who built what, but that page is missing.",
        f"The {place} of {town} is made of {draw.choice(STONES)} and stands near the river.",
        f"Every spring the {place} of {town} is closed for {draw.randint(2, 9)} days of cleaning.",
        f"A market is held beside the {place} of {town} on Saturdays.",
    ][: documents - 1]
    texts = [answer, *others]
    order = draw.sample(range(len(texts)), len(texts))
    return {
        "query": f"Who built the {place} of {town}?",
        "documents": [texts[i] for i in order],
        "gains": [float(i == 0) for i in order],
        "answer": builder,
    }
