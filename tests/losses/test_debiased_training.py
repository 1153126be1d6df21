"""Labels that lack relevant documents, on pools whose truth is known: what each remedy recovers of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from negtune.losses.debiased import CET_MODES, cet, em_relevance, em_selection, expected_gains
from negtune.losses.ranking import pg_rank, rank_net
from negtune.metrics.ranking import greedy_reward, ideal_value


def fitted(models, losses, steps, rate):
    """Adam on the sum of the losses' means."""
    optimizer = torch.optim.Adam([p for model in models for p in model.parameters()], lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        sum(loss.mean() for loss in losses(step)).backward()
        optimizer.step()


# --- Which points are relevant ----------------------------------------------------------------------------------------


def area(scores, relevant):
    """Under the ROC curve: the share of pairs of a relevant and an irrelevant point that are the right way round."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    n = int(relevant.sum())
    return float((ranks[relevant].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_em_recovers_relevance_and_selection_where_each_has_features_of_its_own(correlation):
    """20,000 points, logistic r(x) and s(z), labelled where both hold: check C2 of the notes on CET.

    A model that reads all of it and takes labels as they are is off by .17 to .18, and orders points by r s: an area of
    .79 to .80, where r itself has .864.
    """
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 20_000, 3, generator=draw)
    z = correlation * x + (1 - correlation**2) ** 0.5 * noise
    r = torch.sigmoid(x @ torch.tensor([1.5, -1.0, 0.8]) - 1.5)
    s = torch.sigmoid(z @ torch.tensor([1.2, 1.0, -0.7]) - 0.5)
    relevant = torch.rand(20_000, generator=draw) < r
    labels = relevant & (torch.rand(20_000, generator=draw) < s)
    gains, mask = labels.float()[None], torch.ones(1, 20_000, dtype=torch.bool)
    torch.manual_seed(0)
    relevance, selection, naive = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1), torch.nn.Linear(6, 1)

    def em(_):
        a, b = relevance(x).T, selection(z).T
        return em_relevance(a, gains, mask, selection=b.detach()), em_selection(b, gains, mask, scores=a.detach())

    fitted((relevance, selection), em, 400, 0.05)
    both = torch.cat([x, z], -1)
    fitted((naive,), lambda _: [F.binary_cross_entropy_with_logits(naive(both).T, gains)], 400, 0.05)
    with torch.no_grad():
        found, chosen, plain = (
            torch.sigmoid(model(features).squeeze(-1))
            for model, features in ((relevance, x), (selection, z), (naive, both))
        )
    assert (found - r).abs().mean() <= 0.02
    assert torch.corrcoef(torch.stack([chosen, s]))[0, 1] >= 0.98
    assert (plain - r).abs().mean() >= 0.1
    oracle = area(r, relevant)
    assert area(found, relevant) >= oracle - 0.005
    assert area(plain, relevant) <= oracle - 0.03


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


# --- Selection that is learned, and gains that are expected -----------------------------------------------------------


def hidden_behind(features, relevance=slice(0, 6), selection=slice(6, 12)):
    """Logits of relevance and of selection in the sum of their features."""
    return 2 * features[..., relevance].sum(-1) - 4, 2 * features[..., selection].sum(-1) - 1


def perceptron(width):
    return torch.nn.Sequential(
        torch.nn.Linear(width, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1), torch.nn.Flatten(-2)
    )


def ranked(loss, seed, observed=None):
    """True nDCG@10 of 600 other lists of 50: a ranker of all features, 1,200 steps of 16 lists.

    `loss(scores, labels, selection, relevance)` gets the true logits of both; with `observed`, the features that a
    selection model reads, selection by that model, which is trained beside the ranker by `em_selection`.
    """
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(1200, 50, 12, generator=draw)
    relevance, selection = hidden_behind(features)
    relevant, selected = (torch.rand(1200, 50, generator=draw) < x.sigmoid() for x in (relevance, selection))
    labels = (relevant & selected).float()
    torch.manual_seed(seed)
    ranker, seen = perceptron(12), features[..., observed or slice(1)]
    watcher = perceptron(seen.shape[-1])

    def losses(_):
        rows = torch.randint(0, 600, (16,), generator=draw)
        scores, known, gains = ranker(features[rows]), selection[rows], labels[rows]
        mask = torch.ones_like(gains, dtype=torch.bool)
        if observed:
            known = watcher(seen[rows])
            yield em_selection(known, gains, mask, scores=scores)
        yield loss(scores, gains, known, relevance[rows])

    fitted((ranker, watcher), losses, 1200, 3e-3)
    with torch.no_grad():
        scores, truth = ranker(features[600:]), relevant[600:].float()
    mask = torch.ones_like(truth, dtype=torch.bool)
    return float(greedy_reward(scores, truth, mask, "ndcg", ideal_value(truth, "ndcg", 10), 10).nanmean())


def everywhere(gains):
    return torch.ones_like(gains, dtype=torch.bool)


def plain(scores, labels, *_):
    return rank_net(scores, labels, everywhere(labels))


def em(scores, labels, selection, _):
    return em_relevance(scores, labels, everywhere(labels), selection=selection)


def weighed(scores, labels, selection, _, *, mode):
    known = {"propensities": selection.sigmoid()} if "ips" in mode else {"selection": selection}
    return cet(scores, labels, everywhere(labels), mode=mode, **known)


@pytest.mark.slow
def test_known_selection_is_worth_most_where_hidden_positives_are_let_go():
    labels = ranked(plain, 0)
    worth = {mode: ranked(partial(weighed, mode=mode), 0) - labels for mode in CET_MODES}
    worth["em"] = ranked(em, 0) - labels
    print("labels", labels, worth)
    assert labels < 0.75
    assert 0 < worth["official"] < 0.04
    assert min(worth["ips"], worth["ratio"]) > 0.04
    assert worth["posterior"] > max(worth["ips"], worth["ratio"]) + 0.03
    assert worth["ips_posterior"] > worth["posterior"] + 0.02
    assert worth["em"] > worth["posterior"] + 0.02


@pytest.mark.slow
def test_selection_is_learned_beside_relevance_where_it_reads_what_relevance_does_not_depend_on():
    labels, apart = ranked(plain, 0), ranked(em, 0, observed=slice(6, 12))
    together = ranked(em, 0, observed=slice(0, 12))
    print(labels, apart, together)
    assert apart > labels + 0.12
    assert apart > together + 0.02


@pytest.mark.slow
def test_expected_gains_help_where_relevance_is_calibrated_and_hurt_where_scores_confirm_themselves():
    def reward(scores, labels, selection, relevance, source):
        nobody = torch.zeros_like(labels, dtype=torch.bool)
        opinion = {"own": scores, "calibrated": relevance}.get(source)
        gains = labels if opinion is None else expected_gains(labels, nobody, opinion, selection)
        return pg_rank(scores, gains, everywhere(labels))

    found = {source: ranked(partial(reward, source=source), 0) for source in ("labels", "own", "calibrated")}
    print(found)
    assert found["own"] < found["labels"] - 0.05
    assert found["calibrated"] > found["labels"] + 0.12
