"""Policy-gradient objectives: values by hand, weights on the log-probabilities, limits, and nonsense behind masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from negtune.losses.policy import (
    POLICY_LOSSES,
    asymre,
    awr,
    clipped,
    nsr,
    only,
    pmpo,
    positive_nll,
    psr,
    reinforce,
    rwr,
    topr,
    w_reinforce,
)
from negtune.losses.preference import dpo, step_dpo, step_kto
from negtune.ops import (
    MissingBehaviourError,
    MissingReferenceError,
    MissingStepsError,
    SequenceLogps,
    TokenCredit,
    needs_of,
    segment_sums,
    weigh_signs,
)

F, T = False, True
MASK = torch.tensor([[T, T, T, T, F], [T, T, T, F, F]])
KNOWN = torch.tensor([[T, T, F, T, F], [T, T, T, F, F]])
STEPS = torch.tensor([[0, 0, 1, 2, -1], [0, 1, 1, -1, -1]])
ADVANTAGES = torch.tensor([[0.5, 0.5, 9.0, -2.0, 9.0], [-1.0, 0.25, 0.25, 9.0, 9.0]], dtype=torch.float64)
LOGPS = torch.tensor([[-1.0, -0.5, -0.25, -2.0, 7.0], [-0.75, -1.5, -0.1, 7.0, 7.0]], dtype=torch.float64)
BEHAVIOUR = torch.tensor([[-1.5, -0.5, -0.5, -1.0, 3.0], [-0.25, -1.0, -0.1, 3.0, 3.0]], dtype=torch.float64)


def policy(logps=LOGPS, ref=None) -> SequenceLogps:
    return SequenceLogps(logps.clone().requires_grad_(), MASK, ref)


def credit(advantages=ADVANTAGES, behaviour=BEHAVIOUR, steps=STEPS) -> TokenCredit:
    return TokenCredit(advantages, KNOWN, behaviour, steps)


def weights(objective, given=None, judged=None, **kwargs):
    """-d loss / d log p_t: how hard each token is pushed up."""
    given = given or policy()
    objective(given, judged or credit(), **kwargs).sum().backward()
    return -given.logps.grad


def test_reinforce_by_hand():
    """-A log p: .5, .25, unknown, -4, and -.75, .375, .025."""
    expected = torch.tensor([[0.5, 0.25, 0, -4.0, 0], [-0.75, 0.375, 0.025, 0, 0]], dtype=torch.float64)
    assert_close(reinforce(policy(), credit()), expected)
    assert_close(weights(reinforce), ADVANTAGES.masked_fill(~KNOWN, 0))


def test_awr_weighs_by_the_exponential_up_to_its_cap():
    found = weights(awr, beta=0.5, cap=2.0)
    assert_close(found, (ADVANTAGES / 0.5).exp().clamp(max=2).masked_fill(~KNOWN, 0))
    assert found[0, 0] == 2
    assert found[0, 3] == pytest.approx(math.exp(-4))
    assert_close(weights(awr, beta=1e9), KNOWN.double())
    assert (weights(awr, judged=credit(ADVANTAGES * 1e6)) <= 20).all()  # no overflow


def test_rwr_by_hand():
    """exp(A/.5) up to 2: e^1 is cut, e^-4; e^-2, e^.5, e^.5. Times -log p: 1, .5, 2 and .75, 1.5, .1."""
    found = rwr(policy(), credit(), tau=0.5, cap=2.0)
    e = math.exp
    expected = [[2, 1, 0, 2 * e(-4), 0], [0.75 * e(-2), 1.5 * e(0.5), 0.1 * e(0.5), 0, 0]]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    row0, row1 = [2, 2, 0, e(-4), 0], [e(-2), e(0.5), e(0.5), 0, 0]
    assert_close(weights(rwr, tau=0.5, cap=2.0), torch.tensor([row0, row1], dtype=torch.float64))
    assert weights(rwr, judged=credit(ADVANTAGES * 1e6)).max() == 10  # the cap, and no overflow


def test_rwr_at_a_high_temperature_is_fine_tuning_on_all_samples():
    """At tau = 1000 times the range of the rewards; advantages are the rewards minus their mean."""
    rewards = torch.tensor([[3.0], [-1.0], [0.0], [7.0]], dtype=torch.float64).expand(4, 3)
    known = torch.ones(4, 3, dtype=torch.bool)
    judged = TokenCredit(rewards - rewards.mean(), known)
    logits = torch.linspace(-1, 1, 60, dtype=torch.float64).sin().reshape(4, 3, 5).requires_grad_()

    def gradient(objective, **kwargs):
        values = objective(SequenceLogps(logits.log_softmax(-1)[..., 2], known), judged, **kwargs)
        return torch.autograd.grad(values.sum(), logits)[0]

    [nll] = torch.autograd.grad(-logits.log_softmax(-1)[..., 2].sum(), logits)
    assert (gradient(rwr, tau=8e3) - nll).norm() < 1e-3 * nll.norm()
    assert (gradient(rwr, tau=8.0) - nll).norm() > 1e-1 * nll.norm()


def test_rwr_at_a_low_temperature_keeps_what_is_above_the_mean():
    assert_close(weights(rwr, tau=1e-3), 10 * credit().positive.double())


def test_one_signed_objectives_leave_the_other_sign_alone():
    up, down = weights(psr), weights(nsr)
    assert_close(up, ADVANTAGES.clamp(min=0).masked_fill(~KNOWN, 0))
    assert_close(down, ADVANTAGES.clamp(max=0).masked_fill(~KNOWN, 0))
    assert_close(up + down, weights(reinforce))
    assert_close(weights(w_reinforce), 0.1 * up + down)
    assert_close(weights(w_reinforce, positive_weight=2.0, negative_weight=0.5), 2 * up + 0.5 * down)


@pytest.mark.parametrize(
    ("level", "row0", "row1"),
    [
        # log ratios: .5, 0, .25, -1 (sum -.25) and -.5, -.5, 0 (sum -1)
        ("sequence", [0.5, 0.5, 0, -2 * math.exp(-0.25), 0], [-math.exp(-1), 0.25, 0.25, 0, 0]),
        ("token", [0.5, 0.5, 0, -2 * math.exp(-1), 0], [-math.exp(-0.5), 0.25, 0.25, 0, 0]),
        ("step", [0.5, 0.5, 0, -2 * math.exp(-1), 0], [-math.exp(-0.5), 0.25, 0.25, 0, 0]),
    ],
)
def test_topr_tapers_negatives_by_the_ratio(level, row0, row1):
    assert_close(weights(topr, level=level), torch.tensor([row0, row1], dtype=torch.float64))


def test_topr_never_pushes_harder_than_reinforce():
    risen = policy(BEHAVIOUR + 1.0)
    assert_close(weights(topr, risen), weights(reinforce))
    gone = policy(BEHAVIOUR - 30.0)
    assert (weights(topr, gone)[credit().negative].abs() < 1e-12).all()


def test_topr_is_reinforce_where_the_policy_has_not_moved():
    assert_close(weights(topr, policy(BEHAVIOUR)), weights(reinforce, policy(BEHAVIOUR)))


def test_asymre_moves_the_baseline_down():
    assert_close(weights(asymre), (ADVANTAGES + 0.1).masked_fill(~KNOWN, 0))
    assert_close(weights(asymre, delta=0.0), weights(reinforce))


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
def test_clipped_at_ratio_one_has_the_gradient_of_reinforce(level):
    still = policy(BEHAVIOUR)
    assert_close(weights(clipped, still, level=level), weights(reinforce, policy(BEHAVIOUR)))


def test_clipped_by_hand():
    """Ratios e^.5, 1, -, e^-1 and e^-.5, e^-.5, 1 with epsilon .2.

    Token 0 of row 0 rose beyond 1.2 and is positive: no gradient; token 3 fell below .8 and is negative: none.
    Row 1: the negative fell below .8: none; the positive that fell to e^-.5 is raised with e^-.5 A.
    """
    loss = clipped(policy(), credit())
    expected = [[-0.6, -0.5, 0, 1.6, 0], [0.8, -0.25 * math.exp(-0.5), -0.25, 0, 0]]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    found = weights(clipped)
    assert_close(found, torch.tensor([[0, 0.5, 0, 0, 0], [0, 0.25 * math.exp(-0.5), 0.25, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_that_is_not_judged_pushes_nothing_however_far_it_has_moved(level):
    logps = torch.full((1, 3), -1.0, requires_grad=True)
    behaviour = torch.tensor([[-1.0, -200.0, -1.0]])
    known, mask = torch.tensor([[True, False, True]]), torch.ones(1, 3, dtype=torch.bool)
    given = TokenCredit(torch.tensor([[1.0, torch.nan, -1.0]]), known, behaviour)
    values = clipped(SequenceLogps(logps, mask), given, level=level)
    [gradient] = torch.autograd.grad(values.sum(), logps)
    assert values[0, 1] == gradient[0, 1] == 0
    assert gradient.isfinite().all()


def test_delta_bounds_the_push_on_a_negative_that_became_likely():
    risen = BEHAVIOUR + 3.0
    free, bounded = weights(clipped, policy(risen)), weights(clipped, policy(risen), delta=4.0)
    assert free[0, 3] == pytest.approx(-2 * math.exp(3))
    assert bounded[0, 3] == 0
    assert clipped(policy(risen), credit(), delta=4.0)[0, 3].item() == pytest.approx(8.0)
    with pytest.raises(ValueError, match=r"delta=1.2 must be more than 1 \+ epsilon_high = 1.2"):
        clipped(policy(risen), credit(), delta=1.2)


def test_clipped_on_sequences_takes_the_geometric_mean():
    """Mean log ratios -.25/4 and -1/3: all inside .2 but the second, below .8 = e^-.223: negatives stop there."""
    loss = clipped(policy(), credit(), level="sequence")
    first, second = math.exp(-0.0625), math.exp(-1 / 3)
    expected = [[-0.5 * first, -0.5 * first, 0, 2 * first, 0], [0.8, -0.25 * second, -0.25 * second, 0, 0]]
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


# --- PMPO -------------------------------------------------------------------------------------------------------------

REFERENCE = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
OTHER = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.3], dtype=torch.float64)


def pmpo_of_each(logits, behaviour, advantages=(0.0,) * 5, **kwargs):
    """pmpo of every token of a vocabulary of five, each drawn by `behaviour`."""
    every = torch.ones(5, 1, dtype=torch.bool)
    given = SequenceLogps(logits.log_softmax(-1)[:, None], every, REFERENCE.log()[:, None])
    signs = torch.tensor(advantages, dtype=torch.float64)[:, None]
    return pmpo(given, TokenCredit(signs, every, behaviour.log()[:, None]), **kwargs)[:, 0]


def test_pmpo_by_hand():
    """Signs +, +, unknown, - and -, +, + with alpha .7; log(pi_ref/mu) = .3 everywhere, log(pi/mu) as above.

    A token costs -sign log p, and e^.3 (.3 - log(pi/mu)) - e^.3 + pi/mu times beta.
    """
    loss = pmpo(policy(ref=BEHAVIOUR + 0.3), credit(), alpha=0.7, beta=2.0)

    def divergence(log_ratio):
        return math.exp(0.3) * (0.3 - log_ratio) - math.exp(0.3) + math.exp(log_ratio)

    row0 = [0.7 + 2 * divergence(0.5), 0.35 + 2 * divergence(0.0), 0, -0.6 + 2 * divergence(-1.0), 0]
    row1 = [-0.225 + 2 * divergence(-0.5), 1.05 + 2 * divergence(-0.5), 0.07 + 2 * divergence(0.0), 0, 0]
    assert_close(loss, torch.tensor([row0, row1], dtype=torch.float64))


def test_pmpo_weighs_a_token_by_its_sign_and_by_what_it_lost_to_the_reference():
    signs = (ADVANTAGES > 0).double() - 0.3
    lost = (BEHAVIOUR + 0.3).exp() - LOGPS.exp()
    expected = (signs + 2 * lost / BEHAVIOUR.exp()).masked_fill(~KNOWN, 0)
    assert_close(weights(pmpo, policy(ref=BEHAVIOUR + 0.3), alpha=0.7, beta=2.0), expected)


def test_pmpo_where_nothing_has_moved_weighs_by_sign_alone():
    found = weights(pmpo, policy(BEHAVIOUR, ref=BEHAVIOUR), alpha=0.0, beta=5.0)
    assert_close(found, -credit().negative.double())
    assert_close(pmpo(policy(BEHAVIOUR, ref=BEHAVIOUR), credit(), alpha=0.0)[0, :2], torch.zeros(2).double())


@pytest.mark.parametrize("behaviour", [None, REFERENCE, OTHER], ids=["policy", "reference", "other"])
def test_the_divergence_of_pmpo_and_its_gradient_are_right_on_average_whoever_drew(behaviour):
    """All five tokens enumerated; every single one is at least 0."""
    logits = torch.tensor([0.5, -0.3, 1.0, 0.1, -2.0], dtype=torch.float64, requires_grad=True)
    drew = logits.softmax(-1).detach() if behaviour is None else behaviour
    each = pmpo_of_each(logits, drew, beta=1.0)
    assert (each >= 0).all()
    found = drew @ each
    kl = (REFERENCE * (REFERENCE.log() - logits.log_softmax(-1))).sum()
    assert_close(found, kl, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, kl)]
    assert_close(*gradients, rtol=0, atol=1e-12)


def test_pmpo_carves_negatives_out_of_the_reference():
    """On samples of the reference its gradient is 0 at pi_ref (beta + sign)/Z, with signs alpha and -(1 - alpha)."""
    signs = torch.tensor([0.3, -0.7, 0.0, -0.7, 0.3], dtype=torch.float64)
    for beta in (0.75, 2.0):
        end = (REFERENCE * (beta + signs)).log().requires_grad_()
        value = REFERENCE @ pmpo_of_each(end, REFERENCE, (1.0, -1.0, 0.0, -1.0, 1.0), alpha=0.3, beta=beta)
        assert_close(torch.autograd.grad(value, end)[0], torch.zeros(5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("alpha", "beta", "comes_back"), [(0.0, 1.01, True), (0.0, 0.99, False), (0.3, 0.71, True), (0.3, 0.69, False)]
)
def test_pmpo_brings_a_lost_negative_back_only_if_beta_is_above_one_minus_alpha(alpha, beta, comes_back):
    logits = torch.tensor([0.0, -30.0, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = REFERENCE @ pmpo_of_each(logits, REFERENCE, (1.0, -1.0, 0.0, 1.0, 1.0), alpha=alpha, beta=beta)
    push = -torch.autograd.grad(value, logits)[0][1]
    assert push.item() == pytest.approx(REFERENCE[1].item() * (beta - 1 + alpha), rel=1e-6)
    assert (push > 0) == comes_back


def test_pmpo_needs_a_reference():
    with pytest.raises(MissingReferenceError, match="pass reference="):
        pmpo(policy(), credit())


def test_the_anchor_is_the_nll_of_positive_tokens():
    expected = torch.tensor([[1.0, 0.5, 0, 0, 0], [0, 1.5, 0.1, 0, 0]], dtype=torch.float64)
    assert_close(positive_nll(policy(), credit()), expected)


def test_one_sign_alone():
    assert torch.equal(only(credit(), -1).known, credit().negative)
    assert_close(
        reinforce(policy(), only(credit(), 1)) + reinforce(policy(), only(credit(), -1)), reinforce(policy(), credit())
    )


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
def test_nothing_behind_the_masks_reaches_a_result(name, nonsense):
    """Behind the completion: everything. On unknown tokens: the advantage; their log-probabilities count in ratios."""
    ref = BEHAVIOUR + 0.3

    def run(spoil: bool):
        logps, behaviour, advantages, reference = (x.clone() for x in (LOGPS, BEHAVIOUR, ADVANTAGES, ref))
        if spoil:
            for x in (logps, behaviour, reference):
                x[~MASK] = nonsense
            advantages[~KNOWN] = nonsense
        given = SequenceLogps(logps.requires_grad_(), MASK, reference)
        loss = POLICY_LOSSES[name](given, TokenCredit(advantages, KNOWN, behaviour, STEPS))
        loss.sum().backward()
        return loss.detach(), logps.grad

    for clean, dirty in zip(run(False), run(True), strict=True):
        assert_close(dirty, clean)
        assert clean.isfinite().all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_completion_without_a_known_token_yields_zero(name):
    given = SequenceLogps(LOGPS.clone().requires_grad_(), MASK, BEHAVIOUR)
    loss = POLICY_LOSSES[name](given, TokenCredit(ADVANTAGES, torch.zeros_like(KNOWN), BEHAVIOUR, STEPS))
    loss.sum().backward()
    assert (loss == 0).all()
    assert (given.logps.grad == 0).all()


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"topr"}))  # whose weight is a constant for the gradient
def test_gradients_in_float64(name):
    given = (LOGPS.masked_fill(~MASK, -1.0)).clone().requires_grad_()
    judged = TokenCredit(ADVANTAGES.masked_fill(~KNOWN, 0), KNOWN, BEHAVIOUR.masked_fill(~MASK, -1.0), STEPS)
    assert torch.autograd.gradcheck(
        lambda logps: POLICY_LOSSES[name](SequenceLogps(logps, MASK, judged.behaviour_logps), judged), given
    )


@pytest.mark.parametrize("name", ["topr", "clipped", "pmpo"])
def test_ratios_need_the_policy_that_drew(name):
    assert needs_of(POLICY_LOSSES[name]).behaviour
    with pytest.raises(MissingBehaviourError, match="give rows with behaviour_logps"):
        POLICY_LOSSES[name](policy(ref=BEHAVIOUR), credit(behaviour=None))


def test_levels_and_steps_are_checked():
    with pytest.raises(ValueError, match="level must be token, step or sequence"):
        topr(policy(), credit(), level="word")
    with pytest.raises(MissingStepsError, match="say where their steps end"):
        topr(policy(), credit(steps=None), level="step")


def test_segments_are_summed_in_their_row():
    values = torch.arange(10.0).reshape(2, 5)
    found = segment_sums(values, credit().segments("step"))
    assert found.tolist() == [[1, 1, 2, 3, 4], [5, 13, 13, 17, 17]]
    single = TokenCredit(values, KNOWN, steps=torch.arange(5).expand(2, 5))  # as many steps as tokens
    assert torch.equal(segment_sums(values, single.segments("step")), values)


def test_the_sign_dial_scales_each_side_alone():
    found = weigh_signs(torch.tensor([2.0, 0.0, -3.0]), positive_weight=0.1, negative_weight=2.0)
    assert_close(found, torch.tensor([0.2, 0.0, -6.0]))


# --- Per-step preference objectives -----------------------------------------------------------------------------------


def pair(step=True):
    """Both share two tokens; the second row parts at token 2 and goes on for one token behind its pit."""
    on = torch.tensor([[F, F, T, T, F], [F, F, T, F, F]])
    sides = []
    for row in (0, 1):
        logps = LOGPS[row : row + 1].clone().requires_grad_()
        mask = torch.tensor([[T, T, T, T, F]])
        sides.append(SequenceLogps(logps, mask, BEHAVIOUR[row : row + 1], on[row : row + 1] if step else None))
    return sides


def test_step_dpo_reads_the_differing_step_alone():
    """Log ratios on the step: .25 - 1 = -.75 and 0."""
    chosen, rejected = pair()
    loss = step_dpo(chosen, rejected, beta=0.5)
    assert_close(loss, torch.tensor([math.log1p(math.exp(0.5 * 0.75))], dtype=torch.float64))
    loss.sum().backward()
    assert (chosen.logps.grad != 0).tolist() == [[F, F, T, T, F]]
    assert (rejected.logps.grad != 0).tolist() == [[F, F, T, F, F]]
    assert rejected.logps.grad[0, 2] == -chosen.logps.grad[0, 2] > 0


def test_step_dpo_is_dpo_on_the_step_cut_out():
    chosen, rejected = pair()
    cut = [SequenceLogps(s.logps[:, 2:], s.step[:, 2:], s.ref_logps[:, 2:]) for s in (chosen, rejected)]
    assert_close(step_dpo(chosen, rejected), dpo(*cut))


def test_step_dpo_refuses_rows_without_a_step():
    with pytest.raises(MissingStepsError, match="chosen_step and rejected_step"):
        step_dpo(*pair(step=False))


def test_step_kto_by_hand():
    """Row 0: step 0 rose by .5 and is good, step 1 is unknown, step 2 fell by 1 and is bad.
    Row 1: step 0 fell by .5 and is bad, step 1 fell by .5 and is good."""
    found = step_kto(policy(ref=BEHAVIOUR), credit(), beta=2.0)

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    expected = [(sigma(-1.0) + sigma(-2.0)) / 2, (sigma(-1.0) + sigma(1.0)) / 2]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_step_kto_counts_a_step_once_however_long():
    """One good step of three tokens and one bad step of one token: the value of each is a half of the row's."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    steps = torch.tensor([[0, 0, 0, 1]])
    advantages = torch.tensor([[1.0, 1, 1, -1]], dtype=torch.float64)
    still = SequenceLogps(torch.zeros(1, 4, dtype=torch.float64), mask, torch.zeros(1, 4, dtype=torch.float64))
    credits = TokenCredit(advantages, mask, steps=steps)
    assert step_kto(still, credits, desirable_weight=3.0).item() == pytest.approx((3 / 2 + 1 / 2) / 2)


def test_step_kto_raises_good_steps_and_lowers_bad_ones():
    given = policy(ref=BEHAVIOUR)
    step_kto(given, credit()).sum().backward()
    assert (given.logps.grad[credit().positive] < 0).all()
    assert (given.logps.grad[credit().negative] > 0).all()
    assert (given.logps.grad[~KNOWN] == 0).all()


def test_step_kto_needs_a_reference_and_steps():
    with pytest.raises(MissingReferenceError):
        step_kto(policy(), credit())
    with pytest.raises(MissingStepsError):
        step_kto(policy(ref=BEHAVIOUR), credit(steps=None))
