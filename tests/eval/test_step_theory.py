"""Closed forms of training on wrong steps: the tilt, the squeeze, the shortcut."""

import math

import pytest
import torch
from torch.testing import assert_close

from negtune.eval.step_theory import (
    Fork,
    entropy_change,
    minimise_step_dpo,
    population_step_dpo,
    shortcut_experiment,
    tilted,
)
from negtune.losses.unlearning import grad_ascent, nll


def test_population_loss_by_hand():
    # two tokens at 1/2; equal ones cost log 2. A difference of log 3 prefers the first with chance 3/4; the policy at
    # 9:1 has the margin log 9, so beta = 1/2 gives sigma(log 3) = 3/4 too: the entropy of 3/4
    reference, logits = torch.tensor([0.5, 0.5]).double(), torch.tensor([9.0, 1.0]).double().log()
    loss = population_step_dpo(logits, reference, torch.tensor([math.log(3), 0.0]).double(), beta=0.5)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * entropy)


def test_tilted_by_hand():
    policy = tilted(torch.tensor([0.5, 0.5]).double(), torch.tensor([math.log(2), 0.0]).double(), beta=0.5)
    assert_close(policy, torch.tensor([0.8, 0.2]).double())  # 2^(1/beta) = 4 to 1


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_per_step_dpo_ends_at_the_tilted_reference(beta, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).softmax(-1)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    found = minimise_step_dpo(reference, advantages, beta=beta)
    assert_close(found, tilted(reference, advantages, beta=beta), atol=1e-6, rtol=0)
    assert (found - reference).abs().max() > 0.05


@pytest.mark.parametrize(
    ("objective", "token", "expected"),
    [(grad_ascent, 0, 0.0751), (grad_ascent, 3, -0.1231), (nll, 0, -0.0883), (nll, 3, 0.1363)],
)
def test_pushing_down_the_unlikely_squeezes_mass_onto_the_likely(objective, token, expected):
    logits = torch.tensor([2, 1, 0, -1, -2], dtype=torch.float64)
    assert entropy_change(logits, token, objective, lr=0.5) == pytest.approx(expected, abs=1e-4)


def test_fork_by_hand():
    task, weights = Fork(options=3), torch.tensor([math.log(4), math.log(2)]).double()
    chances = task.logps_of_right(weights, torch.tensor([True, False])).exp()
    assert_close(chances, torch.tensor([8 / 10, 4 / 7]).double())  # 8 : 1 : 1, and 4 : 2 : 1
    assert task.test_success(weights) == pytest.approx(((8 / 10 + 2 * 4 / 7) / 3) ** 5)


def test_fit_is_stationary_and_decays_the_weights():
    task, start = Fork(weight_decay=0.02), torch.zeros(2).double()
    weights = task.fit(start, 0.9, steps=600).requires_grad_()
    agree, differ = task.logps_of_right(weights, torch.tensor([True, False]))
    (gradient,) = torch.autograd.grad(-(0.9 * agree + 0.1 * differ), weights)
    assert_close(gradient, -0.02 * weights.detach(), atol=1e-6, rtol=0)


def test_own_right_answers_amplify_the_shortcut_and_more_of_the_same_does_not():
    # population optima and seeds 100-102 were looked at when the task was specified; these three were not
    for seed in (0, 1, 2):
        result = shortcut_experiment(Fork(forks=5, options=3, agreement=0.9, weight_decay=0.02), seed)
        assert abs(result.success["continued SFT"] - result.success["SFT"]) <= 0.005
        assert result.success["RFT"] <= result.success["continued SFT"] - 0.04
        right, mark = zip(result.weights["SFT"], result.weights["RFT"], strict=True)
        assert mark[1] > mark[0]
        assert right[1] < right[0]
