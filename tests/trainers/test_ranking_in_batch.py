"""RankingTrainer on documents that queries share: masks by the judgements, direction, accumulation, two processes."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from datasets import Dataset, IterableDataset

from negtune.data.completions import RowError
from negtune.data.retrieval import split_queries, synthetic_retrieval
from negtune.losses.ranking import RANKING_LOSSES
from negtune.models.tiny_encoder import tiny_encoder
from negtune.retrieval.evaluation import evaluate_retrieval
from negtune.retrieval.losses import Lists, RankingLoss
from negtune.retrieval.mining import mine, to_rows
from negtune.retrieval.retrievers import BM25Retriever
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.launching import run_script
from tests.retrieval.test_in_batch import by_judgement, cosines, judged_rows
from tests.retrieval.tiny_rankers import bi_encoder, static_encoder
from tests.trainers.test_ranking import assert_close, config, train

ROOT = str(Path(__file__).resolve().parents[2])


def hard_rows(task, **settings):
    lists = mine(task, [BM25Retriever(task.corpus)], n_documents=6, positives="guaranteed", select="random", **settings)
    return to_rows(lists.lists, task=task)


@pytest.mark.parametrize("settings", [{"loss_type": "star", "alpha": 1.0}, {"loss_type": "masked_infonce"}])
def test_held_out_queries_find_more_and_the_sides_part(tmp_path, settings):
    train_set, test_set = split_queries(synthetic_retrieval(), 0.3)
    model = tiny_encoder()
    before = evaluate_retrieval(model, test_set).means["ndcg@10"]
    settings = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8, **settings}
    trainer = train(model, tmp_path, data=hard_rows(train_set), **settings)
    assert evaluate_retrieval(model, test_set).means["ndcg@10"] > before + 0.1
    logs = [row for row in trainer.state.log_history if "positive/score" in row]
    first, last = logs[0], logs[-1]
    assert last["positive/score"] - last["negative/score"] > first["positive/score"] - first["negative/score"] + 1
    assert sum(row["in_batch/withheld"] for row in logs) / len(logs) > 0.5  # of the topic, in lists of others


@pytest.mark.parametrize("loss_type", ["infonce", "lambda_rank", "pg_rank", "star"])
def test_the_loss_of_a_step_is_that_of_lists_without_what_is_known(tmp_path, loss_type):
    made = judged_rows(2)
    model = static_encoder()
    args = config(tmp_path, loss_type=loss_type, in_batch=True, scale=5.0, k=None, max_steps=1)
    trainer = RankingTrainer(model=model, args=args, train_dataset=made, eval_dataset=made)
    found = trainer.evaluate()
    values = []
    for scores, gains, _ in cosines(model, made, by_judgement(made)):
        if loss_type == "pg_rank":  # what it samples is compared in what is not sampled
            order = scores[0].argsort(descending=True)
            dcg = sum(gains[0][d].item() / math.log2(rank + 2) for rank, d in enumerate(order[:10]))
            values.append(dcg / (2 + 1 / math.log2(3)))
        elif loss_type == "star":
            gaps = [n - p for p in scores[gains > 0] for n in scores[gains == 0]]
            values += torch.nn.functional.softplus(torch.stack(gaps)).tolist()
        else:
            values.append(RANKING_LOSSES[loss_type](scores, gains, gains >= 0).item())
    name = "eval_reward/greedy" if loss_type == "pg_rank" else "eval_loss"
    assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-5)


@pytest.mark.parametrize("as_set", [Dataset.from_list, lambda made: IterableDataset.from_generator(lambda: iter(made))])
def test_a_set_and_a_stream_are_masked_alike(tmp_path, as_set):
    settings = {"loss_type": "star", "max_steps": 2, "per_device_train_batch_size": 5, "learning_rate": 0.1}
    one, other = (train(static_encoder(), tmp_path, data=d, **settings) for d in (judged_rows(), as_set(judged_rows())))
    assert one.state.log_history[0]["in_batch/withheld"] == other.state.log_history[0]["in_batch/withheld"] > 0


@pytest.mark.parametrize("cached", [None, 2])
@pytest.mark.parametrize("loss_type", ["star", "masked_infonce"])
def test_micro_batches_are_weighed_by_their_queries(tmp_path, loss_type, cached):
    """Five queries in micro-batches of 3 and 2, each with the documents of its own."""
    model = bi_encoder(tmp_path / "model").double()
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "loss_type": loss_type, "k": None}
    args = config(tmp_path, **settings, scale=5.0, mini_batch_size=cached)
    trainer = RankingTrainer(model=model, args=args, train_dataset=judged_rows(4))
    parts = []
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.collate.check, untouched = parts.append, copy.deepcopy(model)
    trainer.train()
    trainer.collate.check = None
    assert sorted(map(len, parts)) == [2, 3]
    loss, expected = RankingLoss(untouched, loss_type, scale=5.0), 0.0
    for rows in parts:
        batch = trainer.collate(rows)
        expected = expected + loss(batch["features"], Lists(**batch["lists"])) * len(rows) / 5
    expected.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in untouched.named_parameters():
        if parameter.grad is not None:
            moved = start[name] - dict(model.named_parameters())[name].detach()
            torch.testing.assert_close(moved, parameter.grad, atol=1e-9, rtol=0, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "loss_type": "star"}
    settings |= {"per_device_train_batch_size": 3, "alpha": 0.5}
    whole = train(bi_encoder(tmp_path / "model", dropout=0.1), tmp_path / "run", data=judged_rows(), **settings)
    again = RankingTrainer(
        model=bi_encoder(tmp_path / "model", dropout=0.1),
        args=config(tmp_path / "run", **{**settings, "k": None}),
        train_dataset=judged_rows(),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_close(whole, again, atol=0, rtol=0)


def two_steps(folder, micro):
    """Loss, norm and counts of two steps on four queries, and the weights after them, for three objectives."""
    found = []
    for loss_type in ("star", "masked_infonce", "lambda_rank"):
        settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "warmup_steps": 0, "scale": 5.0, "k": None}
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": micro, "in_batch": True}
        data = {"data": judged_rows(1)[:4], "loss_type": loss_type}
        trainer = train(static_encoder().double(), folder, **data, **settings)
        names = ("loss", "grad_norm", "in_batch/withheld", "negative/score")
        logs = [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]
        found.append([logs, sum(float(p.abs().sum()) for p in trainer.model.parameters())])
    return found


SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from tests.trainers.test_ranking_in_batch import two_steps

out = Path(sys.argv[1])
found = two_steps(out, 1)  # the first to ask how many processes there are, of gloo
if PartialState().is_main_process:
    json.dump([PartialState().num_processes, found], open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_two_micro_batches(tmp_path):
    """Each sees the documents of its own two queries; means are over all four."""
    run_script(SCRIPT.format(root=ROOT), tmp_path, tmp_path, processes=2, first_port=30500)
    world, two = json.loads((tmp_path / "result.json").read_text())
    assert world == 2
    for (logs, weights), (others, other_weights) in zip(two_steps(tmp_path, 2), two, strict=True):
        for first, second in zip(logs, others, strict=True):
            assert second == pytest.approx(first, rel=1e-6)
        assert other_weights == pytest.approx(weights, rel=1e-9)


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"known_positives": []}, "train row 1: document .* has a gain and is not among known_positives"),
        ({"known_positives": None}, "train row 1: some rows have known_positives and others not"),
        ({"document_ids": ["d0", "d1"]}, "train row 1: 4 documents and 2 document_ids"),
        ({"selection_propensity": [0.5, 1, 1, 2]}, "train row 1: selection_propensity of document .* is 2; it is a"),
    ],
)
def test_rows_are_refused_before_any_weight_moves(tmp_path, changed, message):
    made = judged_rows()
    made[1] = made[1] | changed
    with pytest.raises(RowError, match=message):
        RankingTrainer(model=static_encoder(), args=config(tmp_path, loss_type="star", k=None), train_dataset=made)


def test_a_known_positive_with_gain_0_is_named(tmp_path):
    made = judged_rows()
    negative = next(d for d, gain in zip(made[0]["document_ids"], made[0]["gains"], strict=True) if gain == 0)
    made[0]["known_positives"] = [negative]
    with pytest.raises(RowError, match=f"train row 0: document {negative} has gain 0 and is among known_positives"):
        RankingTrainer(model=static_encoder(), args=config(tmp_path, loss_type="star", k=None), train_dataset=made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "star", "alpha": -1.0}, "alpha weighs random negatives and must be 0 or more"),
        ({"loss_type": "masked_infonce", "alpha": 1.0}, "masked_infonce has no hyper-parameter 'alpha'"),
        ({"loss_type": "pg_rank", "alpha": 1.0}, "pg_rank has no hyper-parameter 'alpha'"),
        ({"loss_type": "star", "k": 3}, "star has no hyper-parameter 'k'; it has alpha, temperature"),
        ({"loss_type": "star", "loss_kwargs": {"own": 1}}, "star has no hyper-parameter 'own'"),
    ],
)
def test_settings_are_refused_when_they_are_made(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RankingConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_rows_of_a_trainer_with_other_settings_are_refused(tmp_path):
    """They lack what is known to be relevant, and nothing would say so."""
    plain = RankingTrainer(static_encoder(), config(tmp_path, k=None, loss_type="infonce"), train_dataset=judged_rows())
    again = RankingTrainer(
        static_encoder(), config(tmp_path, k=None, loss_type="infonce"), train_dataset=plain.train_dataset
    )
    assert len(again.train_dataset) == len(judged_rows())
    with pytest.raises(ValueError, match="train rows are those of another trainer, checked by .*; pass the"):
        RankingTrainer(static_encoder(), config(tmp_path, k=None, loss_type="star"), train_dataset=plain.train_dataset)


def test_star_is_in_batch_by_itself(tmp_path):
    for loss_type in ("star", "masked_infonce"):
        args = RankingConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=loss_type)
        assert (args.in_batch, args.places) == (True, None)
