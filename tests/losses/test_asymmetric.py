"""Similarity with a direction: values and gradients by hand, what turns and what does not, zero vectors."""

from math import e, exp, log

import pytest
import torch
import torch.nn.functional as F

from negtune.losses.asymmetric import asymmetric_similarity, contains, norm_ratio


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def pairs(rows=8, width=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2)]


def test_the_loss_by_hand():
    # ratios 1, 2 and 1/2
    found = norm_ratio(vectors([3, 4], [0, 10], [3, 4]), vectors([5, 0], [3, 4], [6, 8]))
    assert found.tolist() == pytest.approx([1, exp(-1), exp(0.5)])
    enough = norm_ratio(vectors([3, 4], [0, 10], [0, 15]), vectors([5, 0], [3, 4], [3, 4]), margin=2.0)
    assert enough.tolist() == pytest.approx([1 - exp(-1), 0, 0])


def test_the_gradient_is_radial_and_free_of_scale():
    larger, smaller = pairs()
    losses = norm_ratio(larger, smaller)
    up, down = torch.autograd.grad(losses.sum(), (larger, smaller))
    a, b = larger.norm(dim=1, keepdim=True), smaller.norm(dim=1, keepdim=True)
    value = losses.unsqueeze(1)
    assert torch.allclose(up, -value / b * larger / a, atol=1e-12)
    assert torch.allclose(down, value * a / b**2 * smaller / b, atol=1e-12)
    euler = (larger * up).sum(1) + (smaller * down).sum(1)
    assert euler.abs().max() < 1e-12
    turned = torch.autograd.grad(F.cosine_similarity(larger, smaller).sum(), (larger, smaller))
    assert max((g * t).sum(1).abs().max() for g, t in zip((up, down), turned, strict=True)) < 1e-12


def test_within_the_margin_the_gradient_is_the_same_and_beyond_it_is_none():
    larger, smaller = pairs()
    plain = torch.autograd.grad(norm_ratio(larger, smaller).sum(), larger)[0]
    capped = torch.autograd.grad(norm_ratio(larger, smaller, margin=1.0).sum(), larger)[0]
    close = larger.norm(dim=1) < smaller.norm(dim=1)
    assert 0 < int(close.sum()) < len(close)
    assert torch.equal(capped[close], plain[close])
    assert bool((capped[~close] == 0).all())
    assert torch.autograd.gradcheck(lambda a, b: norm_ratio(a, b, margin=1.7), (larger, smaller))


def test_a_step_lengthens_the_larger_and_shortens_the_smaller():
    larger, smaller = pairs()
    up, down = torch.autograd.grad(norm_ratio(larger, smaller).sum(), (larger, smaller))
    assert bool(((larger - 0.1 * up).norm(dim=1) > larger.norm(dim=1)).all())
    assert bool(((smaller - 0.01 * down).norm(dim=1) < smaller.norm(dim=1)).all())


def test_the_score_by_hand():
    # cosine 1 and 0.6; the second document is half as long as the query
    found = asymmetric_similarity(vectors([10, 0]), vectors([20, 0], [3, 4]), weight=0.5)
    assert found.tolist() == [pytest.approx([1, 0.6 + 0.5 * log(0.5)])]


def test_a_pair_has_a_direction_unless_its_norms_are_equal():
    a, b = (t.detach() for t in pairs())
    there, back = asymmetric_similarity(a, b), asymmetric_similarity(b, a).T
    assert bool((there != back).all())
    assert bool((contains(a, b) != contains(b, a).T).all()), "one direction is kept"
    same = F.normalize(a, dim=1) * 3, F.normalize(b, dim=1) * 3
    assert torch.allclose(asymmetric_similarity(*same), asymmetric_similarity(*same[::-1]).T)
    assert bool(contains(*same, ratio=1 + 1e-9).all())


def test_for_one_query_lengths_are_a_prior_of_the_documents():
    query, documents = vectors([100, 0, 0, 0, 0]), pairs(rows=50)[0].detach()
    prior = F.normalize(documents, dim=1)[:, 0] + 0.3 * documents.norm(dim=1).log()
    found = asymmetric_similarity(query, documents, weight=0.3)[0]
    assert torch.equal(found.argsort(), prior.argsort())


def test_the_filter_by_hand():
    found = contains(vectors([3, 4], [0, 12]), vectors([0, 5], [6, 8]))
    assert found.tolist() == [[True, True], [False, False]]
    assert contains(vectors([0, 12]), vectors([0, 5], [6, 8]), ratio=1.2).tolist() == [[False, True]]


def test_a_large_weight_is_the_filter():
    a, b = (t.detach() for t in pairs())
    assert torch.equal(asymmetric_similarity(a, b, weight=1e9) > -2, contains(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_and_large_vectors_stay_finite(dtype):
    tensor = torch.tensor([[0.0, 0.0], [3e4, 3e4], [1e-4, 0.0]], dtype=dtype)
    for a in range(3):
        for b in range(3):
            larger, smaller = tensor[a : a + 1].clone().requires_grad_(), tensor[b : b + 1].clone().requires_grad_()
            loss = norm_ratio(larger, smaller)
            assert loss.dtype == torch.float32
            (loss.sum() + asymmetric_similarity(smaller, larger).sum()).backward()
            assert 0 <= float(loss.detach()) <= e + 1e-6
            assert bool(larger.grad.isfinite().all() & smaller.grad.isfinite().all())


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_a_margin_that_is_no_ratio(margin):
    with pytest.raises(ValueError, match="margin"):
        norm_ratio(vectors([1, 0]), vectors([1, 0]), margin=margin)


def test_a_ratio_that_keeps_nothing():
    with pytest.raises(ValueError, match="ratio"):
        contains(vectors([1, 0]), vectors([1, 0]), ratio=0.0)
