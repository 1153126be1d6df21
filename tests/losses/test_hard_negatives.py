"""STAR, masked InfoNCE and ADORE: worked values, explicit loops, the published double sum, masks; and a toy corpus."""

from functools import partial
from itertools import permutations
from math import exp, log, log2

import pytest
import torch

from negtune.losses.hard_negatives import (
    IN_BATCH_LOSSES,
    adore,
    append_missed,
    masked_infonce,
    star,
    star_lists,
)
from negtune.losses.ranking import lambda_rank, rank_net

YES, NO = True, False


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def booleans(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def batch(n_queries=5, per_query=2, dtype=torch.float64):
    """Scores of a batch with false negatives on both sides; the positive of query i is in column i."""
    scores = torch.randn(n_queries, n_queries, dtype=dtype)
    hard_scores = torch.randn(n_queries, n_queries * per_query, dtype=dtype)
    relevant = torch.eye(n_queries, dtype=torch.bool) | (torch.rand(n_queries, n_queries) < 0.2)
    hard_relevant = torch.rand(hard_scores.shape) < 0.2
    own = torch.eye(n_queries, dtype=torch.bool).repeat_interleave(per_query, 1)
    return scores, hard_scores, torch.arange(n_queries), relevant, hard_relevant, own


# --- STAR -----------------------------------------------------------------------------------------------------------

# Two queries, positives in columns 0 and 1, one hard negative each. Query 0: gaps to its positive (score log 2) are
# log(1/2) in the batch, log(3/2) and log(1/2) for the hard negatives, so softplus gives log(3/2), log(5/2), log(3/2).
# Query 1: column 0 is relevant to it, and so is hard negative 1, its own; hard negative 0 is log 4 above: log 5.
BY_HAND = (
    doubles([log(2), 0], [9, 0]),
    doubles([log(3), 0], [log(4), 9]),
    torch.tensor([0, 1]),
    booleans([YES, NO], [YES, YES]),
    booleans([NO, NO], [NO, YES]),
    booleans([YES, NO], [NO, YES]),
)


def test_star_by_hand():
    # four pairs in two queries: each query's sum times 2/4
    expected = doubles((2 * log(3 / 2) + log(5 / 2)) / 2, log(5) / 2)
    torch.testing.assert_close(star(*BY_HAND), expected)
    # own: the pair of query 0 with hard negative 0; the other three are random
    expected = doubles(2 * (log(5 / 2) + 0.5 * 2 * log(3 / 2) / 3), 2 * 0.5 * log(5) / 3)
    torch.testing.assert_close(star(*BY_HAND, alpha=0.5), expected)
    warm = star(2 * BY_HAND[0], 2 * BY_HAND[1], *BY_HAND[2:], temperature=2.0)
    torch.testing.assert_close(warm, star(*BY_HAND))


def test_star_is_a_double_loop_of_two_way_log_softmax():
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    total, pairs = 0.0, 0
    for i in range(5):
        for other, masked in ((scores, relevant), (hard_scores, hard_relevant)):
            for j in range(other.shape[1]):
                if not masked[i, j]:
                    total -= torch.stack([scores[i, i], other[i, j]]).log_softmax(0)[0].item()
                    pairs += 1
    assert 0 < pairs < 5 * 15 - 5
    pooled = star(scores, hard_scores, positives, relevant, hard_relevant, own).mean()
    assert pooled.item() == pytest.approx(total / pairs, abs=1e-10)


def test_alpha_at_the_ratio_of_counts_is_the_pooled_loss_but_for_a_constant():
    *scored, relevant, hard_relevant, own = batch()
    static = (own & ~hard_relevant).sum().item()
    random = (~relevant).sum().item() + (~own & ~hard_relevant).sum().item()
    alpha = random / static
    pooled = star(*scored, relevant, hard_relevant, own)
    split = star(*scored, relevant, hard_relevant, own, alpha=alpha)
    torch.testing.assert_close(split, (1 + alpha) * pooled, atol=1e-10, rtol=0)
    # nothing masked: (B - 1)(1 + h)/h
    diagonal, none = torch.eye(5, dtype=torch.bool), torch.zeros_like(own)
    pooled = star(*scored, diagonal, none, own)
    split = star(*scored, diagonal, none, own, alpha=4 * 3 / 2)
    torch.testing.assert_close(split, (1 + 4 * 3 / 2) * pooled, atol=1e-10, rtol=0)


def test_alpha_0_reads_own_hard_negatives_only():
    scores, hard_scores, *rest = batch()
    scores.requires_grad_(), hard_scores.requires_grad_()
    star(scores, hard_scores, *rest, alpha=0.0).sum().backward()
    hard_relevant, own = rest[-2:]
    assert ((hard_scores.grad > 0) == (own & ~hard_relevant)).all()
    assert (scores.grad[~torch.eye(5, dtype=torch.bool)] == 0).all()
    assert (scores.grad.diagonal() <= 0).all()


def test_alpha_below_0_is_refused():
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha weighs random negatives and must be 0 or more.*got {alpha}"):
            star(*BY_HAND, alpha=alpha)


def test_a_positive_may_stand_in_any_column_and_need_not_be_called_relevant():
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = partial(star, scores[:, order], hard_scores, order.argsort())
    expected = star(scores, hard_scores, positives, relevant, hard_relevant, own)
    torch.testing.assert_close(shuffled(relevant[:, order], hard_relevant, own), expected)
    silent = relevant & ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(shuffled(silent[:, order], hard_relevant, own), expected)


# --- InfoNCE with masks ---------------------------------------------------------------------------------------------


def test_masked_infonce_by_hand():
    # query 0: e^s = 2 against 1, 3 and 1; query 1: 1 against 4, the hard negative that is not relevant
    torch.testing.assert_close(masked_infonce(*BY_HAND[:5]), doubles(-log(2 / 7), -log(1 / 5)))
    warm = masked_infonce(2 * BY_HAND[0], 2 * BY_HAND[1], *BY_HAND[2:5], temperature=2.0)
    torch.testing.assert_close(warm, masked_infonce(*BY_HAND[:5]))


def test_masked_infonce_without_other_positives_is_cross_entropy_over_the_batch():
    scores, hard_scores, positives, *_ = batch()
    nothing = torch.zeros_like(hard_scores, dtype=torch.bool)
    ours = masked_infonce(scores, hard_scores, positives, torch.eye(5, dtype=torch.bool), nothing)
    plain = torch.nn.functional.cross_entropy(torch.cat([scores, hard_scores], 1), positives, reduction="none")
    torch.testing.assert_close(ours, plain)


# --- Both -----------------------------------------------------------------------------------------------------------

IN_BATCH = {
    "star": star,
    "star, alpha": partial(star, alpha=0.3),
    "masked_infonce": lambda *arguments, **settings: masked_infonce(*arguments[:5], **settings),
}


@pytest.mark.parametrize("name", IN_BATCH)
def test_negatives_fall_positives_rise_and_what_is_relevant_stays(name):
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    scores.requires_grad_(), hard_scores.requires_grad_()
    IN_BATCH[name](scores, hard_scores, positives, relevant, hard_relevant, own).sum().backward()
    assert (scores.grad.diagonal() < 0).all()
    assert ((scores.grad > 0) == ~relevant).all()
    assert ((hard_scores.grad > 0) == ~hard_relevant).all()
    assert (hard_scores.grad[hard_relevant] == 0).all()
    assert (scores.grad[relevant & ~torch.eye(5, dtype=torch.bool)] == 0).all()


@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", IN_BATCH)
def test_nothing_behind_the_masks_of_a_batch_reaches_a_result(name, nonsense):
    clean, hard_clean, positives, relevant, hard_relevant, own = batch()
    hard_mask = torch.rand(hard_clean.shape) < 0.7
    relevant[0] = hard_relevant[1] = True  # one query without negatives in the batch, one without hard ones
    hidden = relevant & ~torch.eye(5, dtype=torch.bool)
    found = []
    for value in (0.0, nonsense):
        scores = clean.masked_fill(hidden, value).requires_grad_()
        hard_scores = hard_clean.masked_fill(hard_relevant | ~hard_mask, value).requires_grad_()
        arguments = (scores, hard_scores, positives, relevant, hard_relevant, own)
        loss = IN_BATCH[name](*arguments, hard_mask=hard_mask)
        loss.sum().backward()
        found.append((loss.detach(), scores.grad, hard_scores.grad))
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    assert all(values.isfinite().all() for values in found[1])
    assert (found[1][0] > 0).any()


@pytest.mark.parametrize("name", IN_BATCH)
def test_padded_hard_negatives_and_none_at_all_change_nothing(name):
    scores, _, positives, relevant, _, _ = batch()
    none = torch.zeros(5, 0, dtype=torch.bool)
    bare = IN_BATCH[name](scores, torch.zeros(5, 0).double(), positives, relevant, none, none)
    padding = torch.full((5, 3), torch.nan).double(), positives, relevant, *[torch.zeros(5, 3, dtype=torch.bool)] * 2
    torch.testing.assert_close(
        IN_BATCH[name](scores, *padding, hard_mask=torch.zeros(1, 3, dtype=torch.bool)), bare, atol=0, rtol=0
    )


@pytest.mark.parametrize("name", IN_BATCH)
def test_a_batch_without_a_pair_yields_zero(name):
    scores, hard_scores, positives, relevant, hard_relevant, own = batch(dtype=torch.float32)
    scores.requires_grad_()
    everything = torch.ones_like(relevant), torch.ones_like(hard_relevant)
    loss = IN_BATCH[name](scores, hard_scores, positives, *everything, own)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(5), atol=0, rtol=0)
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("name", IN_BATCH)
def test_order_of_queries_and_documents_does_not_matter(name):
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    expected = IN_BATCH[name](scores, hard_scores, positives, relevant, hard_relevant, own)
    hard = torch.randperm(10)
    moved = IN_BATCH[name](scores, hard_scores[:, hard], positives, relevant, hard_relevant[:, hard], own[:, hard])
    torch.testing.assert_close(moved, expected)
    rows = torch.randperm(5)
    turned = [values[rows] for values in (scores, hard_scores, positives, relevant, hard_relevant, own)]
    torch.testing.assert_close(IN_BATCH[name](*turned), expected[rows])


@pytest.mark.parametrize("name", IN_BATCH)
def test_the_gradient_of_a_batch_is_that_of_finite_differences(name):
    scores, hard_scores, *rest = batch(3)
    scores.requires_grad_(), hard_scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, h: IN_BATCH[name](s, h, *rest), (scores, hard_scores))


@pytest.mark.parametrize("name", IN_BATCH)
def test_a_gap_of_100_stays_finite_in_float32(name):
    scores, hard_scores = torch.tensor([[0.0, 100.0], [-100.0, 0.0]]), torch.zeros(2, 0)
    assert torch.log(1 + torch.exp(scores[0, 1])).isinf()
    none = torch.zeros(2, 0, dtype=torch.bool)
    scores.requires_grad_()
    loss = IN_BATCH[name](scores, hard_scores, torch.arange(2), torch.eye(2, dtype=torch.bool), none, none)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert loss.sum() > (25 if name == "star, alpha" else 90)  # alpha weighs pairs in the batch .3
    assert scores.grad.isfinite().all()


# --- Over lists -----------------------------------------------------------------------------------------------------


def lists_of(scores, hard_scores, relevant, hard_relevant, own):
    """The batch as lists of all its documents: each query's positive is the only one with a gain."""
    n = len(scores)
    gains = torch.cat([torch.eye(n, dtype=scores.dtype), torch.zeros_like(hard_scores)], -1)
    known = torch.cat([relevant & ~torch.eye(n, dtype=torch.bool), hard_relevant], -1)
    mine = torch.cat([torch.eye(n, dtype=torch.bool), own], -1)
    return torch.cat([scores, hard_scores], -1), gains, ~known, mine & ~known


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_star_over_lists_with_one_positive_each_is_star(alpha):
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    pool, gains, mask, mine = lists_of(scores, hard_scores, relevant, hard_relevant, own)
    expected = star(scores, hard_scores, positives, relevant, hard_relevant, own, alpha=alpha, temperature=0.5)
    found = star_lists(pool, gains, mask, own=mine, alpha=alpha, temperature=0.5)
    torch.testing.assert_close(found, expected)


def test_masked_infonce_over_lists_is_masked_infonce():
    scores, hard_scores, positives, relevant, hard_relevant, own = batch()
    pool, gains, mask, _ = lists_of(scores, hard_scores, relevant, hard_relevant, own)
    expected = masked_infonce(scores, hard_scores, positives, relevant, hard_relevant, temperature=0.5)
    torch.testing.assert_close(IN_BATCH_LOSSES["masked_infonce"](pool, gains, mask, temperature=0.5), expected)


def test_star_over_lists_takes_the_mean_over_a_querys_positives():
    """Query 0 has two positives and 2 negatives, query 1 one of each, query 2 nothing relevant: 3 negatives."""
    scores = doubles([1.0, 2.0, 0.5, 9.0, -1.0], [0.0, 3.0, 9.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    gains = doubles([1, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0])
    mask = booleans([YES, YES, YES, NO, YES], [NO, YES, NO, YES, NO], [YES, YES, YES, YES, YES])

    def pair(negative, positive):
        return log(1 + exp(negative - positive))

    first = [(pair(0.5, 1) + pair(0.5, 2)) / 2, (pair(-1, 1) + pair(-1, 2)) / 2]
    queries, negatives = 2, 3
    share = queries / negatives
    torch.testing.assert_close(star_lists(scores, gains, mask), doubles(share * sum(first), share * pair(1, 3), 0.0))
    own = booleans([YES, YES, YES, NO, NO], [NO, YES, NO, NO, NO], [NO, NO, NO, NO, NO])  # 1 own negative, 2 others
    expected = doubles(queries * first[0] + 0.5 * queries / 2 * first[1], 0.5 * queries / 2 * pair(1, 3), 0.0)
    torch.testing.assert_close(star_lists(scores, gains, mask, own=own, alpha=0.5), expected)


@pytest.mark.parametrize(("alpha", "constant"), [(None, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("positives", [1, 3, 6])
def test_star_over_lists_is_a_mean_however_many_positives_a_query_has(positives, alpha, constant):
    """Where no score differs every pair is log 2, and the other query's positives do not change this one's gradient."""
    gains = torch.zeros(2, 8, dtype=torch.float64)
    gains[0, 0], gains[1, -positives:] = 1, 1
    scores = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    own = torch.zeros(2, 8, dtype=torch.bool)
    own[0, :2], own[1, 1:] = True, True
    losses = star_lists(scores, gains, torch.ones_like(own), own=own, alpha=alpha)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(constant * log(2))
    if alpha is None:
        assert scores.grad[0, 0].item() == pytest.approx(-0.5 * 7 / (7 + 8 - positives))


def test_star_over_lists_reads_nothing_behind_the_mask():
    scores, hard_scores, _, relevant, hard_relevant, own = batch()
    pool, gains, mask, mine = lists_of(scores, hard_scores, relevant, hard_relevant, own)
    found = []
    for nonsense in (0.0, float("nan"), float("inf")):
        filled = pool.masked_fill(~mask, nonsense).requires_grad_()
        losses = star_lists(filled, gains.masked_fill(~mask, 99.0), mask, own=mine | ~mask)
        losses.sum().backward()
        found.append((losses.detach(), filled.grad))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0, rtol=0)
    assert (found[0][1][~mask] == 0).all()
    none = torch.zeros_like(mask)
    assert (star_lists(pool, gains, none) == 0).all()


# --- ADORE ----------------------------------------------------------------------------------------------------------


def full(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def test_adore_by_hand():
    # ranks by score: document 2, 0, 1; relevant: document 1, at place 3; e^(s_j - s_1) = 2 and 3
    scores, gains = doubles([log(2), 0, log(3)]), doubles([0, 1, 0])
    whole = (abs(1 / 3 - 1) * log(1 + 3) + abs(1 / 3 - 1 / 2) * log(1 + 2)) / 2
    assert adore(scores, gains, full(scores)).item() == pytest.approx(whole)
    # the positive beyond the cut: 1/r = 0; at a cut of 1 the pair with place 2 weighs nothing and counts in |P|
    assert adore(scores, gains, full(scores), metric_cut=2).item() == pytest.approx((log(4) + log(3) / 2) / 2)
    assert adore(scores, gains, full(scores), metric_cut=1).item() == pytest.approx(log(4) / 2)
    # places given: the positive first
    ranks = torch.tensor([[2, 1, 3]])
    given = (abs(1 - 1 / 2) * log(1 + 2) + abs(1 - 1 / 3) * log(1 + 3)) / 2
    assert adore(scores, gains, full(scores), ranks=ranks).item() == pytest.approx(given)
    ndcg = ((1 / log2(2) - 1 / log2(4)) * log(1 + 3) + (1 / log2(3) - 1 / log2(4)) * log(1 + 2)) / 2
    assert adore(scores, gains, full(scores), metric="ndcg").item() == pytest.approx(ndcg)
    # grades 1 (third) and 3 (second), ideal DCG 3 + 1/log2(3): three pairs
    graded = (
        3 * (1 - 1 / log2(3)) * log(1 + 3 / 2)
        + 1 * (1 - 1 / 2) * log(1 + 3)
        + 2 * (1 / log2(3) - 1 / 2) * log(1 + 1 / 2)
    ) / (3 * (3 + 1 / log2(3)))
    assert adore(scores, doubles([3, 1, 0]), full(scores), metric="ndcg").item() == pytest.approx(graded)
    ideal = adore(scores, doubles([0, 1, 0]), full(scores), metric="ndcg", ideal_gains=doubles([1, 3]))
    assert ideal.item() == pytest.approx(ndcg / (3 + 1 / log2(3)))
    warm = adore(2 * scores, doubles([0, 1, 0]), full(scores), metric="ndcg", temperature=2.0)
    assert warm.item() == pytest.approx(ndcg)


def test_mrr_reads_no_grades_and_ndcg_those_that_count_at_the_cut():
    scores, grades = doubles([log(2), 0, log(3)]), doubles([2, 1, 0])
    alike = adore(scores, doubles([1, 1, 0]), full(scores))
    torch.testing.assert_close(adore(scores, grades, full(scores)), alike, atol=0, rtol=0)
    assert alike.item() == pytest.approx(((1 - 1 / 2) * log(1 + 3 / 2) + (1 - 1 / 3) * log(1 + 3)) / 2)
    # nDCG@1: the ideal is the best gain alone; the pair of documents 0 and 1, both beyond the cut, weighs nothing
    for gain, best, second in (("linear", 2, 1), ("exponential", 3, 1)):
        loss = adore(scores, grades, full(scores), metric="ndcg", metric_cut=1, gain=gain)
        assert loss.item() == pytest.approx((log(1 + 3 / 2) + second / best * log(1 + 3)) / 3)


def published(scores, labels, metric_cut):
    """One query: both orientations of every pair are summed, and divided by twice the pairs."""
    n = len(scores)
    reciprocal = [1 / place if place <= metric_cut else 0.0 for place in range(1, n + 1)]
    total, n_positive_pairs = 0.0, 0
    for i in range(n):
        for j in range(n):
            weight = abs(reciprocal[i] - reciprocal[j])
            if labels[i] > labels[j]:
                total += weight * log(1 + exp(-(scores[i] - scores[j])))
                n_positive_pairs += 1
            if labels[i] < labels[j]:
                total += weight * log(1 + exp(scores[i] - scores[j]))
    return total / (2 * n_positive_pairs)


@pytest.mark.parametrize("metric_cut", [1, 4, 8, 200])
def test_adore_is_the_published_double_sum(metric_cut):
    scores = torch.randn(3, 8, dtype=torch.float64)
    gains = doubles([0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0, 0, 0])
    ranks = torch.arange(1, 9).expand(3, 8)
    ours = adore(scores, gains, full(scores), ranks=ranks, metric_cut=metric_cut)
    expected = doubles(*[published(s, g, metric_cut) for s, g in zip(scores.tolist(), gains.tolist(), strict=True)])
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    # by score it is the same once the list is in that order; ties are rare in random numbers
    best = scores.argsort(-1, descending=True)
    by_score = adore(scores, gains, full(scores), metric_cut=metric_cut)
    in_order = adore(scores.gather(-1, best), gains.gather(-1, best), full(scores), ranks=ranks, metric_cut=metric_cut)
    torch.testing.assert_close(by_score, in_order, atol=1e-12, rtol=0)


def test_adore_over_the_whole_list_is_lambda_rank_over_its_pairs():
    scores = torch.randn(4, 7, dtype=torch.float64)
    gains = (torch.rand(4, 7) < 0.3).double()
    pairs = (gains.sum(-1) * (1 - gains).sum(-1)).clamp(min=1)
    ours, theirs = adore(scores, gains, full(scores)), lambda_rank(scores, gains, full(scores), k=None, scheme="mrr")
    torch.testing.assert_close(ours, theirs / pairs)
    assert (ours > 0).any()
    ours = adore(scores, gains, full(scores), metric="ndcg")
    theirs = lambda_rank(scores, gains, full(scores), k=None)
    torch.testing.assert_close(ours, theirs / pairs, atol=1e-14, rtol=1e-12)
    grades = gains.float()
    for metric in ("mrr", "ndcg"):  # gains of a data set are float32
        narrow = adore(scores, grades, full(scores), metric=metric, ideal_gains=3 * grades)
        wide = adore(scores, gains, full(scores), metric=metric, ideal_gains=3 * gains)
        torch.testing.assert_close(narrow, wide, atol=0, rtol=0)
    # places 1 and never: all weights are 1, which is RankNet
    ranks = torch.where(gains > 0, 1, 10**9)
    even = adore(scores, gains, full(scores), ranks=ranks)
    torch.testing.assert_close(even, rank_net(scores, gains, full(scores)), atol=1e-8, rtol=1e-8)


def test_weights_of_one_positive_are_what_exchanges_do_to_the_metric():
    # every ranking of three documents, the second relevant: exchange it with another and look
    gains, mask = doubles([0, 1, 0]), booleans([YES] * 3)
    for metric, value in (("mrr", lambda r: 1 / r), ("ndcg", lambda r: 1 / log2(1 + r))):
        for places in permutations((1, 2, 3)):
            scores = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
            adore(scores, gains, mask, ranks=torch.tensor([places]), metric=metric).sum().backward()
            changes = [abs(value(places[1]) - value(places[j])) for j in (0, 2)]
            # at equal scores each pair pushes with half its weight; two pairs
            torch.testing.assert_close(2 * 2 * scores.grad[0, [0, 2]], doubles(*changes))
            assert scores.grad[0, 1].item() == pytest.approx(-sum(changes) / 4)


def test_what_stands_first_is_pushed_hardest_and_beyond_the_cut_nothing_is():
    scores = doubles([5, 4, 3, 2, 1]).requires_grad_()
    adore(scores, doubles([0, 0, 0, 0, 1]), full(scores), metric_cut=3).sum().backward()
    pushed = scores.grad[0]
    assert pushed[0] > pushed[1] > pushed[2] > 0
    assert pushed[3] == 0
    assert pushed[4] < 0


def test_equal_scores_are_ranked_in_the_worst_order():
    # the positive is third, wherever it stands in the list
    for gains in permutations([1, 0, 0]):
        loss = adore(doubles([0, 0, 0]), doubles(gains), booleans([YES] * 3))
        assert loss.item() == pytest.approx(((1 - 1 / 3) + (1 / 2 - 1 / 3)) * log(2) / 2)


@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
@pytest.mark.parametrize("metric", ["mrr", "ndcg"])
@pytest.mark.parametrize("given", [True, False])
def test_nothing_behind_the_mask_of_a_list_reaches_adore(metric, given, nonsense):
    clean, gains = torch.randn(2, 6), torch.tensor([[2.0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    mask = booleans([YES] * 4 + [NO] * 2, [YES] * 3 + [NO] * 3)
    found = []
    for value, place in ((0.0, 7), (nonsense, 0)):
        scores = clean.masked_fill(~mask, value).requires_grad_()
        ranks = torch.arange(1, 7).expand(2, 6).masked_fill(~mask, place) if given else None
        loss = adore(scores, gains.masked_fill(~mask, value), mask, ranks=ranks, metric=metric, metric_cut=5)
        loss.sum().backward()
        found.append((loss.detach(), scores.grad))
        assert (scores.grad[~mask] == 0).all()
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    assert found[1][1].isfinite().all()
    assert (found[1][0] > 0).all()


def test_lists_without_a_pair_yield_zero():
    scores = torch.randn(3, 4, requires_grad=True)
    mask = booleans([YES] * 4, [YES] * 4, [NO] * 4)
    for metric in ("mrr", "ndcg"):
        loss = adore(scores, torch.tensor([[0.0] * 4, [1.0] * 4, [1.0, 0, 0, 0]]), mask, metric=metric)
        torch.testing.assert_close(loss, torch.zeros(3), atol=0, rtol=0)
        (gradient,) = torch.autograd.grad(loss.sum(), scores)
        assert (gradient == 0).all()


@pytest.mark.parametrize("metric", ["mrr", "ndcg"])
def test_order_of_the_list_does_not_matter_to_adore_and_its_gradient_is_right(metric):
    scores, gains = torch.randn(2, 5, dtype=torch.float64), doubles([2, 0, 0, 1, 0], [0, 0, 1, 0, 0])
    order, ranks = torch.randperm(5), torch.stack([torch.randperm(5) + 1 for _ in range(2)])
    objective = partial(adore, metric=metric, metric_cut=3)
    for places in (None, ranks):
        expected = objective(scores, gains, full(scores), ranks=places)
        moved = objective(
            scores[:, order], gains[:, order], full(scores), ranks=None if places is None else places[:, order]
        )
        torch.testing.assert_close(moved, expected)
    # ranks given: the weights of the ranks by score jump, and take no gradient
    checked = scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: objective(s, gains, full(s), ranks=ranks), (checked,))


def test_adore_stays_finite_at_a_gap_of_100_in_float32():
    scores = torch.tensor([[0.0, 100.0, -100.0]], requires_grad=True)
    loss = adore(scores, torch.tensor([[1.0, 0, 0]]), full(scores))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * 100 / 2)
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_cut": 0}, "metric_cut counts places and must be at least 1, got 0; leave it out for the whole list"),
        ({"metric": "map"}, "unknown metric 'map'; choose one of mrr, ndcg"),
        ({"gain": "log"}, "gain must be linear or exponential, got 'log'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"ranks": torch.tensor([[0, 1]])}, "ranks are places from 1, got 0"),
    ],
)
def test_adore_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        adore(torch.zeros(1, 2), torch.tensor([[1.0, 0]]), booleans([YES, YES]), **settings)


# --- Lists of a search ----------------------------------------------------------------------------------------------


def test_positives_that_a_search_missed_are_put_behind_it():
    positions = torch.tensor([[4, 7, 1], [4, 7, 1], [2, -1, -1], [3, 0, 5]])
    relevant = [[1, 9], [9, 2], {8}, []]
    # query 0 found 1, so that 9 stays out; query 1 missed both; query 2 found little; query 3 has no positive
    lists, gains, mask = append_missed(positions, relevant)
    expected = [[4, 7, 1, -1, -1], [4, 7, 1, 2, 9], [2, -1, -1, 8, -1], [3, 0, 5, -1, -1]]
    assert lists.tolist() == expected
    assert gains.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0] * 5]
    assert torch.equal(mask, lists >= 0)


def test_no_positive_is_ever_a_negative_or_stands_twice():
    positions = torch.stack([torch.randperm(30)[:10] for _ in range(200)])
    relevant = [torch.randperm(30)[: i % 6].tolist() * 2 for i in range(200)]
    lists, gains, mask = append_missed(positions, relevant)
    assert torch.equal(lists[:, :10], positions)
    for row, gain, here, wanted in zip(lists.tolist(), gains.tolist(), mask.tolist(), relevant, strict=True):
        documents = [document for document, real in zip(row, here, strict=True) if real]
        assert len(set(documents)) == len(documents)
        assert [g == 1 for g, real in zip(gain, here, strict=True) if real] == [d in wanted for d in documents]
        assert any(gain) == bool(wanted)
        missed = not set(row[:10]) & set(wanted)
        assert documents[10:] == (sorted(set(wanted)) if missed else [])


def test_nothing_is_appended_where_nothing_is_missed():
    positions = torch.tensor([[4, 7], [0, 4]])
    lists, gains, _ = append_missed(positions, [[4], [4]])
    assert torch.equal(lists, positions)
    assert gains.tolist() == [[1, 0], [0, 1]]
    assert append_missed(positions, [[], []])[0].shape == (2, 2)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need the positives of each of 2 queries, got 1 lists"):
        append_missed(torch.zeros(2, 3, dtype=torch.long), [[1]])
    with pytest.raises(ValueError, match="positions of positives are at least 0, got -1"):
        append_missed(torch.zeros(1, 3, dtype=torch.long), [[2, -1]])
