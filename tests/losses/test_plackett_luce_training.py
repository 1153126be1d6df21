"""What the estimators do when they train: checks P7 and P8 of the notes on PG-RANK, at their sizes."""

import pytest
import torch

from negtune.losses.ranking import infonce, list_net, pg_rank
from negtune.metrics.ranking import ideal_value, place_rewards, rank_documents

pytestmark = pytest.mark.slow

WIDTH, QUERIES, DOCUMENTS = 32, 256, 50


def ndcg(scores, gains, k=10):
    mask = torch.ones_like(scores, dtype=torch.bool)
    best = rank_documents(scores, mask, gains, "worst")[..., :k]
    return place_rewards(gains.gather(-1, best), "ndcg", ideal_value(gains, "ndcg", k)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def bilinear():
    """Hidden q^T M d; relevant are the best five of fifty, with gains 2, 2, 1, 1, 1. `(train, test)` of queries,
    documents and gains."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def made():
        q = torch.randn(QUERIES, WIDTH, generator=generator)
        d = torch.randn(QUERIES, DOCUMENTS, WIDTH, generator=generator)
        best = torch.einsum("qh,hk,qdk->qd", q, hidden, d).topk(5, -1).indices
        gains = torch.zeros(QUERIES, DOCUMENTS).scatter(-1, best, torch.tensor([2.0, 2, 1, 1, 1]).expand(QUERIES, -1))
        return q, d, gains

    return made(), made()


def learned(bilinear, objective):
    """Held-out nDCG@10 before and after 400 steps of Adam on 32 queries each."""
    (q, d, gains), (test_q, test_d, test_gains) = bilinear
    generator = torch.Generator().manual_seed(1)
    weights = (0.1 * torch.eye(WIDTH)).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=3e-3)
    mask = torch.ones(32, DOCUMENTS, dtype=torch.bool)
    with torch.no_grad():
        before = ndcg(torch.einsum("qh,hk,qdk->qd", test_q, weights, test_d), test_gains)
    for _ in range(400):
        rows = torch.randint(QUERIES, (32,), generator=generator)
        scores = torch.einsum("qh,hk,qdk->qd", q[rows], weights, d[rows])
        optimizer.zero_grad()
        objective(scores, gains[rows], mask, generator).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return before, ndcg(torch.einsum("qh,hk,qdk->qd", test_q, weights, test_d), test_gains)


def test_a_hidden_relevance_is_learned_and_reinforce_lags(bilinear):
    def estimator(name):
        return lambda s, g, m, generator: pg_rank(s, g, m, k=10, n_samples=16, estimator=name, generator=generator)

    after = {}
    for name in ("reinforce", "loo", "rtg_loo", "pl_rank", "pl_rank_loo"):
        before, after[name] = learned(bilinear, estimator(name))
        assert before < 0.25
    _, after["list_net"] = learned(bilinear, lambda s, g, m, generator: list_net(s, g, m))
    assert min(after[name] for name in ("loo", "rtg_loo", "pl_rank_loo")) >= 0.88, after
    assert after["pl_rank"] >= 0.85, after
    assert after["reinforce"] <= after["loo"] - 0.08, after
    assert 0.75 <= after["list_net"] < after["pl_rank_loo"], after


@pytest.mark.parametrize(
    ("name", "start", "low", "high"),
    [("pg", (3.0, 0.0), 0.65, 1.0), ("infonce", (3.0, 0.0), 0.0, 0.3), ("pg", (0.0, 0.0), 0.0, 0.4)],
    ids=["pg warm", "infonce warm", "pg cold"],
)
def test_mislabelled_queries_turn_infonce_and_not_the_warm_policy_gradient(name, start, low, high):
    """Of 200 queries a fifth are mislabelled, far out; only from a warm start are they hopeless, and let go."""
    generator = torch.Generator().manual_seed(0)
    features = 0.3 * torch.randn(200, 10, 2, generator=generator)
    gains = torch.zeros(200, 10)
    gains[:, 0] = 1
    features[:160, 0, 0] += 1
    features[160:, 0, 0] -= 6
    weights = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    mask = torch.ones(200, 10, dtype=torch.bool)
    for _ in range(600):
        optimizer.zero_grad()
        scores = features @ weights
        if name == "pg":
            settings = {"k": 1, "metric": "precision", "n_samples": 16, "estimator": "loo", "generator": generator}
            loss = pg_rank(scores, gains, mask, **settings)
        else:
            loss = infonce(scores, gains, mask)
        loss.mean().backward()
        optimizer.step()
    first = (features @ weights.detach()).argmax(-1)
    assert low <= (first == 0).double().mean().item() <= high
