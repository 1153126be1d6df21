"""Every pairwise objective against a value worked by hand, the weight its docstring states, its optimum and limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from negtune.losses.preference import (
    PREFERENCE_LOSSES,
    apo_down,
    apo_zero,
    cdpo,
    chosen_nll,
    cpo,
    dpo,
    dpo_mean,
    dpop,
    exo,
    hinge,
    nca,
    orpo,
    robust_dpo,
    simpo,
    slic,
)
from negtune.ops import MissingReferenceError, SequenceLogps, needs_of

NAMES = sorted(set(PREFERENCE_LOSSES) - {"step_dpo"})  # which reads a step besides, see test_policy.py


def sequence(logps, ref_logps=None) -> SequenceLogps:
    logps = torch.as_tensor(logps, dtype=torch.float64)
    ref_logps = None if ref_logps is None else torch.as_tensor(ref_logps, dtype=torch.float64)
    return SequenceLogps(logps, torch.ones_like(logps, dtype=torch.bool), ref_logps)


def at(*log_ratios: float) -> SequenceLogps:
    """Answers of one token with these log ratios."""
    reference = torch.full((len(log_ratios), 1), -1.0, dtype=torch.float64)
    return sequence(reference + torch.tensor(log_ratios, dtype=torch.float64)[:, None], reference)


def pushes(objective: Callable, chosen: SequenceLogps, rejected: SequenceLogps, **kwargs) -> tuple[Tensor, Tensor]:
    """How hard each token of the chosen answers is pushed up, and of the rejected ones down: `[B T]` each."""
    sides = [
        SequenceLogps(side.logps.clone().requires_grad_(), side.mask, side.ref_logps) for side in (chosen, rejected)
    ]
    values = objective(*sides, **kwargs)
    up, down = torch.autograd.grad(values.sum(), [side.logps for side in sides], materialize_grads=True)
    return -up, down


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return math.log1p(math.exp(x))


# log pi -2, two tokens, mean -1, r = -2 + 3 = 1, mean .5
CHOSEN = sequence([[-1.0, -1.0]], [[-2.0, -1.0]])
# log pi -4.5, three tokens, mean -1.5, r = -4.5 + 3.75 = -.75, mean -.25
REJECTED = sequence([[-2.0, -1.5, -1.0]], [[-1.5, -1.5, -0.75]])


@pytest.mark.parametrize(
    ("objective", "kwargs", "value"),
    [
        # margin of means .5 + .25 = .75, times 2
        (dpo_mean, {"beta": 2.0}, softplus(-1.5)),
        # h = 1 + .75 = 1.75, times .4 is .7
        (cdpo, {"beta": 0.4, "label_smoothing": 0.1}, 0.9 * softplus(-0.7) + 0.1 * softplus(0.7)),
        (robust_dpo, {"beta": 0.4, "label_smoothing": 0.1}, (0.9 * softplus(-0.7) - 0.1 * softplus(0.7)) / 0.8),
        (hinge, {"beta": 0.4}, 0.3),
        (hinge, {"beta": 1.0}, 0.0),  # 1.75 is beyond 1
        (slic, {"delta": 4.0}, 1.5),  # 4 + 2 - 4.5
        (slic, {"delta": 1.0}, 0.0),  # 1 + 2 - 4.5 < 0
        (cpo, {"beta": 0.2}, softplus(-0.5)),  # .2 (-2 + 4.5)
        (simpo, {"beta": 2.0, "gamma": 0.3}, softplus(-0.7)),  # 2 (-1 + 1.5) - .3
        # P = 1/e and e^-1.5: odds 1/(e - 1) and 1/(e^1.5 - 1); -log sigma(log x) = log(1 + 1/x)
        (orpo, {"beta": 0.5}, 1 + 0.5 * math.log1p((math.e - 1) / (math.exp(1.5) - 1))),
        (apo_zero, {"beta": 0.4}, 1 - sigma(0.4) + sigma(-0.3)),
        (apo_down, {"beta": 0.4}, sigma(0.4) + 1 - sigma(0.7)),
        (dpop, {"beta": 0.4, "penalty": 2.0}, softplus(-0.7)),  # the chosen answer has not fallen
        (nca, {"beta": 0.4}, softplus(-0.4) + (softplus(0.4) + softplus(-0.3)) / 2),
        # q = (sigma(.7), sigma(-.7)) against p = (.9, .1)
        (
            exo,
            {"beta": 0.4, "label_smoothing": 0.1},
            sigma(0.7) * math.log(sigma(0.7) / 0.9) + sigma(-0.7) * math.log(sigma(-0.7) / 0.1),
        ),
        (chosen_nll, {}, 1.0),
    ],
)
def test_one_pair_by_hand(objective, kwargs, value):
    assert objective(CHOSEN, REJECTED, **kwargs).item() == pytest.approx(value, rel=1e-12, abs=1e-12)


def test_dpop_by_hand_where_the_chosen_answer_has_fallen():
    """The pair the wrong way round: -.75 - 1 - 2 x .75 = -3.25, times .4."""
    assert dpop(REJECTED, CHOSEN, beta=0.4, penalty=2.0).item() == pytest.approx(softplus(1.3))


# --- Weights ----------------------------------------------------------------------------------------------------------

BETA, E, GAMMA, DELTA, PENALTY = 0.7, 0.15, 0.4, 1.3, 3.0


def h(c: SequenceLogps, r: SequenceLogps) -> Tensor:
    return c.log_ratio - r.log_ratio


def both(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight, weight


def per_token(weight: Tensor, c: SequenceLogps, r: SequenceLogps) -> tuple[Tensor, Tensor]:
    return weight / c.lengths, weight / r.lengths


def bell(x: Tensor) -> Tensor:
    """s (1 - s) of s = sigma(x)."""
    return x.sigmoid() * (1 - x.sigmoid())


def dpop_weights(c: SequenceLogps, r: SequenceLogps) -> tuple[Tensor, Tensor]:
    fallen = c.log_ratio < 0
    down = BETA * torch.sigmoid(-BETA * (h(c, r) + torch.where(fallen, PENALTY * c.log_ratio, 0.0)))
    return torch.where(fallen, PENALTY + 1, 1.0) * down, down


def orpo_weights(c: SequenceLogps, r: SequenceLogps) -> tuple[Tensor, Tensor]:
    p, q = c.means.exp(), r.means.exp()
    wrong = 1 / (1 + p * (1 - q) / ((1 - p) * q))  # sigma(-log x) = 1/(1 + x)
    return (1 + BETA * wrong / (1 - p)) / c.lengths, BETA * wrong / (r.lengths * (1 - q))


SMOOTH = {"beta": BETA, "label_smoothing": E}
WEIGHTS = {  # (settings, pair -> weight up on a token of the chosen answer, weight down on one of the rejected)
    "dpo": ({"beta": BETA}, lambda c, r: both(BETA * torch.sigmoid(-BETA * h(c, r)))),
    "ipo": ({"beta": BETA}, lambda c, r: both(2 * (1 / (2 * BETA) - h(c, r)))),
    "ipo_mean": (
        {"beta": BETA},
        lambda c, r: per_token(2 * (1 / (2 * BETA) - c.mean_log_ratio + r.mean_log_ratio), c, r),
    ),
    "dpo_mean": (
        {"beta": BETA},
        lambda c, r: per_token(BETA * torch.sigmoid(BETA * (r.mean_log_ratio - c.mean_log_ratio)), c, r),
    ),
    "cdpo": (SMOOTH, lambda c, r: both(BETA * (torch.sigmoid(-BETA * h(c, r)) - E))),
    "robust_dpo": (SMOOTH, lambda c, r: both(BETA * torch.sigmoid(-BETA * h(c, r)) + BETA * E / (1 - 2 * E))),
    "hinge": ({"beta": BETA}, lambda c, r: both(BETA * (h(c, r) < 1 / BETA).double())),
    "slic": ({"delta": DELTA}, lambda c, r: both((c.sums - r.sums < DELTA).double())),
    "cpo": ({"beta": BETA}, lambda c, r: both(BETA * torch.sigmoid(-BETA * (c.sums - r.sums)))),
    "simpo": (
        {"beta": BETA, "gamma": GAMMA},
        lambda c, r: per_token(BETA * torch.sigmoid(GAMMA - BETA * (c.means - r.means)), c, r),
    ),
    "orpo": ({"beta": BETA}, orpo_weights),
    "apo_zero": ({"beta": BETA}, lambda c, r: (BETA * bell(BETA * c.log_ratio), BETA * bell(BETA * r.log_ratio))),
    "apo_down": (
        {"beta": BETA},
        lambda c, r: (BETA * (bell(BETA * h(c, r)) - bell(BETA * c.log_ratio)), BETA * bell(BETA * h(c, r))),
    ),
    "dpop": ({"beta": BETA, "penalty": PENALTY}, dpop_weights),
    "nca": (
        {"beta": BETA},
        lambda c, r: (
            BETA * (torch.sigmoid(-BETA * c.log_ratio) - torch.sigmoid(BETA * c.log_ratio) / 2),
            BETA * torch.sigmoid(BETA * r.log_ratio) / 2,
        ),
    ),
    "exo": (SMOOTH, lambda c, r: both(BETA * bell(BETA * h(c, r)) * (math.log((1 - E) / E) - BETA * h(c, r)))),
    "chosen_nll": ({}, lambda c, r: (1 / c.lengths.double(), torch.zeros_like(r.sums))),
}

# Log ratios of the chosen answer 1, -.75, 1, -2, 3, of the rejected one -.75, 1, 2.5, -2.5, -3.
LIKELIER = torch.tensor([1.0, -0.75, 1.0, -2.0, 3.0], dtype=torch.float64)
CHOSEN_ROWS = sequence([[-1.5, -0.5]] * 5, torch.tensor([[-1.5, -0.5]]) - LIKELIER[:, None] / 2)
REJECTED_ROWS = sequence(
    [[-2.0, -1.5, -1.0], [-1.0, -0.5, -0.5], [-0.4, -0.3, -0.2], [-1.5, -1.0, -0.5], [-3.0, -2.0, -4.0]],
    [[-1.5, -1.5, -0.75], [-2.0, -0.5, -0.5], [-1.4, -0.8, -1.2], [-0.25, -0.1, -0.15], [-2.0, -1.0, -3.0]],
)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_weight_that_the_docstring_states(name):
    kwargs, weights = WEIGHTS[name]
    up, down = pushes(PREFERENCE_LOSSES[name], CHOSEN_ROWS, REJECTED_ROWS, **kwargs)
    expected_up, expected_down = weights(CHOSEN_ROWS, REJECTED_ROWS)
    assert_close(up, expected_up[:, None].expand(5, 2), rtol=1e-10, atol=1e-12)
    assert_close(down, expected_down[:, None].expand(5, 3), rtol=1e-10, atol=1e-12)


# --- Optima -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [cdpo, exo])
def test_smoothed_labels_hold_the_margin_at_the_log_odds_of_the_labels(objective):
    end = math.log(0.9 / 0.1) / 0.5
    _, down = pushes(objective, at(0, 0, 0), at(0.1 - end, -end, -0.1 - end), beta=0.5, label_smoothing=0.1)
    assert down[0] > 1e-4
    assert down[1].item() == pytest.approx(0, abs=1e-15)
    assert down[2] < -1e-4


def test_exo_gives_up_a_pair_that_is_far_the_wrong_way_round_where_cdpo_pushes_hardest():
    near, far = at(1.0), at(100.0)
    assert pushes(exo, at(0), far, beta=0.5)[1] < 1e-6 < pushes(exo, at(0), near, beta=0.5)[1]
    assert pushes(cdpo, at(0), far, beta=0.5)[1] > pushes(cdpo, at(0), near, beta=0.5)[1]


def test_nca_holds_the_chosen_answer_at_log_two_over_beta_whatever_the_rejected_one_does():
    end = math.log(2) / 0.5
    for rejected in (-5.0, 5.0):
        up, _ = pushes(nca, at(end - 0.1, end, end + 0.1), at(rejected, rejected, rejected), beta=0.5)
        assert up[0] > 1e-4
        assert up[1].item() == pytest.approx(0, abs=1e-15)
        assert up[2] < -1e-4


def test_hinges_stop_at_their_margin():
    """hinge: 1/beta = 2 nats over the reference; slic: delta = 2 nats between the answers."""
    for objective, kwargs, weight in ((hinge, {"beta": 0.5}, 0.5), (slic, {"delta": 2.0}, 1.0)):
        up, down = pushes(objective, at(0.99, 1.01), at(-1.0, -1.0), **kwargs)
        assert up[:, 0].tolist() == down[:, 0].tolist() == [weight, 0]


def test_apo_down_lowers_both_answers_once_they_are_apart():
    up, down = pushes(apo_down, at(0.0, 0.5), at(0.0, -1.0))
    assert up[0].item() == pytest.approx(0, abs=1e-15)
    assert up[1] < 0 < down[1]
    assert down[0].item() == pytest.approx(0.1 / 4)


def test_dpop_holds_on_to_a_chosen_answer_that_falls_with_the_rejected_one():
    """Both fell by the same: dpo has one weight for both, dpop raises the chosen one penalty + 1 times as hard."""
    up, down = pushes(dpop, at(-2.0), at(-2.0), penalty=50.0)
    assert (up / down).item() == pytest.approx(51)


# --- Limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "kwargs"),
    [(cdpo, {"label_smoothing": 0.0}), (robust_dpo, {"label_smoothing": 0.0}), (dpop, {"penalty": 0.0})],
)
def test_without_its_addition_it_is_dpo(objective, kwargs):
    found, expected = (
        objective(CHOSEN_ROWS, REJECTED_ROWS, beta=0.3, **kwargs),
        dpo(CHOSEN_ROWS, REJECTED_ROWS, beta=0.3),
    )
    assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_mean_of_robust_dpo_over_flips_is_dpo_on_the_true_labels():
    for e in (0.1, 0.3, 0.49):

        def over_flips(chosen, rejected, e=e):
            kept = robust_dpo(chosen, rejected, beta=0.3, label_smoothing=e)
            return (1 - e) * kept + e * robust_dpo(rejected, chosen, beta=0.3, label_smoothing=e)

        assert_close(over_flips(CHOSEN_ROWS, REJECTED_ROWS), dpo(CHOSEN_ROWS, REJECTED_ROWS, beta=0.3))
        found, expected = (
            pushes(objective, CHOSEN_ROWS, REJECTED_ROWS)
            for objective in (over_flips, lambda c, r: dpo(c, r, beta=0.3))
        )
        assert_close(found, expected)


def test_cdpo_and_exo_are_the_two_directions_of_one_divergence():
    """p = (.8, .2) from the labels, q from the policy; cdpo is the cross entropy, KL(p || q) + H(p)."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    p = torch.tensor([0.8, 0.2], dtype=torch.float64)
    q = torch.stack([0.3 * CHOSEN_ROWS.log_ratio, 0.3 * REJECTED_ROWS.log_ratio], -1).softmax(-1)
    settings = {"beta": 0.3, "label_smoothing": 0.2}
    assert_close(exo(CHOSEN_ROWS, REJECTED_ROWS, **settings), kl(q, p))
    assert_close(cdpo(CHOSEN_ROWS, REJECTED_ROWS, **settings), kl(p, q) - (p * p.log()).sum())


def test_dpo_mean_on_answers_of_one_length_is_dpo_with_beta_shared_among_the_tokens():
    longer = sequence([[-2.0, -1.5]], [[-1.5, -1.5]])
    assert_close(dpo_mean(CHOSEN, longer, beta=0.6), dpo(CHOSEN, longer, beta=0.3))


def test_without_a_reference_it_is_a_uniform_one():
    """A uniform reference gives -n log V to any answer of n tokens: for answers of one length it cancels."""
    uniform = torch.full((1, 2), -math.log(50), dtype=torch.float64)
    better, worse = sequence([[-1.0, -1.0]], uniform), sequence([[-2.0, -1.5]], uniform)
    assert_close(cpo(better, worse, beta=0.3), dpo(better, worse, beta=0.3))
    assert_close(simpo(better, worse, beta=0.3, gamma=0.0), dpo_mean(better, worse, beta=0.3))
    assert_close(slic(better, worse, delta=2.0), 2 * hinge(better, worse, beta=0.5))


def test_simpo_and_orpo_are_those_of_trl():
    """Its experimental CPO and ORPO trainers, written out; logps are means over tokens, gamma is divided by beta."""
    chosen, rejected, beta, gamma = -1.0, -1.5, 2.0, 0.6
    logits = chosen - rejected - gamma / beta
    assert simpo(CHOSEN, REJECTED, beta=beta, gamma=gamma).item() == pytest.approx(-math.log(sigma(beta * logits)))
    log_odds = (chosen - rejected) - (math.log1p(-math.exp(chosen)) - math.log1p(-math.exp(rejected)))
    ratio = math.log(sigma(log_odds))
    assert orpo(CHOSEN, REJECTED, beta=beta).item() == pytest.approx(-chosen - beta * ratio)


# --- What may not happen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nonsense", [math.nan, 99.0, -99.0])
def test_nothing_behind_the_mask_reaches_value_or_gradient(name, nonsense):
    objective = PREFERENCE_LOSSES[name]

    def padded(side: SequenceLogps) -> SequenceLogps:
        logps, ref_logps = (torch.nn.functional.pad(x, (0, 2), value=nonsense) for x in (side.logps, side.ref_logps))
        return SequenceLogps(logps, torch.nn.functional.pad(side.mask, (0, 2), value=False), ref_logps)

    chosen, rejected = padded(CHOSEN_ROWS), padded(REJECTED_ROWS)
    assert_close(objective(chosen, rejected), objective(CHOSEN_ROWS, REJECTED_ROWS), rtol=0, atol=0)
    for found, clean in zip(
        pushes(objective, chosen, rejected), pushes(objective, CHOSEN_ROWS, REJECTED_ROWS), strict=True
    ):
        assert_close(found[:, :-2], clean, rtol=0, atol=0)
        assert (found[:, -2:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_width_of_the_numbers_stays(name):
    for dtype in (torch.float32, torch.float64):
        sides = [
            SequenceLogps(side.logps.to(dtype), side.mask, side.ref_logps.to(dtype))
            for side in (CHOSEN_ROWS, REJECTED_ROWS)
        ]
        assert PREFERENCE_LOSSES[name](*sides).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_far_separated_pairs_stay_finite_in_float32(name):
    """Either way round, and from a probability of 1 to one of e^-10000, under the policy or the reference."""
    extremes = torch.tensor([[0.0], [-1e-9], [-1e-7], [-1.0], [-1e4]])
    grid = torch.cartesian_prod(*[extremes[:, 0]] * 4)[:, :, None]
    chosen, rejected = (
        SequenceLogps(logps, torch.ones_like(logps, dtype=torch.bool), ref_logps)
        for logps, ref_logps in ((grid[:, 0], grid[:, 1]), (grid[:, 2], grid[:, 3]))
    )
    assert PREFERENCE_LOSSES[name](chosen, rejected).isfinite().all()
    assert all(push.isfinite().all() for push in pushes(PREFERENCE_LOSSES[name], chosen, rejected))


def test_orpo_keeps_its_precision_where_a_probability_is_close_to_one():
    """1 - P = 1e-6 and 1e-3: in float32 1 - exp(log P) would be off by some per cent."""
    sides = [torch.tensor([[math.log1p(-short)]], dtype=torch.float64) for short in (1e-3, 1e-6)]
    exact, narrow = (
        orpo(*(SequenceLogps(x.to(dtype), torch.ones(1, 1, dtype=torch.bool)) for x in sides), beta=1.0)
        for dtype in (torch.float64, torch.float32)
    )
    assert exact.item() == pytest.approx(1e-3 + math.log(1 + 1e3), rel=1e-3)
    assert narrow.item() == pytest.approx(exact.item(), rel=1e-5)


def test_orpo_on_a_rejected_answer_that_is_certain_is_as_bad_as_float32_can_tell():
    """P = 1 - 2^-23: log odds 23 log 2, against an even chance of the chosen answer."""
    even, certain = (
        SequenceLogps(torch.tensor([[x]]), torch.ones(1, 1, dtype=torch.bool)) for x in (math.log(0.5), 0.0)
    )
    assert orpo(even, certain, beta=1.0).item() == pytest.approx(math.log(2) + 23 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_a_reference_only_if_it_says_so(name):
    sides = [SequenceLogps(side.logps, side.mask) for side in (CHOSEN_ROWS, REJECTED_ROWS)]
    if not needs_of(PREFERENCE_LOSSES[name]).reference:
        assert PREFERENCE_LOSSES[name](*sides).shape == (5,)
        return
    with pytest.raises(MissingReferenceError, match="pass reference="):
        PREFERENCE_LOSSES[name](*sides)
