"""CHES by hand, and what it is for: the pair whose rejected answer takes the chosen one along has the higher score."""

import pytest
import torch

from negtune.metrics.preference import ches


def test_by_hand_with_sums_and_with_means():
    chosen, rejected = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    assert ches(chosen, rejected).tolist() == [1 * 3 + 2 * 4 - (1 + 4)]
    # means over 1 and 2 tokens: <(1, 2), (1.5, 2)> - 5
    assert ches(chosen, rejected, torch.tensor([1]), torch.tensor([2])).tolist() == [0.5]
    # means over 2 and 1: <(.5, 1), (3, 4)> - 1.25
    assert ches(chosen, rejected, torch.tensor([2]), torch.tensor([1])).tolist() == [4.25]


def test_lengths_come_in_twos():
    with pytest.raises(ValueError, match="of both answers"):
        ches(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1]))


def test_the_score_says_which_chosen_answer_falls():
    """Logits W h, one step on W that raises log p(token | h_w) and lowers log p(token | h_l), as where two answers
    share a word. With h_l far along h_w the chosen log-probability falls; across it, it rises."""
    torch.manual_seed(0)
    unembedding = 0.1 * torch.randn(5, 3, dtype=torch.float64)  # far from saturation
    h_w = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)

    def change(h_l):
        weights = unembedding.clone().requires_grad_()
        loss = (weights @ h_l).log_softmax(0)[0] - (weights @ h_w).log_softmax(0)[0]
        (gradient,) = torch.autograd.grad(loss, weights)
        after = (unembedding - 1e-3 * gradient) @ h_w
        return (after.log_softmax(0)[0] - (unembedding @ h_w).log_softmax(0)[0]).item()

    along, across = 6 * h_w, torch.tensor([-0.5, 1.0, 0.0], dtype=torch.float64)
    scores = ches(torch.stack([h_w, h_w]), torch.stack([along, across])).tolist()
    assert scores[0] > 0 > scores[1]
    assert change(across) > 0 > change(along)
