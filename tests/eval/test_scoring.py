"""Scoring of completions: shared prompts change no number."""

import pytest

from negtune.eval.scoring import score_completions
from negtune.models import sharing
from negtune.models.sharing import set_prefix_sharing
from negtune.models.tiny import tiny_lm, tiny_tokenizer

ITEMS = [
    {
        "name": f"{place} {i}",
        "prompt": f"What is the capital city of {place}?",
        "completion": f" {place} {'is big ' * i}",
    }
    for place in ("France", "Japan", "Peru")
    for i in range(1, 6)
]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_numbers_are_the_same_with_and_without_shared_prompts(batch_size, monkeypatch):
    packed: list[int] = []
    original = sharing.pack_trees

    def counting(rows, *args, **kwargs):
        result = original(rows, *args, **kwargs)
        packed.append(sum(map(len, rows)) - result.tokens)
        return result

    monkeypatch.setattr(sharing, "pack_trees", counting)
    plain = tiny_lm()
    set_prefix_sharing(plain, "off")
    found = score_completions(tiny_lm(), tiny_tokenizer(), ITEMS, batch_size, None)
    expected = score_completions(plain, tiny_tokenizer(), ITEMS, batch_size, None)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert sum(packed[1:]) > 0 or batch_size == 1  # the first is the probe's
