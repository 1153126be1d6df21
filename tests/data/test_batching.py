"""Token-budget batches: every unit once, within the budget, redrawn every epoch, equal for equal seeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from negtune.data.batching import SPREAD, TokenBudgetBatches, longest_first


def singles(sizes, budget, **settings):
    return TokenBudgetBatches([[i] for i in range(len(sizes))], sizes, budget, **{"seed": 0, **settings})


def test_a_small_set_worked_by_hand():
    # sizes 10, 10, 10 | 4, 4 | 1: two units of 10 fit 20; the third 10 takes one 4 with it; the other 4 takes the 1
    sampler = singles([4, 10, 10, 1, 10, 4], 20)
    assert len(sampler) == 3
    kinds = sorted(sorted([4, 10, 10, 1, 10, 4][i] for i in batch) for batch in sampler)
    assert kinds == [[1, 4], [4, 10], [10, 10]]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 900),
    st.integers(0, 5),
    st.sampled_from([1, 2, 3]),
)
def test_every_unit_comes_once_and_no_batch_is_over_budget_or_wide(sizes, budget, epoch, processes):
    try:
        sampler = singles(sizes, budget, processes=processes)
    except ValueError:
        assert len(sizes) % processes  # every batch already had one unit
        return
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert len(batches) == len(sampler)
    assert len(batches) % processes == 0
    for batch in batches:
        assert len(batch) == 1 or max(sizes[i] for i in batch) * len(batch) <= budget


def test_padding_is_small_for_lengths_that_differ_by_a_factor_of_nineteen():
    sizes = [50 + 7 * (i * 37 % 130) for i in range(400)]  # 50 ... 953, evenly
    batches = list(singles(sizes, 8192))
    padded = sum(max(sizes[i] for i in batch) * len(batch) for batch in batches)
    assert 1 - sum(sizes) / padded < 1 - 1 / SPREAD
    assert max(len(batch) for batch in batches) > 5 * min(len(batch) for batch in batches)


def test_an_epoch_is_a_function_of_seed_and_epoch_and_composition_changes():
    sizes = [10] * 40
    one, other = singles(sizes, 40), singles(sizes, 40)
    first = list(one)
    assert list(other) == first
    one.set_epoch(1)
    assert {frozenset(batch) for batch in one} != {frozenset(batch) for batch in first}
    one.set_epoch(0)
    assert list(one) == first
    assert list(singles(sizes, 40, seed=1)) != first


def test_rows_of_a_unit_stay_together():
    sampler = TokenBudgetBatches([[0, 3], [1], [2, 4, 5]], [10, 10, 10], 10, seed=0)
    assert sorted(sampler) == [[0, 3], [1], [2, 4, 5]]


def test_rows_of_one_prompt_follow_their_longest():
    shapes = [("ab", 3), ("c", 9), ("ab", 6), ("d", 1), ("c", 2)]
    rows = [{"prompt_ids": [ord(c) for c in prompt], "completion_ids": [0] * n} for prompt, n in shapes]
    assert longest_first(rows) == [1, 4, 2, 0, 3]


def test_units_without_sizes_are_refused():
    with pytest.raises(ValueError, match="every unit needs a size"):
        TokenBudgetBatches([[0]], [], 10, seed=0)
