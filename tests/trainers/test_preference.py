"""PreferenceTrainer: direction, agreement with TRL, and what must change nothing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from negtune import PreferenceConfig, PreferenceTrainer
from negtune.data.completions import RowError
from negtune.losses.policy import POLICY_LOSSES
from negtune.losses.preference import PREFERENCE_LOSSES
from negtune.models.load import load_tokenizer
from negtune.models.reference import AdapterReference, CachedReference, FrozenCopy
from negtune.trainers.config import bind_objective

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def load(folder: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="session")
def pairs(forget_rows, retain_rows) -> list[dict]:
    """The model's own answer against another one; it knows the first, so that swapping them is a task."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": "I do not know that" + "." * (i + 1)}],
            "rejected": row["completion"],
        }
        for i, row in enumerate(forget_rows + retain_rows)
    ]


@pytest.fixture
def prefer(tmp_path, knowing_folder, pairs):
    """`prefer(model=..., train=True, data=..., ...)` -> trainer; every other keyword is a setting."""

    def build(model=None, train=True, data=None, trainer_kwargs=None, resume=None, **settings):
        defaults = {
            **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 8},
            **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"},
            **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3},
        }
        trainer = PreferenceTrainer(
            model=model if model is not None else knowing_folder,
            args=PreferenceConfig(**{**defaults, **settings}),
            train_dataset=data or pairs,
            processing_class=load_tokenizer(knowing_folder),
            **(trainer_kwargs or {}),
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return build


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "ipo_mean"])
@pytest.mark.parametrize("adapter", [False, True])
def test_chosen_rises_over_rejected(prefer, pairs, loss_type, adapter):
    settings = {"loss_type": loss_type, "beta": 0.1, "max_steps": 20, "learning_rate": 3e-3 if adapter else 5e-4}
    kwargs = {"eval_dataset": pairs, **({"peft_config": LORA} if adapter else {})}
    trainer = prefer(trainer_kwargs=kwargs, train=False, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_margin"] == pytest.approx(0, abs=1e-4)
    assert after["eval_margin"] > 1
    assert after["eval_accuracy"] == 1
    assert after["eval_chosen/log_ratio"] > 0 > after["eval_rejected/log_ratio"]
    assert after["eval_loss"] < before["eval_loss"]


def test_ipo_stops_at_its_margin_where_dpo_goes_on(prefer, pairs):
    """IPO swings around its optimum at this learning rate, so its mean over 20 steps is looked at."""
    final = {}
    for loss_type in ("dpo", "ipo"):
        trainer = prefer(loss_type=loss_type, beta=0.25, max_steps=60, learning_rate=5e-4, data=pairs[:4])
        margins = [entry["margin"] for entry in trainer.state.log_history if "margin" in entry]
        final[loss_type] = sum(margins[-20:]) / 20
    assert final["ipo"] == pytest.approx(1 / (2 * 0.25), abs=0.3)
    assert final["dpo"] > 2 * final["ipo"]


@pytest.mark.parametrize(
    ("ours", "theirs", "smoothing"),
    [
        *[("dpo", "sigmoid", {}), ("dpo_mean", "sigmoid_norm", {}), ("ipo_mean", "ipo", {}), ("hinge", "hinge", {})],
        *[("apo_zero", "apo_zero", {}), ("apo_down", "apo_down", {}), ("nca", "nca_pair", {})],
        *[("robust_dpo", "robust", {"label_smoothing": 0.2}), ("exo", "exo_pair", {"label_smoothing": 0.2})],
    ],
)
def test_loss_and_update_are_those_of_trl(prefer, pairs, knowing_folder, tmp_path, ours, theirs, smoothing):
    """Two steps of SGD on the same batches, by both trainers; the second starts away from the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    shared = {"beta": 0.3, "per_device_train_batch_size": 8, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
    mine = prefer(load(knowing_folder), loss_type=ours, loss_kwargs=smoothing, **shared)
    peer = DPOTrainer(
        model=load(knowing_folder),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type=theirs,
            **smoothing,
            **{**shared, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "bf16": False},
            **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False},
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=load_tokenizer(knowing_folder),
    )
    peer.train()
    assert losses(mine) == pytest.approx(losses(peer), rel=1e-4)
    start = load(knowing_folder)
    for mine_p, peer_p, start_p in zip(
        mine.model.parameters(), peer.model.parameters(), start.parameters(), strict=True
    ):
        moved = (peer_p - start_p).abs().max().item()
        assert_close(mine_p, peer_p, rtol=0, atol=1e-3 * moved + 1e-8)


@pytest.mark.parametrize(("micro", "accumulate"), [(1, 4), (2, 2)])
def test_micro_batches_change_nothing(prefer, knowing_folder, micro, accumulate):
    settings = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.02, "reference": "copy"}
    whole = prefer(load(knowing_folder, torch.float64), per_device_train_batch_size=4, **settings)
    parts = prefer(
        load(knowing_folder, torch.float64),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    assert_close(losses(parts), losses(whole), rtol=1e-6, atol=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_unequal_micro_batches_still_average_over_pairs(prefer, knowing_folder, pairs):
    """Seven pairs as 2 + 2 + 2 + 1: a mean of means would give the last pair twice its weight."""
    settings = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.02, "reference": "copy", "data": pairs[:7]}
    whole = prefer(load(knowing_folder, torch.float64), per_device_train_batch_size=7, **settings)
    parts = prefer(
        load(knowing_folder, torch.float64),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    assert_close(losses(parts), losses(whole), rtol=1e-6, atol=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [{"reference": "cached"}, {"reference": "copy"}, {"lora": True}, {"lora": True, "gradient_checkpointing": True}],
)
def test_sharing_the_prompt_changes_nothing_but_the_number_of_tokens(prefer, knowing_folder, settings):
    settings = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.02, **settings}
    lora = {"peft_config": LORA} if settings.pop("lora", False) else {}
    runs = {
        mode: prefer(load(knowing_folder, torch.float64), prefix_sharing=mode, trainer_kwargs=lora, **settings)
        for mode in ("on", "off")
    }
    assert_close(losses(runs["on"]), losses(runs["off"]), rtol=1e-6, atol=1e-6)
    for a, b in zip(runs["on"].model.parameters(), runs["off"].model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert runs["on"].state.log_history[0]["tokens/shared"] > 0.2


def test_the_reference_follows_the_settings(prefer):
    assert isinstance(prefer(train=False).reference, CachedReference)
    assert isinstance(prefer(train=False, reference="copy").reference, FrozenCopy)
    assert isinstance(prefer(train=False, trainer_kwargs={"peft_config": LORA}).reference, AdapterReference)


def test_a_resumed_run_is_the_uninterrupted_one(prefer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "per_device_train_batch_size": 2}
    whole = prefer(output_dir=str(tmp_path / "whole"), **settings)
    resumed = prefer(output_dir=str(tmp_path / "again"), resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_streams_train_like_lists(prefer, pairs):
    from datasets import Dataset, IterableDataset

    stream: IterableDataset = Dataset.from_list(pairs).to_iterable_dataset()
    trainer = prefer(data=stream, reference="copy", max_steps=4)
    assert len(losses(trainer)) == 4
    with pytest.raises(ValueError, match="needs the rows beforehand"):
        prefer(data=stream, reference="cached", max_steps=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": None}, "train row 1: column 'rejected' is missing"),
        ({"chosen": [{"role": "assistant", "content": " "}]}, "train row 1: chosen: the completion is empty"),
    ],
)
def test_a_broken_row_is_named(prefer, pairs, change, words):
    with pytest.raises(RowError, match=words):
        prefer(data=[pairs[0], {**pairs[1], **change}], train=False)


def test_settings_that_cannot_work_are_refused_at_construction(prefer):
    with pytest.raises(ValueError, match="unknown loss_type 'dpoo'; choose one of apo_down, .* dpo, .* step_dpo"):
        PreferenceConfig(loss_type="dpoo")
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        PreferenceConfig(beta=0.0)
    with pytest.raises(ValueError, match="objective must take chosen and rejected"):
        prefer(train=False, trainer_kwargs={"objective": lambda forget: forget.sums})


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("slic", {"beta": 0.1}, "slic has no hyper-parameter 'beta'; it has delta"),
        ("chosen_nll", {"beta": 0.1}, "chosen_nll has no hyper-parameter 'beta'; it has none"),
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ("robust_dpo", {"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 0.5, got -0.1"),
        ("exo", {"label_smoothing": 0}, "label_smoothing of exo must be above 0"),
        ("dpop", {"penalty": -1.0}, "penalty must be at least 0 and finite, got -1.0"),
        ("pmpo", {"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
        ("pmpo", {"alpha": math.nan}, "alpha must be between 0 and 1, got nan"),
        ("rwr", {"tau": 0.0}, "tau must be positive, got 0.0"),
    ],
)
def test_a_hyper_parameter_that_cannot_be_is_refused(name, kwargs, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bind_objective({**PREFERENCE_LOSSES, **POLICY_LOSSES}, name, kwargs, "loss_type")


def test_the_ends_of_a_range_that_mean_something_are_allowed():
    for name, kwargs in (("cdpo", {"label_smoothing": 0.0}), ("dpop", {"penalty": 0.0})):
        assert bind_objective(PREFERENCE_LOSSES, name, kwargs, "loss_type").keywords == kwargs
    for alpha in (0.0, 1.0):
        assert bind_objective(POLICY_LOSSES, "pmpo", {"alpha": alpha}, "loss_type").keywords == {"alpha": alpha}


def batches_of(trainer, epoch: int) -> list[list[int]]:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return [batch["rows"].tolist() for batch in loader]


def test_a_token_budget_fills_batches_with_pairs_of_similar_length(prefer, pairs):
    trainer = prefer(train=False, tokens_per_batch=120, prefix_sharing="off")
    rows = trainer.train_dataset
    batches = batches_of(trainer, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    assert batches_of(trainer, 0) == batches
    assert any(batches_of(trainer, epoch) != batches for epoch in range(1, 9))
    for batch in batches:
        longest = max(
            len(rows[i]["prompt_ids"]) + len(rows[i][f"{s}_ids"]) for i in batch for s in ("chosen", "rejected")
        )
        assert len(batch) == 1 or 2 * len(batch) * longest <= 120
    assert max(map(len, batches)) > 1


def test_pairs_of_one_prompt_stay_together(prefer, pairs):
    several = [{**pair, "prompt": pairs[i // 2]["prompt"]} for i, pair in enumerate(pairs)]
    trainer = prefer(train=False, data=several, tokens_per_batch=200, group_by_prompt=True)
    found = {i: number for number, batch in enumerate(batches_of(trainer, 1)) for i in batch}
    assert all(found[i] == found[i + 1] for i in range(0, len(pairs), 2))
    with pytest.raises(ValueError, match="group_by_prompt needs tokens_per_batch"):
        PreferenceConfig(group_by_prompt=True)


def test_a_resumed_run_draws_the_same_token_budget_batches(prefer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "tokens_per_batch": 120}
    whole = prefer(output_dir=str(tmp_path / "whole"), **settings)
    per_epoch = len(whole._batches)
    middle = per_epoch + 1  # inside the second epoch
    assert 1 < middle < 9
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{middle}")
    resumed = prefer(output_dir=str(tmp_path / "again"), resume=checkpoint, **settings)
    assert losses(resumed) == losses(whole)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stream_cannot_be_sorted_into_a_budget(prefer, pairs):
    from datasets import Dataset

    with pytest.raises(ValueError, match="tokens_per_batch needs the rows beforehand"):
        prefer(data=Dataset.from_list(pairs).to_iterable_dataset(), reference="copy", tokens_per_batch=100)


def test_several_evaluation_sets_and_new_rows_are_scored(prefer, pairs):
    sets = {"easy": pairs[:3], "hard": pairs[3:]}
    trainer = prefer(train=False, trainer_kwargs={"eval_dataset": sets})
    metrics = trainer.evaluate()
    assert {"eval_easy_loss", "eval_hard_margin", "eval_hard_accuracy", "eval_easy_chosen/logp"} <= set(metrics)
    same = trainer.evaluate(pairs[:3])
    assert same["eval_margin"] == pytest.approx(metrics["eval_easy_margin"], abs=1e-6)
    with pytest.raises(KeyError, match="not there at construction"):
        trainer.evaluate([{**pairs[0], "chosen": [{"role": "assistant", "content": "Something new."}]}])
    with pytest.raises(ValueError, match="train_dataset must be one set of pairs"):
        prefer(data=sets, train=False)


def test_a_prediction_does_not_leak_into_the_next_evaluation(prefer, pairs):
    trainer = prefer(trainer_kwargs={"eval_dataset": pairs[:3]}, reference="copy")
    before = trainer.evaluate()["eval_margin"]
    trainer.predict(trainer._tokenized_for_evaluation(pairs[3:]))
    assert trainer.evaluate()["eval_margin"] == before
