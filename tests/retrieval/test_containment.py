"""Scores of which text is in which: truth tables, both ways, what is fitted, and intervals over passages."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.data.containment import ContainmentTask, containment_task, synthetic_passages
from negtune.metrics.ranking import micro_ap
from negtune.models.tiny_encoder import tiny_encoder
from negtune.retrieval.asymmetric import add_magnitude
from negtune.retrieval.containment import (
    Compared,
    ContainmentEvaluator,
    balanced,
    both_ways,
    containment_metrics,
    fitted,
    micro_ap_draws,
    truth,
)

TASK = ContainmentTask(
    queries={"crop-0": "b c", "superset-0": "z a b c d", "crop-1": "x"},
    documents={"p0": "a b c d", "p1": "e f"},
    kinds={"crop-0": "crop", "superset-0": "superset", "crop-1": "crop"},
    inside={"crop-0": {"p0"}, "superset-0": set(), "crop-1": set()},
    around={"crop-0": set(), "superset-0": {"p0"}, "crop-1": set()},
)
PAIRS = Compared(
    torch.tensor([[0.8, 0.1], [0.9, 0.2], [0.0, 0.3]]), torch.tensor([2.0, 5.0, 1.0]), torch.tensor([4.0, 2.0])
)


def test_truth_has_a_row_a_query():
    inside, around = truth(TASK)
    assert inside.tolist() == [[True, False], [False, False], [False, False]]
    assert around.tolist() == [[False, False], [True, False], [False, False]]


def test_scores_of_both_ways_by_hand():
    inside, around = both_ways(PAIRS, weight=0.5)
    assert inside[0, 0].item() == pytest.approx(0.8)  # 2 in 4
    assert around[0, 0].item() == pytest.approx(0.8 + 0.5 * math.log(2 / 4))
    assert inside[1, 1].item() == pytest.approx(0.2 + 0.5 * math.log(2 / 5))
    inside, around = both_ways(PAIRS, ratio=1.0)
    assert (inside > -math.inf).tolist() == [[True, True], [False, False], [True, True]]
    assert (around > -math.inf).tolist() == [[False, True], [True, True], [False, False]]
    inside, around = both_ways(PAIRS)
    assert torch.equal(inside, around)
    assert torch.equal(inside, PAIRS.cosines)


def test_a_cosine_finds_the_pair_and_takes_it_either_way():
    """In the document: the superset stands first, the crop second. The filter takes it out."""
    metrics = containment_metrics(TASK, *both_ways(PAIRS))
    assert metrics["inside/micro_ap"] == pytest.approx(1 / 2)
    assert metrics["around/micro_ap"] == 1.0
    assert metrics["inside/recall@p90"] == 0.0
    assert metrics["around/recall@p90"] == 1.0
    assert metrics["direction"] == 0.5
    metrics = containment_metrics(TASK, *both_ways(PAIRS, ratio=1.0))
    assert set(metrics.values()) == {1.0}
    wrong = containment_metrics(TASK, *reversed(both_ways(PAIRS, ratio=1.0)))
    assert wrong["inside/micro_ap"] == wrong["around/micro_ap"] == wrong["direction"] == 0.0


def test_words_are_counted_for_norms():
    pairs = PAIRS.by_words(TASK)
    assert (pairs.query_norms.tolist(), pairs.document_norms.tolist()) == ([2, 5, 1], [4, 2])
    assert pairs.cosines is PAIRS.cosines


def test_what_is_fitted_is_the_best_of_all_and_the_first_of_equals():
    settings = {"weights": (0.0, 0.1, 1.0), "ratios": (math.inf, 1.0, 0.1)}
    values = {
        (w, r): balanced(containment_metrics(TASK, *both_ways(PAIRS, weight=w, ratio=r)))
        for w in settings["weights"]
        for r in settings["ratios"]
    }
    found = fitted(TASK, PAIRS, **settings)
    assert values[found["weight"], found["ratio"]] == max(values.values()) == 1.0
    assert found == {"weight": 0.0, "ratio": 1.0}
    assert fitted(TASK, PAIRS) == {"weight": 0.0, "ratio": math.inf}


def test_draws_of_one_group_are_the_figure_itself():
    generator = torch.Generator().manual_seed(0)
    scores, true = torch.rand(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.2
    scores[0, 0], scores[1] = -math.inf, 0.5
    kept = scores > -math.inf
    whole = micro_ap(scores[kept].tolist(), true[kept].tolist(), int(true.sum()))
    assert micro_ap_draws(scores, true, ["same"] * 6, resamples=3) == pytest.approx([whole] * 3)


def test_draws_take_passages_with_all_their_queries():
    """Two passages, of two queries and of one: each draw is the first twice, the second twice, or both; by hand."""
    true = torch.eye(3, dtype=torch.bool)
    scores = torch.full((3, 3), 0.1)
    scores[0, 0], scores[1, 1], scores[2, 2], scores[0, 1] = 0.9, 0.8, 0.05, 0.95
    draws = micro_ap_draws(scores, true, ["a", "a", "b"], resamples=400, seed=1)
    of = {"a": (1 / 2 + 2 / 3) / 2, "b": 1 / 3, "both": (1 / 2 + 2 / 3 + 3 / 9) / 3}
    found, counts = np.unique(draws.round(6), return_counts=True)
    assert found == pytest.approx(sorted(of.values()), abs=1e-6)
    share = dict(zip(found.round(4), counts / 400, strict=True))
    assert share[round(of["both"], 4)] == pytest.approx(0.5, abs=0.1)
    assert np.array_equal(draws, micro_ap_draws(scores, true, ["a", "a", "b"], resamples=400, seed=1))


def test_an_encoder_is_measured_and_left_as_it_was():
    task = containment_task(synthetic_passages(8, seed=3), seed=3)
    model = add_magnitude(tiny_encoder())
    model.train()
    found = ContainmentEvaluator(task)(model)
    assert model.training
    pairs = Compared.of_model(model.eval(), task)
    assert found == containment_metrics(task, *both_ways(pairs, weight=1.0))
    assert found["direction"] > 0.5  # an untrained magnitude counts tokens
    assert ContainmentEvaluator(task, weight=0.0)(model)["direction"] == 0.5
