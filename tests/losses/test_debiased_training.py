"""Labels that lack relevant documents, on pools whose truth is known: what each remedy recovers of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from negtune.losses.debiased import cet, em_relevance, em_selection
from negtune.metrics.ranking import greedy_reward, ideal_value


def fitted(models, losses, steps, rate):
    """Adam on the sum of the losses' means."""
    optimizer = torch.optim.Adam([p for model in models for p in model.parameters()], lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss.mean() for loss in losses(step)).backward()
        optimizer.step()


# --- Which points are relevant ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_em_recovers_relevance_and_selection_where_each_has_a_feature_of_its_own(correlation):
    """20,000 points, logistic r(x) and s(z), labelled where both hold. Naively r is underestimated by a sixth."""
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 20_000, generator=draw)
    z = correlation * x + (1 - correlation**2) ** 0.5 * noise
    r, s = torch.sigmoid(0.5 + 1.5 * x), torch.sigmoid(0.3 + 2 * z)
    labels = (torch.rand(20_000, generator=draw) < r) & (torch.rand(20_000, generator=draw) < s)
    gains, mask = labels.float()[None], torch.ones(1, 20_000, dtype=torch.bool)

    def models():
        torch.manual_seed(0)
        return torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    relevance, selection = models()

    def em(_):
        a, b = relevance(x[:, None]).T, selection(z[:, None]).T
        return em_relevance(a, gains, mask, selection=b.detach()), em_selection(b, gains, mask, scores=a.detach())

    fitted((relevance, selection), em, 400, 0.05)
    naive, _ = models()
    fitted((naive,), lambda _: [F.binary_cross_entropy_with_logits(naive(x[:, None]).T, gains)], 400, 0.05)
    with torch.no_grad():
        found, chosen, plain = (
            torch.sigmoid(model(feature[:, None]).squeeze(-1))
            for model, feature in ((relevance, x), (selection, z), (naive, x))
        )
    assert (found - r).abs().mean() <= 0.02
    assert torch.corrcoef(torch.stack([chosen, s]))[0, 1] >= 0.98
    assert (plain - r).abs().mean() >= 0.1


# --- Which documents come first ---------------------------------------------------------------------------------------


def pool(queries=600, documents=50, seed=0):
    """Features of relevance and of selection side by side, the truth, the labels, the probability of selection."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(queries, documents, 12, generator=draw)
    weights = torch.randn(2, 6, generator=draw)
    weights = weights / weights.norm(dim=1, keepdim=True)
    r = torch.sigmoid(2 * features[..., :6] @ weights[0] - 2)
    s = torch.sigmoid(2.5 * features[..., 6:] @ weights[1] - 0.5)
    relevant = torch.rand(queries, documents, generator=draw) < r
    selected = torch.rand(queries, documents, generator=draw) < s
    return features, relevant.float(), (relevant & selected).float(), s


def ndcg_of(objective, data, seed=0):
    """nDCG@10 of the true relevance on 200 held-out queries: an MLP that sees all features, on the labels of 400."""
    features, truth, labels, s = data
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def losses(_):
        rows = torch.randint(0, 400, (64,))
        scores = network(features[rows]).squeeze(-1)
        yield objective(scores, labels[rows], torch.ones_like(scores, dtype=torch.bool), s[rows])

    fitted((network,), losses, 300, 3e-3)
    with torch.no_grad():
        scores = network(features[400:]).squeeze(-1)
    gains, mask = truth[400:], torch.ones_like(scores, dtype=torch.bool)
    return float(greedy_reward(scores, gains, mask, "ndcg", ideal_value(gains, "ndcg", 10), 10).nanmean())


def uniform(scores, gains, mask, s):
    return cet(scores, gains, mask, selection=torch.zeros_like(scores), normalize=True)


def known(scores, gains, mask, s):
    return cet(scores, gains, mask, mode="ips_posterior", propensities=s)


def posterior(scores, gains, mask, s):
    return cet(scores, gains, mask, mode="posterior", selection=s.logit())


def inverse(scores, gains, mask, s):
    return cet(scores, gains, mask, mode="ips", propensities=s)


def test_known_propensities_find_what_the_labels_hide():
    data = pool()
    plain, positives, negatives, both = (ndcg_of(f, data) for f in (uniform, inverse, posterior, known))
    # .573, .654, .643, .708; trained on the truth .73
    assert positives > plain + 0.05
    assert negatives > plain + 0.05
    assert both > max(positives, negatives) + 0.03
