"""RankingTrainer: direction for four kinds of model, invariances, resuming, adapters, what is refused."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from datasets import Dataset, IterableDataset
from peft import LoraConfig

from negtune.losses.ranking import infonce
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.launching import run_script
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder, multi_vector, needs_adapters, rows, static_encoder

ROOT = str(Path(__file__).resolve().parents[2])


def config(folder, **settings):
    fixed = {"per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "k": 3}
    return RankingConfig(output_dir=str(folder), **{**fixed, "logging_steps": 1, "seed": 1, **settings})


def of_two_processes(script, folder, first_port):
    """What a script with a place for `root` writes to result.json."""
    run_script(script.format(root=ROOT), folder, folder, processes=2, first_port=first_port)
    return json.loads((folder / "result.json").read_text())


def train(model, folder, data=None, held_out=None, peft_config=None, reward_fn=None, objective=None, **settings):
    if settings.get("loss_type", "pg_rank") not in ("pg_rank", "lambda_rank", "list_mle"):
        settings = {"k": None, **settings}
    trainer = RankingTrainer(
        model=model,
        args=config(folder, **settings),
        train_dataset=rows(64, documents=6, shorter=True) if data is None else data,
        eval_dataset=held_out,
        **{"peft_config": peft_config, "reward_fn": reward_fn, "objective": objective},
    )
    trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_close(first, second, **tolerance):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **tolerance)


# --- Direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (bi_encoder, {"scale": 10.0}),
        (bi_encoder, {"scale": 10.0, "loss_type": "infonce", "in_batch": True}),
        (multi_vector, {}),
        (cross_encoder, {"num_train_epochs": 15, "learning_rate": 5e-3}),
    ],
    ids=["bi_encoder", "in_batch", "multi_vector", "cross_encoder"],
)
def test_held_out_lists_are_ranked_better(tmp_path, build, settings):
    held_out = rows(100, documents=8, seed=9)
    model = build(tmp_path / "model")
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 3e-3, **settings}
    args = {**settings, "logging_steps": 1000, "k": 5 if "loss_type" not in settings else None}
    trainer = RankingTrainer(
        model=model, args=config(tmp_path / "run", **args), train_dataset=rows(500), eval_dataset=held_out
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward/greedy"] > before["eval_reward/greedy"] + 0.03
    gap = [m["eval_positive/score"] - m["eval_negative/score"] for m in (before, after)]
    assert gap[1] > gap[0]
    assert after["eval_positive/probability"] > before["eval_positive/probability"]


def test_a_causal_lm_learns_to_say_yes_to_relevant_documents(tmp_path):
    from negtune.retrieval.rankers import causal_reranker

    model = causal_reranker("tiny", instruction="relevant?", yes="a", no="b", max_length=128)
    made = [{"query": f"{i}", "documents": [f"{i}", "none", "other"], "gains": [1.0, 0.0, 0.0]} for i in (1, 2, 3, 4)]
    settings = {"max_steps": 25, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "k": 1, "metric": "precision"}
    trainer = RankingTrainer(model=model, args=config(tmp_path, **settings), train_dataset=made, eval_dataset=made)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward/expected"] > before["eval_reward/expected"] + 0.2
    assert after["eval_positive/score"] - after["eval_negative/score"] > 0.5


def test_a_black_box_reward_is_climbed(tmp_path):
    """Rewarded: that the shortest document comes first. No gains are given, and some rankings cannot be scored."""
    made = [
        {
            "query": row["query"],
            "documents": [*row["documents"][: i % 4], "w7", *row["documents"][i % 4 : 3]],
            "wanted": "w7",
        }
        for i, row in enumerate(rows(32))
    ]
    seen = []

    def reward(queries, rankings, wanted, documents, **columns):
        seen.append((queries[0], rankings[0], sorted(columns)))
        assert all(set(r) <= set(d) for r, d in zip(rankings, documents, strict=True))
        return [
            None if r[0] == made[0]["documents"][1] else float(r[0] == w) for r, w in zip(rankings, wanted, strict=True)
        ]

    settings = {"max_steps": 30, "learning_rate": 3e-3, "k": 2, "scale": 10.0}
    trainer = train(bi_encoder(tmp_path / "model"), tmp_path / "run", data=made, reward_fn=reward, **settings)
    history = [row["reward/expected"] for row in trainer.state.log_history if "reward/expected" in row]
    assert history[-1] > history[0] + 0.3
    assert len(seen[0][1]) == 2
    assert seen[0][0] in [row["query"] for row in made]
    assert "reward/greedy" not in trainer.state.log_history[0]


def half_scored(other):
    """Pays the first document of even queries by its text; the odd ones get `other`."""

    def reward(queries, rankings, number, **columns):
        return [other if n % 2 else sum(map(ord, r[0])) % 7 for r, n in zip(rankings, number, strict=True)]

    return reward


@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (1, 8)])
@pytest.mark.parametrize("cached", [None, 4])
def test_a_query_that_could_not_be_scored_is_in_no_mean(tmp_path, batch, accumulated, cached):
    """Reward 0 for half of the queries has no gradient and halves the mean; None leaves them out of it."""
    data = [{"number": i, **row} for i, row in enumerate(rows(8, documents=5))]
    moved, logs = [], []
    for other in (0.0, None):
        model = bi_encoder(tmp_path / "model").double()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "warmup_steps": 0}
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        rewards = {"reward_fn": half_scored(other), "mini_batch_size": cached}
        trainer = train(model, tmp_path / "run", data=data, **rewards, **settings, **size)
        moved.append({name: p - start[name] for name, p in weights(trainer).items()})
        logs.append(trainer.state.log_history[0])
    assert max(step.abs().max() for step in moved[0].values()) > 1e-4
    for name, step in moved[0].items():
        torch.testing.assert_close(moved[1][name], 2 * step, msg=name, atol=1e-9, rtol=1e-6)
    assert logs[1]["loss"] == pytest.approx(2 * logs[0]["loss"], rel=1e-5)
    assert logs[1]["grad_norm"] == pytest.approx(2 * logs[0]["grad_norm"], rel=1e-5)
    assert logs[1]["reward/expected"] == pytest.approx(2 * logs[0]["reward/expected"], rel=1e-5)
    assert [log["queries/unscored"] for log in logs] == [0, 0.5]
    assert [log["queries/skipped"] for log in logs] == [0, 0.5]


def test_a_step_in_which_no_query_could_be_scored_moves_nothing_and_is_told_of(tmp_path):
    """Neither Adam's momentum of the steps before nor weight decay moves a weight."""
    from negtune.retrieval.losses import RankingWarning

    model, calls = static_encoder(), []

    def reward(queries, rankings, **columns):
        calls.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return [None if len(calls) > 2 else float(len(set(r[0]))) for r in rankings]

    settings = {"max_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 0}
    with pytest.warns(RankingWarning, match="no query of step 3 could be scored"):
        trainer = train(model, tmp_path, data=rows(8, documents=5), reward_fn=reward, **settings)
    (name,) = calls[0]
    assert not torch.equal(calls[1][name], calls[2][name])
    torch.testing.assert_close(weights(trainer)[name], calls[2][name], atol=0, rtol=0)
    assert [row["steps/empty"] for row in trainer.state.log_history[:4]] == [0, 0, 1, 1]


def test_an_evaluation_between_two_logging_steps_leaves_the_count_of_empty_steps_alone(tmp_path):
    calls = []

    def reward(queries, rankings, **columns):
        calls.append(queries)
        return [None if len(calls) <= 2 else float(len(set(r[0]))) for r in rankings]

    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 4}
    with pytest.warns(UserWarning, match="no query of step 1 could be scored"):
        trainer = train(
            static_encoder(),
            tmp_path,
            data=rows(8, documents=5),
            held_out=rows(4, documents=5),
            reward_fn=reward,
            **{"max_steps": 4, **evaluated},
        )
    evaluation, steps = trainer.state.log_history[:2]
    assert "eval_reward/expected" in evaluation
    assert "eval_steps/empty" not in evaluation
    assert steps["steps/empty"] == 0.5


def test_kl_to_the_warm_start_holds_the_scores_back(tmp_path):
    moved = []
    for weight in (None, 5.0):
        model = bi_encoder(tmp_path / "model")
        settings = {"max_steps": 15, "learning_rate": 3e-3, "kl_weight": weight, "scale": 10.0, "n_samples": 64}
        trainer = train(model, tmp_path / "run", data=rows(64, documents=6), **settings)
        moved.append(trainer.state.log_history[-2]["positive/probability"])
    assert moved[0] > moved[1] + 0.1


def test_an_objective_of_ones_own(tmp_path):
    def doubled(scores, gains, mask):
        return 2 * infonce(scores, gains, mask)

    trainers = [
        train(static_encoder(), tmp_path / "run", max_steps=2, objective=doubled, optim="sgd", learning_rate=0.1),
        train(
            static_encoder(),
            tmp_path / "run",
            max_steps=2,
            loss_type="infonce",
            optim="sgd",
            learning_rate=0.2,
            max_grad_norm=0.0,
        ),
    ]
    assert trainers[0].state.log_history[0]["loss"] == pytest.approx(
        2 * trainers[1].state.log_history[0]["loss"], rel=1e-4
    )


def test_what_was_unscored_outside_of_a_step_is_not_counted_in_it(tmp_path):
    """A loss that a callback computes before the step, say to watch a query."""
    data = [{"number": i, **row} for i, row in enumerate(rows(8, documents=5))]
    found = []
    for looked in (False, True):
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "warmup_steps": 0}
        args, reward = config(tmp_path / "run", **settings), half_scored(None)
        trainer = RankingTrainer(model=static_encoder(), args=args, train_dataset=data, reward_fn=reward)
        if looked:
            trainer.compute_loss(trainer.model, trainer.collate([trainer.train_dataset[1]]))
        torch.manual_seed(0)
        trainer.train()
        found.append(trainer)
    assert_close(*found, atol=0, rtol=0)


# --- Invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["lambda_rank", "infonce"])
def test_micro_batches_and_accumulation_change_nothing(tmp_path, loss_type):
    """Lists of unequal length, one query without a relevant document behind the check of rows."""
    data = rows(16, documents=6, shorter=True)
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "loss_type": loss_type, "max_grad_norm": 1.0}
    trainers = [
        train(
            bi_encoder(tmp_path / "model").double(),
            tmp_path / f"run{batch}",
            data=data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            **settings,
        )
        for batch in (8, 2)
    ]
    assert_close(*trainers, atol=1e-9, rtol=0)
    logs = [t.state.log_history[:-1] for t in trainers]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
        assert one["reward/greedy"] == pytest.approx(other["reward/greedy"])


def test_accumulation_counts_only_queries_that_count(tmp_path):
    """A step of two micro-batches, in one of which half of the queries are masked out, is a mean over what is left."""
    model = bi_encoder(tmp_path / "model")
    trainer = RankingTrainer(
        model=model, args=config(tmp_path / "run", loss_type="list_net", k=None, max_steps=1), train_dataset=rows(4)
    )
    made = [{**r, "row": i} for i, r in enumerate(rows(4, documents=4))]
    made[1]["gains"] = [0.0] * 4
    micro = [trainer.collate(made[:2]), trainer.collate(made[2:])]
    from negtune.trainers.list_training import lists_of
    from negtune.trainers.steps import tell_step_totals

    tell_step_totals(trainer, micro, lambda batch: trainer.loss.counted(lists_of(batch)).sum())
    parts = [trainer.compute_loss(model, batch).item() / 2 for batch in micro]
    whole = trainer.compute_loss(model, trainer.collate([made[0], made[2], made[3]])).item()
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_a_stream_trains_like_a_set(tmp_path):
    data = rows(16, documents=5)
    stream = IterableDataset.from_generator(lambda: iter(data))
    loader = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "loss_type": "infonce"}
    from_stream = train(static_encoder(), tmp_path / "stream", data=stream, **loader)
    assert from_stream.state.global_step == 2
    assert from_stream.state.log_history[0]["positive/score"]
    ordered = train(static_encoder(), tmp_path / "set", data=Dataset.from_list(data[:8]), **{**loader, "max_steps": 1})
    assert from_stream.state.log_history[0]["loss"] == pytest.approx(ordered.state.log_history[0]["loss"], rel=1e-5)


def test_what_a_stream_leaves_out_is_counted(tmp_path):
    """Of each three queries the first has no relevant document; batches are full all the same."""
    data = [{**row, "gains": row["gains"] if i % 3 else [0.0] * 5} for i, row in enumerate(rows(24, documents=5))]
    stream = IterableDataset.from_generator(lambda: iter(data))
    trainer = train(static_encoder(), tmp_path, data=stream, held_out=stream, loss_type="infonce", max_steps=2)
    assert [row["queries/skipped"] for row in trainer.state.log_history[:2]] == [4 / 12, 4 / 12]
    assert trainer.evaluate()["eval_queries/skipped"] == 8 / 24


def test_a_stream_of_which_nothing_is_left_is_refused(tmp_path):
    for data in ([{**row, "gains": [0.0] * 5} for row in rows(4, documents=5)], rows(4, documents=5)):
        stream = IterableDataset.from_generator(lambda data=data: iter(data))
        with pytest.raises(ValueError, match="nothing is left of the train stream: of its queries with a relevant"):
            train(static_encoder(), tmp_path, data=stream, max_steps=1, dataloader_drop_last=True)


FEW = """
import json, logging, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from datasets import IterableDataset
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.retrieval.tiny_rankers import rows, static_encoder

out, found = Path(sys.argv[1]), []
logging.getLogger("negtune").addHandler(logging.FileHandler(out / f"log{{PartialState().process_index}}"))
for number, streamed in ((3, False), (3, True), (7, False)):
    data = rows(number, documents=5)
    args = RankingConfig(
        output_dir=str(out), per_device_train_batch_size=2, max_steps=2, k=3, logging_steps=1, save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )
    data = IterableDataset.from_generator(lambda data=data: iter(data)) if streamed else data
    trainer = RankingTrainer(model=static_encoder(), args=args, train_dataset=data)
    try:
        trainer.train()
        found.append(trainer.state.global_step)
    except ValueError as error:
        found.append(str(error))
if PartialState().is_main_process:
    json.dump(found, open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


def test_queries_that_fill_no_round_of_two_processes_are_counted_or_refused(tmp_path):
    too_few, too_few_streamed, steps = of_two_processes(FEW, tmp_path, first_port=30300)
    assert too_few.startswith("3 train queries are no full round of batches, 4 (processes x per_device_train_batch")
    assert too_few_streamed.startswith("nothing is left of the train stream")
    assert steps == 2
    assert (
        "train: 3 of 7 queries fill no round of 4 and are left out, others in each epoch"
        in (tmp_path / "log0").read_text()
    )


RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "scale": 10.0}


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=needs_adapters)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, lora):
    """Draws go on where they were: dropout and rankings come from the saved random state."""
    peft = LoraConfig(r=4, target_modules=["query", "value"]) if lora else None
    whole = train(bi_encoder(tmp_path / "model", dropout=0.1), tmp_path / "run", peft_config=peft, **RESUMED)
    again = RankingTrainer(
        model=bi_encoder(tmp_path / "model", dropout=0.1),
        args=config(tmp_path / "run", **RESUMED),
        train_dataset=rows(64, documents=6, shorter=True),
        peft_config=peft,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_close(whole, again, atol=0, rtol=0)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]
    ended = RankingTrainer(
        model=bi_encoder(tmp_path / "model", dropout=0.1),
        args=config(tmp_path / "run", **RESUMED),
        train_dataset=rows(64, documents=6, shorter=True),
        peft_config=peft,
    )
    ended.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert ended.state.global_step == 6
    assert_close(whole, ended, atol=0, rtol=0)


SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from peft import LoraConfig
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder, rows

out, batch, kind, cached = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
build = bi_encoder if kind != "cross" else cross_encoder
model = build(out / ("model" + os.environ.get("LOCAL_RANK", "0"))).double()
args = RankingConfig(
    output_dir=str(out), per_device_train_batch_size=batch, max_steps=3, learning_rate=0.5, optim="sgd", k=3,
    logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, loss_type="lambda_rank",
    mini_batch_size=3 if cached == "cached" else None, gradient_accumulation_steps=2, per_device_eval_batch_size=2,
)
trainer = RankingTrainer(
    model=model, args=args, train_dataset=rows(32, documents=6, shorter=True), eval_dataset=rows(7, seed=5),
    peft_config=LoraConfig(r=2, target_modules=["query", "value"]) if kind == "lora" else None,
)
trainer.train()
metrics = trainer.evaluate()
metrics |= trainer.evaluate({{"first": rows(7, seed=5), "second": rows(5, seed=9)}})
weights = sum(float(p.double().abs().sum()) for p in trainer.model.parameters() if p.requires_grad)
if PartialState().is_main_process:
    history = [r for r in trainer.state.log_history if "loss" in r]
    json.dump({{"world": PartialState().num_processes, "history": history, "metrics": metrics, "weights": weights}},
              open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "cached"), [("bi", "plain"), pytest.param("lora", "cached", marks=needs_adapters), ("cross", "cached")]
)
def test_two_processes_train_like_one(tmp_path, kind, cached):
    found = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        out.mkdir()
        script = SCRIPT.format(root=ROOT)
        run_script(script, tmp_path, out, batch, kind, cached, processes=processes, first_port=29900)
        found.append(json.loads((out / "result.json").read_text()))
    one, two = found
    assert (one["world"], two["world"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "reward/greedy", "positive/score", "negative/score"):
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-7), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    for name in ("loss", "reward/greedy", "positive/score"):  # of 7 and of 5 rows, some of which are repeated
        for prefix in ("eval_", "eval_first_", "eval_second_"):
            assert two["metrics"][prefix + name] == pytest.approx(one["metrics"][prefix + name], rel=1e-6), name
        assert (
            one["metrics"]["eval_first_" + name]
            == one["metrics"]["eval_" + name]
            != one["metrics"]["eval_second_" + name]
        )


UNSCORED = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.retrieval.tiny_rankers import rows, static_encoder
from tests.trainers.test_ranking import half_scored

out, found = Path(sys.argv[1]), []
for other in (0.0, None):
    model = static_encoder().double()
    start = [p.detach().clone() for p in model.parameters()]
    args = RankingConfig(
        output_dir=str(out), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, warmup_steps=0, k=3, logging_steps=1, save_strategy="no", use_cpu=True,
        disable_tqdm=True, seed=3,
    )
    data = [{{"number": int(i in (0, 3)), **row}} for i, row in enumerate(rows(4, documents=5))]
    trainer = RankingTrainer(model=model, args=args, train_dataset=data, reward_fn=half_scored(other))
    trainer.train()
    moved = sum(float((p - q).abs().sum()) for p, q in zip(model.parameters(), start))
    found.append({{"moved": moved, **trainer.state.log_history[0]}})
if PartialState().is_main_process:
    json.dump(found, open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


def test_two_processes_leave_unscored_queries_out_of_the_mean_of_both(tmp_path):
    zero, none = of_two_processes(UNSCORED, tmp_path, first_port=30100)
    assert zero["moved"] > 1e-4
    for name in ("moved", "loss", "grad_norm"):
        assert none[name] == pytest.approx(2 * zero[name], rel=1e-5), name
    assert none["queries/unscored"] == 0.5


@pytest.mark.parametrize("given", [None, {"query": "w9 w8 ", "document": "w7 "}])
def test_texts_are_trained_with_the_prompts_that_searching_puts_before_them(tmp_path, given):
    """Scores of a batch are those of encode_query and encode_document of the model with these prompts."""
    model = bi_encoder(tmp_path / "model").eval()
    model.prompts = {"query": "w1 w2 ", "document": "w3 ", "other": "w5 "}
    args = config(tmp_path / "run", prompts=given, scale=1.0)
    trainer = RankingTrainer(model=model, args=args, train_dataset=rows(3, documents=4))
    batch = trainer.collate([{**row, "row": 0} for row in rows(3, documents=4)])
    from negtune.trainers.list_training import lists_of

    with torch.no_grad():
        scores = trainer.loss.scores(batch["features"], lists_of(batch))
    model.prompts = given or model.prompts
    for row, found in zip(rows(3, documents=4), scores, strict=True):
        query = model.encode_query([row["query"]], convert_to_tensor=True)
        documents = model.encode_document(row["documents"], convert_to_tensor=True)
        torch.testing.assert_close(found, model.similarity(query, documents)[0], atol=1e-5, rtol=0)


def test_a_limit_of_tokens_is_written_into_the_model(tmp_path):
    model = bi_encoder(tmp_path / "model").eval()
    trainer = RankingTrainer(model=model, args=config(tmp_path / "run", max_length=4), train_dataset=rows(3))
    assert trainer.model.max_seq_length == 4
    assert trainer.collate(rows(2))["features"][1]["input_ids"].shape[1] == 4


def test_prompts_that_a_chat_template_leaves_out_are_refused(tmp_path):
    from negtune.retrieval.rankers import causal_reranker

    model = causal_reranker("tiny", yes="a", no="b", max_length=128)
    with pytest.raises(ValueError, match=r"does not read prompts; make the model with causal_reranker\(..., instruct"):
        train(model, tmp_path, prompts="Judge: ")
    # one that reads them
    tokenizer = model[0].tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    )
    trainer = train(model, tmp_path, prompts="Judge: ")
    assert trainer.model.prompts["pair"] == "Judge: "


@pytest.mark.parametrize("kind", [bi_encoder, cross_encoder])
def test_prompts_for_a_side_that_there_is_not_are_refused(tmp_path, kind):
    given = {"queries": "q: "} if kind is bi_encoder else {"query": "q: "}
    args = config(tmp_path / "run", prompts=given)
    with pytest.raises(ValueError, match="prompts must be a mapping|prompts of a cross-encoder must be one text"):
        RankingTrainer(model=kind(tmp_path / "model"), args=args, train_dataset=rows(3))


def test_a_cross_encoder_is_trained_with_the_prompt_it_predicts_with(tmp_path):
    model = cross_encoder(tmp_path / "model").eval()
    args = config(tmp_path / "run", prompts="w9 w8 ")
    trainer = RankingTrainer(model=model, args=args, train_dataset=rows(2, documents=4))
    from negtune.trainers.list_training import lists_of

    batch = trainer.collate([{**row, "row": 0} for row in rows(2, documents=4)])
    with torch.no_grad():
        scores = trainer.loss.scores(batch["features"], lists_of(batch))
    for row, found in zip(rows(2, documents=4), scores, strict=True):
        pairs = [(row["query"], document) for document in row["documents"]]
        expected = model.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
        torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_evaluating_changes_nothing_of_the_training(tmp_path):
    trainers = []
    for evaluated in (False, True):
        more = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
        model = bi_encoder(tmp_path / "model", dropout=0.1)
        held_out = rows(4, seed=9) if evaluated else None
        trainers.append(train(model, tmp_path / "run", held_out=held_out, max_steps=4, learning_rate=1e-3, **more))
    assert_close(*trainers, atol=0, rtol=0)


def test_the_warm_start_is_scored_without_dropout(tmp_path):
    model = bi_encoder(tmp_path / "model", dropout=0.5).train()
    args = config(tmp_path / "run", kl_weight=0.1)
    trainer = RankingTrainer(model=model, args=args, train_dataset=rows(3, documents=4))
    assert trainer.model.training
    model.eval()
    for row in trainer.train_dataset:
        query, documents = model.encode([row["query"]]), model.encode(row["documents"])
        expected = 20 * model.similarity(query, documents)[0]
        torch.testing.assert_close(torch.tensor(row["start_scores"]), expected, atol=1e-4, rtol=0)


def test_dropout_is_switched_off_where_asked_for(tmp_path):
    model = bi_encoder(tmp_path / "model", dropout=0.5)
    RankingTrainer(model=model, args=config(tmp_path / "run"), train_dataset=rows(3))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    RankingTrainer(model=model, args=config(tmp_path / "run", disable_dropout=True), train_dataset=rows(3))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_a_router_is_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    towers = [static_encoder()[0] for _ in range(2)]
    router = Router.for_query_document(query_modules=[towers[0]], document_modules=[towers[1]])
    model = SentenceTransformer(modules=[router], device="cpu")
    with pytest.raises(ValueError, match="a Router has a tower for each side"):
        RankingTrainer(model=model, args=config(tmp_path), train_dataset=rows(3))


def test_nobody_is_asked_about_the_name_of_a_folder(tmp_path):
    model = bi_encoder(tmp_path / "model")
    RankingTrainer(model=model, args=config(tmp_path / "run"), train_dataset=rows(3))
    assert model.model_card_data.local_files_only


def test_kl_to_the_warm_start_does_not_hinder_evaluations(tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "kl_weight": 0.1, "max_steps": 2}
    trainer = train(static_encoder(), tmp_path, held_out=rows(4, seed=9), **more)
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 2


@pytest.mark.parametrize("loss_type", ["pg_rank", "infonce", "lambda_rank"])
def test_a_model_that_diverged_stops_the_run_and_names_the_rows(tmp_path, loss_type):
    from negtune.trainers.steps import NonFiniteLossError

    with pytest.raises(NonFiniteLossError, match="the loss is nan at step"):
        train(static_encoder(), tmp_path, loss_type=loss_type, max_steps=5, learning_rate=1e38, warmup_steps=0)
    (file,) = tmp_path.glob("nonfinite_step*_rank0.json")
    assert len(json.loads(file.read_text())["rows"]["queries"]) == 8


# --- Adapters ---------------------------------------------------------------------------------------------------------


@needs_adapters
def test_only_the_adapter_is_trained_and_it_loads_again(tmp_path):
    from sentence_transformers import SentenceTransformer

    model = bi_encoder(tmp_path / "model")
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    peft = LoraConfig(r=4, target_modules=["query", "value"])
    trainer = train(model, tmp_path / "run", peft_config=peft, max_steps=5, learning_rate=1e-2)
    trained = weights(trainer)
    assert trained
    assert all("lora" in name for name in trained)
    for name, p in trainer.model.named_parameters():
        if "lora" not in name:
            torch.testing.assert_close(p, frozen[name.replace(".base_layer", "")], atol=0, rtol=0)
    trainer.save_model(str(tmp_path / "saved"))
    texts = [row["query"] for row in rows(4)]
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        again.encode(texts, convert_to_tensor=True), trainer.model.encode(texts, convert_to_tensor=True)
    )


def test_the_card_names_the_objective_and_redaction_keeps_texts_out(tmp_path):
    data = rows(8, documents=4)
    for redact in (False, True):
        trainer = train(static_encoder(), tmp_path / "run", data=data, max_steps=1, redact=redact)
        trainer.save_model(str(tmp_path / f"saved{redact}"))
        card = (tmp_path / f"saved{redact}" / "README.md").read_text()
        if not redact:
            assert "RankingLoss" in card
            assert "2310.04407" in card
        else:
            assert not any(text in card for row in data for text in [row["query"], *row["documents"]])


# --- Refused ----------------------------------------------------------------------------------------------------------


def broken(**columns):
    made = rows(3, documents=4)
    made[1].update(columns)
    return made


GOOD = rows(3, documents=4)[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "train set is missing"),
        ([], "train set is empty"),
        (broken(query=""), r"train row 1 \(query q1\): query must be a text"),
        (broken(documents="w1"), r"\(query q1\): documents must be a list of texts"),
        (broken(documents=["w1", "w2", "w3", " "]), r"\(query q1\): document 3 is no text or empty"),
        (broken(documents=["w1", "w2", "w1", "w4"]), r"\(query q1\): documents 0 and 2 are the same text"),
        (broken(gains=[1.0, 0.0]), r"\(query q1\): 4 documents and 2 gains"),
        (broken(gains=[1.0, 0.0, math.nan, 0.0]), r"\(query q1\): gains\[2\] is nan"),
        (broken(gains=[1.0, 0.0, -1.0, 0.0]), r"\(query q1\): gains must not be negative"),
        (broken(gains=None), r"\(query q1\): gains are missing"),
        (broken(documents=["w1", "w2"], gains=[1.0, 0.0]), r"\(query q1\): k=3 is larger than its list of 2"),
        (broken(positives=["w9 w9"]), r"\(query q1\): its positive 'w9 w9' is not among its documents"),
        ([{**r, "gains": [0.0] * 4} for r in rows(2, documents=4)], "no train query has a relevant document"),
    ],
)
def test_rows_are_refused_before_any_weight_moves(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        RankingTrainer(model=static_encoder(), args=config(tmp_path), train_dataset=data).train()


def test_over_the_batch_more_places_count_than_a_list_has(tmp_path):
    trainer = train(static_encoder(), tmp_path, data=rows(8, documents=3), k=5, in_batch=True, max_steps=1)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_rows_without_a_relevant_document_are_left_out_and_counted(tmp_path, caplog):
    data = broken(gains=[0.0] * 4)
    trainer = RankingTrainer(model=static_encoder(), args=config(tmp_path), train_dataset=data)
    assert "train: 1 of 3 queries have no relevant document and are left out" in caplog.text
    assert len(trainer.train_dataset) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_distillation_reads_no_gains_and_keeps_rows_without_a_relevant_document(tmp_path, streamed):
    data = [{**row, "gains": [0.0] * 4, "teacher_scores": [1.0, 2.0, 3.0, 4.0]} for row in rows(4, documents=4)]
    for given in (data, [{k: v for k, v in row.items() if k != "gains"} for row in data]):
        given = IterableDataset.from_generator(lambda given=given: iter(given)) if streamed else given
        trainer = train(static_encoder(), tmp_path, data=given, loss_type="kl_distill", max_steps=1)
        assert trainer.state.log_history[0]["queries/skipped"] == 0
        assert trainer.state.log_history[0]["loss"] > 0
        assert [row["row"] for row in trainer.train_dataset] == [0, 1, 2, 3]


def test_margins_need_a_relevant_document(tmp_path, caplog):
    data = [{**row, "teacher_scores": [1.0, 2.0, 3.0, 4.0]} for row in broken(gains=[0.0] * 4)]
    args = config(tmp_path, loss_type="margin_mse", k=None)
    trainer = RankingTrainer(model=static_encoder(), args=args, train_dataset=data)
    assert "train: 1 of 3 queries have no relevant document and are left out" in caplog.text
    assert len(trainer.train_dataset) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "npo"}, "unknown loss_type 'npo'"),
        ({"estimator": "pl_rank", "metric": "mrr"}, "use rtg_loo"),
        ({"loss_type": "infonce"}, "infonce has no hyper-parameter 'k'"),
        ({"loss_kwargs": {"k": 2}}, "k is given twice"),
        ({"loss_kwargs": [1]}, "loss_kwargs must be a mapping"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"entropy_weight": math.nan}, "entropy_weight must be at least 0"),
        ({"loss_type": "infonce", "k": None, "temperature": 0.0}, "temperature must be positive"),
        ({"loss_type": "list_mle", "k": 0}, "k must be positive"),
        ({"loss_type": "lambda_rank", "gain": "exp"}, "gain must be linear or exponential"),
        ({"model_kind": "encoder"}, "model_kind must be one of auto"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1"),
        ({"n_samples": 1, "estimator": "loo"}, "n_samples of at least 2"),
    ],
)
def test_settings_are_refused_when_they_are_made(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_causal_lm_refuses_queries_that_push_their_documents_out(tmp_path):
    """A set before any weight moves; a stream, and a set to evaluate, where the row is reached."""
    from negtune.retrieval.rankers import causal_reranker

    model = causal_reranker("tiny", yes="a", no="b", max_length=128)
    made = [{"query": q, "documents": ["one", "two", "three"], "gains": [1.0, 0.0, 0.0]} for q in ("q", "long " * 99)]
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="train row 1: its query of .* leaves no room for a document in 128 tokens"):
        RankingTrainer(model=model, args=args, train_dataset=made)
    with pytest.raises(ValueError, match="eval row 1: its query of .* leaves no room"):
        RankingTrainer(model=model, args=args, train_dataset=made[:1], eval_dataset=made)
    trainer = RankingTrainer(model=model, args=args, train_dataset=made[:1])
    with pytest.raises(ValueError, match="row 1: its query of .* leaves no room"):
        trainer.evaluate(made)
    stream = IterableDataset.from_generator(lambda: iter(made[::-1]))
    with pytest.raises(ValueError, match="row 0: its query of .* leaves no room"):
        RankingTrainer(model=model, args=args, train_dataset=stream).train()


def test_what_cannot_be_trained_is_refused(tmp_path):
    peft = LoraConfig(r=4, target_modules=["query"])
    with pytest.raises(ValueError, match="needs a model with a transformer"):
        RankingTrainer(model=static_encoder(), args=config(tmp_path), train_dataset=rows(4), peft_config=peft)
    model = static_encoder()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that can be trained"):
        RankingTrainer(model=model, args=config(tmp_path), train_dataset=rows(4))
    with pytest.raises(ValueError, match="model must be a SentenceTransformer"):
        RankingTrainer(model=torch.nn.Linear(2, 2), args=config(tmp_path), train_dataset=rows(4))
    level = [{**row, "gains": [1.0] * len(row["documents"])} for row in rows(4)]
    with pytest.raises(ValueError, match="no train list has documents of different gains: there is nothing to learn"):
        RankingTrainer(model=static_encoder(), args=config(tmp_path), train_dataset=level)
    graded = [{**level[0], "gains": [2.0, *level[0]["gains"][1:]]}, *level[1:]]
    RankingTrainer(model=static_encoder(), args=config(tmp_path), train_dataset=graded)
    over_batch = config(tmp_path, loss_type="masked_infonce", k=None)
    RankingTrainer(model=static_encoder(), args=over_batch, train_dataset=level)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(tmp_path):
    from negtune.trainers.steps import NonFiniteLossError

    objective = partial(lambda scores, gains, mask: scores.sum(-1) * float("nan"))
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 0"):
        train(static_encoder(), tmp_path, max_steps=1, objective=objective)
    (file,) = tmp_path.glob("nonfinite_step0_rank0.json")
    assert len(json.loads(file.read_text())["rows"]["queries"]) == 8
