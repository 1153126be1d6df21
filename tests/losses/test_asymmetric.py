"""Asymmetrical similarity: values by hand, radial gradients, directions that differ, norms at the ends of a type."""

from math import e, exp, log

import pytest
import torch
import torch.nn.functional as F

from negtune.losses.asymmetric import asymmetric_similarity, contained, containment_filter, norm_ratio, vector_norm


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


# --- Values worked by hand --------------------------------------------------------------------------------------------


def test_norm_ratio_by_hand():
    # norms 5 and 5, 10 and 5, 5 and 10: ratios 1, 2, 1/2
    larger, smaller = vectors([3, 4], [6, 8], [0, 5]), vectors([5, 0], [4, -3], [-8, 6])
    assert norm_ratio(larger, smaller).tolist() == pytest.approx([1, exp(-1), exp(0.5)])


def test_margin_by_hand():
    # the same ratios 1, 2, 1/2 with a target of 1.5, of which the second is past
    larger, smaller = vectors([3, 4], [6, 8], [0, 5]), vectors([5, 0], [4, -3], [-8, 6])
    wanted = [1 - exp(-0.5), 0, exp(0.5) - exp(-0.5)]
    assert norm_ratio(larger, smaller, margin=1.5).tolist() == pytest.approx(wanted)


def test_asymmetric_similarity_by_hand():
    # cosine 24/25 of (3, 4) and (8, 6); norms 5 and 10
    small, large = vectors([3, 4]), vectors([8, 6])
    assert asymmetric_similarity(small, large).item() == pytest.approx(0.96)
    assert asymmetric_similarity(large, small).item() == pytest.approx(0.96 - log(2))
    assert asymmetric_similarity(large, small, weight=0.5).item() == pytest.approx(0.96 - log(2) / 2)
    assert asymmetric_similarity(large, small, weight=0.0).item() == pytest.approx(0.96)


def test_filter_by_hand():
    queries, documents = vectors([3, 4], [0, 1]), vectors([0, -5], [0, 4.9])
    assert containment_filter(queries, documents).tolist() == [[True, False], [True, True]]
    assert containment_filter(queries, documents, ratio=1.1).all()
    assert containment_filter(queries, documents, ratio=0.2).tolist() == [[False, False], [True, False]]


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_gradient_is_the_one_of_the_docstring():
    larger, smaller = random_vectors(8, 5), random_vectors(8, 5)
    losses = norm_ratio(larger, smaller)
    to_larger, to_smaller = torch.autograd.grad(losses.sum(), (larger, smaller))
    a, b = larger.norm(dim=-1, keepdim=True), smaller.norm(dim=-1, keepdim=True)
    value = losses.detach()[:, None]
    torch.testing.assert_close(to_larger, -value / b * larger / a, atol=1e-10, rtol=0)
    torch.testing.assert_close(to_smaller, value * a / b**2 * smaller / b, atol=1e-10, rtol=0)


def test_scaling_both_vectors_changes_nothing():
    larger, smaller = random_vectors(8, 5), random_vectors(8, 5)
    torch.testing.assert_close(norm_ratio(7 * larger, 7 * smaller), norm_ratio(larger, smaller))
    to_larger, to_smaller = torch.autograd.grad(norm_ratio(larger, smaller).sum(), (larger, smaller))
    euler = (larger * to_larger).sum(-1) + (smaller * to_smaller).sum(-1)
    assert (larger * to_larger).sum(-1).abs().min() > 1e-3
    torch.testing.assert_close(euler, torch.zeros_like(euler), atol=1e-10, rtol=0)


def test_gradient_is_orthogonal_to_that_of_the_cosine():
    larger, smaller = random_vectors(8, 5), random_vectors(8, 5)
    of_norms = torch.autograd.grad(norm_ratio(larger, smaller).sum(), (larger, smaller))
    of_cosines = torch.autograd.grad(F.cosine_similarity(larger, smaller).sum(), (larger, smaller))
    for ours, theirs in zip(of_norms, of_cosines, strict=True):
        assert ours.norm(dim=-1).min() > 1e-3
        assert theirs.norm(dim=-1).min() > 1e-3
        assert (ours * theirs).sum(-1).abs().max() < 1e-10


def test_a_step_makes_the_larger_longer_and_the_smaller_shorter():
    larger, smaller = random_vectors(8, 5), random_vectors(8, 5)
    to_larger, to_smaller = torch.autograd.grad(norm_ratio(larger, smaller).sum(), (larger, smaller))
    assert ((larger - 0.01 * to_larger).norm(dim=-1) > larger.norm(dim=-1)).all()
    assert ((smaller - 0.01 * to_smaller).norm(dim=-1) < smaller.norm(dim=-1)).all()


def test_beyond_the_margin_nothing_pulls_and_before_it_all_does():
    larger = (vectors([3, 0], [1.9, 0])).requires_grad_()
    smaller = vectors([0, 1], [0, 1])
    (hinged,) = torch.autograd.grad(norm_ratio(larger, smaller, margin=2.0).sum(), larger)
    (plain,) = torch.autograd.grad(norm_ratio(larger, smaller).sum(), larger)
    assert hinged[0].tolist() == [0, 0]
    assert hinged[1].tolist() == plain[1].tolist()
    assert plain[0, 0] < 0


def test_gradients_by_finite_differences():
    # no pair near a kink: ratios are 3 with a margin of 2, or below it
    larger, smaller = random_vectors(6, 4), random_vectors(6, 4)
    assert torch.autograd.gradcheck(norm_ratio, (larger, smaller))
    longer = (3 * F.normalize(larger.detach(), dim=-1)).requires_grad_()
    unit = F.normalize(smaller.detach(), dim=-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: norm_ratio(a, b, margin=4.0), (longer, unit))
    assert torch.autograd.gradcheck(lambda a, b: norm_ratio(a, b, margin=2.0), (longer, unit))
    assert torch.autograd.gradcheck(lambda q, d: asymmetric_similarity(q, d, weight=0.7), (larger, smaller))


# --- Two directions ---------------------------------------------------------------------------------------------------


def test_the_two_directions_differ_where_norms_do_and_only_there():
    ours, theirs = random_vectors(40, 6).detach(), random_vectors(50, 6).detach()
    forth, back = asymmetric_similarity(ours, theirs), asymmetric_similarity(theirs, ours).T
    assert (forth != back).all()
    assert (containment_filter(ours, theirs) ^ containment_filter(theirs, ours).T).all()
    # vectors of one norm, exactly: the same numbers in other places and with other signs
    shuffled = torch.stack([ours[0].roll(i) * (-1) ** i for i in range(6)])
    torch.testing.assert_close(
        asymmetric_similarity(shuffled, shuffled), F.cosine_similarity(shuffled[:, None], shuffled[None], dim=-1)
    )
    exact = vectors([3, 4], [4, -3], [0, 5])
    assert torch.equal(asymmetric_similarity(exact, exact), asymmetric_similarity(exact, exact).T)
    assert containment_filter(exact, exact).all()


def test_a_large_weight_is_the_filter():
    queries, documents = random_vectors(30, 6).detach(), random_vectors(30, 6).detach()
    scores = asymmetric_similarity(queries, documents, weight=1e6)
    assert torch.equal(scores > -1.5, containment_filter(queries, documents))
    assert containment_filter(queries, documents, ratio=float("inf")).all()


def test_without_the_min_the_order_for_one_query_is_a_prior_of_the_document():
    queries, documents = random_vectors(20, 6).detach(), random_vectors(50, 6).detach()
    cosines = asymmetric_similarity(queries, documents, weight=0.0)
    additive = cosines + 0.5 * (vector_norm(documents)[None].log() - vector_norm(queries)[:, None].log())
    prior = cosines + 0.5 * vector_norm(documents)[None].log()
    assert torch.equal(additive.argsort(-1), prior.argsort(-1))
    # with it, the query's norm decides for which documents the prior counts
    assert not torch.equal(asymmetric_similarity(queries, documents, weight=0.5).argsort(-1), prior.argsort(-1))
    # a query below every document's norm is ranked by cosine
    small = 1e-3 * queries
    assert torch.equal(asymmetric_similarity(small, documents).argsort(-1), cosines.argsort(-1))


# --- Extremes ---------------------------------------------------------------------------------------------------------


def test_zero_vectors_have_values_and_no_gradient():
    zero, other = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    # nothing over something, something over nothing, nothing over nothing
    for larger, smaller, wanted in ((zero, other, e), (other, zero, 0), (zero, zero, 1)):
        loss = norm_ratio(larger, smaller)
        assert loss.item() == pytest.approx(wanted)
        (gradient,) = torch.autograd.grad(loss.sum(), zero)
        assert (gradient == 0).all()
    # nothing is in everything; something is not in nothing
    assert containment_filter(zero, other).item()
    assert not containment_filter(other, zero).item()
    assert containment_filter(zero, zero).item()
    assert asymmetric_similarity(zero, other).item() == 0
    lost = asymmetric_similarity(other, zero)
    assert lost.isfinite()
    assert lost.item() < -80
    for queries, documents in ((zero, other), (other, zero)):
        (gradient,) = torch.autograd.grad(asymmetric_similarity(queries, documents).sum(), zero)
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("dtype", "large", "small"),
    [
        (torch.float16, 6e4, 1.2e-7),
        (torch.bfloat16, 1e37, 1e-37),
        (torch.float32, 1e37, 1e-37),
        (torch.float64, 1e300, 1e-300),
    ],
)
def test_norms_at_the_ends_of_a_type(dtype, large, small):
    # squares of these over- or underflow in the type itself, all but float16's also in float32
    for size in (large, small):
        larger = torch.full((2, 8), size, dtype=dtype, requires_grad=True)
        smaller = (larger.detach() / 2).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ratio = vector_norm(larger) / vector_norm(smaller)
        losses = norm_ratio(larger, smaller)
        assert losses.dtype == asymmetric_similarity(larger, smaller).dtype == wide
        torch.testing.assert_close(losses, torch.exp(1 - ratio), rtol=1e-4, atol=0)
        assert vector_norm(larger)[0].item() == pytest.approx(8**0.5 * larger[0, 0].item(), rel=1e-5)
        torch.testing.assert_close(asymmetric_similarity(smaller, larger), torch.ones(2, 2, dtype=wide))
        if dtype == torch.float16 and size == small:
            continue  # the gradient itself, 1 / norm, is beyond this type
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), (larger, smaller)))
    far = norm_ratio(torch.full((1, 8), large, dtype=dtype), torch.full((1, 8), small, dtype=dtype))
    assert far.item() == 0


@pytest.mark.parametrize("size", [1e-30, 1e-2, 0.3, 3.0, 15.0, 40.0, 1e30])
def test_ratios_far_apart_stay_finite(size):
    # up to 1e60, which float32 has not
    larger, smaller = torch.full((1, 4), size, requires_grad=True), torch.full((1, 4), 1 / size, requires_grad=True)
    for margin in (None, 2.0):
        loss = norm_ratio(larger, smaller, margin=margin)
        assert 0 <= loss.item() <= e
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (larger, smaller)))


def test_what_cannot_be_meant_is_refused():
    pair = torch.ones(1, 2)
    for margin in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="margin is a ratio of norms, positive and finite, got"):
            norm_ratio(pair, pair, margin=margin)
    for weight in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight must be at least 0 and finite, got"):
            asymmetric_similarity(pair, pair, weight=weight)
    for ratio in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ratio must be positive, got"):
            contained(pair, pair, ratio=ratio)
