"""CoupledTrainer: the released step by hand, direction, invariances, resuming, what is warned of and refused."""

import copy
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from datasets import IterableDataset
from peft import LoraConfig

from negtune.data.completions import RowError
from negtune.losses.debiased import em_relevance
from negtune.retrieval.coupled import Level
from negtune.retrieval.selection import BIAS, FeatureSelection
from negtune.trainers.coupled import CoupledConfig, CoupledTrainer, CoupledWarning
from negtune.trainers.list_training import scores_of
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.launching import run_script
from tests.retrieval.tiny_rankers import bi_encoder, cross_encoder, multi_vector, needs_adapters, rows, static_encoder

ROOT = str(Path(__file__).resolve().parents[2])


def config(folder, **settings):
    fixed = {"per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return CoupledConfig(output_dir=str(folder), **{**fixed, "logging_steps": 1, "seed": 1, **settings})


def with_features(made, seed=0):
    """Rows with two numbers a document, of which the first says which have a label; some documents are judged."""
    draw = torch.Generator().manual_seed(seed)
    for row in made:
        features = torch.randn(len(row["documents"]), 2, generator=draw) * torch.tensor([1.0, 100.0])
        row["selection_features"] = features.tolist()
        row["judged"] = (torch.rand(len(features), generator=draw) < 0.2).tolist()
    return made


def with_propensities(made, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for row in made:
        row["selection_propensity"] = (0.05 + 0.95 * torch.rand(len(row["documents"]), generator=draw)).tolist()
    return made


def trainer_of(model, folder, data=None, selection=None, peft_config=None, held_out=None, callbacks=None, **settings):
    data = with_features(rows(32, documents=6, shorter=True)) if data is None else data
    more = {"selection": selection, "peft_config": peft_config, "eval_dataset": held_out, "callbacks": callbacks}
    return CoupledTrainer(model=model, args=config(folder, **settings), train_dataset=data, **more)


def train(*args, **settings):
    trainer = trainer_of(*args, **settings)
    trainer.train()
    return trainer


def two_cross_encoders(folder, seed=7):
    """The second with other weights."""
    relevance, selection = cross_encoder(folder / "model"), cross_encoder(folder / "model")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in selection.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return relevance, selection


def weights(trainer):
    found = {f"model.{n}": p for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name in ("selection", "level"):
        module = getattr(trainer, name)
        found |= {} if module is None else {f"{name}.{n}": p for n, p in module.state_dict().items()}
    return {name: p.detach().clone() for name, p in found.items()}


def assert_close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **tolerance)


# --- The released step ------------------------------------------------------------------------------------------------


def by_hand(relevance, selection, data, *, rate, clip, temperature, most=None):
    """Two steps of the release: pairs of a list, weights of both models before either moves, each clipped by itself."""

    def scores(model):
        texts = [(row["query"], document) for row in data for document in row["documents"]]
        return model(model.preprocess(texts))["scores"].view(len(data), -1)

    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model in (relevance, selection)]
    gains, norms = torch.tensor([row["gains"] for row in data]), []
    for _ in range(2):
        for model in (relevance, selection):
            model.eval()
        with torch.no_grad():
            held = scores(relevance), scores(selection)
        for model, other, optimizer in zip((relevance, selection), held[::-1], optimizers, strict=True):
            found, total = scores(model), 0.0
            for query in range(len(data)):
                pairs = [
                    (1 + torch.exp(other[query, n] / temperature))
                    * torch.nn.functional.softplus(found[query, n] - found[query, p])
                    for p in (gains[query] > 0).nonzero().flatten()
                    for n in (gains[query] == 0).nonzero().flatten()
                ]
                total = total + torch.stack(pairs).mean() / len(data)
            optimizer.zero_grad()
            total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
    return norms


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
@pytest.mark.parametrize("cached", [None, 5])
def test_two_cross_encoders_take_the_released_step(tmp_path, cached):
    relevance, selection = (model.double() for model in two_cross_encoders(tmp_path))
    expected = copy.deepcopy(relevance), copy.deepcopy(selection)
    data = rows(8, documents=5)
    norms = by_hand(*expected, data, rate=0.05, clip=0.2, temperature=2.0)
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.2, "temperature": 2.0}
    trainer = train(
        relevance,
        tmp_path / "run",
        data=data,
        selection=selection,
        mini_batch_size=cached,
        **{"warmup_steps": 0, "lr_scheduler_type": "constant", "disable_dropout": True, **settings},
    )
    assert min(norms) > 0.2, "both are clipped"
    for ours, theirs in ((trainer.model, expected[0]), (trainer.selection, expected[1])):
        assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-8, rtol=0)
    first, second = trainer.state.log_history[:2]
    assert [first["grad_norm"], first["selection/grad_norm"]] == pytest.approx(norms[:2], rel=1e-5)
    assert [second["grad_norm"], second["selection/grad_norm"]] == pytest.approx(norms[2:], rel=1e-5)
    assert first["loss"] == pytest.approx(first["relevance/loss"] + first["selection/loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
def test_weights_come_from_models_without_dropout(tmp_path):
    """With dropout in training, two epochs over one batch of a rate of 0 see the same weights."""
    relevance, selection = (cross_encoder(tmp_path / name, dropout=0.5) for name in ("r", "s"))
    settings = {"max_steps": 2, "learning_rate": 0.0, "optim": "sgd", "temperature": 1.0}
    logs = train(relevance, tmp_path, data=rows(8, documents=5), selection=selection, **settings).state.log_history
    assert logs[0]["weight/negative"] == pytest.approx(logs[1]["weight/negative"], rel=1e-6)
    assert logs[0]["relevance/loss"] != pytest.approx(logs[1]["relevance/loss"], rel=1e-3)
    assert logs[0]["selection/loss"] != pytest.approx(logs[1]["selection/loss"], rel=1e-3)


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
@pytest.mark.parametrize(
    ("mode", "selected", "cached"),
    [
        ("official", "text", None),
        ("official", "text", 5),
        ("em", "text", 5),
        ("ratio", "features", None),
        ("ips_posterior", "known", None),
    ],
)
def test_a_step_that_is_weighed_by_its_own_scores_is_the_one_that_is_scored_before(tmp_path, mode, selected, cached):
    data = {"text": lambda made: made, "features": with_features, "known": with_propensities}[selected](rows(12))
    settings = {"mode": mode, "max_steps": 3, "uniform_steps": 1, "mini_batch_size": cached, "temperature": 1.0}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "selection_learning_rate": 0.5}
    found = []
    for before in (False, True):
        relevance, selection = (model.double() for model in two_cross_encoders(tmp_path / str(before)))
        given = selection if selected == "text" else None
        trainer = trainer_of(relevance, tmp_path / "run", data=data, selection=given, **settings)
        assert not trainer._draws
        trainer._draws, calls = before, Counter()
        for name, model in (("relevance", relevance), ("selection", selection)):
            model.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.update([name]))
        trainer.train()
        logs = [{n: v for n, v in log.items() if "/" in n or n == "level"} for log in trainer.state.log_history[:3]]
        found.append((weights(trainer), logs, calls))
    assert_close(found[0][0], found[1][0], atol=1e-8, rtol=0)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert found[0][1][1] != pytest.approx(found[0][1][2], rel=1e-3)  # it does move
    steps = Counter(relevance=3, **({"selection": 3} if selected == "text" else {}))
    assert found[1][2] - found[0][2] == steps
    assert cached is not None or found[0][2] == steps


def test_the_same_model_twice_stays_the_same_and_is_warned_of(tmp_path):
    with pytest.warns(CoupledWarning, match="labels cannot tell relevance from selection"):
        trainer = train(
            cross_encoder(tmp_path / "model"),
            tmp_path / "run",
            data=rows(16, documents=5),
            selection=cross_encoder(tmp_path / "model"),
            max_steps=3,
            learning_rate=1e-2,
        )
    ours, theirs = dict(trainer.model.named_parameters()), dict(trainer.selection.named_parameters())
    assert_close(ours, theirs, atol=0, rtol=0)
    start = dict(cross_encoder(tmp_path / "model").named_parameters())
    assert max(float((start[name] - value).detach().abs().max()) for name, value in ours.items()) > 1e-3


def test_features_that_say_nothing_are_warned_of(tmp_path):
    data = with_features(rows(4))
    for row in data:
        row["selection_features"] = [[1.0, 2.0]] * len(row["documents"])
    with pytest.warns(CoupledWarning, match="selection_features are the same for all documents: they say nothing"):
        trainer_of(static_encoder(), tmp_path, data, mode="em")
    data[0]["selection_features"] = [[1.0, 2.0], *[[1.0, 3.0]] * (len(data[0]["documents"]) - 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoupledWarning)
        trainer_of(static_encoder(), tmp_path, data, mode="em")


# --- Direction --------------------------------------------------------------------------------------------------------


def pooled(n, seed=0):
    """Half of the relevant documents were seen by a retriever that likes `w0`, and nearly only those are labelled.

    Each list has two documents that share two words with the query, one of them with `w0`, and four that share none,
    two of them with `w0`.
    """
    made, draw = [], torch.Generator().manual_seed(seed)
    for row in rows(n, documents=6, seed=seed):
        query, words = row["query"].split(), [document.split()[-2:] for document in row["documents"]]
        texts = [[*query[:2], *words[0], "w0"], [*query[1:], *words[1], "w1"]]
        texts += [[*words[2], *words[5], "w0"], [*words[3], *words[4], "w0"], [*words[4], "w1"], [*words[5], "w1"]]
        popular = ["w0" in text for text in texts]
        chances = [0.9 if liked else 0.1 for liked in popular]
        seen = [float(torch.rand((), generator=draw)) < chance for chance in chances]
        gains = [float(i < 2 and known) for i, known in enumerate(seen)]
        if not any(gains):
            continue
        texts = [" ".join(dict.fromkeys(text)) for text in texts]
        features = [[float(liked)] for liked in popular]
        made.append(
            {
                **{"query": row["query"], "documents": texts, "gains": gains},
                **{"selection_features": features, "selection_propensity": chances},
            }
        )
    return made


def liking_of(trainer, held):
    """What `w0` adds to the score of an irrelevant document, over what relevance does, on held-out lists."""
    scores = torch.tensor(scores_of(trainer, held))
    liked, other = scores[:, 2:4].mean(), scores[:, 4:].mean()
    return float((liked - other) / (scores[:, :2].mean() - (liked + other) / 2))


def only(made, *columns):
    return [{name: row[name] for name in ("query", "documents", "gains", *columns)} for row in made]


MADE_UP = {"num_train_epochs": 6, "learning_rate": 0.02, "selection_learning_rate": 0.05, "scale": 10.0}


def liked_after(folder, data, **settings):
    trainer = train(static_encoder(), folder, data=data, logging_steps=1000, **settings, **MADE_UP)
    return liking_of(trainer, [{**row, "row": 0} for row in pooled(100, seed=9)])


@pytest.fixture(scope="module")
def by_labels(tmp_path_factory):
    """Positives that weigh the same, negatives that are all believed."""
    data = only(pooled(300), "selection_propensity")
    return liked_after(tmp_path_factory.mktemp("labels"), data, mode="ips", clip=1.0)


@pytest.mark.parametrize(
    ("mode", "column", "share"),
    [
        ("em", "selection_features", 0.25),  # -.16
        pytest.param("em", "selection_propensity", 0.0, marks=pytest.mark.slow),  # -1.2
        ("ips_posterior", "selection_propensity", 0.25),  # -.01
        pytest.param("ips", "selection_propensity", 0.5, marks=pytest.mark.slow),  # .22
        pytest.param("posterior", "selection_features", 0.9, marks=pytest.mark.slow),  # .78
        pytest.param("ratio", "selection_features", 0.7, marks=pytest.mark.slow),  # .55
    ],
)
def test_what_the_pool_liked_counts_less_than_by_the_labels(tmp_path, by_labels, mode, column, share):
    assert by_labels > 0.03
    assert liked_after(tmp_path, only(pooled(300), column), mode=mode) < share * by_labels


def test_learned_selection_is_that_of_the_pool(tmp_path):
    settings = {**MADE_UP, "num_train_epochs": 2, "learning_rate": 0.0, "selection_hidden": 8, "logging_steps": 1000}
    trainer = train(static_encoder(), tmp_path, data=only(pooled(300), "selection_features"), mode="em", **settings)
    liked, other = trainer.selection(trainer.selection.preprocess([[1.0], [0.0]]))["scores"].sigmoid().flatten()
    assert liked > other + 0.2


# --- Gains for other objectives ---------------------------------------------------------------------------------------


def test_pg_rank_can_be_rewarded_with_what_labels_leave_open(tmp_path):
    data = [{**row, "query_id": str(i), "ideal_gains": [1.0, 1.0]} for i, row in enumerate(pooled(40))]
    for row in data:
        row["judged"] = [False] * 5 + [True]
        del row["selection_propensity"]
    trainer = train(static_encoder(), tmp_path / "em", data=data, mode="em", **MADE_UP | {"num_train_epochs": 2})
    found = trainer.expected_rows(data)
    assert [row["query_id"] for row in found] == [row["query_id"] for row in data]
    logits = trainer.selection(trainer.selection.preprocess([f for row in data for f in row["selection_features"]]))
    scores = torch.tensor(scores_of(trainer, [{**row, "row": 0} for row in data])).flatten()
    r, s = torch.sigmoid(scores + trainer.level.bias), torch.sigmoid(logits["scores"].detach().flatten())
    before, after = (torch.tensor([row["gains"] for row in each]).flatten() for each in (data, found))
    judged = torch.tensor([row["judged"] for row in data]).flatten()
    wanted = torch.where((before > 0) | judged, before, r * (1 - s) / (1 - r * s))
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
    assert after[~judged & (before == 0)].max() > 0.01
    again = RankingTrainer(
        static_encoder(), RankingConfig(output_dir=str(tmp_path), use_cpu=True, k=3, max_steps=2), found
    )
    again.train()
    assert len(again.train_dataset) == len(data)


def test_a_mode_without_probabilities_has_no_expected_gains(tmp_path):
    trainer = trainer_of(static_encoder(), tmp_path, mode="ratio")
    with pytest.raises(ValueError, match="mode ratio gives no probabilities of relevance; train with mode em"):
        trainer.expected_rows(with_features(rows(2, documents=6)))


# --- Invariance -------------------------------------------------------------------------------------------------------

WATCHED = {"loss", "grad_norm", "relevance/loss", "selection/loss", "selection/grad_norm", "level"}
WATCHED |= {"weight/negative", "weight/positive", "hidden/probability", "selection/positive_score"}
EXACT = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5, "temperature": 2.0}


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
@pytest.mark.parametrize("mode", ["official", "em", "ips_posterior"])
def test_micro_batches_and_accumulation_change_nothing(tmp_path, mode):
    """Weights are normalised over the step; lists are of unequal length, the second step is a query short."""
    found, logs = [], []
    for batch in (8, 2):
        data = rows(15, documents=6, shorter=True)
        data = with_features(data) if mode == "em" else with_propensities(data) if mode == "ips_posterior" else data
        relevance, selection = (model.double() for model in two_cross_encoders(tmp_path))
        accumulated = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        settings = {"mode": mode, "normalize": True, "uniform_steps": 1, **accumulated, **EXACT}
        trainer = train(
            relevance,
            tmp_path / f"run{batch}",
            data=data,
            selection=selection if mode == "official" else None,
            **settings,
        )
        found.append(weights(trainer))
        logs.append(trainer.state.log_history[:-1])
    assert_close(*found, atol=1e-6 if mode == "em" else 1e-8, rtol=0)  # features are in float32
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & WATCHED:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("kind", [bi_encoder, multi_vector])
def test_gradients_of_mini_batches_are_the_same_for_every_kind(tmp_path, kind):
    found = []
    for cached in (None, 3):
        model, settings = kind(tmp_path / "model").double(), {"mini_batch_size": cached, "mode": "em", **EXACT}
        found.append(weights(train(model, tmp_path / "run", selection_learning_rate=0.5, **settings)))
    assert_close(*found, atol=1e-6, rtol=0)
    start = {f"model.{name}": p.detach() for name, p in kind(tmp_path / "model").named_parameters()}
    assert max(float((value - found[0][name]).abs().max()) for name, value in start.items()) > 1e-3


RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "uniform_steps": 4}


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
@pytest.mark.parametrize(
    ("mode", "lora"), [("official", False), pytest.param("em", True, marks=needs_adapters), ("em", False)]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, mode, lora):
    """Both models, their optimiser states, draws of dropout, and the step until which all weigh the same."""
    peft = LoraConfig(r=4, target_modules=["query", "value"]) if lora else None

    def fresh():
        if mode == "em":
            return {"model": bi_encoder(tmp_path / "model", dropout=0.1), "selection_hidden": 4}
        selection = cross_encoder(tmp_path / "selection", dropout=0.2)
        return {"model": cross_encoder(tmp_path / "model", dropout=0.1), "selection": selection, "data": rows(16)}

    def made():
        settings = fresh()
        return trainer_of(settings.pop("model"), tmp_path / "run", peft_config=peft, mode=mode, **settings, **RESUMED)

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_close(weights(whole), weights(again), atol=0, rtol=0)
    halfway = made()
    halfway._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-3"))
    names = [name for name in weights(whole) if not torch.equal(weights(whole)[name], weights(halfway)[name])]
    assert {name.split(".")[0] for name in names} == {"model", "selection", *(["level"] if mode == "em" else [])}


def test_a_checkpoint_without_the_selection_model_is_refused(tmp_path):
    trainer = train(bi_encoder(tmp_path / "model"), tmp_path / "run", max_steps=1, mode="em")
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "saved" / "level.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no level.safetensors; it was not written by a CoupledTrainer"):
        trainer._load_from_checkpoint(str(tmp_path / "saved"))


def test_a_checkpoint_of_a_mode_with_a_level_is_refused_by_one_without(tmp_path):
    trainer = train(bi_encoder(tmp_path / "model"), tmp_path / "run", max_steps=1, mode="em")
    trainer.save_model(str(tmp_path / "saved"))
    other = train(bi_encoder(tmp_path / "model"), tmp_path / "run", max_steps=1, mode="official")
    before = weights(other)
    with pytest.raises(OSError, match=r"has level.safetensors, which this mode does not read; resume with the mode"):
        other._load_from_checkpoint(str(tmp_path / "saved"))
    assert_close(weights(other), before, atol=0, rtol=0)
    with pytest.raises(OSError, match=r"no folder .*nowhere; a checkpoint is a folder"):
        other._load_from_checkpoint(str(tmp_path / "nowhere"))


def of_a_process(folder, models, batch, mode):
    """Weights and history of a run, and how far other processes are from it."""
    relevance, selection = (model.double() for model in two_cross_encoders(models))
    data = rows(32, documents=6, shorter=True)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": batch, "normalize": True, **EXACT}
    trainer = train(
        relevance,
        folder,
        data=with_features(data) if mode == "em" else data,
        selection=selection if mode == "official" else None,
        **{"mode": mode, "seed": 3, **settings},
    )
    trainer.save_model(str(folder / "saved"))
    found = {name: float(p.double().abs().sum()) for name, p in weights(trainer).items()}
    mine = torch.tensor(list(found.values()), dtype=torch.float64)
    others = trainer.accelerator.gather(mine).view(-1, len(mine))
    history = [row for row in trainer.state.log_history if "loss" in row]
    return {
        **{"world": len(others), "apart": float((others - others[0]).abs().max())},
        **{"weights": found, "history": history},
    }


SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from tests.trainers.test_coupled import of_a_process

out, mode = Path(sys.argv[1]), sys.argv[2]
found = of_a_process(out, out / ("model" + os.environ["LOCAL_RANK"]), 2, mode)
if PartialState().is_main_process:
    json.dump(found, open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
@pytest.mark.parametrize("mode", ["official", pytest.param("em", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(tmp_path, mode):
    one = of_a_process(tmp_path / "one", tmp_path / "model", 4, mode)
    run_script(SCRIPT.format(root=ROOT), tmp_path, tmp_path, mode, processes=2, first_port=30600)
    two = json.loads((tmp_path / "result.json").read_text())
    assert [one["world"], two["world"]] == [1, 2]
    assert two["apart"] == 0, "both processes have the same models"
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-6)
    assert (tmp_path / "saved" / "selection").is_dir()
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & WATCHED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_first_steps_take_labels_as_they_are(tmp_path):
    settings = {"mode": "ips_posterior", "uniform_steps": 2, "max_steps": 3, "normalize": False, "learning_rate": 1e-3}
    logs = train(bi_encoder(tmp_path / "model"), tmp_path, with_propensities(rows(16)), **settings).state.log_history
    assert [log["weight/negative"] for log in logs[:2]] == [log["weight/positive"] for log in logs[:2]] == [1, 1]
    assert logs[2]["weight/negative"] < 1 < logs[2]["weight/positive"]


def test_normalised_weights_have_mean_1_over_the_pairs_of_a_step(tmp_path):
    """At equal scores every pair costs log 2."""
    model = static_encoder()
    with torch.no_grad():
        model[0].embedding.weight.zero_()
    settings = {"mode": "ips", "max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 4}
    data = with_propensities(rows(8, documents=6, shorter=True))
    log = train(model, tmp_path, data, per_device_train_batch_size=2, **settings).state.log_history[0]
    assert log["relevance/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log["weight/negative"] != pytest.approx(1, abs=0.05)


def test_the_level_starts_at_the_share_of_labels_and_takes_a_part_of_newtons_step(tmp_path):
    data = with_features(rows(32, documents=6))
    trainer = trainer_of(bi_encoder(tmp_path / "model"), tmp_path, data, mode="em", max_steps=1, learning_rate=0.0)
    scores = torch.tensor(scores_of(trainer, list(trainer.train_dataset)))
    assert torch.sigmoid(scores + trainer.level.bias).mean().item() == pytest.approx(64 / 192, abs=0.01)
    start, chances = trainer.level.bias.item(), torch.tensor(BIAS).sigmoid()  # of selection, everywhere
    settings = {"mode": "em", "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 32}
    trainer = train(bi_encoder(tmp_path / "model"), tmp_path, data, **settings)
    gains, judged = (torch.tensor([row[name] for row in data]) for name in ("gains", "judged"))
    r = torch.sigmoid(scores + start)
    hidden = r * (1 - chances) / (1 - r * chances)
    target = torch.where(gains > 0, 1.0, torch.where(judged, 0.0, hidden))
    newton = float((target - r).sum() / (r * (1 - r)).sum())
    assert 1e-3 < abs(newton) < 2
    assert trainer.level.bias.item() == pytest.approx(start + newton / 4, rel=1e-5)


@pytest.mark.parametrize("mode", ["posterior", "em"])
def test_a_level_that_scores_have_left_behind_finds_them(tmp_path, mode):
    settings = {"mode": mode, "num_train_epochs": 12, "learning_rate": 1e-2, "scale": 20.0}
    trainer = trainer_of(static_encoder(), tmp_path, with_features(rows(32, documents=8)), **settings)
    trainer.level.bias.fill_(-20.0)
    trainer.train()
    last = [log for log in trainer.state.log_history if "level" in log][-1]
    assert last["positive/score"] + last["level"] > 1
    assert last["negative/score"] + last["level"] < -1


def test_a_step_of_the_level_is_bounded():
    level = Level(0.0)
    level.move(3.0, 0.0)
    assert level.bias.item() == 0.5
    level.move(-2.0, 4.0)
    assert level.bias.item() == 0.375


def test_evaluation_takes_labels_as_they_are_and_needs_no_provenance(tmp_path):
    held = rows(10, documents=5, seed=4)
    trainer = trainer_of(bi_encoder(tmp_path / "model"), tmp_path, held_out=held, mode="em", max_steps=1)
    metrics = trainer.evaluate()
    scores = torch.tensor(scores_of(trainer, list(trainer.eval_dataset))) + trainer.level.bias.detach()
    gains = torch.tensor([row["gains"] for row in held])
    mask = torch.ones_like(gains, dtype=torch.bool)
    known = em_relevance(scores, gains, mask, selection=torch.zeros_like(scores), judged=mask).mean()
    assert metrics["eval_loss"] == pytest.approx(float(known), rel=1e-5)
    assert "eval_selection/loss" not in metrics


def test_a_stream_trains_with_a_selection_model_of_its_own(tmp_path):
    data = with_features(rows(16, documents=5))
    stream = IterableDataset.from_generator(lambda: iter(data))
    numbers = torch.tensor([document for row in data for document in row["selection_features"]])
    own = FeatureSelection(2, hidden=3).standardise(numbers)
    trainer = train(static_encoder(), tmp_path, stream, selection=own, mode="em", max_steps=2, learning_rate=1e-2)
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[1]["selection/loss"] > 0
    with pytest.raises(ValueError, match="features of a stream cannot be standardised before it is read"):
        trainer_of(static_encoder(), tmp_path, stream, mode="em", max_steps=2)


def test_what_is_saved_can_be_used(tmp_path):
    from sentence_transformers import CrossEncoder

    trainer = train(cross_encoder(tmp_path / "model"), tmp_path / "run", max_steps=2, mode="posterior")
    trainer.save_model()
    again = FeatureSelection.from_pretrained(tmp_path / "run" / "selection")
    assert_close(dict(again.state_dict()), dict(trainer.selection.state_dict()), atol=0, rtol=0)
    pair = [("w1 w2", "w3")]
    assert CrossEncoder(str(tmp_path / "run")).predict(pair) == pytest.approx(trainer.model.predict(pair), abs=1e-6)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "CoupledLoss" in card
    assert "Correcting Pooling Bias" in card


BOTH = with_propensities(with_features(rows(4)))
ALL_RELEVANT = with_features([{**row, "gains": [2.0] + [1.0] * (len(row["documents"]) - 1)} for row in rows(4)])
UNEVEN = with_features(rows(4))
UNEVEN[2] = {**UNEVEN[2], "selection_features": [[1.0]] * len(UNEVEN[2]["documents"])}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (rows(4), {}, "mode official needs a model of selection: give rows selection_features"),
        (rows(4), {"mode": "ips"}, "mode ips needs rows with selection_propensity"),
        (BOTH, {"mode": "em"}, "rows have selection_features and selection_propensity; leave one of the two out"),
        (UNEVEN, {}, "train row 2: 1 selection_features a document, and 2 in the first row"),
        (rows(4), {"selection": "features"}, "a FeatureSelection reads selection_features, which the rows do not have"),
        (with_features(rows(4)), {"selection": "wide"}, "this FeatureSelection reads 3 features a document, got 2"),
        (with_features(rows(4)), {"selection": "text"}, "selection_features, which a cross-encoder does not read"),
        (with_propensities(rows(4)), {"selection": "text"}, "selection is known by selection_propensity"),
        (rows(4), {"selection": "bi"}, "selection must be a cross-encoder or a FeatureSelection"),
        (rows(4), {"selection": "itself"}, "the two models share parameters"),
        (ALL_RELEVANT, {}, "no train list has a relevant and an irrelevant document: there is nothing to learn"),
    ],
)
def test_mistakes_are_told_before_a_weight_moves(tmp_path, data, settings, message):
    model = cross_encoder(tmp_path / "model")
    selection = {
        "features": lambda: FeatureSelection(2),
        "wide": lambda: FeatureSelection(3),
        "text": lambda: cross_encoder(tmp_path / "other"),
        "bi": static_encoder,
        "itself": lambda: model,
        None: lambda: None,
    }[settings.pop("selection", None)]()
    with pytest.raises((ValueError, RowError), match=message):
        trainer_of(model, tmp_path, data, selection=selection, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dual"}, "mode must be one of official, posterior, ratio, ips, ips_posterior, em, got 'dual'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0; the release takes 10"),
        ({"clip": 0.0}, "clip must be above 0 and at most 1, got 0.0"),
        ({"uniform_steps": -1}, "uniform_steps must not be negative, got -1"),
        ({"selection_learning_rate": -1.0}, "selection_learning_rate must be finite and not negative"),
        ({"loss_type": "infonce"}, "one objective, set by mode; leave loss_type=infonce out"),
        ({"in_batch": True}, "in_batch adds documents of which nothing says where they come from"),
        ({"k": 5}, "rank_net has no hyper-parameter 'k'"),
    ],
)
def test_settings_are_checked_where_they_are_typed(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
