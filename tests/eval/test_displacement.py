"""CHES of a data set of pairs, and the choice of pairs by it."""

from __future__ import annotations

import pytest
import torch

from negtune.data.completions import tokenize_row
from negtune.eval.displacement import ches_scores, least_displacing
from negtune.models.tiny import tiny_lm, tiny_tokenizer

PAIRS = [
    {"prompt": "Who is it?", "chosen": "It is me.", "rejected": "It is not me, it is him."},
    {"prompt": "Say no.", "chosen": "yes", "rejected": "yes"},  # a tie: training leaves it out
    {"prompt": "Where?", "chosen": "Over there by the sea", "rejected": "Here"},
]


@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_the_models_own_hidden_states(normalize):
    model, tokenizer = tiny_lm().eval(), tiny_tokenizer()

    def hidden(prompt, answer):
        ids = tokenize_row({"prompt": prompt, "completion": answer}, tokenizer)
        whole = torch.tensor([ids["prompt_ids"] + ids["completion_ids"]])
        with torch.no_grad():
            states = model(whole, output_hidden_states=True).hidden_states[-1][0]
        of_answer = states[len(ids["prompt_ids"]) - 1 : -1]
        return of_answer.mean(0) if normalize else of_answer.sum(0)

    expected = []
    for pair in (PAIRS[0], PAIRS[2]):
        chosen, rejected = (hidden(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        expected.append(float(chosen @ rejected - chosen @ chosen))
    for batch_size in (1, 8):
        found = ches_scores(model, tokenizer, PAIRS, batch_size=batch_size, normalize=normalize)
        assert found[1] is None
        assert [found[0], found[2]] == pytest.approx(expected, rel=1e-4)


def test_the_lowest_scores_are_kept_in_order():
    scores = [3.0, -1.0, None, 0.5, -2.0]
    assert least_displacing(scores, 0.5) == [1, 4]
    assert least_displacing(scores, 0.01) == [4]
    assert least_displacing(scores, 1.0) == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="share must be above 0"):
        least_displacing(scores, 0.0)
