import pytest

from negtune.data.questions import synthetic_questions


def test_one_document_of_each_list_has_the_answer_and_it_stands_anywhere():
    rows = synthetic_questions(96, seed=3)
    places = set()
    for row in rows:
        has = [row["answer"] in text for text in row["documents"]]
        assert has == [gain > 0 for gain in row["gains"]]
        assert sum(has) == 1
        assert len(set(row["documents"])) == 6
        places.add(has.index(True))
    assert places == set(range(6))
    assert len({row["query"] for row in rows}) == 96


def test_the_words_of_the_question_mislead():
    """By shared words the document that repeats the question is best, never the one with the answer."""
    for row in synthetic_questions(32):
        words = set(row["query"].lower().rstrip("?").split())
        shared = [len(words & set(text.lower().replace("?", "").split())) for text in row["documents"]]
        assert row["gains"][shared.index(max(shared))] == 0


def test_equal_seeds_give_equal_questions():
    assert synthetic_questions(8, seed=1) == synthetic_questions(8, seed=1)
    assert synthetic_questions(8, seed=1) != synthetic_questions(8, seed=2)
    assert all(len(row["documents"]) == 4 for row in synthetic_questions(8, documents=4))


@pytest.mark.parametrize(("n", "documents"), [(0, 6), (97, 6), (4, 3), (4, 7)])
def test_impossible_sizes_are_refused(n, documents):
    with pytest.raises(ValueError, match="need"):
        synthetic_questions(n, documents=documents)
