"""What is in what must be so: every query of every kind, by its words."""

import pytest

from negtune.data.completions import RowError
from negtune.data.containment import (
    AFTER,
    BEFORE,
    KINDS,
    SMALLER,
    containment_rows,
    containment_task,
    passages_of,
    shingle_containment,
    synthetic_passages,
)
from negtune.data.retrieval import text_key

PASSAGES = [
    "One fish swam. Two fish sank. Three fish flew away. Four of them talked.",
    "Red birds sing at noon. Blue birds sing at night. Green birds do not sing.",
    "A mill stands by the river. A miller lives in it. He has no flour left.",
    "Ships come in with the tide. Sailors go home. The harbour is empty then.",
    "Bread is baked at four. Cakes are baked at six. Nobody bakes on Sundays.",
]


def bare(query, kind):
    """The words of the passage that a query holds."""
    if kind != "quoted":
        return query
    before = next(text for text in BEFORE if query.startswith(text))
    after = next(text for text in AFTER if query.endswith(text))
    return query.removeprefix(before).removesuffix(after).strip()


def sentences(text):
    return [part.strip(".") for part in text.split(". ")]


@pytest.mark.parametrize("seed", range(5))
def test_every_query_is_what_its_kind_says(seed):
    task = containment_task(PASSAGES, absent=0.0, seed=seed)
    assert list(task.documents.values()) == PASSAGES
    assert sorted(task.kinds.values()) == sorted(KINDS * len(PASSAGES))
    for query_id, query in task.queries.items():
        kind, number = query_id.split("-")
        passage = PASSAGES[int(number)]
        assert task.kinds[query_id] == kind
        if kind == "superset":
            assert passage in query
            assert query != passage
            assert (task.inside[query_id], task.around[query_id]) == (set(), {f"p{number}"})
            continue
        assert (task.inside[query_id], task.around[query_id]) == ({f"p{number}"}, set())
        words = bare(query, kind)
        assert 0 < len(words.split()) < len(passage.split())
        if kind == "extract":
            assert set(sentences(words)) < set(sentences(passage))
        else:
            assert words in passage


def test_passages_that_are_left_out_leave_queries_without_an_answer():
    task = containment_task(PASSAGES, absent=0.4)
    assert len(task.documents) == 3
    assert len(task.queries) == 4 * 5
    for query_id in task.queries:
        known = {f"p{query_id.split('-')[1]}"} & task.documents.keys()
        assert task.inside[query_id] | task.around[query_id] == known
    assert len({tuple(containment_task(PASSAGES, absent=0.4, seed=seed).documents) for seed in range(5)}) > 1
    assert containment_task(PASSAGES, absent=0.4) == task != containment_task(PASSAGES, absent=0.4, seed=1)


def test_rows_name_the_smaller_text_first():
    rows = containment_rows(PASSAGES, copies=3, seed=1)
    assert len(rows) == 3 * len(KINDS) * len(PASSAGES)
    supersets = [row for row in rows if row["smaller"] in PASSAGES]
    assert len(supersets) == 3 * len(PASSAGES)
    assert all(row["smaller"] in row["larger"] for row in supersets)
    assert sum(row["larger"] in PASSAGES for row in rows) == 3 * len(SMALLER) * len(PASSAGES)
    assert len({(row["smaller"], row["larger"]) for row in rows}) > 2 * len(KINDS) * len(PASSAGES)


def test_passages_are_whole_sentences_without_overlap():
    text = "a b c. d e f! g h?\ni j k l. m n. o.\n\na b c. d e f!"
    assert passages_of(text, least=4, most=8) == ["a b c. d e f!", "i j k l."]
    assert passages_of(text, least=7, most=8) == ["a b c. d e f! g h?", "i j k l. m n. o."]
    assert passages_of("one two three four five. six seven.", least=2, most=4) == ["six seven."]
    with pytest.raises(ValueError, match="least <= most"):
        passages_of(text, least=9, most=8)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        (PASSAGES[:3], "at least 4 passages, got 3"),
        ([*PASSAGES, "too short"], "passage 5 has fewer than 4 words"),
        ([*PASSAGES, PASSAGES[2].replace(" ", "\n")], "passages 2 and 5 are equal"),
    ],
)
def test_passages_that_make_no_task_are_refused(passages, message):
    for make in (containment_task, containment_rows):
        with pytest.raises(RowError, match=message):
            make(passages)


@pytest.mark.parametrize("absent", [-0.1, 1.0, 0.95])
def test_a_task_needs_documents(absent):
    with pytest.raises(ValueError, match="absent"):
        containment_task(PASSAGES, absent=absent)


def test_synthetic_passages_are_repeatable_and_distinct():
    made = synthetic_passages(40, seed=2)
    assert made == synthetic_passages(40, seed=2) != synthetic_passages(40, seed=3)
    assert len({text_key(text) for text in made}) == 40
    assert len(containment_task(made).queries) == 4 * 40
    with pytest.raises(ValueError, match="4 to 512"):
        synthetic_passages(3)


def test_shingles_are_counted_by_hand():
    """Of the runs a b c, b c d and c d e the first document has two; of one of its own it lacks the rest."""
    queries, documents = {"q": "a b c d e", "short": "a b"}, {"x": "z a b c d", "y": "c d e a b"}
    assert shingle_containment(queries, documents) == {"q": {"x": 2 / 3, "y": 1 / 3}, "short": {"x": 0.0, "y": 0.0}}
    assert shingle_containment(queries, documents, size=1)["q"] == {"x": 4 / 5, "y": 1.0}
    assert shingle_containment(documents, documents)["x"] == {"x": 1.0, "y": 0.0}
    with pytest.raises(ValueError, match="at least 1"):
        shingle_containment(queries, documents, size=0)
