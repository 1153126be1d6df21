"""What weighs the documents of a step, by itself; within training: test_coupled.py."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.trainers.coupled_config import CoupledConfig
from negtune.trainers.coupled_weights import add_weights, normalize, opinions


def test_a_list_without_a_negative_is_no_part_of_the_mean_over_pairs():
    """Mean over lists that have pairs, of the mean over their pairs of the product of both weights: 1 afterwards."""
    gains = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])  # the second list has positives only
    weights = torch.tensor([[2.0, 3.0, 5.0], [7.0, 7.0, 1e6]])
    opinion = {"weights": weights.clone()}
    sums = []
    normalize([({"gains": gains, "mask": mask}, opinion)], lambda total: sums.append(total) or total)
    assert torch.stack(sums).tolist() == [[2 * (3 + 5) / 2, 1.0]]
    pairs = opinion["weights"][0, 0] * opinion["weights"][0, 1:]
    assert pairs.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(opinion["weights"], weights / 8**0.5)


def test_in_warm_up_labels_are_taken_as_they_are_and_the_level_follows_them(tmp_path):
    gains = torch.tensor([[1.0, 0.0, 0.0]])
    judged = torch.tensor([[False, True, False]])
    lists = {"gains": gains, "mask": torch.ones_like(gains, dtype=torch.bool), "documents": torch.arange(3)[None]}
    batch = {"lists": lists, "provenance": {"judged": judged}}
    scores, selection = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.5, -2.0]])
    args = CoupledConfig(output_dir=str(tmp_path), use_cpu=True, mode="em")
    settings = {"level": torch.tensor(-0.25), "trained": True}
    warm = opinions(batch, scores, selection, args, uniform=True, **settings)
    assert warm["relevance"]["targets"].tolist() == gains.tolist()
    assert warm["selection"]["targets"].tolist() == [[1.0, 1.0, 0.0]]
    r = torch.sigmoid(scores.double() - 0.25)
    torch.testing.assert_close(warm["level"], torch.stack([(gains - r).sum(), (r * (1 - r)).sum()]), rtol=0, atol=1e-6)
    # afterwards the document that nobody judged is relevant and was not selected, with r (1 - s) / (1 - r s)
    after = opinions(batch, scores, selection, args, uniform=False, **settings)
    s = torch.sigmoid(selection.double())
    hoped = (r * (1 - s) / (1 - r * s))[0, 2].item()
    assert after["relevance"]["targets"][0].tolist() == pytest.approx([1.0, 0.0, hoped], abs=1e-6)
    assert after["level"][0].item() == pytest.approx((1 + hoped - r.sum()).item(), abs=1e-6)


def test_the_hidden_are_looked_for_among_what_nobody_judged():
    seen = {}
    sums = type("Sums", (), {"add": lambda self, name, values: seen.update({name: values.tolist()})})()
    gains = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    targets = torch.tensor([[1.0, 0.0, 0.25, 0.75]])
    add_weights(
        sums, {"gains": gains, "mask": mask, "more": {"targets": targets}}, torch.tensor([[True, True, False, False]])
    )
    assert seen == {"hidden/probability": [0.25]}
