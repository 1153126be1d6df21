"""Training against a frozen index: the lists of a step, what the gradient reaches, and what does not fit."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.losses.hard_negatives import adore
from negtune.losses.ranking import infonce
from negtune.retrieval import query_side
from negtune.retrieval.index import ExactIndex, FaissIndex
from negtune.retrieval.losses import Lists, NonFiniteScoresError
from negtune.retrieval.query_side import (
    LastLists,
    QueryCollator,
    QueryLoss,
    check_index,
    check_lengths,
    differing_vectors,
    lists_of,
)
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder, static_encoder

TEXTS = [f"w{i} w{(7 * i) % 200} w{(11 * i + 3) % 200}" for i in range(40)]
QUERIES = ["w1 w2", "w3 w30 w7", "w5"]
JUDGED = [{0: 2.0, 7: 1.0}, {39: 1.0}, {5: 1.0, 11: 3.0, 20: 0.0}]
"""Gains by position; 0: never to be found."""


def index_of(model, similarity="cosine", texts=TEXTS):
    vectors = torch.from_numpy(model.encode(texts))
    return ExactIndex(vectors, [f"d{i}" for i in range(len(texts))], similarity)


def batch_of(model, judged=JUDGED, queries=QUERIES):
    rows = [
        {"row": 10 + i, "query": query, "documents": list(gains), "gains": list(gains.values())}
        for i, (query, gains) in enumerate(zip(queries, judged, strict=True))
    ]
    batch = QueryCollator(model.preprocess, "bi_encoder")(rows)
    return batch["features"], Lists(**batch["lists"], rows=batch["texts"])


def brute_force(model, texts=TEXTS, depth=5, similarity="cosine", judged=JUDGED):
    """Positions by falling score, of each query, in numpy and float64."""
    queries, documents = (model.encode(side).astype(np.float64) for side in (QUERIES, texts))
    if similarity == "cosine":
        queries, documents = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, documents))
    scores = queries @ documents.T
    for row, gains in zip(scores, judged, strict=True):
        row[[place for place, gain in gains.items() if gain == 0]] = -np.inf
    return [np.argsort(-row, kind="stable")[:depth].tolist() for row in scores], scores


# --- The lists of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_search_is_the_brute_force_one_and_leaves_excluded_documents_out(similarity):
    model = static_encoder()
    model.similarity_fn_name = similarity
    loss = QueryLoss(model, index_of(model, similarity), depth=40)
    features, judged = batch_of(model)
    found = loss.search(features[0], judged)
    expected, _ = brute_force(model, depth=40, similarity=similarity)
    assert found[:2].tolist() == expected[:2]
    assert found[2].tolist() == [*expected[2][:39], -1]  # 39 are left, and 20 is not among them
    assert 20 not in found[2].tolist()


def test_the_search_follows_the_model():
    model = static_encoder()
    loss = QueryLoss(model, index_of(model), depth=5)
    features, judged = batch_of(model)
    before = loss.search(features[0], judged)
    with torch.no_grad():
        model[0].embedding.weight[2] += 5 * torch.randn(16)
    after = loss.search(features[0], judged)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert after.tolist() == brute_force_with(model, loss)


def brute_force_with(model, loss):
    documents = torch.nn.functional.normalize(loss.index.embeddings.double(), dim=1)
    scores = torch.from_numpy(model.encode(QUERIES)).double() @ documents.T
    scores[2, 20] = -torch.inf
    return scores.topk(5).indices.tolist()


def test_missed_positives_stand_behind_once_and_no_positive_is_a_negative():
    judged = Lists(
        gains=torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 9.0, 0.0]]),
        mask=torch.tensor([[True, True, False], [True, True, True], [True, False, False]]),
        documents=torch.tensor([[4, 6, 99], [8, 3, 5], [1, 7, 99]]),
    )
    found = torch.tensor([[4, 5, 7], [1, 2, 4], [7, -1, -1]])
    lists = lists_of(found, judged)
    # query 0: 4 is found, so 6 is left out; query 1: both are missed, 3 before 8; query 2: what is masked (7) is none
    assert lists.documents.masked_fill(~lists.mask, -1).tolist() == [
        [4, 5, 7, -1, -1],
        [1, 2, 4, 3, 8],
        [7, -1, -1, 1, -1],
    ]
    assert lists.gains.masked_fill(~lists.mask, -1.0).tolist() == [
        [2.0, 0.0, 0.0, -1.0, -1.0],
        [0.0, 0.0, 0.0, 3.0, 1.0],
        [0.0, -1.0, -1.0, 1.0, -1.0],
    ]
    assert lists.ideal.tolist() == [[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_query_that_is_masked_has_an_empty_list():
    judged = Lists(torch.ones(2, 1), torch.tensor([[True], [False]]), torch.tensor([[3], [3]]))
    lists = lists_of(torch.tensor([[0, 3], [0, 3]]), judged)
    assert lists.mask.tolist() == [[True, True], [False, False]]


# --- The loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("metric", "rank_by"), [("mrr", "list"), ("mrr", "score"), ("ndcg", "list")])
def test_the_loss_is_adore_of_the_scores_of_brute_force(similarity, metric, rank_by):
    model = static_encoder()
    model.similarity_fn_name = similarity
    loss = QueryLoss(model, index_of(model, similarity), depth=5, metric=metric, rank_by=rank_by, scale=3.0)
    value = loss(*batch_of(model))
    expected, scores = brute_force(model, similarity=similarity)
    wanted = []
    for list_, row, gains in zip(expected, scores, JUDGED, strict=True):
        positives = {place: gain for place, gain in gains.items() if gain > 0}
        list_ = list_ if set(list_) & set(positives) else [*list_, *sorted(positives)]
        grades = torch.tensor([[positives.get(place, 0.0) for place in list_]], dtype=torch.float64)
        ranks = torch.arange(1, len(list_) + 1)[None] if rank_by == "list" else None
        settings = {"ranks": ranks, "metric": metric, "metric_cut": 5}
        ideal = torch.tensor([list(positives.values())], dtype=torch.float64)
        wanted.append(adore(3 * torch.tensor(row[list_])[None], grades, grades >= 0, ideal_gains=ideal, **settings))
    assert value.item() == pytest.approx(torch.cat(wanted).mean().item(), abs=1e-5)
    assert value.item() > 0


def test_missed_positives_are_weighed_by_their_place_in_the_list_or_by_their_score():
    """The two documents that a query scores lowest, in ascending positions: places 6 and 7 whatever they score."""
    model = static_encoder()
    index = index_of(model)
    _, scores = brute_force(model, judged=[{}] * 3)
    judged = [dict.fromkeys(sorted(np.argsort(row)[:2].tolist()), 1.0) for row in scores]
    values = {}
    for rank_by in ("list", "score"):
        loss = QueryLoss(model, index, depth=5, metric_cut=7, rank_by=rank_by, scale=3.0)
        values[rank_by] = loss(*batch_of(model, judged)).item()
    expected = []
    for row, positives in zip(scores, judged, strict=True):
        list_ = [*np.argsort(-row)[:5].tolist(), *positives]
        pairs = [
            abs(1 / (i + 1) - 1 / (j + 1)) * np.logaddexp(0, 3 * (row[list_[j]] - row[list_[i]]))
            for i in (5, 6)
            for j in range(5)
        ]
        expected.append(np.mean(pairs))
    assert values["list"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert abs(values["score"] - values["list"]) > 1e-4


def test_only_the_query_side_has_a_gradient_and_the_index_stays_as_it_is(tmp_path):
    model = bi_encoder(tmp_path / "model").double()
    index = index_of(model)
    assert index.embeddings.dtype == torch.float64
    index.embeddings.requires_grad_()  # even then
    before = index.fingerprint()
    loss = QueryLoss(model, index, depth=5)
    features, judged = batch_of(model)
    value = loss(features, judged)
    value.backward()
    assert index.embeddings.grad is None
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    assert index.fingerprint() == before
    # the same loss with the query's vector as the only thing that moves, by differences
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("query.weight"))
    place = int(parameter.grad.abs().argmax())
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[place] += sign * step
            values.append(float(loss(features, judged)))
            parameter.view(-1)[place] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-4), name


def test_nonsense_where_nothing_is_judged_changes_nothing():
    model = static_encoder()
    loss = QueryLoss(model, index_of(model), depth=5)
    features, judged = batch_of(model)
    value = loss(features, judged)
    gains = judged.gains.masked_fill(~judged.mask, 99.0)
    documents = judged.documents.masked_fill(~judged.mask, 3)
    assert loss(features, Lists(gains, judged.mask, documents)).item() == value.item()


def test_the_search_has_no_dropout_and_the_scores_have(tmp_path):
    model = bi_encoder(tmp_path / "model", dropout=0.5)
    loss = QueryLoss(model, index_of(model), depth=10, loss_type="infonce")
    features, judged = batch_of(model)
    model.train()
    found = [loss.search(features[0], judged) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert model.training
    assert loss(features, judged).item() != loss(features, judged).item()
    model.eval()
    assert torch.equal(found[0], loss.search(features[0], judged))
    assert not model.training


@pytest.mark.parametrize("loss_type", ["pg_rank", "lambda_rank", "infonce", "list_mle", "list_net", "rank_net"])
def test_objectives_over_lists_train_queries_too(loss_type):
    model = static_encoder()
    settings = {"k": 3} if loss_type in ("pg_rank", "lambda_rank", "list_mle") else {}
    loss = QueryLoss(model, index_of(model), loss_type, depth=5, **settings)
    loss(*batch_of(model)).backward()
    assert model[0].embedding.weight.grad.abs().sum() > 0
    assert ("reward/expected" in loss.take_metrics()) == (loss_type == "pg_rank")


def test_an_objective_of_ones_own_gets_what_was_found():
    model, seen = static_encoder(), []

    def objective(scores, gains, mask):
        seen.append((scores.shape, gains))
        return infonce(scores, gains, mask)

    loss = QueryLoss(model, index_of(model), depth=5, objective=objective)
    value = loss(*batch_of(model))
    assert value.item() == pytest.approx(QueryLoss(model, index_of(model), "infonce", depth=5)(*batch_of(model)).item())
    assert {0.0, 1.0, 2.0} == set(seen[0][1].unique().tolist())


def test_a_memory_mapped_index_in_half_precision_is_searched_and_read(tmp_path):
    model = static_encoder()
    vectors = model.encode(TEXTS).astype(np.float16)
    np.save(tmp_path / "corpus.npy", vectors)
    index = ExactIndex(np.load(tmp_path / "corpus.npy", mmap_mode="r"), [str(i) for i in range(40)], "cosine")
    exact = ExactIndex(vectors.astype(np.float32), [str(i) for i in range(40)], "cosine")
    values = [QueryLoss(model, one, depth=5)(*batch_of(model)).item() for one in (index, exact)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_a_model_that_diverged_is_told_of_before_the_search():
    model = static_encoder()
    loss = QueryLoss(model, index_of(model), depth=5)
    with torch.no_grad():
        model[0].embedding.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteScoresError, match="vector of a query is not finite"):
        loss(*batch_of(model))


def test_it_trains_in_the_stock_trainer(tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = static_encoder()
    index = index_of(model)
    data = Dataset.from_list([{"query": f"w{i}", "label": [i, -1]} for i in range(40)])
    loss = QueryLoss(model, index, depth=10)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=20, learning_rate=0.05, use_cpu=True, report_to="none", save_strategy="no",
        per_device_train_batch_size=20, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    features, labels = [model.preprocess(data["query"])], torch.tensor(list(data["label"]))
    before = loss(features, labels).item()
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
    assert loss(features, labels).item() < 0.5 * before


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "label must be positions"),
        (torch.zeros(3, 2), "label must be positions"),
        (torch.tensor([[1], [-1], [0]]), r"query 1 of the batch \(from 0\) has no positive"),
    ],
)
def test_labels_that_are_no_positions_are_refused(labels, message):
    model = static_encoder()
    with pytest.raises(ValueError, match=message):
        QueryLoss(model, index_of(model), depth=5)([model.preprocess(QUERIES)], labels)


def test_vectors_as_encode_gives_them_can_be_trained_against():
    """Tensors of inference mode cannot be kept for a backward pass; copies of them can."""
    model = static_encoder()
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    assert vectors.is_inference()
    loss = QueryLoss(model, ExactIndex(vectors, [str(i) for i in range(40)], "cosine"), depth=40)
    loss(*batch_of(model)).backward()
    assert model[0].embedding.weight.grad.abs().sum() > 0


# --- What is watched --------------------------------------------------------------------------------------------------


def test_what_the_search_finds_is_counted():
    """Of the first query a positive is found at some place r; of the others what is missed is known by brute force."""
    model = static_encoder()
    loss = QueryLoss(model, index_of(model), depth=5)
    loss(*batch_of(model))
    found, _ = brute_force(model)
    positives = [{place for place, gain in gains.items() if gain > 0} for gains in JUDGED]
    reached = [[place in wanted for place in row] for row, wanted in zip(found, positives, strict=True)]
    first = [1 / (row.index(True) + 1) if any(row) else 0.0 for row in reached]
    metrics = {name: total / count for name, (total, count) in loss.take_metrics().items() if count}
    assert metrics["search/mrr"] == pytest.approx(sum(first) / 3)
    assert metrics["search/missed"] == pytest.approx(1 - sum(map(sum, reached)) / 5)
    assert metrics["search/appended"] == pytest.approx(sum(not any(row) for row in reached) / 3)
    assert 0 < metrics["search/missed"] < 1
    assert "search/changed" not in metrics  # seen once


def test_what_has_changed_since_a_query_was_last_seen(monkeypatch, tmp_path):
    lists = LastLists()
    assert lists.changed([5, 6], np.array([[1, 2, 3, 4], [5, 6, -1, -1]])) == []
    assert lists.changed([6, 7], np.array([[6, 8, 9, 10], [1, 2, 3, 4]])) == [0.75]
    assert lists.changed([5], np.array([[4, 3, 2, 1]])) == [0.0]
    lists.save(tmp_path / "seen.safetensors")
    again = LastLists()
    again.load(tmp_path / "seen.safetensors")
    assert {row: places.tolist() for row, places in again.lists.items()} == {
        5: [4, 3, 2, 1],
        6: [6, 8, 9, 10],
        7: [1, 2, 3, 4],
    }
    monkeypatch.setattr(query_side, "WATCHED", 3)
    assert again.changed([8, 5], np.array([[1, 2], [4, 9]])) == [0.5]
    assert set(again.lists) == {5, 6, 7}  # bounded, and those that are in stay
    empty = LastLists()
    empty.save(tmp_path / "none.safetensors")
    again.load(tmp_path / "none.safetensors")
    assert again.lists == {}


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    model = static_encoder()
    index = index_of(model)
    for depth in (0, 41):
        with pytest.raises(ValueError, match=f"depth={depth} and 40 documents"):
            QueryLoss(model, index, depth=depth)
    with pytest.raises(ValueError, match="the index is 3 wide and the model's vectors 16"):
        QueryLoss(model, ExactIndex(torch.randn(9, 3), list("abcdefghi"), "cosine"), depth=5)
    with pytest.raises(ValueError, match="the model compares by cosine and the index by dot; make it with ExactIndex"):
        QueryLoss(model, index_of(model, "dot"), depth=5)
    with pytest.raises(ValueError, match="searched with a bi-encoder, got CrossEncoder"):
        QueryLoss(cross_encoder(tmp_path / "model"), index, depth=5)
    pytest.importorskip("faiss")
    faiss = FaissIndex(index.embeddings, index.ids, "cosine")
    with pytest.raises(ValueError, match="index must be an ExactIndex, whose vectors can be read, got FaissIndex"):
        check_index(model, faiss, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_cut": 0}, "metric_cut counts places and must be at least 1, got 0"),
        ({"rank_by": "place"}, "rank_by must be one of list, score"),
        ({"metric": "map"}, "unknown metric 'map'"),
        ({"loss_type": "margin_mse"}, "unknown loss_type 'margin_mse'; choose one of adore, infonce"),
        ({"loss_type": "npo"}, "unknown loss_type 'npo'"),
        ({"k": 3}, "adore has no hyper-parameter 'k'"),
    ],
)
def test_settings_are_refused(settings, message):
    model = static_encoder()
    with pytest.raises(ValueError, match=message):
        QueryLoss(model, index_of(model), depth=5, **settings)


def test_one_side_normalised_and_the_other_not_is_refused_under_dot():
    model = static_encoder()
    model.similarity_fn_name = "dot"
    plain = index_of(model, "dot")
    unit = ExactIndex(torch.nn.functional.normalize(plain.embeddings, dim=1), plain.ids, "dot")
    check_lengths(model, plain, QUERIES)
    with pytest.raises(ValueError, match=r"the index's vectors have length 1 and the model's .* compared by dot"):
        check_lengths(model, unit, QUERIES)
    from sentence_transformers.base.modules import Normalize

    model.append(Normalize())
    check_lengths(model, unit, QUERIES)
    with pytest.raises(ValueError, match="the model's vectors have length 1 and the index's"):
        check_lengths(model, plain, QUERIES)
    model.similarity_fn_name = "cosine"
    check_lengths(model, ExactIndex(plain.embeddings, plain.ids, "cosine"), QUERIES)


def test_vectors_of_another_encoder_or_in_another_order_are_told_apart():
    model = static_encoder()
    corpus = {f"d{i}": text for i, text in enumerate(TEXTS)}
    index = index_of(model)
    assert differing_vectors(model, index, corpus, 8) == []
    turned = ExactIndex(index.embeddings.roll(1, 0), index.ids, "cosine")
    assert differing_vectors(model, turned, corpus, 8) == [f"d{i}" for i in range(8)]
    assert differing_vectors(model, index, {"other": "w1"}, 8) == []


def test_the_card_says_what_was_searched():
    model = static_encoder()
    loss = QueryLoss(model, index_of(model), depth=5)
    assert loss.get_config_dict()["depth"] == 5
    assert loss.get_config_dict()["documents"] == 40
    assert "2104.08051" in loss.citation
    assert "2310.04407" in QueryLoss(model, index_of(model), "pg_rank", depth=5).citation
    assert math.isfinite(loss.scale)
