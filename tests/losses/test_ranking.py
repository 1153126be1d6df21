"""Listwise, pairwise and distillation objectives: hand-worked values, limits, sentence-transformers' own, nonsense."""

import itertools
from functools import partial
from math import exp, log, log2

import pytest
import torch

from negtune.losses.plackett_luce import first_place_kl
from negtune.losses.ranking import (
    RANKING_LOSSES,
    SCHEMES,
    infonce,
    kl_distill,
    lambda_rank,
    list_mle,
    list_net,
    margin_mse,
    p_list_mle,
    pg_rank,
    rank_net,
)

NEED_TEACHER = {"margin_mse", "kl_distill"}


def bound(name, scores):
    """The objective with a teacher that ranks the list the other way round, and draws that repeat."""
    if name in NEED_TEACHER:
        return partial(RANKING_LOSSES[name], teacher_scores=-scores.detach().masked_fill(scores.isnan(), 0.0))
    if name == "pg_rank":
        return partial(pg_rank, k=3, generator=torch.Generator().manual_seed(0))
    return RANKING_LOSSES[name]


def full(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def lists(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- Values worked by hand ------------------------------------------------------------------------------------------


def test_infonce_by_hand_with_one_positive_and_with_two():
    scores = lists([log(2), 0, log(3)])
    one = infonce(scores, lists([1, 0, 0]), full(scores))
    assert one.item() == pytest.approx(-log(2 / 6))
    # two positives, log 2 and log 3: each against the one negative only
    two = infonce(scores, lists([1, 0, 2]), full(scores))
    assert two.item() == pytest.approx((-log(2 / 3) - log(3 / 4)) / 2)
    warm = infonce(2 * scores, lists([1, 0, 0]), full(scores), temperature=2.0)
    assert warm.item() == pytest.approx(-log(2 / 6))


def test_list_mle_by_hand():
    # best ranking: 1 (gain 2), 2 (gain 1), 0; weights e^s = 2, 1, 3: 1/6 * 3/5 * 1
    scores, gains = lists([log(2), 0, log(3)]), lists([0, 2, 1])
    assert list_mle(scores, gains, full(scores)).item() == pytest.approx(-log(1 / 6 * 3 / 5))
    assert list_mle(scores, gains, full(scores), k=1).item() == pytest.approx(-log(1 / 6))


def test_position_aware_list_mle_by_hand():
    # places weigh 2^2 - 1, 2^1 - 1, 0 -> 3/4, 1/4
    scores, gains = lists([log(2), 0, log(3)]), lists([0, 2, 1])
    expected = -(0.75 * log(1 / 6) + 0.25 * log(3 / 5))
    assert p_list_mle(scores, gains, full(scores)).item() == pytest.approx(expected)


def test_list_net_by_hand_and_with_a_sharp_target():
    scores, gains = lists([log(2), 0, log(3)]), lists([0, log(2), 0])
    # target 1/4, 2/4, 1/4; scores 2/6, 1/6, 3/6
    expected = -(0.25 * log(2 / 6) + 0.5 * log(1 / 6) + 0.25 * log(3 / 6))
    assert list_net(scores, gains, full(scores)).item() == pytest.approx(expected)
    sharp = list_net(scores, gains, full(scores), gain_temperature=1e-3)
    assert sharp.item() == pytest.approx(-log(1 / 6))


def test_rank_net_by_hand():
    # gains 0, 2, 1: pairs (1 over 0), (1 over 2), (2 over 0)
    scores, gains = lists([log(2), 0, log(3)]), lists([0, 2, 1])
    expected = (log(1 + 2) + log(1 + 3) + log(1 + 2 / 3)) / 3
    assert rank_net(scores, gains, full(scores)).item() == pytest.approx(expected)


def test_lambda_rank_by_hand():
    # ranks by score: document 2 first, 0 second, 1 third; gain 1 for document 1 only, ideal DCG 1
    scores, gains = lists([log(2), 0, log(3)]), lists([0, 1, 0])
    over_2 = abs(1 / log2(2) - 1 / log2(4)) * log(1 + 3)
    over_0 = abs(1 / log2(3) - 1 / log2(4)) * log(1 + 2)
    assert lambda_rank(scores, gains, full(scores), k=3).item() == pytest.approx(over_2 + over_0)
    reciprocal = abs(1 - 1 / 3) * log(1 + 3) + abs(1 / 2 - 1 / 3) * log(1 + 2)
    assert lambda_rank(scores, gains, full(scores), k=3, scheme="mrr").item() == pytest.approx(reciprocal)
    # distances 2 and 1: |1/D_2 - 1/D_3| and |1/D_1 - 1/D_2|
    tight = (1 / log2(3) - 1 / log2(4)) * log(1 + 3) + (1 / log2(2) - 1 / log2(3)) * log(1 + 2)
    assert lambda_rank(scores, gains, full(scores), k=3, scheme="ndcg2").item() == pytest.approx(tight)
    both = lambda_rank(scores, gains, full(scores), k=3, scheme="ndcg2++", mu=10.0).item()
    assert both == pytest.approx(10 * tight + over_2 + over_0)
    # k = 1: only the pair with the document that is first
    assert lambda_rank(scores, gains, full(scores), k=1).item() == pytest.approx(over_2)


def double_loop(scores, gains, ideal_gains, scheme, k, mu=10.0):
    """One query of LambdaLoss in Python's numbers, without ties: its value, and its derivative by each score."""
    places = {d: place for place, d in enumerate(sorted(range(len(scores)), key=lambda d: -scores[d]), 1)}
    ideal = sum(gain / log2(1 + j) for j, gain in enumerate(sorted(ideal_gains, reverse=True)[:k], 1))
    value, slopes = 0.0, [0.0] * len(scores)
    for i, j in itertools.permutations(range(len(scores)), 2):
        r_i, r_j = places[i], places[j]
        if gains[i] <= gains[j] or min(r_i, r_j) > k:
            continue
        gained, near = abs(gains[i] - gains[j]) / ideal, abs(r_i - r_j)
        exchanged = gained * abs(1 / log2(1 + r_i) - 1 / log2(1 + r_j))
        tight = gained * abs(1 / log2(1 + near) - 1 / log2(2 + near))
        weight = {
            "lambda_rank": exchanged,
            "ndcg1": gains[i] / ideal / log2(1 + r_i),
            "ndcg2": tight,
            "ndcg2++": mu * tight + exchanged,
            "mrr": abs(1 / r_i - 1 / r_j),
        }[scheme]
        value += weight * log(1 + exp(scores[j] - scores[i]))
        push = weight / (1 + exp(scores[i] - scores[j]))
        slopes[i], slopes[j] = slopes[i] - push, slopes[j] + push
    return value, slopes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lambda_rank_of_float64_scores_is_exact_whatever_the_gains_are_stored_in(scheme, dtype):
    scores = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    gains = torch.randint(0, 4, (4, 7)).to(dtype)
    ideal = torch.cat([gains, torch.full((4, 2), 3, dtype=dtype)], -1)
    for k in (3, 7):
        loss = lambda_rank(scores, gains, full(scores), k=k, scheme=scheme, ideal_gains=ideal)
        (gradient,) = torch.autograd.grad(loss.sum(), scores)
        by_query = zip(scores.tolist(), gains.tolist(), ideal.tolist(), strict=True)
        expected = [double_loop(*query, scheme, k) for query in by_query]
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.detach(), lists(*[value for value, _ in expected]), atol=0, rtol=1e-13)
        torch.testing.assert_close(gradient, lists(*[slopes for _, slopes in expected]), atol=1e-14, rtol=1e-13)


def test_margin_mse_by_hand():
    scores, gains = lists([3, 1, 0]), lists([1, 0, 0])
    teacher = lists([10, 9, 4])
    # teacher's margins 1 and 6, ours 2 and 3
    assert margin_mse(scores, gains, full(scores), teacher_scores=teacher).item() == pytest.approx((1 + 9) / 2)


def test_kl_distill_by_hand_and_zero_at_the_teacher():
    scores, teacher = lists([0, 0]), lists([0, log(3)])
    kl = 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    assert kl_distill(scores, scores, full(scores), teacher_scores=teacher).item() == pytest.approx(kl)
    assert kl_distill(teacher, scores, full(scores), teacher_scores=teacher).item() == pytest.approx(0, abs=1e-15)


def test_pg_rank_is_minus_the_metric_where_the_policy_is_certain():
    # 200 apart: the ranking is 0, 1, 2; relevant is 1 with gain 3: nDCG 1/log2(3)
    scores = lists([400, 200, 0])
    loss = pg_rank(scores, lists([0, 3, 0]), full(scores), k=2)
    assert loss.item() == pytest.approx(-1 / log2(3))


def test_pg_rank_adds_entropy_and_kl_of_the_first_place():
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    start, gains = torch.randn(2, 5, dtype=torch.float64), lists([1, 0, 0, 0, 0]).repeat(2, 1)

    def loss(**settings):
        generator = torch.Generator().manual_seed(0)
        return pg_rank(scores, gains, full(scores), k=3, temperature=0.5, generator=generator, **settings)

    logps = (scores / 0.5).log_softmax(-1)
    torch.testing.assert_close(loss() - loss(entropy_weight=0.3), 0.3 * -(logps.exp() * logps).sum(-1))
    kl = first_place_kl(scores, start, full(scores), temperature=0.5)
    torch.testing.assert_close(loss(kl_weight=0.3, ref_scores=start) - loss(), 0.3 * kl)
    (pull,) = torch.autograd.grad((loss(kl_weight=5.0, ref_scores=start) - loss()).sum(), scores)
    step = first_place_kl(scores - 0.05 * pull, start, full(scores), temperature=0.5)
    assert (step < kl).all()


def test_kl_without_the_warm_start_is_refused():
    with pytest.raises(ValueError, match="kl_weight needs ref_scores"):
        pg_rank(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3).bool(), k=2, kl_weight=0.1)


# --- All of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RANKING_LOSSES))
def test_a_step_down_the_gradient_ranks_better(name):
    # the relevant document is last; distillation follows a teacher that has it first
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0]], requires_grad=True)
    gains = torch.tensor([[0.0, 0, 0, 1]])
    objective = partial(pg_rank, k=4, n_samples=4096) if name == "pg_rank" else bound(name, scores)
    objective(scores, gains, full(scores)).sum().backward()
    assert scores.grad[0, 3] < 0
    assert scores.grad[0, :3].sum() > 0
    assert scores.grad[0, 0] > 0


@pytest.mark.parametrize("nonsense", [99.0, -99.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(RANKING_LOSSES))
def test_nothing_behind_the_mask_reaches_a_result(name, nonsense):
    clean = torch.randn(2, 6)
    gains = torch.tensor([[2.0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 3 + [False] * 3])
    found = []
    for value in (0.0, nonsense):
        scores = clean.masked_fill(~mask, value).requires_grad_()
        teacher = {"teacher_scores": (-clean).masked_fill(~mask, value)} if name in NEED_TEACHER else {}
        loss = partial(bound(name, scores), **teacher)(scores, gains.masked_fill(~mask, value), mask)
        loss.sum().backward()
        assert (scores.grad[~mask] == 0).all()
        found += [loss.detach(), scores.grad]
    torch.testing.assert_close(found[0], found[2], atol=0, rtol=0)
    torch.testing.assert_close(found[1], found[3], atol=0, rtol=0)
    assert found[1].isfinite().all()


@pytest.mark.parametrize("name", sorted(set(RANKING_LOSSES) - {"pg_rank"}))
def test_padding_a_list_changes_nothing(name):
    scores, gains = torch.randn(1, 4), torch.tensor([[2.0, 0, 1, 0]])
    wide = torch.nn.functional.pad(scores, (0, 3), value=7.0)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    short = bound(name, scores)(scores, gains, full(scores))
    long = bound(name, wide)(wide, torch.nn.functional.pad(gains, (0, 3), value=5.0), mask)
    torch.testing.assert_close(short, long)


@pytest.mark.parametrize("name", sorted(set(RANKING_LOSSES) - {"kl_distill"}))
def test_a_list_without_a_relevant_document_and_an_empty_one_yield_zero(name):
    scores = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4])
    loss = bound(name, scores)(scores, torch.tensor([[0.0] * 4, [1.0] * 4]), mask)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(2), atol=0, rtol=0)
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("name", sorted(RANKING_LOSSES))
def test_scores_far_apart_stay_finite(name):
    scores = torch.tensor([[0.0, 4000.0, -4000.0, 300.0]], requires_grad=True)
    loss = bound(name, scores)(scores, torch.tensor([[1.0, 0, 2, 0]]), full(scores))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


def test_a_hopeless_positive_pulls_infonce_for_ever_and_leaves_pg_rank_alone():
    # the positive is 30 behind: probability e^-30 of being drawn first
    gradients = {}
    for name in ("infonce", "pg_rank"):
        scores = torch.tensor([[-30.0, 0.0, 0.1]], requires_grad=True)
        objective = partial(pg_rank, metric="precision", k=1) if name == "pg_rank" else infonce
        objective(scores, torch.tensor([[1.0, 0, 0]]), full(scores)).sum().backward()
        gradients[name] = scores.grad.abs().max().item()
    assert gradients["infonce"] == pytest.approx(1, abs=1e-3)
    assert gradients["pg_rank"] < 1e-9


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="unknown scheme 'ndcg3'; choose one of lambda_rank"):
        lambda_rank(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool(), scheme="ndcg3")


# --- Beside sentence-transformers -----------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """Looks like a cross-encoder and gives the scores it was made with."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs, **kwargs):
        return {"which": torch.tensor([[int(q), int(d)] for q, d in pairs])}

    def forward(self, features):
        return {"scores": self.scores[features["which"][:, 0], features["which"][:, 1]]}


def theirs(loss_of, scores, gains, lengths):
    docs = [[str(d) for d in range(n)] for n in lengths]
    labels = [row[:n] for row, n in zip(gains, lengths, strict=True)]
    return loss_of(Fixed(scores))([[str(q) for q in range(len(lengths))], docs], labels)


def test_values_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses", reason="needs negtune[retrieval]")
    from sentence_transformers.cross_encoder.losses.lambda_loss import (
        LambdaRankScheme,
        NDCGLoss2PPScheme,
        NDCGLoss2Scheme,
    )

    lengths = [6, 4]
    scores = torch.randn(2, 6)
    gains = torch.tensor([[3.0, 0, 1, 2, 0, 0], [0, 2, 1, 0, 0, 0]])
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    for scheme, its in (
        ("lambda_rank", LambdaRankScheme()),
        ("ndcg2", NDCGLoss2Scheme()),
        ("ndcg2++", NDCGLoss2PPScheme()),
    ):
        for k in (2, 6):
            settings = {"weighting_scheme": its, "k": k, "reduction_log": "natural"}
            mean = theirs(lambda m: losses.LambdaLoss(m, **settings), scores, gains, lengths)  # noqa: B023
            ours = lambda_rank(scores, gains, mask, scheme=scheme, k=k, gain="exponential")
            # theirs is a mean over the pairs of the batch with one document among the first k, ours a sum per query
            torch.testing.assert_close(ours.sum() / counted_pairs(scores, gains, mask, k), mean)
    ordered = gains.sort(-1, descending=True)
    by_gain = scores.gather(-1, ordered.indices)
    for ours, its in (
        (list_mle(scores, gains, mask), lambda m: losses.ListMLELoss(m, respect_input_order=False)),
        (p_list_mle(scores, gains, mask), lambda m: losses.PListMLELoss(m, respect_input_order=False)),
        (list_net(scores, gains, mask), losses.ListNetLoss),
    ):
        value = theirs(its, scores, gains, lengths)
        assert value.item() == pytest.approx(ours.mean().item(), rel=1e-5) or value.item() == pytest.approx(
            ours.sum().item() / sum(lengths), rel=1e-5
        )
    assert by_gain.shape == scores.shape


def counted_pairs(scores, gains, mask, k):
    ranks = scores.masked_fill(~mask, -torch.inf).argsort(-1, descending=True).argsort(-1)
    top = ranks < k
    higher = (gains[:, :, None] > gains[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    return (higher & (top[:, :, None] | top[:, None, :])).sum()


def test_infonce_has_the_gradient_of_cross_entropy():
    scores = torch.randn(3, 5, requires_grad=True)
    target = torch.tensor([1, 0, 4])
    gains = torch.nn.functional.one_hot(target, 5).float()
    (ours,) = torch.autograd.grad(infonce(scores, gains, full(scores)).sum(), scores)
    (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, target, reduction="sum"), scores)
    torch.testing.assert_close(ours, plain)
    assert exp(-infonce(scores, gains, full(scores))[0].item()) == pytest.approx(scores[0].softmax(-1)[1].item())
