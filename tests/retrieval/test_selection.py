"""Models of selection by provenance: features of mined lists, standardisation, what is saved, batches."""

from __future__ import annotations

from math import log2

import pytest
import torch

from negtune.data.retrieval import RetrievalTask
from negtune.retrieval.collate import CandidateCollator
from negtune.retrieval.mining import mine
from negtune.retrieval.retrievers import RunRetriever
from negtune.retrieval.selection import BIAS, FeatureSelection, ProvenanceCollator, provenance, provenance_names

CORPUS = {name: f"text of {name}" for name in "abcdefghij"}
TASK = RetrievalTask(CORPUS, {"1": "first", "2": "second"}, {"1": {"a": 2.0, "b": 0.0, "j": 1.0}, "2": {"c": 1.0}})
WORDS = {"1": {"b": 9.0, "a": 8.0, "d": 7.0, "e": 5.0}, "2": {"d": 3.0}}
DENSE = {"1": {"d": 0.9, "g": 0.8, "h": 0.5}, "2": {"c": 0.5, "a": 0.4}}


def test_provenance_of_mined_lists_by_hand():
    lists = mine(
        TASK, [RunRetriever(WORDS, "words"), RunRetriever(DENSE, "dense")], n_documents=7, positives="guaranteed"
    ).lists
    names = provenance_names(lists)
    assert names == [f"{r}/{w}" for r in ("dense", "words") for w in ("found", "rank", "score")] + ["added"]
    first = dict(zip(lists[0].document_ids, provenance(lists)[0], strict=True))
    # scores of the list: words 9 8 7 5, dense .9 .8 .5
    assert first["a"] == pytest.approx([0, 0, 0, 1, 1 / log2(3), 3 / 4, 0])
    assert first["d"] == pytest.approx([1, 1, 1, 1, 1 / log2(4), 2 / 4, 0])
    assert first["h"] == pytest.approx([1, 1 / log2(4), 0, 0, 0, 0, 0])
    assert first["j"] == [0, 0, 0, 0, 0, 0, 1]
    second = dict(zip(lists[1].document_ids, provenance(lists)[1], strict=True))
    assert second["d"] == pytest.approx([0, 0, 0, 1, 1, 0, 0])  # the only score of its retriever has no range


def test_features_are_standardised_and_constant_ones_count_nothing():
    features = torch.tensor([[1.0, 100.0, 7.0], [3.0, 300.0, 7.0]])
    model = FeatureSelection(3).standardise(features)
    with torch.no_grad():
        model.last.weight.copy_(torch.tensor([[1.0, 10.0, 1e6]]))
    found = model(model.preprocess(features.tolist()))["scores"]
    # (1 - 2)/1 and (100 - 200)/100
    assert found.flatten().tolist() == pytest.approx([BIAS - 11, BIAS + 11])
    assert model(model.preprocess([[2.0, 200.0, -1e6]]))["scores"].item() == pytest.approx(BIAS)


def test_at_the_start_all_are_selected_alike_and_draws_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, same, other = (FeatureSelection(2, hidden=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert model(model.preprocess([[1.0, 2.0], [-3.0, 0.5]]))["scores"].flatten().tolist() == [BIAS, BIAS]
    assert torch.equal(model.first[0].weight, same.first[0].weight)
    assert not torch.equal(model.first[0].weight, other.first[0].weight)


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_saved_model_scores_the_same(tmp_path, hidden):
    model = FeatureSelection(2, hidden).standardise(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
    torch.nn.init.normal_(model.last.weight)
    model.save_pretrained(tmp_path / "folder")
    again, features = FeatureSelection.from_pretrained(tmp_path / "folder"), model.preprocess([[3.0, 2.0], [1.0, 0.0]])
    assert torch.equal(again(features)["scores"], model(features)["scores"])
    assert model(features)["scores"].std() > 0


def test_batches_have_what_decides_selection_at_the_right_documents():
    rows = [
        {"query": "p", "documents": ["x"], "gains": [1.0], "judged": [True], "selection_features": [[5.0]]},
        {"query": "q", "documents": ["y", "x"], "gains": [0.0, 1.0], "judged": [False, True]},
    ]
    rows[1]["selection_features"] = [[6.0], [7.0]]
    plain = CandidateCollator(lambda texts, **_: {"n": torch.arange(len(texts))}, "bi_encoder")
    batch = ProvenanceCollator(plain, FeatureSelection(1))(rows)
    found, mask = batch["provenance"], batch["lists"]["mask"]
    assert found["judged"].tolist() == [[True, False], [False, True]]
    values = found["features"][0]["selection_features"][found["documents"]].squeeze(-1)
    assert values[mask].tolist() == [5, 6, 7]
    assert batch["lists"]["documents"].tolist() == [[0, 0], [1, 0]], "of texts, of which x is there once"
    chances = [{**row, "selection_propensity": [0.5] * len(row["documents"])} for row in rows]
    assert ProvenanceCollator(plain, None)(chances)["provenance"]["propensities"].tolist() == [[0.5, 1], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureSelection(0), "at least one feature"),
        (lambda: FeatureSelection(2).preprocess([[1.0]]), "reads 2 features a document, got 1"),
        (lambda: FeatureSelection(2).standardise(torch.zeros(3, 1)), "reads 2 features a document, got 1"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
