"""Packing itself, without a model; `test_sharing.py` has the values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negtune.models.tree import Cost, PackedTrees, pack_trees

LINEAR = Cost(per_token=1.0, per_pair=0.0)
"""Attention is free: everything into one sequence."""


def ancestors(packed: PackedTrees, sequence: int, place: int) -> list[int]:
    """What the token at `place` may attend to, read from the mask."""
    return packed.mask()[sequence, 0, place].nonzero()[:, 0].tolist()


def test_a_tree_worked_by_hand():
    # 7 ─ 8 ─ 9        row 0: 7 8 9
    #      └─ 5 ─ 6    row 1: 7 8 5 6
    # 3                row 2: 3
    packed = pack_trees([[7, 8, 9], [7, 8, 5, 6], [3]], LINEAR)
    assert packed.input_ids.tolist() == [[3, 7, 8, 5, 6, 9]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2, 3, 2]]
    assert packed.ends.tolist() == [[1, 6, 6, 5, 5, 6]]
    assert packed.places.tolist() == [[1, 2, 5, -1], [1, 2, 3, 4], [0, -1, -1, -1]]
    assert packed.tokens == 6
    assert packed.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


def test_a_row_that_is_the_beginning_of_another_and_a_repeated_row_add_nothing():
    packed = pack_trees([[1, 2, 3], [1, 2], [1, 2, 3], [1]], LINEAR)
    assert packed.tokens == 3
    assert packed.places.tolist() == [[0, 1, 2], [0, 1, -1], [0, 1, 2], [0, -1, -1]]


rows_of_few_tokens = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=1, max_size=9)
costs = st.builds(Cost, per_token=st.just(1.0), per_pair=st.sampled_from([0.0, 0.05, 1.0, 100.0]))
budgets = st.none() | st.integers(1, 40)


@given(rows_of_few_tokens, costs, budgets)
@settings(deadline=None, max_examples=300)
def test_every_token_attends_to_exactly_its_row_so_far(rows, cost, budget):
    packed = pack_trees(rows, cost, budget=budget)
    for i, row in enumerate(rows):
        sequence, places = int(packed.sequences[i]), packed.places[i, : len(row)].tolist()
        assert packed.input_ids[sequence, places].tolist() == row
        assert packed.position_ids[sequence, places].tolist() == list(range(len(row)))
        for depth, place in enumerate(places):
            assert ancestors(packed, sequence, place) == places[: depth + 1]
        assert (packed.places[i, len(row) :] == -1).all()
    for sequence in range(packed.input_ids.shape[0]):
        used = {p for i in range(len(rows)) if packed.sequences[i] == sequence for p in packed.places[i].tolist()} - {
            -1
        }
        fillers = [p for p in range(packed.input_ids.shape[1]) if p not in used]
        assert all(ancestors(packed, sequence, filler) == [filler] for filler in fillers)
    if budget is not None:
        assert packed.input_ids.shape[1] <= max(budget, *map(len, rows))


@given(rows_of_few_tokens)
@settings(deadline=None, max_examples=300)
def test_with_free_attention_each_distinct_prefix_is_one_token(rows):
    prefixes = {tuple(row[: depth + 1]) for row in rows for depth in range(len(row))}
    assert pack_trees(rows, LINEAR).tokens == len(prefixes)


def test_dear_attention_keeps_rows_apart_and_cheap_attention_together():
    rows = [[1] * 4 + [i] * 60 for i in range(2, 6)]
    assert pack_trees(rows, Cost(1.0, 0.0)).input_ids.shape == (1, 4 + 4 * 60)
    assert pack_trees(rows, Cost(1.0, 10.0)).input_ids.shape == (4, 64)


def test_packing_depends_on_the_rows_only_not_on_their_order():
    rows = [[5, 6, 7], [5, 6], [9], [5, 8, 8, 8]]
    one, other = pack_trees(rows, LINEAR), pack_trees(rows[::-1], LINEAR)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.places, other.places.flip(0))
