"""Objectives for labels that lack relevant documents: the model of the labels, limits, the released loss, nonsense."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from negtune.losses.debiased import (
    CET_MODES,
    cet,
    cet_weights,
    em_relevance,
    em_selection,
    expected_gains,
    hidden_relevance,
    matching_level,
    official_weights,
    pair_means,
    propensity_weights,
    ratio_weights,
    relevance_targets,
    selection_targets,
    soft_labels,
    weighed_pairs,
)
from negtune.losses.ranking import lambda_rank, rank_net


def lists(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def full(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def some(seed=0, queries=5, documents=6):
    """Scores, gains with both sides in every list, selection logits, propensities."""
    draw = torch.Generator().manual_seed(seed)
    scores, selection = (torch.randn(queries, documents, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    gains = (torch.rand(queries, documents, generator=draw) < 0.4).double()
    gains[:, 0], gains[:, -1] = 1, 0
    return scores, gains, selection, torch.sigmoid(selection)


def of_mode(mode, selection, propensities):
    return {"mode": mode, **({"propensities": propensities} if "ips" in mode else {"selection": selection})}


# --- The model of the labels ------------------------------------------------------------------------------------------


def test_the_hidden_by_bayes():
    r, s = torch.meshgrid(*[torch.linspace(0.01, 0.99, 40, dtype=torch.float64)] * 2, indexing="ij")
    expected = r * (1 - s) / (1 - r * s)
    assert torch.allclose(hidden_relevance(r.logit(), s.logit()), expected, rtol=1e-12)
    assert torch.allclose(hidden_relevance(s.logit(), r.logit()), s * (1 - r) / (1 - r * s), rtol=1e-12)


def test_the_weight_of_an_unjudged_negative_at_its_limits():
    """w = (1 - r)/(1 - r s)."""
    r = torch.linspace(-6, 6, 50, dtype=torch.float64)
    weight = lambda s: 1 - hidden_relevance(r, torch.full_like(r, s))  # noqa: E731
    assert torch.allclose(weight(-800.0), 1 - torch.sigmoid(r), rtol=1e-12)
    assert torch.equal(weight(800.0), torch.ones_like(r))
    assert float(1 - hidden_relevance(torch.tensor(800.0), torch.tensor(0.0))) == 0.0
    steps = torch.stack([weight(s) for s in (-3.0, -1.0, 0.0, 1.0, 3.0)])
    assert bool((steps.diff(dim=0) > 0).all())
    assert bool((steps.diff(dim=1) < 0).all())


def test_gains_are_expected_where_nobody_looked():
    gains, judged = lists([2, 0, 0, 1]), torch.tensor([[True, True, False, False]])
    found = expected_gains(gains, judged, lists([0, 0, log(3), 0]), lists([0, 0, 0, 0]))
    # r = 3/4, s = 1/2: 3/8 of 5/8
    assert torch.allclose(found, lists([2, 0, 3 / 5, 1]), rtol=1e-12)


def test_what_is_surely_selected_is_surely_irrelevant():
    scores, gains = lists([0, 1]), lists([1, 0])
    found = cet(scores, gains, full(scores), mode="ips_posterior", propensities=lists([1, 1]), normalize=False)
    assert found.item() == pytest.approx(log(1 + exp(1)))


def test_the_level_that_matches_a_share():
    # sigmoid(-5 + 5) = 1/2; two scores: 1/4 and 3/4 have the mean 1/2
    assert matching_level(torch.tensor([5.0]), 0.5) == pytest.approx(-5)
    assert matching_level(torch.tensor([7 - log(3), 7 + log(3)]), 0.5) == pytest.approx(-7, abs=1e-6)
    draws = 8 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.sigmoid(draws + matching_level(draws, 0.06)).mean().item() == pytest.approx(0.06)
    with pytest.raises(ValueError, match="share must be above 0 and below 1, got 1"):
        matching_level(draws, 1.0)


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_the_released_weight_is_an_inverse_propensity():
    logits = torch.linspace(-10, 10, 200, dtype=torch.float64)  # beyond, 1 - sigmoid itself has lost the digits
    inverse = 1 / (1 - torch.sigmoid(logits))
    torch.testing.assert_close(official_weights(logits, temperature=1.0), inverse, rtol=1e-9, atol=0)
    assert official_weights(lists([log(3)]), temperature=0.5).item() == pytest.approx(10)
    flat = official_weights(logits, temperature=1e9)
    torch.testing.assert_close(flat, torch.full_like(logits, 2.0), rtol=0, atol=1e-6)


def test_a_logit_beyond_all_measure_leaves_the_loss_finite():
    scores, gains = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True), torch.tensor([[1.0, 0.0, 0.0]])
    selection = torch.tensor([[0.0, 1e4, float("inf")]])
    for normalize in (False, True):
        found = cet(scores, gains, full(scores), selection=selection, temperature=1.0, normalize=normalize)
        assert bool(torch.isfinite(torch.autograd.grad(found.sum(), scores)[0]).all())
        assert bool(found.isfinite().all())


def test_positives_by_hand():
    # s = 1/2, 1/5, 4/5; the third is padding
    selection, mask = lists([0, -log(4), log(4)]), torch.tensor([[True, True, False]])
    assert ratio_weights(selection, mask, clip=0.1)[0, :2].tolist() == pytest.approx([1, 2.5])
    assert ratio_weights(selection, mask, clip=0.5)[0, :2].tolist() == pytest.approx([1, 2])
    rare = (selection.sigmoid() * 1e-30).log()  # the logit of so little
    assert ratio_weights(rare, mask, clip=0.1)[0, :2].tolist() == pytest.approx([1, 2.5])
    assert propensity_weights(lists([0.5, 0.01])).tolist() == [[2, 20]]


# --- CET --------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_released_loss():
    """One relevant and one irrelevant document: mean of w(d-) times -log softmax([s+, s-])_0."""
    draw = torch.Generator().manual_seed(0)
    scores, other = (torch.randn(32, 2, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    released = torch.stack(
        [(1 + torch.exp(o[1] / 2)) * -F.log_softmax(s, 0)[0] for s, o in zip(scores, other, strict=True)]
    )
    ours = cet(scores, lists([1, 0]).expand(32, 2), full(scores), selection=other, temperature=2.0)
    assert torch.allclose(ours, released, rtol=1e-12)


def test_by_hand_in_every_mode():
    # one positive, two negatives, the last of them judged; softplus(-log 2) = log 1.5, softplus(0) = log 2
    scores, gains = lists([log(2), 0, log(2)]), lists([1, 0, 0])
    selection, judged = lists([-log(3), 0, log(2)]), torch.tensor([[True, False, True]])
    far, near = log(1.5), log(2)
    settings = {"selection": selection, "normalize": False, "temperature": 1.0}
    assert cet(scores, gains, full(scores), **settings).item() == pytest.approx((2 * far + 3 * near) / 2)
    # r = 1/2, s = 1/2: w = (1/2)/(3/4)
    posterior = cet(scores, gains, full(scores), mode="posterior", judged=judged, **settings)
    assert posterior.item() == pytest.approx((2 / 3 * far + near) / 2)
    # r = 2/3, s = 2/3: w = (1/3)/(5/9)
    unjudged = cet(scores, gains, full(scores), mode="posterior", **settings)
    assert unjudged.item() == pytest.approx((2 / 3 * far + 3 / 5 * near) / 2)
    # s = 1/4, 1/2, 2/3
    ratio = cet(scores, gains, full(scores), mode="ratio", **settings)
    assert ratio.item() == pytest.approx((2 / 3) / (1 / 4) * (far + near) / 2)
    known = {"propensities": selection.sigmoid(), "judged": judged, "normalize": False}
    assert cet(scores, gains, full(scores), mode="ips", **known).item() == pytest.approx(4 * (far + near) / 2)
    both = cet(scores, gains, full(scores), mode="ips_posterior", **known)
    assert both.item() == pytest.approx(4 * (2 / 3 * far + near) / 2)


def test_each_mode_weighs_the_side_it_says():
    # p, p, judged n, two unjudged n; scores of 0: r = 1/2, w = (1/2)/(1 - s/2)
    gains, scores = lists([1, 2, 0, 0, 0]), lists([0, 0, 0, 0, 0])
    judged = torch.tensor([[False, True, True, False, False]])
    chances = lists([1 / 2, 1 / 8, 1 / 4, 1 / 4, 3 / 4])
    expected = {
        "official": [1, 1, 4 / 3, 4 / 3, 4],
        "posterior": [1, 1, 1, 4 / 7, 4 / 5],
        "ratio": [3 / 2, 5, 1, 1, 1],
        "ips": [2, 5, 1, 1, 1],
        "ips_posterior": [2, 5, 1, 4 / 7, 4 / 5],
    }
    for mode in CET_MODES:
        known = of_mode(mode, chances.logit(), chances)
        found = cet_weights(scores, gains, full(gains), judged=judged, temperature=1.0, clip=0.2, **known)
        assert found[0].tolist() == pytest.approx(expected[mode]), mode


def test_weighed_pairs_by_hand():
    # relevant 0 and 2, irrelevant 1: e^(s_n - s_p) = 1/2 and 1/3; weights 2 * 5 and 3 * 5
    scores, gains, weights = lists([log(2), 0, log(3)]), lists([1, 0, 2]), lists([2, 5, 3])
    found = weighed_pairs(scores, gains, full(scores), weights=weights)
    assert found.item() == pytest.approx((10 * log(3 / 2) + 15 * log(4 / 3)) / 2)
    assert pair_means(weights, gains, full(scores)).tolist() == [12.5]


def test_known_propensities_are_read_at_relevant_documents_only():
    scores, gains = lists([0, 1]), lists([1, 0])
    found = cet(scores, gains, full(scores), mode="ips", propensities=lists([0.5, float("nan")]))
    assert found.item() == pytest.approx(log(1 + exp(1)))


@pytest.mark.parametrize("mode", CET_MODES)
def test_normalised_weights_have_mean_1_as_the_loss_counts_them(mode):
    """Equal scores: every pair costs log 2; lists have different numbers of pairs, one of them none."""
    scores, gains, selection, propensities = some()
    gains[1] = 0
    known = of_mode(mode, selection, propensities)
    found = cet(scores, gains, full(scores), **known, normalize=True)
    raw = cet(scores, gains, full(scores), **known, normalize=False)
    with_pairs = raw > 0
    assert with_pairs.tolist() == [True, False, True, True, True]
    ratio = (found / raw)[with_pairs]
    assert torch.allclose(ratio, ratio[:1], rtol=1e-12)
    flat = cet(0 * scores, gains, full(scores), **known, normalize=True)
    assert flat[with_pairs].mean().item() == pytest.approx(log(2))
    assert flat.std() > 0.01, "which lists weigh more than others stays"


def test_at_an_infinite_temperature_nothing_is_weighted():
    scores, gains, selection, _ = some()
    scores.requires_grad_()
    plain = torch.autograd.grad(rank_net(scores, gains, full(scores)).sum(), scores)[0]
    settings = {"selection": selection, "temperature": 1e12}
    twice = torch.autograd.grad(cet(scores, gains, full(scores), **settings).sum(), scores)[0]
    assert torch.allclose(twice, 2 * plain, rtol=1e-6)
    once = torch.autograd.grad(cet(scores, gains, full(scores), normalize=True, **settings).sum(), scores)[0]
    assert torch.allclose(once, plain, rtol=1e-6)


def test_a_trusted_negative_is_pushed_further_and_a_doubted_one_less():
    scores, gains = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True), lists([1, 0, 0])
    selection = lists([0, 3, -3])
    for mode in ("official", "posterior"):
        push = torch.autograd.grad(
            cet(scores, gains, full(scores), selection=selection, mode=mode, temperature=1.0).sum(), scores
        )[0][0]
        assert push[0] < 0 < push[2] < push[1]


@pytest.mark.parametrize("mode", CET_MODES)
def test_weights_carry_no_gradient(mode):
    scores, gains, selection, propensities = some()
    scores.requires_grad_()
    selection.requires_grad_()
    cet(scores, gains, full(scores), **of_mode(mode, selection, propensities)).sum().backward()
    assert selection.grad is None
    expected = scores.grad.clone()
    with torch.no_grad():
        weighted = [
            cet(scores + eps, gains, full(scores), **of_mode(mode, selection, propensities)).sum() for eps in (0.0, 1.0)
        ]
    assert expected.sum(-1).abs().max() < 1e-12, "a shift of all scores changes no pair"
    if mode in ("official", "ratio"):
        assert torch.allclose(weighted[0], weighted[1], rtol=1e-12)


def test_two_models_that_read_the_same_and_start_the_same_stay_the_same():
    """Exchangeability: nothing in the labels says which of the two is which."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(8, 10, 3, generator=draw, dtype=torch.float64)
    gains = (torch.rand(8, 10, generator=draw) < 0.3).double()
    mask = full(gains)

    def official(a, b):
        return cet(a, gains, mask, selection=b.detach()), cet(b, gains, mask, selection=a.detach())

    def em(a, b):
        return em_relevance(a, gains, mask, selection=b.detach()), em_selection(b, gains, mask, scores=a.detach())

    for losses in (official, em):
        one, other = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.Adam([one, other], lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            sum(loss.mean() for loss in losses(features @ one, features @ other)).backward()
            optimizer.step()
        assert torch.equal(one, other)
        assert one.abs().max() > 0.1


# --- Expectation-maximisation -----------------------------------------------------------------------------------------


def test_em_climbs_the_likelihood_of_the_labels():
    scores, gains, selection, _ = some()
    scores.requires_grad_()
    selection.requires_grad_()
    both = scores.sigmoid() * selection.sigmoid()
    likelihood = -(gains * both.log() + (1 - gains) * (1 - both).log()).mean(-1)
    exact = torch.autograd.grad(likelihood.sum(), (scores, selection))
    relevance = torch.autograd.grad(em_relevance(scores, gains, full(scores), selection=selection).sum(), scores)[0]
    selected = torch.autograd.grad(em_selection(selection, gains, full(scores), scores=scores).sum(), selection)[0]
    assert torch.allclose(relevance, exact[0], atol=1e-14)
    assert torch.allclose(selected, exact[1], atol=1e-14)


def test_em_believes_a_judgement():
    scores, gains, judged = lists([1, 2]), lists([1, 0]), torch.tensor([[False, True]])
    settings = {"gains": gains, "mask": full(scores), "judged": judged}
    found = em_relevance(scores, **settings, selection=lists([0, 0]))
    assert found.item() == pytest.approx((log(1 + exp(-1)) + log(1 + exp(2))) / 2)
    found = em_selection(scores, **settings, scores=lists([0, 0]))
    assert found.item() == pytest.approx((log(1 + exp(-1)) + log(1 + exp(-2))) / 2)


def test_targets_by_hand():
    # r = 2/3, s = 3/4: labelled; judged irrelevant; unjudged, r(1-s)/(1-rs) = 1/3 and s(1-r)/(1-rs) = 1/2
    a, b, gains = lists([log(2)] * 3), lists([log(3)] * 3), lists([2, 0, 0])
    judged = torch.tensor([[False, True, False]])
    assert relevance_targets(gains, judged, a, b)[0].tolist() == pytest.approx([1, 0, 1 / 3])
    assert selection_targets(gains, judged, a, b)[0].tolist() == pytest.approx([1, 1, 1 / 2])
    assert relevance_targets(gains, None, a, b)[0].tolist() == pytest.approx([1, 1 / 3, 1 / 3])
    assert selection_targets(gains, None, a, b)[0].tolist() == pytest.approx([1, 1 / 2, 1 / 2])


def test_em_has_the_gradient_of_the_likelihood_of_judgements_too():
    scores, gains, selection, _ = some()
    judged = torch.rand(gains.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    scores.requires_grad_()
    selection.requires_grad_()
    r, s = scores.sigmoid(), selection.sigmoid()
    likelihood = torch.where(gains > 0, r * s, torch.where(judged, (1 - r) * s, 1 - r * s))
    exact = torch.autograd.grad(-likelihood.log().mean(-1).sum(), (scores, selection))
    known = {"judged": judged, "mask": full(gains), "gains": gains}
    found = torch.autograd.grad(
        (em_relevance(scores, selection=selection, **known) + em_selection(selection, scores=scores, **known)).sum(),
        (scores, selection),
    )
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_expected_gains_raise_a_probable_false_negative():
    # document 1 looks relevant and could not be selected, document 2 could; only document 0 is labelled
    scores, gains = lists([1, 1, 1, 1]).requires_grad_(), lists([1, 0, 0, 0])
    hoped = expected_gains(gains, ~full(gains), lists([3, 3, 3, -3]), lists([0, -8, 8, 0]))
    plain, found = (
        torch.autograd.grad(lambda_rank(scores, given, full(gains)).sum(), scores)[0][0] for given in (gains, hoped)
    )
    assert plain[1] > 0
    assert found[1] < 0 < found[2]


# --- What must not matter ---------------------------------------------------------------------------------------------

OBJECTIVES = {
    **{mode: lambda s, g, m, b, p, mode=mode: cet(s, g, m, **of_mode(mode, b, p)) for mode in CET_MODES},
    "em_relevance": lambda s, g, m, b, p: em_relevance(s, g, m, selection=b),
    "em_selection": lambda s, g, m, b, p: em_selection(s, g, m, scores=b),
    "soft_labels": lambda s, g, m, b, p: soft_labels(s, g, m, targets=p),
    "weighed_pairs": lambda s, g, m, b, p: weighed_pairs(s, g, m, weights=b),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
def test_what_is_behind_the_mask_does_not_matter(name, nonsense):
    scores, gains, selection, propensities = some()
    mask = full(scores)
    clean = scores.clone().requires_grad_()
    expected = OBJECTIVES[name](clean, gains, mask, selection, propensities)
    expected.sum().backward()
    padded = [torch.cat([t, torch.full_like(t[:, :2], nonsense)], -1) for t in (scores, gains, selection, propensities)]
    noisy = padded[0].requires_grad_()
    found = OBJECTIVES[name](noisy, padded[1], F.pad(mask, (0, 2)), padded[2], padded[3])
    found.sum().backward()
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(noisy.grad[:, :-2], clean.grad, rtol=1e-12)
    assert bool((noisy.grad[:, -2:] == 0).all())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_lists_without_both_sides_say_nothing(name):
    scores, gains, selection, propensities = some(queries=3)
    mask = full(scores)
    mask[0] = False
    gains[1] = 1
    scores.requires_grad_()
    found = OBJECTIVES[name](scores, gains, mask, selection, propensities)
    found.sum().backward()
    assert found[0] == 0
    assert bool(scores.grad[0].eq(0).all())
    assert bool(scores.grad.isfinite().all())
    if name in CET_MODES:
        assert found[1] == 0
        assert bool(scores.grad[1].eq(0).all())


@pytest.mark.parametrize("mode", CET_MODES)
def test_long_gaps_in_half_precision_stay_finite(mode):
    scores = torch.tensor([[-60.0, 60.0]], dtype=torch.bfloat16, requires_grad=True)
    selection = torch.tensor([[0.0, 30.0]], dtype=torch.bfloat16)
    found = cet(scores, torch.tensor([[1.0, 0.0]]), full(scores), **of_mode(mode, selection, selection.sigmoid()))
    found.sum().backward()
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dual"}, "unknown mode 'dual'; choose one of official, posterior, ratio, ips, ips_posterior"),
        ({}, "mode 'official' needs selection"),
        ({"mode": "ips"}, "mode 'ips' needs propensities"),
        ({"mode": "ips_posterior"}, "mode 'ips_posterior' needs propensities"),
        ({"mode": "ips", "propensities": lists([0.0, 0.5])}, "propensity of document 0 of query 0 is 0; .* above 0"),
        ({"mode": "ips_posterior", "propensities": lists([0.5, float("nan")])}, "document 1 of query 0 is nan"),
        ({"mode": "ips", "propensities": lists([1.5, 0.5])}, "document 0 of query 0 is 1.5"),
        ({"mode": "ips", "propensities": lists([0.5, 0.5]), "clip": 0.0}, "clip is a probability .* got 0"),
        ({"mode": "ratio", "selection": lists([0, 0]), "clip": 1.5}, "clip is a probability .* got 1.5"),
        ({"selection": lists([0, 0]), "temperature": 0.0}, "temperature"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        cet(lists([1, 0]), lists([1, 0]), full(lists([1, 0])), **settings)
