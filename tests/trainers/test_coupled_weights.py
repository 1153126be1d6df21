"""What weighs the documents of a step, by itself; within training: test_coupled.py."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.trainers.coupled_weights import normalize


def test_a_list_without_a_negative_is_no_part_of_the_mean_over_pairs():
    """Mean over lists that have pairs, of the mean over their pairs of the product of both weights: 1 afterwards."""
    gains = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])  # the second list has positives only
    weights = torch.tensor([[2.0, 3.0, 5.0], [7.0, 7.0, 1e6]])
    opinion = {"weights": weights.clone()}
    sums = []
    normalize([({"gains": gains, "mask": mask}, opinion)], lambda total: sums.append(total) or total)
    assert torch.stack(sums).tolist() == [[2 * (3 + 5) / 2, 1.0]]
    pairs = opinion["weights"][0, 0] * opinion["weights"][0, 1:]
    assert pairs.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(opinion["weights"], weights / 8**0.5)
