"""RefreshNegatives: which lists a step is trained on, before and behind a refresh and after an interruption."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")

from negtune.data.retrieval import RetrievalTask, synthetic_retrieval
from negtune.models.tiny_encoder import tiny_encoder
from negtune.records import read_jsonl
from negtune.retrieval.choice import SimANS, mine_negatives
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import mine, read_lists, to_rows
from negtune.retrieval.negatives import PercentOfPositive, RankWindow, RelativeMargin
from negtune.retrieval.retrievers import DenseRetriever, RunRetriever
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from negtune.trainers.refresh import RefreshNegatives
from tests.launching import run_script
from tests.retrieval.tiny_rankers import cross_encoder, rows

ROOT = str(Path(__file__).resolve().parents[2])
TASK = synthetic_retrieval(n_topics=5, queries_per_topic=4)
MINED = {"n_documents": 6, "max_positives": 2, "positives": "guaranteed"}


def config(folder, **settings):
    fixed = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1}
    fixed |= {"per_device_train_batch_size": 4, "loss_type": "infonce", "max_steps": 6, "learning_rate": 3e-3}
    return RankingConfig(output_dir=str(folder), **{**fixed, **settings})


def first_lists(model, task=TASK, **settings):
    return mine(task, [DenseRetriever(model, task.corpus)], **{**MINED, **settings}).lists


def refreshed(folder, model=None, task=TASK, every=None, mined=None, retrievers=(), rules=None, **settings):
    model = tiny_encoder() if model is None else model
    lists = first_lists(model, task, **(mined or {}))
    trainer = RankingTrainer(model, config(folder, **settings), to_rows(lists))
    again = {**MINED, **(mined or {}), **(rules or {})}
    refresh = RefreshNegatives(trainer, task, lists, **(every or {"every_steps": 2}), retrievers=retrievers, **again)
    trainer.add_callback(refresh)
    return trainer, refresh


def assert_same(first, second):
    for (name, value), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=0, rtol=0, msg=name)


def watched(trainer):
    """Texts of the lists of every optimiser step, by query."""
    seen, compute = [], trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, items = compute(*args)
        if batches:
            seen.append([])
        for batch in batches:
            lists, tokens = batch["lists"], batch["features"][1]["input_ids"]
            texts = [trainer.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
            for row, places, mask in zip(batch["rows"].tolist(), lists["documents"], lists["mask"], strict=True):
                seen[-1].append((row, [texts[place] for place in places[mask].tolist()]))
        return batches, items

    trainer.get_batch_samples = get_batch_samples
    return seen


@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_step_is_trained_on_the_lists_of_the_last_refresh(tmp_path, accumulated):
    """Also the batch that the data loader had made before it."""
    trainer, _ = refreshed(tmp_path, gradient_accumulation_steps=accumulated, per_device_train_batch_size=2)
    seen = watched(trainer)
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "lists").iterdir())] == [f"step-{i}.jsonl" for i in (0, 2, 4)]
    files = {step: read_lists(tmp_path / "lists" / f"step-{step}.jsonl") for step in (0, 2, 4)}
    assert len(seen) == 6
    differ = 0
    for step, lists in enumerate(seen):
        for row, texts in lists:
            assert texts == files[step // 2 * 2][row].documents, (step, row)
            differ += texts != files[max(0, step // 2 * 2 - 2)][row].documents
    assert differ > 5


def test_lists_are_those_that_mining_with_the_model_of_that_step_gives(tmp_path):
    trainer, _ = refreshed(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")
    expected = mine(TASK, [DenseRetriever(model, TASK.corpus, name="dense@2")], **MINED, seed=2).lists
    found = read_lists(tmp_path / "lists" / "step-2.jsonl")
    assert [one.document_ids for one in found] == [one.document_ids for one in expected]
    assert [one.ranks for one in found] == [one.ranks for one in expected]
    assert list(found[0].ranks) == ["dense@2"]


@pytest.mark.parametrize(
    "chosen",
    [
        {"rules": [RelativeMargin("dense", 0.02)]},
        {"select": SimANS("dense", 200.0, -0.1)},
        pytest.param(
            {"rules": [PercentOfPositive("dense", 0.9, shift=1.0), RankWindow("other", skip=1)]}, marks=pytest.mark.slow
        ),
        pytest.param({"by": "dense"}, marks=pytest.mark.slow),
    ],
    ids=["margin", "simans", "percent", "by"],
)
def test_rules_hold_at_a_refresh_by_the_scores_of_the_model_as_it_is_then(tmp_path, chosen):
    """The same rules on the model of the checkpoint, by hand; they do take something out, or change what is chosen."""
    from sentence_transformers import SentenceTransformer

    ids = list(TASK.corpus)
    other = RunRetriever({q: dict.fromkeys([*ids[::7], *TASK.positives(q)], 1.0) for q in TASK.queries}, "other")
    settings = {**MINED, "depth": 12, **chosen}
    more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = refreshed(tmp_path, mined={"depth": 12}, rules=chosen, retrievers=[other], **more)
    trainer.train()
    model = SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu")
    retrievers = [DenseRetriever(model, TASK.corpus), other]
    expected = mine_negatives(TASK, retrievers, score=scorer(model), scorer="dense", **settings, seed=2)
    found = read_lists(tmp_path / "lists" / "step-2.jsonl")
    assert [one.document_ids for one in found] == [one.document_ids for one in expected.lists]
    assert all(None not in one.scores["dense@2"] for one in found)
    plain = mine(TASK, retrievers, **{**MINED, "depth": 12}, seed=2).lists
    assert [one.document_ids for one in found] != [one.document_ids for one in plain]


def test_training_is_that_of_two_trainers_one_behind_the_other(tmp_path):
    """The second begins where the first has stopped, with rows of the mined lists."""
    whole, _ = refreshed(tmp_path / "whole", max_steps=4)
    whole.train()
    model = tiny_encoder()
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = RankingTrainer(model, config(tmp_path / "parts", **save), to_rows(first_lists(model)))
    first.train()
    lists = read_lists(tmp_path / "whole" / "lists" / "step-2.jsonl")
    second = RankingTrainer(tiny_encoder(), config(tmp_path / "parts", **save), to_rows(lists))
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same(whole, second)
    with pytest.raises(AssertionError):
        assert_same(whole, first)


@pytest.mark.parametrize("stopped", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stopped):
    """Stopped in the moment of a refresh, and between two."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _ = refreshed(tmp_path, **settings)
    whole.train()
    (tmp_path / "lists" / "step-4.jsonl").write_text("what a run that was stopped had not written")
    again, _ = refreshed(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped}"))
    assert_same(whole, again)
    changed = [row for row in read_jsonl(tmp_path / "history.jsonl") if "refresh/changed" in row]
    assert [row["step"] for row in changed] == [2, 4]
    (tmp_path / "lists" / "step-2.jsonl").unlink()
    again, _ = refreshed(tmp_path, **settings)
    if stopped == 2:  # the weights are those of the step: its lists can be mined again
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same(whole, again)
        return
    with pytest.raises(FileNotFoundError, match="step-2.jsonl is missing: it has the lists of step 2; resume in the"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_epochs_are_counted_in_optimiser_steps(tmp_path):
    """20 queries in batches of 4, two of which are a step: 3 steps an epoch."""
    trainer, refresh = refreshed(
        tmp_path, every={"every_epochs": 2}, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=4
    )
    trainer.train()
    assert refresh.every_steps == 6
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == ["step-0.jsonl", "step-6.jsonl"]


def test_what_a_refresh_did_is_logged(tmp_path):
    trainer, refresh = refreshed(tmp_path, max_steps=3)
    before = refresh.lists
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "refresh/changed" in row]
    new = [
        document not in old.document_ids
        for old, one in zip(before, refresh.lists, strict=True)
        for document, gain in zip(one.document_ids, one.gains, strict=True)
        if gain == 0
    ]
    assert row["refresh/changed"] == pytest.approx(sum(new) / len(new))
    assert 0 < row["refresh/changed"] < 1
    assert row["refresh/kept"] == 0
    assert row["refresh/seconds"] > 0
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [1, 2, 3]  # that of the step of the refresh too


def test_a_query_without_a_new_list_keeps_its_own(tmp_path):
    """Only what is retrieved counts, and at the refresh nothing of the first query is."""
    model = tiny_encoder()
    lists = first_lists(model)
    trainer = RankingTrainer(model, config(tmp_path, max_steps=3), to_rows(lists))
    wanted = {query_id: TASK.positives(query_id) for query_id in list(TASK.queries)[1:]}
    refresh = RefreshNegatives(trainer, TASK, lists, every_steps=2, n_documents=6, depth=5, seed=7)
    trainer.add_callback(refresh)
    refresh._mined = lambda step: mine(TASK, [RunRetriever({q: dict(found) for q, found in wanted.items()}, "some")])
    trainer.train()
    assert refresh.lists[0] == lists[0]
    assert all(one.ranks.keys() == {"some"} for one in refresh.lists[1:])
    (row,) = [row for row in trainer.state.log_history if "refresh/kept" in row]
    assert row["refresh/kept"] == pytest.approx(1 / 20)


def test_the_model_is_neither_pickled_nor_copied_for_the_name_of_a_cache(tmp_path, monkeypatch):
    model = tiny_encoder()
    asked, plain = [], type(model).__reduce_ex__

    def reduce(self, protocol):
        asked.append(protocol)
        return plain(self, protocol)

    lists = first_lists(model)
    trainer = RankingTrainer(model, config(tmp_path), to_rows(lists))
    monkeypatch.setattr(type(model), "__reduce_ex__", reduce)
    refresh = RefreshNegatives(trainer, TASK, lists, every_steps=2)
    assert trainer.train_dataset.select([1])[0]["documents"] == refresh.lists[1].documents
    assert asked == []


@pytest.mark.slow
def test_other_retrievers_are_asked_too(tmp_path):
    ids = list(TASK.corpus)
    other = RunRetriever({query_id: {ids[-1]: 1.0} for query_id in TASK.queries}, "other")
    trainer, refresh = refreshed(tmp_path, retrievers=[other], max_steps=3)
    trainer.train()
    assert {name for one in refresh.lists for name in one.ranks} == {"dense@2", "other"}
    assert any(one.ranks["other"] != [None] * len(one.document_ids) for one in refresh.lists)


@pytest.mark.slow
def test_redacted_lists_have_no_texts_and_can_be_resumed_from(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "redact": True}
    whole, _ = refreshed(tmp_path, **settings)
    whole.train()
    text = (tmp_path / "lists" / "step-2.jsonl").read_text()
    assert not [one for one in [*TASK.queries.values(), *TASK.corpus.values()] if one in text]
    again, _ = refreshed(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(whole, again)


@pytest.mark.slow
def test_a_new_run_in_the_same_folder_leaves_no_lists_of_the_old_one(tmp_path):
    refreshed(tmp_path)[0].train()
    refreshed(tmp_path, max_steps=2)[0].train()
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == ["step-0.jsonl"]


SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import PartialState
from negtune.models.tiny_encoder import tiny_encoder
from tests.trainers.test_refresh import refreshed

out, batch = Path(sys.argv[1]), int(sys.argv[2])
trainer, refresh = refreshed(
    out, tiny_encoder().double(), per_device_train_batch_size=batch, optim="sgd", learning_rate=0.5, max_steps=5
)
trainer.train()
weights = sum(float(p.double().abs().sum()) for p in trainer.model.parameters())
if PartialState().is_main_process:
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    ids = [one.document_ids for one in refresh.lists]
    json.dump({{"losses": losses, "weights": weights, "ids": ids}}, open(out / "result.json", "w"))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    found = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        out.mkdir()
        run_script(SCRIPT.format(root=ROOT), tmp_path, out, batch, processes=processes, first_port=30700)
        found.append(json.loads((out / "result.json").read_text()))
    assert found[0]["ids"] == found[1]["ids"]
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-6)
    assert found[1]["weights"] == pytest.approx(found[0]["weights"], rel=1e-9)


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "mined", "settings", "message"),
    [
        ({}, {}, {}, "give every_steps or every_epochs, at least 1"),
        ({"every_steps": 2, "every_epochs": 1}, {}, {}, "give every_steps or every_epochs, at least 1"),
        ({"every_steps": 0}, {}, {}, "at least 1, got every_steps=0"),
        ({"every_steps": 2}, {"n_documents": 1}, {}, "a list needs a positive and a negative"),
        ({"every_steps": 2}, {"width": 3}, {}, "settings of mine: .*width"),
        ({"every_steps": 2}, {"n_documents": 4}, {"loss_type": "pg_rank", "k": 5}, "n_documents=4 is shorter than"),
        ({"every_steps": 2}, {"rules": [RelativeMargin("bm25")]}, {}, "rules read the scores of 'bm25', and there are"),
        ({"every_steps": 2}, {"select": SimANS("x", 1.0)}, {}, "rules read the scores of 'x', and there are"),
        ({"every_steps": 2}, {"by": "dense", "select": "random"}, {}, "orders select='top' only"),
        ({"every_steps": 2}, {"retrievers": [RunRetriever({}, "dense")]}, {}, "'dense' is the model that is trained"),
        ({"every_steps": 2}, {}, {"dataloader_num_workers": 1}, "workers that load data keep the old lists"),
        ({"every_steps": 2}, {}, {"loss_type": "pg_rank", "k": 3, "kl_weight": 0.1}, "kl_weight and objectives with a"),
    ],
)  # fmt: skip
def test_settings_are_refused_at_construction(tmp_path, every, mined, settings, message):
    model = tiny_encoder()
    lists = first_lists(model)
    trainer = RankingTrainer(model, config(tmp_path, **settings), to_rows(lists))
    with pytest.raises(ValueError, match=message):
        RefreshNegatives(trainer, TASK, lists, **every, **mined)


def test_lists_of_another_set_are_refused(tmp_path):
    model = tiny_encoder()
    lists = first_lists(model)
    trainer = RankingTrainer(model, config(tmp_path), to_rows(lists))
    with pytest.raises(ValueError, match="train row 0 is not list 0; make the train set of the same lists"):
        RefreshNegatives(trainer, TASK, lists[::-1], every_steps=2)
    other = first_lists(model, n_documents=5)
    with pytest.raises(ValueError, match=r"train row 0 \(query q0-0-0\) has other documents than its list"):
        RefreshNegatives(trainer, TASK, other, every_steps=2)
    part = TASK.only(list(TASK.queries)[1:])
    with pytest.raises(ValueError, match="the task lacks query q0-0-0 of the lists"):
        RefreshNegatives(trainer, part, lists, every_steps=2)


def test_what_cannot_be_mined_again_is_refused(tmp_path):
    from datasets import IterableDataset

    model = tiny_encoder()
    lists = first_lists(model)
    stream = IterableDataset.from_generator(lambda: iter(to_rows(lists)))
    with pytest.raises(ValueError, match="the lists of a stream cannot be mined again"):
        RefreshNegatives(RankingTrainer(model, config(tmp_path), stream), TASK, lists, every_steps=2)
    trainer = RankingTrainer(cross_encoder(tmp_path / "cross"), config(tmp_path), rows(4))
    with pytest.raises(ValueError, match="searched with a bi-encoder, and this trainer has a cross_encoder"):
        RefreshNegatives(trainer, TASK, lists, every_steps=2)
    noted = [{**row, "note": "a"} for row in to_rows(lists)]
    trainer = RankingTrainer(
        tiny_encoder(), config(tmp_path, loss_type="pg_rank", k=3, estimator="loo"), noted,
        reward_fn=lambda queries, rankings, **columns: [0.0] * len(rankings),
    )  # fmt: skip
    with pytest.raises(ValueError, match="train rows have note, which mined lists lack"):
        RefreshNegatives(trainer, TASK, lists, every_steps=2)


def test_what_is_known_to_be_relevant_is_no_negative_of_the_batch_after_a_refresh_either(tmp_path):
    model = tiny_encoder()
    lists = first_lists(model)
    rows = to_rows(lists, task=TASK)
    trainer = RankingTrainer(model, config(tmp_path, loss_type="masked_infonce", k=None, max_steps=4), rows)
    refresh = RefreshNegatives(trainer, TASK, lists, every_steps=2, n_documents=4)
    trainer.add_callback(refresh)
    trainer.train()
    found = refresh.rows(trainer.train_dataset["row"])
    assert [row["known_positives"] for row in found] == [row["known_positives"] for row in rows]
    assert any(set(row["known_positives"]) - set(row["document_ids"]) for row in found)


def test_what_a_rule_took_out_is_no_negative_of_the_batch_either(tmp_path):
    """Before the first refresh, behind it, and in a run that is resumed."""
    strict = {"rules": [RelativeMargin("dense", 0.3)], "depth": 12}

    def trainer(**more):
        model = tiny_encoder()
        mined = mine_negatives(
            TASK, [DenseRetriever(model, TASK.corpus)], score=scorer(model), scorer="dense", **{**MINED, **strict}
        )
        settings = {"loss_type": "masked_infonce", "k": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        rows = to_rows(mined, task=TASK)
        found = RankingTrainer(model, config(tmp_path, **settings, **more), rows)
        refresh = RefreshNegatives(found, TASK, mined, every_steps=2, **{**MINED, **strict})
        found.add_callback(refresh)
        assert [row["known_positives"] for row in found.train_dataset] == [row["known_positives"] for row in rows]
        return found, refresh, mined

    first, refresh, mined = trainer()
    assert mined.dropped
    first.train()
    known = [row["known_positives"] for row in refresh.rows(first.train_dataset["row"])]
    assert refresh.dropped
    assert refresh.dropped != mined.dropped
    for one, named in zip(refresh.lists, known, strict=True):
        assert set(named) >= refresh.dropped.get(one.query_id, {}).keys() - set(one.document_ids)
    resumed, again, _ = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [row["known_positives"] for row in again.rows(resumed.train_dataset["row"])] == known


def test_lists_without_what_was_dropped_are_not_those_of_the_rows(tmp_path):
    model = tiny_encoder()
    rules = {"rules": [RelativeMargin("dense", 0.3)], "score": scorer(model), "scorer": "dense"}
    mined = mine_negatives(TASK, [DenseRetriever(model, TASK.corpus)], **{**MINED, "depth": 12}, **rules)
    trainer = RankingTrainer(model, config(tmp_path, loss_type="masked_infonce", k=None), to_rows(mined, task=TASK))
    with pytest.raises(ValueError, match=r"train row 0 \(query .*\) has other known_positives .* give the Mined that"):
        RefreshNegatives(trainer, TASK, mined.lists, every_steps=2, **MINED)


@pytest.mark.filterwarnings("ignore::negtune.trainers.coupled.CoupledWarning")
def test_a_trainer_whose_lists_say_more_is_refused(tmp_path):
    """The rows of CET have to say where documents come from, which mined lists do not."""
    from negtune.trainers.coupled import CoupledConfig, CoupledTrainer

    lists = first_lists(tiny_encoder())
    args = CoupledConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no")
    trainer = CoupledTrainer(tiny_encoder(), args, to_rows(lists), selection=cross_encoder(tmp_path / "cross"))
    with pytest.raises(ValueError, match="only RankingTrainer takes new lists as it runs, got a CoupledTrainer"):
        RefreshNegatives(trainer, TASK, lists, every_steps=2)


def test_a_task_that_is_small_is_enough(tmp_path):
    """Fewer documents than a list may have."""
    task = RetrievalTask({"a": "ba", "b": "de"}, {"q": "ba"}, {"q": {"a": 1.0}})
    trainer, refresh = refreshed(tmp_path, task=task, max_steps=3, per_device_train_batch_size=1)
    trainer.train()
    assert [sorted(one.document_ids) for one in refresh.lists] == [["a", "b"]]
