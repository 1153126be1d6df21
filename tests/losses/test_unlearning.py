"""Forget and retain objectives in float64: values by hand, limits of the papers, gradient weights, enumeration."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from negtune.losses.preference import dpo
from negtune.losses.unlearning import (
    FORGET_LOSSES,
    RETAIN_LOSSES,
    activation_mse,
    beta_for_mean,
    beta_for_sum,
    ce_u,
    control_vector,
    grad_ascent,
    idk_dpo,
    idk_nll,
    jensun,
    jsd,
    kl,
    kto,
    kto_logsigmoid,
    nll,
    npo,
    npo_weight,
    rmu,
    satimp,
    simnpo,
    undial,
    wga,
)
from negtune.ops import LayerActivations, MissingReferenceError, SequenceLogps, TokenDistributions, needs_of

BATCH, TOKENS, WIDTH, VOCABULARY = 3, 5, 6, 7
LENGTHS = [5, 1, 3]
ALL_LOSSES = {**FORGET_LOSSES, **RETAIN_LOSSES}
SEQUENCE_LOSSES = {name: loss for name, loss in ALL_LOSSES.items() if needs_of(loss).logps_suffice}
DISTRIBUTION_LOSSES = {name: loss for name, loss in ALL_LOSSES.items() if needs_of(loss).distributions}


@dataclass
class IdentityHead:
    """Hidden states are the logits."""

    vocab_size: int
    trainable: bool = False

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden


def tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def sequence(logps, ref_logps=None) -> SequenceLogps:
    """Sequences without padding."""
    logps = tensor(logps)
    ref_logps = None if ref_logps is None else tensor(ref_logps)
    return SequenceLogps(logps, torch.ones_like(logps, dtype=torch.bool), ref_logps)


def distributions(logits, targets, ref_logits=None, *, mask=None) -> TokenDistributions:
    """Logits as hidden states below an identity head; one row of tokens unless a mask is given."""
    head = IdentityHead(logits.shape[-1])
    mask = torch.ones(1, len(targets), dtype=torch.bool) if mask is None else mask
    return TokenDistributions(logits, torch.as_tensor(targets), mask, head, ref_logits, head)


def random_sequence(seed: int, *, grow: float = 0.0) -> SequenceLogps:
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(BATCH, TOKENS, generator=generator, dtype=torch.float64) * 4 - 0.01
    mask = torch.arange(TOKENS) < tensor(LENGTHS)[:, None]
    noise = torch.randn(BATCH, TOKENS, generator=generator, dtype=torch.float64)
    return SequenceLogps(logps.requires_grad_(), mask, logps.detach() - grow + noise)


def random_distributions(seed: int) -> TokenDistributions:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, mask = sum(LENGTHS), torch.arange(TOKENS) < tensor(LENGTHS)[:, None]
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return distributions(draw(rows, VOCABULARY).requires_grad_(), targets, draw(rows, VOCABULARY), mask=mask)


def random_activations(seed: int) -> LayerActivations:
    generator = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = torch.randn(2, sum(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
    return LayerActivations(hidden.requires_grad_(), torch.arange(TOKENS) < tensor(LENGTHS)[:, None], ref_hidden)


def sides_of(loss, seed: int = 0) -> dict:
    """Random inputs by the names the objective asks for."""
    make = random_distributions if needs_of(loss).distributions else random_sequence
    make = random_activations if needs_of(loss).activations else make
    names = sorted(needs_of(loss).sides)
    return {name: tensor(0.3) if name == "z0" else make(seed + index) for index, name in enumerate(names)}


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]


# --- Values by hand ---------------------------------------------------------------------------------------------------


def test_npo_of_one_answer_by_hand():
    # l = -1 - 2 = -3, l_ref = -1 - 1 = -2: r = -1; beta .5: 4 log(1 + e^-.5)
    assert_close(npo(sequence([[-1.0, -2.0]], [[-1.0, -1.0]]), beta=0.5), tensor([4 * math.log1p(math.exp(-0.5))]))


def test_simnpo_of_one_answer_by_hand():
    # l/|y| = -3/2; beta 2, gamma .5: -log sigma(3 - .5) = log(1 + e^-2.5)
    assert_close(simnpo(sequence([[-1.0, -2.0]]), beta=2.0, gamma=0.5), tensor([math.log1p(math.exp(-2.5))]))
    # the released code's gamma stands inside beta: log sigma(beta (-l/|y| - gamma'))
    released = -(2 / 2.0) * F.logsigmoid(2.0 * (tensor([1.5]) - 0.25))
    assert_close(simnpo(sequence([[-1.0, -2.0]]), beta=2.0, gamma=2.0 * 0.25), released)


def test_token_losses_by_hand():
    answer = sequence([[math.log(0.5), math.log(0.2)]])
    assert_close(grad_ascent(answer), tensor([[math.log(0.5), math.log(0.2)]]))
    assert_close(nll(answer), tensor([[math.log(2), math.log(5)]]))
    assert_close(idk_nll(answer), tensor([[math.log(2), math.log(5)]]))
    assert_close(wga(answer, beta=2.0), tensor([[0.25 * math.log(0.5), 0.04 * math.log(0.2)]]))
    assert_close(
        satimp(answer, beta1=2.0, beta2=1.0), tensor([[0.25 * 0.5 * math.log(0.5), 0.04 * 0.8 * math.log(0.2)]])
    )


def activations(hidden, ref_hidden=None, *, mask=None) -> LayerActivations:
    hidden = tensor(hidden)
    mask = torch.ones(1, len(hidden), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return LayerActivations(hidden, mask, None if ref_hidden is None else tensor(ref_hidden))


def test_activation_mse_by_hand():
    # (1 + 4)/2 and (0 + 9)/2; the third token of the layout is padding
    value = activation_mse(activations([[1.0, 2.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], mask=[[True, True, False]]))
    assert_close(value, tensor([[2.5, 4.5, 0.0]]))


def test_rmu_of_one_token_by_hand():
    # |h - c u|^2 / H with c = 10 and h = 0: c^2 |u|^2 / H = 100/4; at h = c u it is 0, and it pulls towards c u
    assert_close(rmu(activations([[0.0] * 4]), steering=10.0, seed=3), tensor([[25.0]]), rtol=1e-6, atol=0)
    target = 10.0 * control_vector(4, 3)
    assert_close(rmu(activations([target.tolist()]), steering=10.0, seed=3), tensor([[0.0]]))
    hidden = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    pull = gradient(rmu(LayerActivations(hidden, torch.ones(1, 1).bool()), steering=10.0, seed=3), hidden)
    assert_close(pull, (-2 / 4) * target[None].double(), rtol=1e-6, atol=0)


def test_the_control_vector_is_a_positive_unit_vector_that_only_the_seed_decides():
    before = torch.random.get_rng_state()
    first = control_vector(64, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, control_vector(64, 0))
    assert not torch.equal(first, control_vector(64, 1))
    assert first.norm().item() == pytest.approx(1.0)
    assert (first >= 0).all()


def test_rmu_reads_the_layer_it_is_told():
    assert needs_of(rmu).layer == 7
    assert needs_of(partial(rmu, layer=3)).layer == 3
    assert needs_of(npo).layer is None


def test_kto_by_hand():
    # r = -1, beta .5, z0 = .25: sigma(.25 + .5) = 1/(1 + e^-.75)
    forget, z0 = sequence([[-1.0, -2.0]], [[-1.0, -1.0]]), tensor(0.25)
    sigma = 1 / (1 + math.exp(-0.75))
    assert_close(kto(forget, z0, beta=0.5), tensor([1 - 4 * sigma]))
    assert_close(kto_logsigmoid(forget, z0, beta=0.5), tensor([1 - 4 * math.log(sigma)]))


def test_kto_with_a_log_sigmoid_and_no_statistic_is_npo_plus_one():
    forget = random_sequence(0)
    assert_close(kto_logsigmoid(forget, tensor(0.0), beta=0.3), npo(forget, beta=0.3) + 1)


def test_idk_dpo_by_hand():
    # alternative: r = 1; forget: r = -.5; margin 1.5, beta .5: 4 log(1 + e^-.75)
    loss = idk_dpo(sequence([[-2.0]], [[-1.5]]), sequence([[-1.0, -2.0]], [[-2.0, -2.0]]), beta=0.5)
    assert_close(loss, tensor([4 * math.log1p(math.exp(-0.75))]))


def test_npo_weights_of_the_reference_table():
    ratios = tensor([1.0, 0.1, 0.01, 1e-4]).log()
    assert_close(npo_weight(ratios, beta=1.0), tensor([1, 0.1818, 0.0198, 0.0002]), rtol=0, atol=5e-5)
    assert_close(npo_weight(ratios, beta=0.1), tensor([1, 0.8854, 0.7737, 0.5695]), rtol=0, atol=5e-5)


# --- NPO: identities and limits of the paper --------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 5.0])
def test_npo_gradient_is_its_weight_times_gradient_ascent(beta):
    forget = random_sequence(1)
    weight = npo_weight(forget.log_ratio, beta=beta)[:, None]
    expected = weight * gradient(grad_ascent(forget), forget.logps)
    assert_close(gradient(npo(forget, beta=beta), forget.logps), expected, rtol=1e-6, atol=0)


def test_npo_tends_to_gradient_ascent_for_small_beta():
    beta, ratio = 1e-3, torch.linspace(-10, 10, 41, dtype=torch.float64)[:, None]
    forget = sequence(ratio, torch.zeros_like(ratio))
    second_order = beta / 4 * (ratio**2).mean()
    remainder = npo(forget, beta=beta).mean() - 2 / beta * math.log(2) - ratio.mean() - second_order
    assert remainder.abs() <= 1e-3 * second_order
    deviation = (npo_weight(forget.log_ratio, beta=beta) - 1).abs()
    assert (deviation <= beta * ratio[:, 0].abs() / 2).all()


def test_npo_tends_to_a_hinge_for_large_beta():
    ratio = tensor([[-3.0], [-0.1], [0.1], [3.0]])
    forget = sequence(ratio, torch.zeros_like(ratio))
    assert_close(npo(forget, beta=1e4), 2 * ratio[:, 0].clamp(min=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_at_the_reference_is_gradient_ascent_plus_a_constant(beta):
    logps = random_sequence(2).logps
    forget = SequenceLogps(logps, torch.ones_like(logps, dtype=torch.bool), logps.detach())
    loss = npo(forget, beta=beta)
    assert_close(loss, torch.full_like(loss, 2 / beta * math.log(2)), rtol=1e-15, atol=0)
    assert torch.equal(gradient(loss, logps), gradient(grad_ascent(forget), logps))


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=200)
def test_npo_is_never_negative_and_its_weight_stays_between_0_and_2(logp, ref_logp, beta):
    logps = tensor([[logp]]).requires_grad_()
    loss = npo(SequenceLogps(logps, torch.ones(1, 1, dtype=torch.bool), tensor([[ref_logp]])), beta=beta)
    assert loss.item() >= 0
    assert math.isfinite(loss.item())
    assert 0 <= gradient(loss, logps).item() <= 2


def test_npo_is_the_rejected_half_of_dpo():
    # a chosen answer that never leaves the reference, and 2/beta
    rejected = random_sequence(3)
    frozen = SequenceLogps(rejected.ref_logps, rejected.mask, rejected.ref_logps)
    assert_close(npo(rejected, beta=0.3), 2 / 0.3 * dpo(frozen, rejected, beta=0.3))
    assert_close(npo(rejected, beta=0.3), idk_dpo(rejected, frozen, beta=0.3))


def trl_dpo_loss(loss_type: str, chosen: SequenceLogps, rejected: SequenceLogps, *, beta: float) -> Tensor:
    """What `trl.DPOTrainer._compute_loss` returns for these log-probabilities: its own code, below a model that only
    hands them over. The batch is [chosen, rejected] with one prompt token in front."""
    from trl import DPOTrainer

    logps = torch.cat([chosen.logps * chosen.mask, rejected.logps * rejected.mask])
    mask = torch.cat([chosen.mask, rejected.mask])
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    class Model:
        training = True

        def __call__(self, **inputs):
            return outputs

    gathers = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=Model(),
        accelerator=gathers,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
    )
    inputs = {
        "input_ids": F.pad(mask.long(), (1, 0)),
        "attention_mask": F.pad(mask.long(), (1, 0), value=1),
        "completion_mask": F.pad(mask.long(), (1, 0)),
        "ref_chosen_logps": chosen.ref_sums,
        "ref_rejected_logps": rejected.ref_sums,
    }
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def test_npo_is_the_rejected_half_of_trls_bco_pair_and_dpo_is_trls_sigmoid():
    chosen, rejected, beta = random_sequence(4), random_sequence(5), 0.3
    bco_pair = trl_dpo_loss("bco_pair", chosen, rejected, beta=beta)
    expected = beta / 2 * gradient(npo(rejected, beta=beta).mean(), rejected.logps)
    assert_close(gradient(bco_pair, rejected.logps), expected, rtol=1e-12, atol=0)

    at_reference = SequenceLogps(chosen.ref_logps, chosen.mask, chosen.ref_logps)  # TRL's chosen half is log 2 there
    rejected_half = trl_dpo_loss("bco_pair", at_reference, rejected, beta=beta) - math.log(2)
    assert_close(rejected_half, beta / 2 * npo(rejected, beta=beta).mean(), rtol=1e-12, atol=0)

    sigmoid = trl_dpo_loss("sigmoid", chosen, rejected, beta=beta)
    assert_close(sigmoid, dpo(chosen, rejected, beta=beta).mean(), rtol=1e-12, atol=0)


def test_beta_converts_between_sums_and_means():
    # 50 tokens that each lost 1 nat: beta .1 gives a weight of .013 on the sum and .95 on the mean
    length, lost = 50, tensor([-1.0])
    assert_close(npo_weight(lost * length, beta=0.1), tensor([0.01339]), rtol=0, atol=5e-6)
    assert_close(npo_weight(lost, beta=0.1), tensor([0.95004]), rtol=0, atol=5e-6)
    beta = beta_for_mean(0.1, length)
    assert beta == pytest.approx(5.0)
    assert beta_for_sum(beta, length) == pytest.approx(0.1)
    assert_close(npo_weight(lost, beta=beta), npo_weight(lost * length, beta=0.1))

    # the whole objective, against SimNPO with a reference of probability 1: same weight, divided by the length
    summed = sequence(torch.full((1, length), -0.02), torch.zeros(1, length))
    assert_close(simnpo(summed, beta=beta), npo(summed, beta=0.1) / length)


# --- Gradients: which way, and how hard -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grad_ascent", "npo", "simnpo", "kto", "kto_logsigmoid", "wga", "satimp", "idk_dpo"])
def test_descent_pushes_the_forget_answer_down(name):
    sides = sides_of(FORGET_LOSSES[name])
    pushed = gradient(FORGET_LOSSES[name](**sides), sides["forget"].logps)
    assert (pushed[sides["forget"].mask] > 0).all()


@pytest.mark.parametrize("name", ["idk_dpo", "idk_nll", "jensun"])
def test_descent_pulls_the_alternative_up(name):
    sides = sides_of(FORGET_LOSSES[name])
    pulled = gradient(FORGET_LOSSES[name](**sides), sides["alternative"].logps)
    assert (pulled[sides["alternative"].mask] < 0).all()


@pytest.mark.parametrize("name", ["undial", "ce_u"])
def test_descent_lowers_the_forget_token_and_raises_some_other(name):
    logits, targets = torch.zeros(2, 4, dtype=torch.float64).requires_grad_(), [1, 2]
    forget = distributions(logits, targets, logits.detach())
    loss = FORGET_LOSSES[name](forget)
    pushed = gradient(loss, logits)[1]  # CE-U skips the first token
    assert pushed[2] > 0
    assert (pushed[[0, 1, 3]] < 0).all()


def test_weights_on_the_log_probability_are_those_of_the_docstrings():
    forget, z0 = random_sequence(6), tensor(0.3)
    ratio, probability = forget.log_ratio.detach()[:, None], forget.logps.detach().exp()
    means = forget.means.detach()[:, None]
    sigma = torch.sigmoid(z0 - 0.5 * ratio)
    expected = {
        simnpo: 2 / forget.lengths[:, None] * torch.sigmoid(2.0 * means + 0.3),
        kto: 2 * sigma * (1 - sigma),
        kto_logsigmoid: 2 * torch.sigmoid(0.5 * ratio - z0),
        wga: probability**0.5,
        satimp: probability**5 * (1 - probability),
    }
    losses = {
        simnpo: simnpo(forget, beta=2.0, gamma=0.3),
        kto: kto(forget, z0, beta=0.5),
        kto_logsigmoid: kto_logsigmoid(forget, z0, beta=0.5),
        wga: wga(forget, beta=0.5),
        satimp: satimp(forget),
    }
    for objective, loss in losses.items():
        weight = expected[objective].expand_as(forget.logps).masked_fill(~forget.mask, 0)
        assert_close(gradient(loss, forget.logps), weight, msg=objective.__name__)

    pull = gradient(jensun(forget), forget.logps)
    assert_close(pull, (-probability / 2 * (1 + 1 / probability).log()).masked_fill(~forget.mask, 0))


def test_the_statistic_of_kto_carries_no_gradient():
    alternative = random_sequence(7)
    loss = kto(random_sequence(8), alternative.log_ratio.mean(), beta=0.5)
    assert torch.autograd.grad(loss.sum(), alternative.logps, allow_unused=True)[0] is None


def test_ce_u_has_the_gradient_of_unlikelihood():
    forget = random_distributions(9)
    logps = forget.hidden.log_softmax(-1)[torch.arange(9), forget.targets]
    unlikelihood = gradient(-(-logps.exp()).log1p(), forget.hidden)
    assert_close(gradient(ce_u(forget, skip_first=0), forget.hidden), unlikelihood)


def test_ce_u_skips_the_first_tokens_of_each_answer_wherever_it_starts():
    forget = random_distributions(10)
    everything, skipped = ce_u(forget, skip_first=0), ce_u(forget, skip_first=2)
    assert (everything[forget.mask] > 0).all()
    assert not skipped[:, :2].any()
    assert torch.equal(skipped[:, 2:], everything[:, 2:])
    left_padded = TokenDistributions(forget.hidden, forget.targets, forget.mask.flip(-1), forget.head)
    assert_close(ce_u(left_padded)[2], F.pad(everything[2, 1:3], (3, 0)))


def test_undial_stops_at_the_reference_with_one_logit_lowered():
    ref_logits, targets = random_distributions(11).ref_hidden, torch.arange(9) % VOCABULARY
    lowered = ref_logits - 3.0 * F.one_hot(targets, VOCABULARY)
    optimum = lowered.clone().requires_grad_()
    loss = undial(distributions(optimum, targets, ref_logits), beta=3.0)
    assert_close(gradient(loss, optimum), torch.zeros_like(optimum))
    assert_close(loss[0], torch.distributions.Categorical(logits=lowered).entropy())


# --- Enumeration over a small vocabulary ------------------------------------------------------------------------------


def softmax(logits) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_divergences_and_cross_entropies_equal_sums_over_the_vocabulary():
    logits, ref_logits, target = [0.3, -1.2, 2.0], [1.0, 0.5, -0.7], 2
    p, q = softmax(logits), softmax(ref_logits)
    lowered = softmax([z - 3.0 * (index == target) for index, z in enumerate(ref_logits)])
    others = [0.0 if index == target else x / (1 - p[target]) for index, x in enumerate(p)]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    both = distributions(tensor([logits]), [target], tensor([ref_logits]))
    expected = {
        partial(kl, direction="forward"): divergence(q, p),
        partial(kl, direction="reverse"): divergence(p, q),
        jsd: (divergence(p, middle) + divergence(q, middle)) / 2,
        partial(undial, beta=3.0): -sum(a * math.log(b) for a, b in zip(lowered, p, strict=True)),
        partial(ce_u, skip_first=0): -sum(a * math.log(b) for a, b in zip(others, p, strict=True)),
    }
    for objective, value in expected.items():
        assert_close(objective(both), tensor([[value]]), msg=str(objective))
    assert_close(kl(both), kl(both, direction="forward"))


def test_jensun_equals_the_divergence_to_the_one_hot_summed_over_the_vocabulary():
    for logits in ([0.0, 0.0, 0.0], [5.0, -3.0, 0.1], [-9.0, 0.0, 2.0]):
        p, onehot = softmax(logits), [1.0, 0.0, 0.0]
        middle = [(a + b) / 2 for a, b in zip(p, onehot, strict=True)]
        expected = (divergence(p, middle) + divergence(onehot, middle)) / 2
        assert_close(jensun(sequence([[math.log(p[0])]])), tensor([[expected]]))


def test_jensun_lies_between_0_for_a_certain_refusal_and_log_2_for_an_impossible_one():
    assert_close(jensun(sequence([[0.0, -1e3, -math.inf]])), tensor([[0, math.log(2), math.log(2)]]))


def test_kl_refuses_an_unknown_direction():
    with pytest.raises(ValueError, match=r"forward.*reverse.*got 'sideways'"):
        kl(random_distributions(0), direction="sideways")


# --- Extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTION_LOSSES)
def test_impossible_tokens_of_both_models_change_nothing(name):
    loss, inputs = DISTRIBUTION_LOSSES[name], random_distributions(12)
    logits = F.pad(inputs.hidden.detach(), (0, 2), value=-math.inf).requires_grad_()
    padded = distributions(logits, inputs.targets, F.pad(inputs.ref_hidden, (0, 2), value=-math.inf), mask=inputs.mask)
    expected = loss(inputs)
    assert_close(loss(padded), expected)
    expected_gradient = F.pad(gradient(expected, inputs.hidden), (0, 2))
    assert_close(gradient(loss(padded), logits), expected_gradient)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_finite_when_only_the_averaging_side_rules_a_token_out(direction):
    possible, impossible = tensor([[0.0, 0.0, 0.0]]), tensor([[0.0, 0.0, -math.inf]])
    logits, ref_logits = (possible, impossible) if direction == "forward" else (impossible, possible)
    logits = logits.clone().requires_grad_()
    loss = kl(distributions(logits, [0], ref_logits), direction=direction)
    assert_close(loss, tensor([[math.log(1.5)]]))  # 1/2 log(1/2 / 1/3) twice
    assert torch.isfinite(gradient(loss, logits)).all()
    swapped = kl(distributions(ref_logits, [0], logits.detach()), direction=direction)
    assert swapped.item() == math.inf  # honest: the trainer stops on it


def test_jsd_of_disjoint_distributions_is_log_2_with_a_finite_gradient():
    logits = tensor([[0.0, 0.0, -math.inf, -math.inf]]).requires_grad_()
    loss = jsd(distributions(logits, [0], tensor([[-math.inf, -math.inf, 0.0, 0.0]])))
    assert_close(loss, tensor([[math.log(2)]]))
    assert torch.isfinite(gradient(loss, logits)).all()


@pytest.mark.parametrize("name", ["wga", "satimp", "jensun"])
def test_weights_at_probability_0_and_1_leave_value_and_gradient_finite(name):
    loss = FORGET_LOSSES[name]
    for logp in (-math.inf, -1e6, -800.0, -1e-300, 0.0):
        for dtype in (torch.float64, torch.float32):
            logps = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
            value = loss(SequenceLogps(logps, torch.ones(1, 1, dtype=torch.bool)))
            assert torch.isfinite(value).all()
            assert torch.isfinite(gradient(value, logps)).all()


def test_satimp_survives_a_probability_rounded_above_1():
    assert satimp(sequence([[1e-12]]), beta2=0.5).item() == 0


@pytest.mark.parametrize("name", ["npo", "kto", "kto_logsigmoid"])
@pytest.mark.parametrize("ratio", [-1e8, 1e8])
def test_huge_log_ratios_do_not_overflow(name, ratio):
    logps = tensor([[ratio]]).float().requires_grad_()
    forget = SequenceLogps(logps, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))
    sides = {"z0": torch.tensor(0.3)} if name.startswith("kto") else {}
    loss = FORGET_LOSSES[name](forget, **sides, beta=1.0)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient(loss, logps)).all()


@pytest.mark.parametrize("name", DISTRIBUTION_LOSSES)
def test_large_logits_do_not_overflow(name):
    logits = (1e4 * random_distributions(13).hidden.detach()).float().requires_grad_()
    ref_logits, targets = (1e4 * random_distributions(14).hidden.detach()).float(), [0, 1, 2, 3, 4, 5, 6, 0, 1]
    loss = DISTRIBUTION_LOSSES[name](distributions(logits, targets, ref_logits))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient(loss, logits)).all()


# --- Every objective --------------------------------------------------------------------------------------------------


def rewritten(sides: dict, rewrite) -> dict:
    return {name: side if name == "z0" else rewrite(side) for name, side in sides.items()}


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_one_value_per_row_or_token_in_float64_and_0_behind_the_mask(name):
    loss, sides = ALL_LOSSES[name], sides_of(ALL_LOSSES[name])
    value = loss(**sides)
    per_row = {"npo", "simnpo", "kto", "kto_logsigmoid", "idk_dpo"}
    assert value.shape == ((BATCH,) if name in per_row else (BATCH, TOKENS))
    assert value.dtype == torch.float64
    assert value.requires_grad
    if value.ndim == 2:
        mask = next(side.mask for side in sides.values())
        assert not value[~mask].any()


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
@pytest.mark.parametrize("nonsense", [math.nan, 99.0, -99.0, -math.inf])
def test_nonsense_behind_the_mask_changes_neither_value_nor_gradient(name, nonsense):
    loss, sides = SEQUENCE_LOSSES[name], sides_of(SEQUENCE_LOSSES[name])

    def spoil(side: SequenceLogps) -> SequenceLogps:
        logps = side.logps.detach().masked_fill(~side.mask, nonsense).requires_grad_()
        return SequenceLogps(logps, side.mask, side.ref_logps.masked_fill(~side.mask, nonsense))

    spoiled = rewritten(sides, spoil)
    expected, actual = loss(**sides), loss(**spoiled)
    assert torch.equal(actual, expected)
    for name in sides.keys() - {"z0"}:
        assert torch.equal(gradient(actual, spoiled[name].logps), gradient(expected, sides[name].logps))


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_padding_side_does_not_matter(name):
    loss, sides = ALL_LOSSES[name], sides_of(ALL_LOSSES[name])

    def left_pad(side):
        mask = side.mask.flip(-1)
        if isinstance(side, LayerActivations):
            return LayerActivations(side.hidden, mask, side.ref_hidden)
        if isinstance(side, TokenDistributions):
            return TokenDistributions(side.hidden, side.targets, mask, side.head, side.ref_hidden, side.ref_head)

        def move(values: Tensor) -> Tensor:
            return values.new_full(values.shape, 99.0).masked_scatter(mask, values[side.mask])

        return SequenceLogps(move(side.logps), mask, move(side.ref_logps))

    expected, actual = loss(**sides), loss(**rewritten(sides, left_pad))
    if expected.ndim == 2:
        expected, actual = expected.sum(-1), actual.sum(-1)
    assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_rows_do_not_see_each_other(name):
    loss, sides, order = ALL_LOSSES[name], sides_of(ALL_LOSSES[name]), torch.tensor([2, 0, 1])

    def permute(side):
        if isinstance(side, SequenceLogps):
            return SequenceLogps(side.logps[order], side.mask[order], side.ref_logps[order])
        rows = torch.arange(len(side.hidden)).split(LENGTHS)
        rows = torch.cat([rows[index] for index in order])
        if isinstance(side, LayerActivations):
            return LayerActivations(side.hidden[rows], side.mask[order], side.ref_hidden[rows])
        return TokenDistributions(
            side.hidden[rows], side.targets[rows], side.mask[order], side.head, side.ref_hidden[rows], side.ref_head
        )

    assert_close(loss(**rewritten(sides, permute)), loss(**sides)[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_a_fully_masked_row_is_finite_and_pushes_nothing(name):
    loss = SEQUENCE_LOSSES[name]
    logps = torch.full((1, 2), math.nan, dtype=torch.float64, requires_grad=True)
    empty = SequenceLogps(logps, torch.zeros(1, 2, dtype=torch.bool), torch.full_like(logps, math.nan).detach())
    value = loss(**{name: tensor(0.3) if name == "z0" else empty for name in needs_of(loss).sides})
    assert torch.isfinite(value).all()
    assert not gradient(value, logps).any()


# a detached weight or target makes the gradient of these three differ from the slope of their value: tested above
@pytest.mark.parametrize("name", [name for name in ALL_LOSSES if name not in ("wga", "satimp", "ce_u")])
def test_gradients_are_those_of_finite_differences(name):
    loss, sides = ALL_LOSSES[name], sides_of(ALL_LOSSES[name])

    def value(*leaves: Tensor) -> Tensor:
        given = iter(leaves)

        def rebuild(side):
            if isinstance(side, SequenceLogps):
                return SequenceLogps(next(given), side.mask, side.ref_logps)
            if isinstance(side, LayerActivations):
                return LayerActivations(next(given), side.mask, side.ref_hidden)
            return TokenDistributions(next(given), side.targets, side.mask, side.head, side.ref_hidden, side.ref_head)

        return loss(**rewritten(sides, rebuild))

    leaves = [side.logps if isinstance(side, SequenceLogps) else side.hidden for n, side in sides.items() if n != "z0"]
    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("name", [name for name, loss in ALL_LOSSES.items() if needs_of(loss).reference])
def test_a_missing_reference_is_named(name):
    loss = ALL_LOSSES[name]

    def strip(side):
        if isinstance(side, SequenceLogps):
            return SequenceLogps(side.logps, side.mask)
        if isinstance(side, LayerActivations):
            return LayerActivations(side.hidden, side.mask)
        return TokenDistributions(side.hidden, side.targets, side.mask, side.head)

    with pytest.raises(MissingReferenceError, match="pass reference="):
        loss(**rewritten(sides_of(loss), strip))


@pytest.mark.parametrize("name", [name for name, loss in SEQUENCE_LOSSES.items() if not needs_of(loss).reference])
def test_objectives_that_declare_no_reference_work_without_one(name):
    loss = SEQUENCE_LOSSES[name]
    sides = rewritten(sides_of(loss), lambda side: SequenceLogps(side.logps, side.mask))
    assert torch.isfinite(loss(**sides)).all()


def test_every_objective_is_listed_with_the_sides_a_trainer_can_pass():
    assert all(needs_of(loss).sides <= {"forget", "alternative", "z0"} for loss in FORGET_LOSSES.values())
    assert all(needs_of(loss).sides == {"retain"} for loss in RETAIN_LOSSES.values())
    assert all(name == loss.__name__ for name, loss in ALL_LOSSES.items())
    assert set(DISTRIBUTION_LOSSES) == {"undial", "ce_u", "kl", "jsd"}
    assert set(ALL_LOSSES) - set(SEQUENCE_LOSSES) - set(DISTRIBUTION_LOSSES) == {"rmu", "activation_mse"}
