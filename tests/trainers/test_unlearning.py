"""The unlearning trainer: direction first, then invariances, references, resume, and errors before any weight moves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from negtune import UnlearningConfig
from negtune.data.completions import RowError, collate, tokenize_row
from negtune.losses.unlearning import FORGET_LOSSES, RETAIN_LOSSES, npo
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.load import load_tokenizer
from negtune.models.reference import AdapterReference, CachedReference, FrozenCopy
from negtune.ops import MissingReferenceError
from negtune.trainers.unlearning import NonFiniteLossError

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def load(folder: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --- direction ---


@pytest.mark.parametrize("loss_type", sorted(FORGET_LOSSES))
def test_forget_falls_and_retain_holds(unlearn, probabilities, knowing_folder, loss_type):
    before = probabilities(load(knowing_folder))
    steps = 40 if loss_type in ("jensun", "idk_nll", "kto", "idk_dpo") else 20
    kwargs = {"layer": 0, "steering": 8.0} if loss_type == "rmu" else None
    trainer = unlearn(loss_type=loss_type, loss_kwargs=kwargs, max_steps=steps, learning_rate=2e-3)
    after = probabilities(trainer.model)
    assert before["forget"] > 0.9
    assert before["retain"] > 0.9
    assert after["forget"] < 0.6 * before["forget"]
    assert after["retain"] > before["retain"] - 0.1


@pytest.mark.parametrize("retain_loss_type", sorted(RETAIN_LOSSES.keys() - {"activation_mse"}))
def test_the_retain_term_is_what_holds(unlearn, probabilities, retain_loss_type):
    held = probabilities(unlearn(retain_loss_type=retain_loss_type, max_steps=12).model)
    unheld = probabilities(unlearn(retain_loss_type="none", max_steps=12).model)
    assert unheld["retain"] < held["retain"] - 0.1


def test_rmu_misdirects_one_layer_of_the_forget_answers_and_keeps_the_others(unlearn, probabilities, knowing_folder):
    settings = {
        "loss_type": "rmu",
        "loss_kwargs": {"layer": 0, "steering": 8.0},
        "trainable": r"layers\.0\.mlp\.down_proj",
        "max_steps": 60,
        "learning_rate": 5e-3,
    }
    holding = {"retain_loss_type": "activation_mse", "retain_loss_kwargs": {"layer": 0}, "retain_weight": 20.0}
    trainer = unlearn(**settings, **holding)
    held = probabilities(trainer.model)
    assert held["forget"] < 0.3
    assert held["retain"] > 0.8
    assert probabilities(unlearn(**settings, retain_loss_type="none").model)["retain"] < held["retain"] - 0.2
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["forget/activation_norm"] > 1.5 * rows[0]["forget/activation_norm"]
    new, old = dict(trainer.model.named_parameters()), dict(load(knowing_folder).named_parameters())
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize("reference", ["adapter", "copy"])
def test_activations_are_compared_with_the_reference(unlearn, knowing_folder, retain_rows, reference):
    """Step 1 of an adapter that is not at 0, against the base (adapter off) or itself (copy), by a hook of our own."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = unlearn(
        loss_type="rmu",
        loss_kwargs={"layer": 0},
        retain_loss_type="activation_mse",
        retain_loss_kwargs={"layer": 0},
        reference=reference,
        forget_weight=0.0,
        trainer_kwargs={"peft_config": config},
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=0.0,
    )
    model, tokenizer = trainer.model, load_tokenizer(knowing_folder)
    caught = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda module, args, out: caught.append(out.detach()))
    total, count = 0.0, 0
    for row in retain_rows:
        ids = tokenize_row(row, tokenizer)
        inputs = torch.tensor([ids["prompt_ids"] + ids["completion_ids"]])
        with torch.no_grad():
            model(input_ids=inputs)
            with model.disable_adapter():
                model(input_ids=inputs)
        on, off = (out[0, len(ids["prompt_ids"]) :] for out in caught[-2:])
        total, count = total + (on - off).square().mean(-1).sum().item(), count + len(on)
    expected = total / count if reference == "adapter" else 0.0
    assert total / count > 1e-3
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def _trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("reference", ["adapter", "cached"])
def test_what_is_trained_stays_so_however_often_the_reference_switches_adapters(
    unlearn, knowing_folder, arrives, reference
):
    model = get_peft_model(load(knowing_folder), LORA) if arrives else None
    kwargs = None if arrives else {"peft_config": LORA}
    pattern = r"layers\.0\.mlp\.down_proj"
    trainer = unlearn(model=model, trainer_kwargs=kwargs, trainable=pattern, reference=reference, train=False)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    wanted = _trained_names(trainer.model)
    assert len(wanted) == 2
    trainer.train()
    assert _trained_names(trainer.model) == wanted
    assert {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])} == wanted
    assert {n for n, p in trainer.model.named_parameters() if p.grad is not None} <= wanted


def test_lora_trains_the_adapter_and_leaves_the_base_alone(unlearn, probabilities):
    trainer = unlearn(trainer_kwargs={"peft_config": LORA}, max_steps=30, learning_rate=1e-2)
    after = probabilities(trainer.model)
    with trainer.model.disable_adapter():
        base = probabilities(trainer.model)
    assert after["forget"] < 0.3
    assert after["retain"] > 0.8
    assert base["forget"] > 0.9
    assert isinstance(trainer.reference, AdapterReference)


def test_qlora_trains_on_a_four_bit_base(unlearn, probabilities, knowing_folder):
    from negtune.models.load import load_model

    model, _ = load_model(knowing_folder, load_in_4bit=True)
    before = probabilities(model)
    trainer = unlearn(model=model, trainer_kwargs={"peft_config": LORA}, max_steps=60, learning_rate=5e-3)
    after = probabilities(trainer.model)
    assert after["forget"] < 0.5 * before["forget"]
    assert after["retain"] > before["retain"] - 0.1


# --- invariance ---


@pytest.mark.parametrize("loss_type", ["npo", "grad_ascent", "kto", "undial"])
@pytest.mark.parametrize(("micro", "accumulate"), [(1, 4), (2, 2)])
def test_micro_batches_change_nothing(unlearn, knowing_folder, loss_type, micro, accumulate):
    settings = {"loss_type": loss_type, "optim": "sgd", "max_steps": 3, "learning_rate": 0.05, "reference": "copy"}
    whole = unlearn(load(knowing_folder, torch.float64), per_device_train_batch_size=4, **settings)
    parts = unlearn(
        load(knowing_folder, torch.float64),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-6, atol=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # RMSNorm is float32 in a float64 model


def test_the_step_loss_is_the_formula(unlearn, knowing_folder, forget_rows, retain_rows):
    """First logged loss against (2/beta) log 2 + token-mean NLL of the retain rows drawn for that step."""
    trainer = unlearn(loss_type="npo", beta=0.5, per_device_train_batch_size=4, max_steps=1)
    model, tokenizer = load(knowing_folder), load_tokenizer(knowing_folder)
    attach_scoring(model)
    logps = completion_logps(model, collate([tokenize_row(row, tokenizer) for row in retain_rows], 0))
    nll = -logps.sum() / (logps != 0).sum()
    assert losses(trainer)[0] == pytest.approx(2 / 0.5 * math.log(2) + nll.item(), abs=1e-4)


def test_the_weight_of_a_side_scales_its_loss(unlearn):
    first = {w: losses(unlearn(forget_weight=w, max_steps=1, retain_loss_type="none"))[0] for w in (1.0, 2.5)}
    assert first[2.5] == pytest.approx(2.5 * first[1.0], rel=1e-5)


# --- references ---


@pytest.mark.parametrize("lora", [False, True])
def test_all_references_give_the_same_run(unlearn, lora):
    kinds = ["cached", "copy", *(["adapter"] if lora else [])]
    runs = {
        kind: losses(unlearn(reference=kind, max_steps=4, trainer_kwargs={"peft_config": LORA} if lora else None))
        for kind in kinds
    }
    for kind in kinds[1:]:
        torch.testing.assert_close(runs[kind], runs["cached"], rtol=1e-5, atol=1e-5)


def test_a_model_that_arrives_with_a_trained_adapter_is_its_own_reference(unlearn, knowing_folder, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(load(knowing_folder), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer = unlearn(model=model, beta=0.1, max_steps=3, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["forget/log_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert rows[2]["forget/log_ratio"] < -0.1
    assert [
        name for name, p in trainer.model.named_parameters() if p.requires_grad and "negtune_reference" in name
    ] == []
    saved = [path.name for path in Path(trainer.args.output_dir, "checkpoint-3").rglob("*") if "reference" in path.name]
    assert saved == [], "the reference adapter knows what was to be forgotten and must not be shipped"
    PeftModel.from_pretrained(load(knowing_folder), Path(trainer.args.output_dir, "checkpoint-3"))


def test_a_head_trained_through_modules_to_save_has_its_frozen_twin_as_reference(unlearn, knowing_folder):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = unlearn(
        loss_type="undial",
        trainer_kwargs={"peft_config": config},
        max_steps=3,
        retain_loss_type="kl",
        reference="adapter",
    )
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["retain/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[2]["retain/kl"] > 1e-4


def test_cached_log_probs_are_reused_by_the_next_run_and_not_by_other_weights(unlearn, tmp_path, knowing_folder):
    settings = {"reference": "cached", "reference_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
    unlearn(**settings)
    (first,) = (tmp_path / "cache").iterdir()
    stamp = first.stat().st_mtime_ns
    unlearn(**settings)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [stamp]
    other = load(knowing_folder)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    unlearn(model=other, **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_second_model_can_be_passed_as_reference(unlearn, knowing_folder):
    trainer = unlearn(trainer_kwargs={"reference": load(knowing_folder)}, max_steps=1)
    assert isinstance(trainer.reference, FrozenCopy)


# --- data ---


def test_streams_train_too(unlearn, probabilities, forget_rows, retain_rows):
    from datasets import Dataset

    data = {
        "forget": Dataset.from_list(forget_rows).to_iterable_dataset().shuffle(seed=1, buffer_size=4),
        "retain": Dataset.from_list(retain_rows).to_iterable_dataset(),
    }
    trainer = unlearn(data=data, max_steps=20, learning_rate=2e-3)
    after = probabilities(trainer.model)
    assert after["forget"] < 0.6
    assert after["retain"] > 0.8
    assert isinstance(trainer.reference, FrozenCopy)


def test_plain_text_rows_train_too(unlearn):
    def rows(names):
        return [{"prompt": f"Q: where is {n}?\nA:", "completion": f" {n} is here"} for n in names]

    trainer = unlearn(data={"forget": rows("ab"), "retain": rows("cde")}, max_steps=10)
    assert trainer.state.log_history[-2]["forget/log_ratio"] < -1


def test_forgetting_without_retain_rows(unlearn, forget_rows):
    trainer = unlearn(data={"forget": forget_rows}, retain_loss_type="none", max_steps=3)
    assert losses(trainer)[2] < losses(trainer)[0]


# --- resume and evaluation ---


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_repeats_the_uninterrupted_one(unlearn, tmp_path, lora):
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    settings |= {"save_strategy": "steps", "save_steps": 3, "loss_type": "idk_dpo", "reference": "cached"}
    kwargs = {"peft_config": LORA} if lora else {}
    straight = unlearn(**settings, output_dir=str(tmp_path / "straight"), trainer_kwargs=dict(kwargs))
    broken = str(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**settings, output_dir=broken, trainer_kwargs={**kwargs, "callbacks": [StopAt(5)]})
    resumed = unlearn(**settings, output_dir=broken, trainer_kwargs=dict(kwargs), resume=True)
    assert losses(resumed) == losses(straight)
    history = [json.loads(line) for line in Path(broken, "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 10))
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_picks_the_best_checkpoint_and_stops_early(unlearn, forget_rows, retain_rows):
    trainer = unlearn(
        train=False,
        max_steps=60,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_separation",
        greater_is_better=True,
        learning_rate=5e-3,
        trainer_kwargs={
            "eval_dataset": {"forget": forget_rows, "retain": retain_rows},
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.02)],
        },
    )
    trainer.train()
    scores = {r["step"]: r["eval_separation"] for r in trainer.state.log_history if "eval_separation" in r}
    best = max(scores, key=scores.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.state.global_step < 60
    assert trainer.evaluate()["eval_separation"] == pytest.approx(scores[best], abs=1e-5)
    assert scores[best] > 0.5


def test_logged_sides_are_apart_and_the_weight_is_npos(unlearn):
    trainer = unlearn(beta=0.1, max_steps=2, per_device_train_batch_size=4, reference="copy")
    first, second = [row for row in trainer.state.log_history if "loss" in row]
    assert [first[f"forget/weight_{q}"] for q in ("p10", "p50", "p90")] == pytest.approx([1, 1, 1], abs=1e-4)
    assert second["forget/weight_p50"] < 1
    assert second["forget/logp"] < first["forget/logp"]
    assert first["retain/kl"] == pytest.approx(0, abs=1e-6)


# --- errors before any weight moves ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "npoo"}, "unknown loss_type 'npoo'; choose one of .*npo"),
        ({"retain_loss_type": "nl"}, "unknown retain_loss_type 'nl'; .*none"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"loss_type": "grad_ascent", "beta": 1.0}, "grad_ascent has no hyper-parameter 'beta'"),
        (
            {"loss_type": "simnpo", "loss_kwargs": {"gama": 1.0}},
            "simnpo has no hyper-parameter 'gama'; it has beta, gamma",
        ),
        ({"retain_per_forget": 0}, "retain_per_forget must be at least 1"),
        ({"retain_weight": -1.0}, "retain_weight must not be negative"),
        ({"overlong": "cut"}, "overlong must be"),
        ({"loss_type": "rmu", "loss_kwargs": {"steering": 0}}, "steering must be positive, got 0"),
        ({"loss_type": "rmu", "loss_kwargs": {"layer": "7"}}, "layer must be a whole number, got '7'"),
    ],
)
def test_wrong_settings_are_refused_by_the_config(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def _with(rows, index, **columns):
    return [{**row, **(columns if i == index else {})} for i, row in enumerate(rows)]


def test_bad_rows_are_named(unlearn, forget_rows, retain_rows):
    empty = [{"role": "assistant", "content": "  "}]
    with pytest.raises(RowError, match="forget row 2: the completion is empty"):
        unlearn(data={"forget": _with(forget_rows, 2, completion=empty), "retain": retain_rows}, train=False)
    with pytest.raises(RowError, match="retain row 1: .*both be text or both be lists"):
        unlearn(data={"forget": forget_rows, "retain": _with(retain_rows, 1, prompt="text")}, train=False)
    no_column = [{"prompt": row["prompt"]} for row in retain_rows]
    with pytest.raises(RowError, match="retain row 0: column 'completion' is missing"):
        unlearn(data={"forget": forget_rows, "retain": no_column}, train=False)
    with pytest.raises(RowError, match="retain row 4 is the same as forget row 3"):
        unlearn(data={"forget": forget_rows, "retain": [*retain_rows, forget_rows[3]]}, train=False)
    bare = [{k: v for k, v in row.items() if k != "alternative"} for row in forget_rows]
    with pytest.raises(RowError, match="forget row 0 has no alternative and this objective needs one"):
        unlearn(data={"forget": bare, "retain": retain_rows}, loss_type="idk_dpo", train=False)
    with pytest.raises(RowError, match="the forget set is empty"):
        unlearn(data={"forget": [], "retain": retain_rows}, train=False)


def test_overlong_rows_are_cut_dropped_or_refused(unlearn, forget_rows, retain_rows, caplog):
    data = {"forget": forget_rows, "retain": retain_rows}
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in unlearn(train=False).train_dataset.forget]
    limit = sorted(lengths)[-1] - 1
    cut = unlearn(data=data, max_length=limit, train=False).train_dataset.forget
    assert [len(r["prompt_ids"]) + len(r["completion_ids"]) for r in cut] == [min(n, limit) for n in lengths]
    assert "cut" in caplog.text
    dropped = unlearn(data=data, max_length=limit, overlong="drop", train=False).train_dataset.forget
    assert len(dropped) == sum(n <= limit for n in lengths)
    with pytest.raises(RowError, match=rf"forget row \d: \d+ tokens are more than max_length={limit}"):
        unlearn(data=data, max_length=limit, overlong="error", train=False)


def test_alternatives_cut_at_max_length_are_counted_or_refused(unlearn, forget_rows, knowing_folder, caplog):
    tokenized = [tokenize_row(row, load_tokenizer(knowing_folder)) for row in forget_rows]
    longest = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in tokenized)
    rows = [{**row, "alternative": [row["alternative"][0], "I do not know " * 20]} for row in forget_rows]
    data = {"forget": rows}
    settings = {"loss_type": "idk_nll", "retain_loss_type": "none", "data": data, "max_length": longest, "train": False}
    unlearn(**settings)
    assert f"forget: 4 alternative answers longer than max_length={longest} cut" in caplog.text
    dropped = unlearn(**settings, overlong="drop").train_dataset.forget
    assert [len(row["alternatives"]) for row in dropped] == [1] * 4
    assert f"forget: 4 alternative answers longer than max_length={longest} dropped" in caplog.text
    data["forget"] = [{**row, "alternative": row["alternative"][int(i == 0) :]} for i, row in enumerate(rows)]
    assert [row["row"] for row in unlearn(**settings, overlong="drop").train_dataset.forget] == [1, 2, 3]
    with pytest.raises(RowError, match=f"forget row 0: an alternative makes it longer than max_length={longest}"):
        unlearn(**settings, overlong="error")


def test_impossible_combinations_are_refused(unlearn, forget_rows, retain_rows, knowing_folder):
    with pytest.raises(ValueError, match="retain_loss_type='nll' needs retain rows"):
        unlearn(data={"forget": forget_rows}, train=False)
    with pytest.raises(ValueError, match="distributions or activations and cached log-probabilities cannot"):
        unlearn(loss_type="undial", reference="cached", train=False)
    with pytest.raises(ValueError, match="reference=adapter needs an adapter"):
        unlearn(reference="adapter", train=False)
    with pytest.raises(ValueError, match="targets lm_head"):
        unlearn(trainer_kwargs={"peft_config": LoraConfig(target_modules=["lm_head"])}, train=False)
    for adapter in (PromptTuningConfig, PrefixTuningConfig):
        settings = adapter(num_virtual_tokens=4, task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match=r"(PROMPT|PREFIX)_TUNING adapters are made of virtual tokens"):
            unlearn(trainer_kwargs={"peft_config": settings}, train=False)
    with pytest.raises(ValueError, match="already carries an adapter"):
        unlearn(model=get_peft_model(load(knowing_folder), LORA), trainer_kwargs={"peft_config": LORA}, train=False)
    with pytest.raises(ValueError, match="layer must be between 0 and 1 for this model, got 7"):
        unlearn(loss_type="rmu", train=False)
    with pytest.raises(ValueError, match="reads layer 0 and the retain objective layer 7; set the same layer"):
        unlearn(loss_type="rmu", loss_kwargs={"layer": 0}, retain_loss_type="activation_mse", train=False)
    with pytest.raises(ValueError, match="nothing that is trained lies at or below layer 0"):
        unlearn(loss_type="rmu", loss_kwargs={"layer": 0}, trainable=r"layers\.1\.", train=False)
    with pytest.raises(ValueError, match="matches none of the 21 trainable parameters"):
        unlearn(trainable="layers.9", train=False)
    with pytest.raises(ValueError, match="is no regular expression"):
        unlearn(trainable="layers[", train=False)
    frozen = load(knowing_folder).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        unlearn(model=frozen, train=False)


def test_weights_that_zero3_splits_are_never_hashed_or_copied(unlearn, monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    for kind in ("cached", "copy"):
        with pytest.raises(ValueError, match=f"reference={kind} needs whole weights and ZeRO-3 splits them"):
            unlearn(reference=kind, train=False)
    with pytest.raises(ValueError, match="reference=cached needs whole weights"):
        unlearn(reference="auto", train=False)


def test_an_output_folder_that_cannot_be_written_is_refused_at_construction(unlearn, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .* cannot be written .*choose another"):
        unlearn(output_dir=str(tmp_path / "file" / "run"), train=False)


def test_a_full_disk_is_refused_at_construction(unlearn, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(OSError, match=r"MiB free and one checkpoint needs about"):
        unlearn(save_strategy="steps", train=False)


@pytest.mark.parametrize("redact", [False, True])
def test_a_non_finite_loss_stops_and_leaves_the_rows(unlearn, tmp_path, redact):
    with pytest.raises(NonFiniteLossError, match="the rows of this batch are in .*nonfinite_step0_rank0.json"):
        unlearn(redact=redact, trainer_kwargs={"forget_loss": lambda forget: forget.sums * torch.inf}, max_steps=2)
    dump = json.loads(Path(tmp_path, "run", "nonfinite_step0_rank0.json").read_text())
    assert len(dump["rows"]["forget"]) == 2
    assert ("texts" in dump) == (not redact)


def test_redacted_runs_write_no_text(unlearn, tmp_path, forget_rows, retain_rows):
    trainer = unlearn(
        redact=True,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        reference="cached",
        trainer_kwargs={"eval_dataset": {"forget": forget_rows, "retain": retain_rows}},
    )
    trainer.save_model()
    secrets = [b"small village", b"lives in", b"Hana"]
    for path in Path(tmp_path, "run").rglob("*"):
        if path.is_file() and path.name not in ("tokenizer.json",):
            assert not any(secret in path.read_bytes() for secret in secrets), path


def test_a_callable_objective_is_used_as_given(unlearn):
    from functools import partial

    named = unlearn(loss_type="npo", beta=0.7, max_steps=3)
    passed = unlearn(loss_type="simnpo", trainer_kwargs={"forget_loss": partial(npo, beta=0.7)}, max_steps=3)
    assert losses(passed) == losses(named)


def test_the_card_names_objective_paper_and_artefact(unlearn):
    trainer = unlearn(trainer_kwargs={"peft_config": LORA}, max_steps=2)
    trainer.save_model()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    for word in ("**npo**", "2404.05868", "adapter", "switching the adapter off", "nll x 1"):
        assert word in card


def test_cached_reference_names_the_missing_row(unlearn, tmp_path, knowing_folder):
    trainer = unlearn(reference="cached", train=False)
    assert isinstance(trainer.reference, CachedReference)
    tokenizer = load_tokenizer(knowing_folder)
    batch = collate([tokenize_row({"prompt": "new", "completion": "row"}, tokenizer)], 0)
    with pytest.raises(KeyError, match="has no reference log-probabilities for a row"):
        trainer.reference.logps(trainer.model, batch)


def test_broken_weights_are_noticed_at_construction(unlearn, knowing_folder):
    model = load(knowing_folder)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite; its weights are broken"):
        unlearn(model=model, train=False)


def test_an_objective_that_did_not_declare_its_reference_stops_before_any_weight_moves(unlearn, knowing_folder):
    model = load(knowing_folder)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(MissingReferenceError, match="pass reference= to the trainer"):
        unlearn(model=model, trainer_kwargs={"forget_loss": lambda forget: forget.log_ratio})
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_evaluation_that_cannot_work_is_refused_at_construction(unlearn, forget_rows, retain_rows):
    with pytest.raises(ValueError, match="load_best_model_at_end needs metric_for_best_model"):
        unlearn(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", train=False)
    with pytest.raises(ValueError, match="needs generated answers"):
        unlearn(metric_for_best_model="eval_forget_quality_x_model_utility", train=False)
    with pytest.raises(ValueError, match="eval_dataset must be"):
        unlearn(trainer_kwargs={"eval_dataset": retain_rows}, train=False)
    broken = [forget_rows[0], {"prompt": "x"}]
    with pytest.raises(RowError, match="forget row 1 has no 'completion'"):
        unlearn(trainer_kwargs={"eval_dataset": {"forget": broken}}, train=False)


def test_a_stream_that_is_resumed_at_its_end_takes_no_step(unlearn, forget_rows, retain_rows):
    from datasets import Dataset

    rows = {"forget": forget_rows, "retain": retain_rows}
    given = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    done, again = (
        unlearn(data={side: Dataset.from_list(r).to_iterable_dataset() for side, r in rows.items()}, **given, **more)
        for more in ({}, {"resume": True})
    )
    assert again.state.global_step == 3
    for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_stream_goes_on_where_it_was(unlearn, tmp_path, forget_rows, retain_rows):
    from datasets import Dataset

    def data():
        streams = {"forget": forget_rows, "retain": [*retain_rows, *retain_rows[:1]][:3]}
        return {side: Dataset.from_list(rows).to_iterable_dataset() for side, rows in streams.items()}

    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    straight = unlearn(**settings, data=data(), output_dir=str(tmp_path / "straight"))
    broken = str(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        unlearn(**settings, data=data(), output_dir=broken, trainer_kwargs={"callbacks": [StopAt(4)]})
    assert losses(unlearn(**settings, data=data(), output_dir=broken, resume=True)) == losses(straight)


@pytest.mark.parametrize("init", ["pissa", True])
def test_the_frozen_twin_leaves_the_policy_alone_and_is_made_anew_each_time(unlearn, knowing_folder, init):
    model = get_peft_model(load(knowing_folder), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init))
    ids = torch.tensor([[11, 12, 13]])
    before = model(input_ids=ids).logits
    unlearn(model=model, train=False)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    first = unlearn(model=model, max_steps=4, learning_rate=1e-2)
    again = unlearn(model=first.model, max_steps=1)
    logged = next(row for row in again.state.log_history if "loss" in row)
    assert logged["forget/log_ratio"] == pytest.approx(0, abs=1e-4)


def test_a_stream_with_workers_is_refused(unlearn, forget_rows, retain_rows):
    from datasets import Dataset

    data = {
        k: Dataset.from_list(v).to_iterable_dataset() for k, v in (("forget", forget_rows), ("retain", retain_rows))
    }
    with pytest.raises(ValueError, match="set dataloader_num_workers to 0"):
        unlearn(data=data, dataloader_num_workers=1, train=False)


@pytest.mark.parametrize(("metric", "greater"), [("eval_forget/probability", False), ("eval_separation", True)])
def test_the_best_checkpoint_is_best_in_the_metrics_own_direction(tmp_path, metric, greater):
    args = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric)
    assert args.greater_is_better is greater
