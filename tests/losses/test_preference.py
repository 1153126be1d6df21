"""DPO and IPO by hand: values, gradients, where they end. All objectives together: test_preference_objectives.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from negtune.losses.preference import dpo, ipo, ipo_mean
from negtune.ops import MissingReferenceError, SequenceLogps


def sequence(logps, ref_logps=None) -> SequenceLogps:
    logps = torch.as_tensor(logps, dtype=torch.float64)
    ref_logps = None if ref_logps is None else torch.as_tensor(ref_logps, dtype=torch.float64)
    return SequenceLogps(logps, torch.ones_like(logps, dtype=torch.bool), ref_logps)


def test_dpo_of_one_pair_by_hand():
    # chosen: -1 - 2 = -3 against -4: r = 1; rejected: -2 against -1.5: r = -.5; margin 1.5, beta .5 -> log(1 + e^-.75)
    chosen, rejected = sequence([[-1.0, -2.0]], [[-2.0, -2.0]]), sequence([[-2.0]], [[-1.5]])
    assert_close(dpo(chosen, rejected, beta=0.5), torch.tensor([math.log1p(math.exp(-0.75))], dtype=torch.float64))


def test_gradient_at_the_reference_is_half_beta_down_on_rejected_and_up_on_chosen():
    chosen_logps = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    rejected_logps = torch.full((2, 3), -2.0, dtype=torch.float64, requires_grad=True)
    chosen = sequence(chosen_logps, chosen_logps.detach())
    rejected = sequence(rejected_logps, rejected_logps.detach())
    dpo(chosen, rejected, beta=0.1).sum().backward()
    assert_close(rejected_logps.grad, torch.full_like(rejected_logps, 0.05))
    assert_close(chosen_logps.grad, torch.full_like(chosen_logps, -0.05))


def test_a_far_separated_pair_neither_overflows_nor_pulls():
    logps = torch.tensor([[-1e4]], dtype=torch.float64, requires_grad=True)
    loss = dpo(sequence([[-1.0]], [[-1.0]]), sequence(logps, [[-1.0]]), beta=1.0)
    loss.sum().backward()
    assert loss.item() == 0
    assert logps.grad.item() == 0
    reversed_pair = dpo(sequence(logps, [[-1.0]]), sequence([[-1.0]], [[-1.0]]), beta=1.0)
    assert reversed_pair.item() == pytest.approx(9999)


def test_without_a_reference_the_error_says_what_to_pass():
    with pytest.raises(MissingReferenceError, match="pass reference="):
        dpo(sequence([[-1.0]]), sequence([[-1.0]]))


def test_ipo_of_one_pair_by_hand():
    # r = 1 and -.5 as above: margin 1.5; tau .25 asks for 2: (1.5 - 2)^2
    chosen, rejected = sequence([[-1.0, -2.0]], [[-2.0, -2.0]]), sequence([[-2.0]], [[-1.5]])
    assert_close(ipo(chosen, rejected, beta=0.25), torch.tensor([0.25], dtype=torch.float64))
    # per token: 1/2 and -.5, margin 1: (1 - 2)^2
    assert_close(ipo_mean(chosen, rejected, beta=0.25), torch.tensor([1.0], dtype=torch.float64))
    # a rejected answer of two tokens with r = -1.5, -.75 each: margin 1.25
    longer = sequence([[-2.0, -2.0]], [[-1.5, -1.0]])
    assert_close(ipo_mean(chosen, longer, beta=0.25), torch.tensor([0.5625], dtype=torch.float64))


@pytest.mark.parametrize("objective", [ipo, ipo_mean])
def test_ipo_pulls_the_margin_back_once_it_is_wide_enough(objective):
    for start, sign in ((-1.0, 1), (-9.0, -1)):  # one token each, so both forms agree
        rejected_logps = torch.tensor([[start]], dtype=torch.float64, requires_grad=True)
        loss = objective(sequence([[-1.0]], [[-1.0]]), sequence(rejected_logps, [[-1.0]]), beta=0.1)
        loss.sum().backward()
        assert torch.sign(rejected_logps.grad).item() == sign


def test_ipo_in_a_table_of_two_answers_ends_at_one_over_two_tau_whatever_the_repetition():
    for repeats in (1, 5):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

        def closure(logits=logits, optimizer=optimizer, repeats=repeats):
            optimizer.zero_grad()
            logps = logits.log_softmax(-1)
            half = torch.full((repeats, 1), math.log(0.5), dtype=torch.float64)
            chosen = sequence(logps[0].expand(repeats, 1), half)
            loss = ipo(chosen, sequence(logps[1].expand(repeats, 1), half), beta=0.2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert (logits[0] - logits[1]).item() == pytest.approx(1 / (2 * 0.2), abs=1e-4)
