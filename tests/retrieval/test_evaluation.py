"""Search and reranking by a task's judgements."""

import json

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.data.retrieval import RetrievalTask, synthetic_retrieval
from negtune.metrics.runs import evaluate_run
from negtune.retrieval.evaluation import RetrievalEvaluator, evaluate_reranking, evaluate_retrieval, scorer
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder, multi_vector, static_encoder

TASK = RetrievalTask(
    corpus={"a": "w1 w2", "b": "w3 w4", "c": "w5 w6"},
    queries={"q1": "w1 w2", "q2": "w5 w6"},
    qrels={"q1": {"a": 2.0}, "q2": {"c": 1.0, "a": 1.0}},
)


def test_a_query_with_the_words_of_its_document_finds_it_first():
    found = evaluate_retrieval(static_encoder(), TASK, metrics=("mrr@10", "recall@1"))
    assert found.per_query["mrr@10"] == {"q1": 1.0, "q2": 1.0}
    assert found.per_query["recall@1"] == {"q1": 1.0, "q2": 0.5}


def test_reranking_leaves_lost_what_the_first_stage_lost():
    """q2's document c is not in the run: its reciprocal rank is that of a, behind or before b."""
    run = {"q1": {"b": 2.0, "a": 1.0}, "q2": {"b": 2.0, "a": 1.0}}
    found = evaluate_reranking(static_encoder(), TASK, run, metrics=("mrr@10", "recall@10"))
    assert found.per_query["mrr@10"]["q1"] == 1.0
    assert found.per_query["recall@10"]["q2"] == 0.5
    shallow = evaluate_reranking(static_encoder(), TASK, run, metrics=("recall@10",), depth=1)
    assert shallow.means["recall@10"] == 0.0


@pytest.mark.parametrize("build", [bi_encoder, cross_encoder, multi_vector])
def test_pairs_are_scored_as_the_model_scores_them(tmp_path, build):
    model = build(tmp_path / "model").eval()
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), ("w1 w2", "w5 w6 w7"), ("w4", "w3")]
    found = scorer(model)(pairs)
    for (query, document), value in zip(pairs, found, strict=True):
        if build is cross_encoder:
            expected = model.predict([(query, document)], activation_fn=torch.nn.Identity())[0]
        else:
            expected = model.similarity(model.encode_query([query]), model.encode_document([document]))[0, 0]
        assert value == pytest.approx(float(expected), abs=1e-5)


def test_the_evaluator_is_one_for_the_host_and_keeps_values_per_query(tmp_path):
    from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator

    evaluator = RetrievalEvaluator(TASK, metrics=("ndcg@10", "mrr@10"))
    assert isinstance(evaluator, BaseEvaluator)
    found = SequentialEvaluator([evaluator])(static_encoder(), output_path=str(tmp_path), steps=7)
    assert evaluator.primary_metric == "ndcg@10"
    kept = json.loads((tmp_path / "retrieval_7.json").read_text())
    assert kept["mrr@10"] == {"q1": 1.0, "q2": 1.0}
    assert found["mrr@10"] == 1.0


def test_conventions_are_handed_on():
    task = synthetic_retrieval(n_topics=2)
    model = static_encoder()
    linear = evaluate_retrieval(model, task, metrics=("ndcg@10",))
    exponential = evaluate_retrieval(model, task, metrics=("ndcg@10",), gain="exponential")
    assert linear.means != exponential.means
    with pytest.raises(ValueError, match="gain"):
        evaluate_run({"q": {"d": 1.0}}, {"q": {"d": 1.0}}, ("ndcg@10",), gain="square")
