"""Estimators against exact sums over all rankings (checks P1 to P6 of the notes on PG-RANK); limits and nonsense."""

from itertools import permutations
from math import exp, log

import pytest
import torch
from scipy.stats import chisquare

from negtune.losses import plackett_luce
from negtune.losses.plackett_luce import (
    ESTIMATORS,
    first_place_entropy,
    first_place_kl,
    plackett_luce_logps,
    policy_gradient,
    sample_rankings,
)
from negtune.metrics.ranking import ideal_value, place_rewards

SCORES = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GAINS = torch.tensor([3.0, 0, 1, 0, 2], dtype=torch.float64)
EXACT = {"atol": 1e-12, "rtol": 0}
ALL = torch.tensor(list(permutations(range(5))))
"""The 120 rankings of five documents."""


def repeated(values, rows):
    return values.expand(rows, -1).clone()


def full(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def probabilities(scores, rankings=ALL):
    scores = repeated(scores, len(rankings))
    return plackett_luce_logps(scores, rankings, full(scores)).exp()


def rewards(gains, rankings, metric, k):
    ideal = ideal_value(gains[None], metric, k)
    return place_rewards(gains[rankings][..., :k].unsqueeze(1), metric, ideal).sum(-1).squeeze(1)


def exact_gradient(scores, gains, metric="ndcg", k=3):
    """By autograd through the sum over all rankings of probability times reward."""
    scores = scores.clone().requires_grad_()
    (probabilities(scores) * rewards(gains, ALL, metric, k)).sum().backward()
    return scores.grad


def estimates(monkeypatch, rankings, gains=GAINS, scores=SCORES, k=3, **settings):
    """The estimate from each set of samples: `rankings [N Q D]` -> `[Q D]`."""
    monkeypatch.setattr(plackett_luce, "sample_rankings", lambda *a, **kw: rankings[..., :k])
    scores = repeated(scores, rankings.shape[1])
    gains = repeated(gains, len(scores))
    return policy_gradient(scores, gains, full(scores), k=k, n_samples=len(rankings), **settings).gradient


def pairs():
    """All 120 x 120 pairs of rankings `[2 Q D]` and the probability of drawing each."""
    first, second = torch.meshgrid(torch.arange(120), torch.arange(120), indexing="ij")
    chance = probabilities(SCORES)
    return torch.stack([ALL[first.flatten()], ALL[second.flatten()]]), chance[first.flatten()] * chance[
        second.flatten()
    ]


def test_probability_of_a_ranking_by_hand():
    # scores log 1, log 2, log 3; ranking 2, 0, 1: 3/6 * 1/3 * 1
    scores = torch.tensor([0.0, log(2), log(3)], dtype=torch.float64)
    logp = plackett_luce_logps(scores, torch.tensor([2, 0, 1]), full(scores))
    torch.testing.assert_close(logp.exp(), torch.tensor(1 / 6, dtype=torch.float64))
    first = plackett_luce_logps(scores, torch.tensor([2, 0, 1]), full(scores), k=1)
    torch.testing.assert_close(first.exp(), torch.tensor(0.5, dtype=torch.float64))


def test_probabilities_of_all_rankings_sum_to_one():
    torch.testing.assert_close(probabilities(SCORES).sum(), torch.tensor(1.0, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("metric", ["ndcg", "dcg", "precision", "recall"])
@pytest.mark.parametrize("estimator", ["pl_rank", "reinforce"])
def test_one_sample_estimators_are_exact_in_expectation(monkeypatch, estimator, metric):
    each = estimates(monkeypatch, ALL[None], estimator=estimator, metric=metric)
    expected = (probabilities(SCORES)[:, None] * each).sum(0)
    torch.testing.assert_close(expected, exact_gradient(SCORES, GAINS, metric), **EXACT)


@pytest.mark.parametrize(
    ("estimator", "metric"),
    [
        ("loo", "ndcg"),
        ("loo", "mrr"),
        ("rtg_loo", "ndcg"),
        ("rtg_loo", "mrr"),
        ("rtg_loo", "map"),
        ("pl_rank_loo", "ndcg"),
    ],
)
def test_leave_one_out_is_unbiased_over_all_pairs_of_samples(monkeypatch, estimator, metric):
    both, chance = pairs()
    each = estimates(monkeypatch, both, estimator=estimator, metric=metric)
    torch.testing.assert_close((chance[:, None] * each).sum(0), exact_gradient(SCORES, GAINS, metric), **EXACT)


def test_places_behind_the_last_that_counts_are_not_credited(monkeypatch):
    # the k-prefix alone: same expectation as crediting all five places, less variance
    chance, reward = probabilities(SCORES), rewards(GAINS, ALL, "ndcg", 3)
    scores = repeated(SCORES, 120).requires_grad_()
    (plackett_luce_logps(scores, ALL, full(scores)) * reward).sum().backward()
    truncated = estimates(monkeypatch, ALL[None], estimator="reinforce")
    mean = (chance[:, None] * scores.grad).sum(0)
    torch.testing.assert_close((chance[:, None] * truncated).sum(0), mean, **EXACT)
    variance = [(chance[:, None] * (g - mean).square()).sum() for g in (truncated, scores.grad)]
    assert variance[0] < 0.9 * variance[1]


def test_leave_one_out_is_centring_times_n_over_n_minus_one_and_the_pairwise_form(monkeypatch):
    samples = sample_rankings(SCORES[None], full(SCORES[None]), 6, generator=torch.Generator().manual_seed(1))
    ours = estimates(monkeypatch, samples, estimator="loo", k=3)[0]
    scores = SCORES.clone().requires_grad_()
    logps = plackett_luce_logps(scores.expand(6, -1), samples[:, 0], full(scores.expand(6, -1)), k=3)
    reward = rewards(GAINS, samples[:, 0], "ndcg", 3)
    (centred,) = torch.autograd.grad(((reward - reward.mean()) * logps).mean(), scores, retain_graph=True)
    torch.testing.assert_close(ours * 5 / 6, centred, **EXACT)
    difference = (reward[:, None] - reward) * (logps[:, None] - logps)
    (pairwise,) = torch.autograd.grad(difference.sum() / (2 * 6 * 5), scores)
    torch.testing.assert_close(ours, pairwise, **EXACT)


def test_with_the_top_one_it_is_infonce_damped_by_the_probability_of_the_positive(monkeypatch):
    gains = torch.tensor([0.0, 0, 1, 0, 0], dtype=torch.float64)
    each = estimates(monkeypatch, ALL[None], gains, estimator="pl_rank", metric="precision", k=1)
    chance = SCORES.softmax(-1)
    damped = chance[2] * (torch.nn.functional.one_hot(torch.tensor(2), 5) - chance)
    torch.testing.assert_close((probabilities(SCORES)[:, None] * each).sum(0), damped, **EXACT)


def test_draws_follow_the_policy():
    draws = sample_rankings(SCORES[None], full(SCORES[None]), 200_000, generator=torch.Generator().manual_seed(0))
    code = (draws[:, 0] * 5 ** torch.arange(5)).sum(-1)
    counts = torch.stack([(code == (ranking * 5 ** torch.arange(5)).sum()).sum() for ranking in ALL])
    assert counts.sum() == 200_000
    assert chisquare(counts.numpy(), (probabilities(SCORES) * 200_000).numpy()).pvalue > 1e-3


def variance_ratios(n, k, relevant, n_samples, sigma=1.0, rows=400):
    """Variance of REINFORCE over that of each estimator, from `rows` estimates for the same scores."""
    generator = torch.Generator().manual_seed(1)
    scores = repeated(sigma * torch.randn(n, generator=generator, dtype=torch.float64), rows)
    gains = torch.zeros(n, dtype=torch.float64)
    gains[torch.randperm(n, generator=generator)[:relevant]] = 1
    traces = {}
    for estimator in ESTIMATORS:
        settings = {"k": k, "n_samples": n_samples, "estimator": estimator, "generator": generator}
        found = policy_gradient(scores, repeated(gains, rows), full(scores), **settings)
        traces[estimator] = found.gradient.var(0).sum()
        # what one call says of its own variance is what many calls show
        assert found.variance.mean() / traces[estimator] == pytest.approx(1, abs=0.35)
    return {name: float(traces["reinforce"] / trace) for name, trace in traces.items()}


def test_variance_on_short_lists():
    ratios = variance_ratios(n=20, k=10, relevant=2, n_samples=8)
    assert ratios["loo"] >= 1.2
    assert ratios["rtg_loo"] >= 2.2
    assert ratios["pl_rank"] >= 2


def test_with_one_relevant_document_among_many_a_baseline_does_not_help_but_the_others_do():
    ratios = variance_ratios(n=100, k=10, relevant=1, n_samples=8)
    assert ratios["loo"] < 1.1
    assert ratios["rtg_loo"] >= 1.5
    assert ratios["pl_rank"] >= 2


@pytest.mark.parametrize("estimator", ["loo", "rtg_loo", "pl_rank_loo"])
def test_a_constant_reward_has_no_gradient(estimator):
    scores = torch.randn(3, 6, dtype=torch.float64)
    gains = torch.ones_like(scores)
    found = policy_gradient(scores, gains, full(scores), k=6, estimator=estimator)
    torch.testing.assert_close(found.gradient, torch.zeros_like(scores), atol=1e-10, rtol=0)
    assert found.flat.all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_shift_of_the_scores_changes_nothing(estimator):
    scores, gains = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[2.0, 0, 1, 0, 0, 1]] * 3).double()
    found = [
        policy_gradient(s, gains, full(s), k=4, estimator=estimator, generator=torch.Generator().manual_seed(2))
        for s in (scores, scores + 7)
    ]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, atol=1e-10, rtol=0)
    torch.testing.assert_close(found[0].loss, found[1].loss, atol=1e-10, rtol=0)
    if estimator != "pl_rank":  # whose samples sum to zero in the mean only
        torch.testing.assert_close(found[0].gradient.sum(-1), torch.zeros(3).double(), atol=1e-10, rtol=0)


def test_the_loss_is_minus_the_mean_reward_and_its_gradient_minus_the_estimate():
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    gains = torch.tensor([[1.0, 0, 0, 2, 0, 0]] * 2).double()
    found = policy_gradient(scores, gains, full(scores), k=3, temperature=0.5)
    torch.testing.assert_close(found.loss.detach(), -found.rewards.mean(0))
    found.loss.sum().backward()
    torch.testing.assert_close(scores.grad, -found.gradient / 0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
def test_padding_is_never_drawn_and_reaches_no_result(estimator, nonsense):
    scores, gains = torch.randn(2, 7), torch.tensor([[1.0, 0, 0, 2, 0, 0, 0]] * 2)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:], mask[1, 4:] = False, False
    found = []
    for value in (0.0, nonsense):
        s, g = scores.masked_fill(~mask, value), gains.masked_fill(~mask, value)
        s.requires_grad_()
        settings = {"k": 6, "estimator": estimator, "generator": torch.Generator().manual_seed(3)}
        estimate = policy_gradient(s, g, mask, **settings)
        estimate.loss.sum().backward()
        found.append((estimate.loss.detach(), s.grad, estimate.entropy, estimate.greedy, estimate.variance))
        assert (s.grad[~mask] == 0).all()
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(clean, dirty, atol=0, rtol=0)
        assert clean.isfinite().all()


def test_padded_lists_are_the_short_ones(monkeypatch):
    # the gradient of a list of five is the same with three documents of padding behind it
    padded = torch.cat([SCORES, torch.zeros(3).double()])
    mask = torch.tensor([True] * 5 + [False] * 3)
    rankings = torch.cat([ALL, torch.tensor([5, 6, 7]).expand(120, -1)], -1)
    for estimator in ("pl_rank", "reinforce"):
        short = estimates(monkeypatch, ALL[None], estimator=estimator, k=5)
        monkeypatch.setattr(plackett_luce, "sample_rankings", lambda *a, **kw: rankings[None, :, :7])
        gains = repeated(torch.cat([GAINS, torch.ones(3).double()]), 120)
        settings = {"k": 7, "n_samples": 1, "estimator": estimator}
        long = policy_gradient(repeated(padded, 120), gains, mask.expand(120, -1), **settings).gradient
        torch.testing.assert_close(long[:, :5], short, **EXACT)
        assert (long[:, 5:] == 0).all()


def test_a_list_without_a_relevant_document_and_an_empty_one_have_no_gradient():
    scores = torch.randn(3, 4, requires_grad=True)
    gains = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    for estimator in ESTIMATORS:
        scores.grad = None
        policy_gradient(scores, gains, mask, k=2, estimator=estimator).loss.sum().backward()
        assert (scores.grad[[0, 2]] == 0).all()
        assert scores.grad[1].abs().sum() > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_far_apart_stay_finite(estimator):
    scores = torch.tensor([[0.0, 5000.0, -5000.0, 3.0, 4000.0]], requires_grad=True)
    gains = torch.tensor([[1.0, 0, 0, 1, 0]])
    found = policy_gradient(scores, gains, full(scores), k=5, estimator=estimator)
    found.loss.sum().backward()
    assert scores.grad.isfinite().all()
    assert found.entropy.item() == pytest.approx(0, abs=1e-6)


def test_half_precision_scores_are_computed_in_float32():
    scores = torch.randn(2, 6).bfloat16().requires_grad_()
    found = policy_gradient(scores, torch.tensor([[1.0, 0, 0, 2, 0, 0]] * 2), full(scores), k=3)
    assert found.loss.dtype == torch.float32
    found.loss.sum().backward()
    assert scores.grad.dtype == torch.bfloat16


def test_a_relevant_document_that_the_list_lacks_lowers_the_reward():
    # one relevant document, found first: nDCG 1; with a second one elsewhere 1 / (1 + 1/log2 3)
    scores, gains = torch.tensor([[50.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    settings = {"k": 3, "n_samples": 4}
    assert policy_gradient(scores, gains, full(scores), **settings).greedy.item() == pytest.approx(1)
    found = policy_gradient(scores, gains, full(scores), ideal_gains=torch.tensor([[1.0, 1.0]]), **settings)
    assert found.greedy.item() == pytest.approx(0.6131471927654584)


def test_a_reward_function_gets_rankings_and_unscored_ones_have_no_part(monkeypatch):
    scores, gains = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3)
    seen = []

    def reward(rankings):
        seen.append(rankings)
        first = (rankings[..., 0] == 2).double()
        return first.masked_fill(rankings[..., 0] == 1, torch.nan)

    settings = {"k": 2, "reward_fn": reward}
    generator = torch.Generator().manual_seed(0)
    found = policy_gradient(scores, gains, full(scores), n_samples=64, generator=generator, **settings)
    assert seen[0].shape == (64, 1, 2)
    scored = seen[0][seen[0][:, 0, 0] != 1]
    wins = (scored[:, 0, 0] == 2).double()
    assert found.loss.item() == pytest.approx(-wins.mean().item())
    # it is the estimate from the scored ones alone
    monkeypatch.setattr(plackett_luce, "sample_rankings", lambda *a, **kw: scored)
    alone = policy_gradient(scores, gains, full(scores), n_samples=len(scored), **settings)
    torch.testing.assert_close(found.gradient, alone.gradient)
    assert found.gradient[0, 2] > 0 > found.gradient[0, 0]


def test_nothing_scored_is_no_gradient_and_no_nan():
    scores = torch.zeros(1, 3, requires_grad=True)
    found = policy_gradient(
        scores, torch.zeros(1, 3), full(scores), k=2, reward_fn=lambda r: torch.full(r.shape[:2], torch.nan)
    )
    found.loss.sum().backward()
    assert (scores.grad == 0).all()
    assert found.flat.all()


def test_a_single_scored_sample_has_nothing_to_compare_with():
    scores = torch.zeros(1, 3, requires_grad=True)

    def reward(rankings):
        return torch.full(rankings.shape[:2], torch.nan).index_fill(0, torch.tensor([2]), 1.0)

    found = policy_gradient(scores, torch.zeros(1, 3), full(scores), k=2, reward_fn=reward)
    assert found.loss.item() == -1
    assert (found.gradient == 0).all()


def test_equal_scores_do_not_earn_the_best_greedy_reward():
    scores = torch.zeros(1, 4)
    found = policy_gradient(scores, torch.tensor([[1.0, 0, 0, 0]]), full(scores), k=4)
    assert found.greedy.item() == pytest.approx(1 / torch.log2(torch.tensor(5.0)).item())


def test_draws_do_not_touch_the_global_generator_and_repeat_with_their_own():
    scores = torch.randn(2, 5)
    before = torch.get_rng_state()
    draws = [
        sample_rankings(scores, full(scores), 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 5}, "need 1 <= k <= documents of a list, got k=5 and lists of 4"),
        ({"k": 0}, "got k=0"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"estimator": "ppo"}, "unknown estimator 'ppo'; choose one of pl_rank"),
        ({"estimator": "pl_rank", "metric": "mrr"}, "use rtg_loo"),
        ({"estimator": "loo", "n_samples": 1}, "needs n_samples of at least 2"),
        ({"estimator": "pl_rank", "reward_fn": lambda r: r}, "scores whole rankings; use loo"),
        ({"gain": "square"}, "gain must be linear or exponential"),
        ({"reward_fn": lambda r: torch.zeros(3)}, "one reward for each ranking of each query"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    scores = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=message):
        policy_gradient(scores, torch.ones(1, 4), full(scores), **{"k": 2, **settings})


def test_scores_of_nan_are_refused_with_their_list():
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="list 1 of the batch have NaN"):
        policy_gradient(scores, torch.ones(3, 4), full(scores), k=2)


def test_entropy_and_kl_of_the_first_place_by_hand():
    # softmax of log 1, log 3 is 1/4, 3/4; of equal scores 1/2, 1/2
    scores = torch.tensor([[0.0, log(3), 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    entropy = -(0.25 * log(0.25) + 0.75 * log(0.75))
    assert first_place_entropy(scores, mask).item() == pytest.approx(entropy, abs=1e-12)
    kl = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert first_place_kl(scores, torch.zeros(1, 3).double(), mask).item() == pytest.approx(kl, abs=1e-12)
    assert first_place_kl(scores, scores, mask).item() == 0
    assert exp(first_place_entropy(torch.zeros(1, 3), mask).item()) == pytest.approx(2)


def test_padding_is_drawn_behind_all_documents_whatever_its_score():
    scores = torch.tensor([[0.0, 50.0, -50.0, 50.0]])
    mask = torch.tensor([[True, False, True, False]])
    draws = sample_rankings(scores, mask, 200)
    assert set(draws[:, 0, :2].flatten().tolist()) == {0, 2}
    assert set(draws[:, 0, 2:].flatten().tolist()) == {1, 3}


@pytest.mark.parametrize("estimator", ["pl_rank", "reinforce"])
def test_documents_that_are_hardly_ever_drawn_keep_their_gradient(monkeypatch, estimator):
    """Scores 60 apart: the last places are a contest of its own among documents with probabilities of e^-60."""
    scores = torch.tensor([0.0, 60.0, -1.0, 30.0, 1.0], dtype=torch.float64)
    each = estimates(monkeypatch, ALL[None], scores=scores, k=4, estimator=estimator)
    found = (probabilities(scores)[:, None] * each).sum(0)
    torch.testing.assert_close(found, exact_gradient(scores, GAINS, k=4), **EXACT)
    assert found[[0, 2, 4]].abs().min() > 1e-4


def test_the_variance_is_that_of_the_mean_of_the_samples(monkeypatch):
    samples = sample_rankings(SCORES[None], full(SCORES[None]), 6, generator=torch.Generator().manual_seed(4))
    each = torch.stack([estimates(monkeypatch, samples[i : i + 1], estimator="pl_rank")[0] for i in range(6)])
    monkeypatch.setattr(plackett_luce, "sample_rankings", lambda *a, **kw: samples[..., :3])
    settings = {"k": 3, "n_samples": 6, "estimator": "pl_rank"}
    found = policy_gradient(SCORES[None], GAINS[None], full(SCORES[None]), **settings)
    torch.testing.assert_close(found.gradient[0], each.mean(0))
    torch.testing.assert_close(found.variance[0], each.var(0).sum() / 6)


def test_the_estimator_that_is_taken_where_none_is_named():
    scores, gains = torch.randn(2, 6, dtype=torch.float64), torch.tensor([[1.0, 0, 0, 2, 0, 1]] * 2).double()

    def gradient(**settings):
        generator = torch.Generator().manual_seed(5)
        return policy_gradient(scores, gains, full(scores), k=4, generator=generator, **settings).gradient

    def reward(rankings):
        return (rankings[..., 0] == 3).double()

    for settings, name in (
        ({}, "pl_rank_loo"),
        ({"n_samples": 1}, "pl_rank"),
        ({"metric": "mrr"}, "rtg_loo"),
        ({"reward_fn": reward}, "loo"),
    ):
        torch.testing.assert_close(gradient(**settings), gradient(**settings, estimator=name), atol=0, rtol=0)
    assert not torch.equal(gradient(), gradient(estimator="pl_rank"))


@pytest.mark.parametrize(("estimator", "wanted"), [("loo", [False, False, True]), ("reinforce", [False, True, True])])
def test_rankings_that_are_compared_need_two_that_were_scored(estimator, wanted):
    """Of three queries none, one and two rankings are scored."""

    def reward(rankings):
        return torch.tensor([[torch.nan, 1.0, 1.0], [torch.nan, torch.nan, 0.0]])

    scores, settings = torch.zeros(3, 4), {"n_samples": 2, "k": 2, "estimator": estimator, "reward_fn": reward}
    found = policy_gradient(scores, torch.zeros(3, 4), scores == 0, **settings)
    assert found.scored.tolist() == wanted
    assert not found.gradient[~found.scored].any()
