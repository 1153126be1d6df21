"""QueryEncoderTrainer: direction, what stays as it is, invariances, resuming, what is saved, what is refused."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from datasets import IterableDataset
from peft import LoraConfig

from negtune.data.positives import task_rows
from negtune.data.retrieval import split_queries, synthetic_retrieval
from negtune.losses.ranking import infonce
from negtune.models.tiny_encoder import save_tiny_encoder, tiny_encoder
from negtune.retrieval.encoder import encode
from negtune.retrieval.evaluation import RetrievalEvaluator, evaluate_retrieval
from negtune.retrieval.index import ExactIndex
from negtune.retrieval.losses import RankingWarning
from negtune.retrieval.mining import mine, to_rows
from negtune.retrieval.retrievers import DenseRetriever
from negtune.trainers.query_encoder import IndexChangedError, QueryEncoderConfig, QueryEncoderTrainer
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.launching import run_script
from tests.retrieval.tiny_rankers import cross_encoder, needs_adapters

ROOT = str(Path(__file__).resolve().parents[2])
FEW = synthetic_retrieval(n_topics=4)
FIXED = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1}


def index_of(model, task=FEW):
    return ExactIndex(encode(model, list(task.corpus.values()), side="document"), list(task.corpus), "cosine")


def config(folder, **settings):
    fixed = {**FIXED, "per_device_train_batch_size": 8, "depth": 10, "learning_rate": 1e-3, "max_steps": 2}
    return QueryEncoderConfig(output_dir=str(folder), **{**fixed, **settings})


def noisy(model, p=0.1):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    return model


def trainer_of(folder, model=None, data=FEW, index=None, **settings):
    model = tiny_encoder() if model is None else model
    names = ("eval_dataset", "evaluator", "peft_config", "objective", "document_model", "callbacks")
    more = {name: settings.pop(name) for name in names if name in settings}
    index = index_of(model) if index is None else index
    return QueryEncoderTrainer(model, index, config(folder, **settings), data, **more)


def train(folder, model=None, data=FEW, **settings):
    trainer = trainer_of(folder, model, data, **settings)
    trainer.train()
    return trainer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(first, second, **tolerance):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **tolerance)


# --- Direction --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """An encoder that InfoNCE has warmed up with negatives of the batch, its index, and queries to train and test."""
    task = synthetic_retrieval(n_topics=24, documents_per_topic=18, queries_per_topic=8)
    train_task, test_task = split_queries(task, 0.3)
    model, folder = tiny_encoder(), str(tmp_path_factory.mktemp("warm"))
    lists = mine(train_task, [DenseRetriever(model, task.corpus)], positives="guaranteed", max_positives=4).lists
    settings = {**FIXED, "loss_type": "infonce", "in_batch": True, "per_device_train_batch_size": 16, "max_steps": 30}
    args = RankingConfig(output_dir=folder, learning_rate=1e-3, **settings)
    RankingTrainer(model, args, to_rows(lists)).train()
    return model, index_of(model, task), train_task, test_task


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"metric": "ndcg", "rank_by": "score"}, marks=pytest.mark.slow), {"loss_type": "pg_rank"}],
    ids=["adore", "ndcg", "pg_rank"],
)
def test_a_warm_start_gets_better_on_held_out_queries_and_nothing_else_moves(tmp_path, warm, settings):
    """From .36 nDCG@10 and .64 MRR@10 to at least .69 and .90 on each of seeds 0 to 2, with every objective."""
    model, index, train_task, test_task = warm
    before, documents = evaluate_retrieval(model, test_task, index=index).means, weights(model)
    fingerprint, vectors = index.fingerprint(), index.embeddings.clone()
    more = {"depth": 100, "per_device_train_batch_size": 32, "max_steps": 25, "learning_rate": 3e-3}
    trainer = train(tmp_path, model, train_task, index=index, **more, **settings)
    after = evaluate_retrieval(trainer.model, test_task, index=index).means
    assert after["ndcg@10"] > before["ndcg@10"] + 0.2
    assert after["mrr@10"] > before["mrr@10"] + 0.15
    first, last = (trainer.state.log_history[i] for i in (0, -2))
    assert last["search/mrr"] > first["search/mrr"]
    assert last["search/missed"] < first["search/missed"]
    gaps = [row["positive/score"] - row["negative/score"] for row in (first, last)]
    assert gaps[1] > gaps[0]
    # the documents' side
    assert index.fingerprint() == fingerprint == trainer.fingerprint
    assert torch.equal(index.embeddings, vectors)
    assert all(p.grad is None for p in model.parameters())
    for name, value in weights(model).items():
        assert torch.equal(value, documents[name]), name


def test_what_queries_find_changes_as_they_are_trained(tmp_path, warm):
    model, index, train_task, _ = warm
    queries = list(train_task.queries.values())
    more = {"depth": 50, "per_device_train_batch_size": 32, "max_steps": 20, "learning_rate": 3e-3}
    trainer = train(tmp_path, model, train_task, index=index, **more)
    first, last = (index.search(encode(one, queries), 50)[1].sort(1).values for one in (model, trainer.model))
    assert (first != last).any(1).float().mean() > 0.1
    changed = [row["search/changed"] for row in trainer.state.log_history if "search/changed" in row]
    assert len(changed) < 20  # nothing was seen before in the first epoch
    assert 0.05 < changed[0] < 1
    assert changed[-1] < changed[0]


def test_the_published_settings_are_the_default(tmp_path):
    args = config(tmp_path, metric_cut=None, depth=7)
    assert args.loss_type == "adore"
    assert args.objective_settings() == {"metric_cut": 7}
    assert config(tmp_path, metric_cut=3).objective_settings() == {"metric_cut": 3}
    assert QueryEncoderConfig(output_dir=str(tmp_path), use_cpu=True).depth == 200


def test_rows_with_positions_and_a_stream_train_like_the_task(tmp_path):
    index = index_of(tiny_encoder())
    places = {document_id: i for i, document_id in enumerate(index.ids)}
    numbered = [{**row, "positives": [places[d] for d in row["positives"]]} for row in task_rows(FEW)]
    sets = [FEW, task_rows(FEW), numbered]
    trainers = [train(tmp_path, data=data, index=index) for data in sets]
    assert_same(trainers[0].model, trainers[1].model, atol=0, rtol=0)
    assert_same(trainers[0].model, trainers[2].model, atol=0, rtol=0)
    stream = train(tmp_path, data=IterableDataset.from_generator(lambda: iter(numbered)), index=index)
    ordered = train(tmp_path, data=numbered[:8], index=index, max_steps=1)
    assert stream.state.log_history[0]["loss"] == pytest.approx(ordered.state.log_history[0]["loss"], rel=1e-5)


# --- Invariance -------------------------------------------------------------------------------------------------------

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "warmup_steps": 0}


@pytest.mark.parametrize("loss_type", ["adore", "lambda_rank"])
def test_micro_batches_and_accumulation_change_nothing(tmp_path, loss_type):
    trainers = [
        train(
            tmp_path / f"run{batch}",
            tiny_encoder().double(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            loss_type=loss_type,
            **SGD,
        )
        for batch in (8, 2)
    ]
    assert_same(trainers[0].model, trainers[1].model, atol=1e-9, rtol=0)
    for one, other in zip(*(t.state.log_history[:-1] for t in trainers), strict=True):
        for name in ("loss", "grad_norm", "search/mrr", "search/missed", "negative/score"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-9), name
        assert one.get("search/changed") == other.get("search/changed")


SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from peft import LoraConfig
from negtune.data.retrieval import synthetic_retrieval
from negtune.models.tiny_encoder import tiny_encoder
from negtune.retrieval.evaluation import RetrievalEvaluator
from negtune.trainers.query_encoder import QueryEncoderConfig, QueryEncoderTrainer
from tests.trainers.test_query_encoder import index_of

out, batch, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
task = synthetic_retrieval(n_topics=4)
model = tiny_encoder().double()
index = index_of(model)
args = QueryEncoderConfig(
    output_dir=str(out), per_device_train_batch_size=batch, max_steps=3, learning_rate=0.5, optim="sgd", depth=10,
    logging_steps=1, save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, seed=3,
    gradient_accumulation_steps=2, per_device_eval_batch_size=2,
)
held_out = task.only(list(task.queries)[:7])
trainer = QueryEncoderTrainer(
    model, index, args, task, held_out, RetrievalEvaluator(held_out, index=index),
    peft_config=LoraConfig(r=2, target_modules=["query", "value"]) if kind == "lora" else None,
)
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(str(out / "both"))
weights = sum(float(p.double().abs().sum()) for p in trainer.model.parameters() if p.requires_grad)
if PartialState().is_main_process:
    history = [r for r in trainer.state.log_history if "loss" in r]
    json.dump({{"world": PartialState().num_processes, "history": history, "metrics": metrics, "weights": weights,
               "fingerprint": index.fingerprint()}}, open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=needs_adapters)])
def test_two_processes_train_like_one(tmp_path, kind):
    found = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        out.mkdir()
        run_script(SCRIPT.format(root=ROOT), tmp_path, out, batch, kind, processes=processes, first_port=30500)
        found.append(json.loads((out / "result.json").read_text()))
    one, two = found
    assert (one["world"], two["world"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "search/mrr", "search/missed", "positive/score", "negative/score"):
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-7), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    assert two["fingerprint"] == one["fingerprint"]
    for name in ("eval_loss", "eval_search/mrr", "eval_negative/score", "eval_ndcg@10"):  # of 7 rows, one is repeated
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6), name
    assert sorted(p.name for p in (tmp_path / "2" / "checkpoint-2").glob("last_lists*")) == [
        "last_lists_rank0.safetensors",
        "last_lists_rank1.safetensors",
    ]
    assert (tmp_path / "2" / "both" / "router_config.json").exists()


RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def logged(trainer):
    return [{name: v for name, v in row.items() if "runtime" not in name} for row in trainer.state.log_history[:6]]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=needs_adapters)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, lora):
    """With dropout; what is logged too, also of lists that were seen before the interruption."""
    from sentence_transformers import SentenceTransformer

    folder = str(save_tiny_encoder(tmp_path / "model"))
    more = {**RESUMED, "peft_config": LoraConfig(r=4, target_modules=["query", "value"]) if lora else None}
    whole = train(tmp_path / "run", noisy(SentenceTransformer(folder, device="cpu")), **more)
    again = trainer_of(tmp_path / "run", noisy(SentenceTransformer(folder, device="cpu")), **more)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(whole.model, again.model, atol=0, rtol=0)
    assert logged(whole) == logged(again)
    assert "search/changed" in logged(again)[4]


def test_a_run_is_not_resumed_on_another_index(tmp_path):
    train(tmp_path, **RESUMED)
    other = index_of(tiny_encoder(seed=1))
    trainer = trainer_of(tmp_path, index=other, **RESUMED)
    with pytest.raises(IndexChangedError, match="checkpoint-3 was trained on another index; resume with that one"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "index.json").unlink()
    with pytest.raises(OSError, match=r"checkpoint-3 has no index\.json: it was not finished, or not written"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_an_index_that_somebody_wrote_to_is_told_of_at_the_end(tmp_path):
    from transformers import TrainerCallback

    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            index.embeddings[3, 1] += 1e-3

    index = index_of(tiny_encoder())
    trainer = trainer_of(tmp_path, index=index, callbacks=[Vandal()])
    with pytest.raises(IndexChangedError, match=r"the index was .* before training and is .*: something wrote to its"):
        trainer.train()


def test_evaluating_embeds_no_document_and_changes_nothing_of_the_training(tmp_path):
    trainers = []
    for evaluated in (False, True):
        model = noisy(tiny_encoder())
        index, more = index_of(model), {}
        if evaluated:
            evaluator = RetrievalEvaluator(FEW, metrics=("mrr@10",), index=index)
            more = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": FEW, "evaluator": evaluator}
        trainer = trainer_of(tmp_path, model, index=index, max_steps=3, **more)
        trainer.model.encode_document = None  # would fail
        trainer.train()
        trainers.append(trainer)
    assert_same(trainers[0].model, trainers[1].model, atol=0, rtol=0)
    row = next(row for row in trainers[1].state.log_history if "eval_mrr@10" in row)
    assert row["eval_search/mrr"] == pytest.approx(row["eval_mrr@10"], rel=1e-5)


def test_the_metrics_of_an_evaluation_are_those_of_the_task(tmp_path):
    """`reward/greedy` of ADORE is nDCG@10 of the list, here of the whole corpus, with the ideal of all positives."""
    trainer = trainer_of(tmp_path, eval_dataset=FEW, depth=48)
    found = trainer.evaluate()
    expected = evaluate_retrieval(trainer.model, FEW, metrics=("ndcg@10", "mrr@48"), index=trainer.index).means
    assert found["eval_reward/greedy"] == pytest.approx(expected["ndcg@10"], rel=1e-4)
    assert found["eval_search/mrr"] == pytest.approx(expected["mrr@48"], rel=1e-4)
    assert found["eval_search/missed"] == 0


# --- Adapters, what is saved ------------------------------------------------------------------------------------------


@needs_adapters
def test_an_adapter_is_trained_on_weights_that_both_sides_share(tmp_path):
    model = tiny_encoder()
    before, grads = weights(model), [p.requires_grad for p in model.parameters()]
    texts = list(FEW.queries.values())[:4]
    start = model.encode(texts)
    trainer = train(tmp_path / "run", model, peft_config=LoraConfig(r=4, target_modules=["query", "value"]),
                    learning_rate=1e-2, max_steps=4, **{"save_strategy": "steps", "save_steps": 4})  # fmt: skip
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    shared = {p.data_ptr() for p in model.parameters()}
    assert sum(p.data_ptr() in shared for p in trainer.model.parameters()) == len(shared)
    assert [p.requires_grad for p in model.parameters()] == grads
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name
    assert np.array_equal(model.encode(texts), start)
    assert not np.allclose(trainer.model.encode(texts), start)
    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").exists()
    from sentence_transformers import SentenceTransformer

    trainer.save_model(str(tmp_path / "both"))
    again = SentenceTransformer(str(tmp_path / "both"), device="cpu")
    np.testing.assert_allclose(again.encode_query(texts), trainer.model.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(again.encode_document(texts), model.encode_document(texts), atol=1e-6)


@pytest.mark.parametrize("named", [False, True])
def test_one_model_with_both_encoders_is_saved_and_can_be_trained_further(tmp_path, named):
    from sentence_transformers import SentenceTransformer

    folder = save_tiny_encoder(tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    index, texts = index_of(model), list(FEW.queries.values())[:4]
    trainer = train(tmp_path / "run", str(folder) if named else model, index=index, prompts={"query": "ba "},
                    save_strategy="steps", save_steps=2)  # fmt: skip
    trainer.save_model(str(tmp_path / "both"))
    again = SentenceTransformer(str(tmp_path / "both"), device="cpu")
    np.testing.assert_allclose(again.encode_query(texts), trainer.model.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(again.encode_document(texts), model.encode_document(texts), atol=1e-6)
    assert not np.allclose(again.encode_query(texts), again.encode_document(texts), atol=1e-3)
    card = (tmp_path / "both" / "README.md").read_text()
    assert "`encode_document` is the encoder that the index was made with" in card
    for text in (trainer.fingerprint, "index of 48 documents, 32 wide", "2104.08051", "QueryLoss"):
        assert text in card
    # alone in a checkpoint, which says so and names the encoder of the documents
    alone = (tmp_path / "run" / "checkpoint-2" / "README.md").read_text()
    assert "do **not** encode documents with it" in alone
    assert f"Encoder of the documents: {folder}." in alone
    # the saved one goes on, its documents are still those of the index
    more = trainer_of(tmp_path / "more", again, index=index)
    np.testing.assert_allclose(more.model.encode_query(texts), trainer.model.encode_query(texts), atol=1e-6)
    more.train()
    more.save_model(str(tmp_path / "more_both"))
    last = SentenceTransformer(str(tmp_path / "more_both"), device="cpu")
    np.testing.assert_allclose(last.encode_document(texts), model.encode_document(texts), atol=1e-6)
    assert not np.allclose(last.encode_query(texts), again.encode_query(texts), atol=1e-4)


def test_the_query_encoder_is_saved_alone_where_asked_for(tmp_path):
    from sentence_transformers import SentenceTransformer

    trainer = train(tmp_path / "run", save_document_encoder=False)
    trainer.save_model(str(tmp_path / "alone"))
    again = SentenceTransformer(str(tmp_path / "alone"), device="cpu")
    texts = list(FEW.queries.values())[:4]
    np.testing.assert_allclose(again.encode_query(texts), trainer.model.encode_query(texts), atol=1e-6)
    assert "do **not** encode documents with it" in (tmp_path / "alone" / "README.md").read_text()


def test_redaction_keeps_texts_and_folders_out_of_cards(tmp_path):
    folder = save_tiny_encoder(tmp_path / "secret_name")
    trainer = train(tmp_path / "run", str(folder), redact=True, index=index_of(tiny_encoder()))
    for both in (True, False):
        trainer.saves_both = both
        trainer.save_model(str(tmp_path / f"saved{both}"))
        card = (tmp_path / f"saved{both}" / "README.md").read_text()
        assert "## Documents" in card
        assert not [text for text in FEW.queries.values() if text in card]
        assert "secret_name" not in card.split("## Documents")[1]


def test_another_encoder_of_the_documents_is_saved_with_the_queries(tmp_path):
    documents = tiny_encoder(seed=3)
    trainer = train(tmp_path / "run", tiny_encoder(), index=index_of(documents), document_model=documents)
    trainer.save_model(str(tmp_path / "both"))
    from sentence_transformers import SentenceTransformer

    again, texts = SentenceTransformer(str(tmp_path / "both"), device="cpu"), list(FEW.corpus.values())[:3]
    np.testing.assert_allclose(again.encode_document(texts), documents.encode_document(texts), atol=1e-6)


# --- Refused, told of -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_at_construction(tmp_path):
    model = tiny_encoder()
    index = index_of(model)
    with pytest.raises(ValueError, match="need 1 <= depth <= documents of the index, got depth=49 and 48"):
        trainer_of(tmp_path, depth=49)
    narrow = ExactIndex(index.embeddings[:, :8].clone(), index.ids, "cosine")
    with pytest.raises(ValueError, match="the index is 8 wide and the model's vectors 32"):
        trainer_of(tmp_path, index=narrow)
    with pytest.raises(ValueError, match="compares by cosine and the index by dot"):
        trainer_of(tmp_path, index=ExactIndex(index.embeddings, index.ids, "dot"))
    with pytest.raises(ValueError, match="document 'd9' is not in the index"):
        trainer_of(tmp_path, data=[{"query": "ba", "positives": ["d9"]}])
    with pytest.raises(ValueError, match="has no positive"):
        trainer_of(tmp_path, data=[{"query": "ba", "positives": []}])
    with pytest.raises(ValueError, match="eval row 0: document 'd9' is not in the index"):
        trainer_of(tmp_path, eval_dataset=[{"query": "ba", "positives": ["d9"]}])
    with pytest.raises(ValueError, match="searched with a bi-encoder, got CrossEncoder"):
        trainer_of(tmp_path, cross_encoder(tmp_path / "cross"), index=index)
    with pytest.raises(ValueError, match="the train set is missing: pass a RetrievalTask, or rows with query and"):
        trainer_of(tmp_path, data=None).train()
    with pytest.raises(ValueError, match="model_init_kwargs are for loading by name"):
        trainer_of(tmp_path, model_init_kwargs={"dtype": "float32"})
    model.similarity_fn_name = "dot"
    unit = ExactIndex(torch.nn.functional.normalize(index.embeddings, dim=1), index.ids, "dot")
    with pytest.raises(ValueError, match="the index's vectors have length 1 and the model's"):
        trainer_of(tmp_path, model, index=unit)


def test_an_index_of_another_model_is_told_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "negtune"):
        trainer_of(tmp_path)
        assert "another vector" not in caplog.text
        trainer_of(tmp_path, index=index_of(tiny_encoder(seed=5)))
    assert "the model gives 8 of 8 documents another vector than the index has, d0-0-0 among them" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_cut": 0}, "metric_cut counts places and must be at least 1, got 0"),
        ({"depth": 0}, "depth counts documents and must be at least 1, got 0"),
        ({"rank_by": "place"}, "rank_by must be one of list, score"),
        ({"loss_type": "kl_distill"}, "unknown loss_type 'kl_distill'"),
        ({"loss_type": "infonce", "metric_cut": 3}, "metric_cut is for adore, got loss_type=infonce"),
        ({"loss_type": "infonce", "rank_by": "score"}, "rank_by is for adore"),
        ({"k": 3}, "adore has no hyper-parameter 'k'"),
        ({"loss_type": "pg_rank", "k": 11}, "k=11 places are more than the depth=10 documents"),
        ({"loss_type": "pg_rank", "kl_weight": 0.1}, "kl_weight is for lists that are known"),
        ({"in_batch": True}, "in_batch is for lists that are known"),
        ({"mini_batch_size": 4}, "mini_batch_size is for lists that are known"),
        ({"model_kind": "cross_encoder"}, "searched with a bi-encoder, got model_kind=cross_encoder"),
        ({"prompts": {"document": "d: "}}, "only queries are embedded: prompts may have query"),
    ],
)
def test_settings_are_refused_when_they_are_made(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_model_that_diverged_stops_the_run_and_names_the_rows(tmp_path):
    from negtune.trainers.steps import NonFiniteLossError

    with pytest.raises(NonFiniteLossError, match="the loss is nan at step"):
        train(tmp_path, max_steps=5, learning_rate=1e38, warmup_steps=0, max_grad_norm=0.0)
    (file,) = tmp_path.glob("nonfinite_step*_rank0.json")
    assert len(json.loads(file.read_text())["rows"]["queries"]) == 8


def test_an_objective_of_ones_own(tmp_path):
    def doubled(scores, gains, mask):
        return 2 * infonce(scores, gains, mask)

    losses = [
        train(tmp_path, loss_type="infonce", max_steps=1, **more).state.log_history[0]["loss"]
        for more in ({}, {"objective": doubled})
    ]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_a_uniform_policy_is_told_of(tmp_path):
    """What watches the policy gradient watches it here too."""
    with pytest.warns(RankingWarning, match="the policy is uniform"):
        train(tmp_path, loss_type="pg_rank", k=5, scale=0.1, max_steps=1)


def test_history_has_the_search(tmp_path):
    train(tmp_path, num_train_epochs=1, max_steps=-1)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert all(math.isfinite(row["search/missed"]) and row["steps/empty"] == 0 for row in steps)
    assert len(steps) > 1
    about = json.loads((tmp_path / "index.json").read_text())
    assert about["documents"] == 48
    assert len(about["fingerprint"]) == 64
