"""Shared prefixes in training: same losses and weights, fewer tokens."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from negtune.models.load import load_model
from negtune.models.sharing import packs_in_training
from negtune.models.structure import causal_lm

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


SHARED_PREFIX_SETTINGS = {
    "alternatives": {"loss_type": "idk_dpo", "reference": "copy"},
    "adapter off, checkpointing": {"loss_type": "idk_dpo", "lora": True, "gradient_checkpointing": True},
    "cached": {"loss_type": "idk_dpo", "reference": "cached"},
    "accumulated": {
        **{"loss_type": "idk_dpo", "reference": "copy"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    },
    "whole distributions": {"loss_type": "undial", "retain_loss_type": "kl", "reference": "copy"},
    "activations": {
        **{"loss_type": "rmu", "loss_kwargs": {"layer": 1, "steering": 5.0}, "reference": "copy"},
        **{"retain_loss_type": "activation_mse", "retain_loss_kwargs": {"layer": 1}},
    },
}


@pytest.mark.parametrize("name", SHARED_PREFIX_SETTINGS)
def test_sharing_prefixes_changes_nothing_but_the_number_of_tokens(unlearn, knowing_folder, name):
    settings = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    settings |= SHARED_PREFIX_SETTINGS[name]
    lora = {"peft_config": LORA} if settings.pop("lora", False) else {}
    runs = {
        mode: unlearn(load(knowing_folder), prefix_sharing=mode, trainer_kwargs=lora, **settings)
        for mode in ("on", "off")
    }
    torch.testing.assert_close(losses(runs["on"]), losses(runs["off"]), rtol=1e-6, atol=1e-6)
    for a, b in zip(runs["on"].model.parameters(), runs["off"].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    first = {mode: run.state.log_history[0] for mode, run in runs.items()}
    assert first["off"]["tokens/shared"] == 0
    assert first["off"]["tokens/padding"] > 0
    assert first["on"]["tokens/shared"] > 0.1


@pytest.mark.parametrize("settings", [{"bf16": True}, {"load_in_4bit": True}], ids=["bf16", "QLoRA"])
def test_sharing_prefixes_in_low_precision_trains_the_same(unlearn, knowing_folder, settings):
    """The same numbers up to what rounding does to three steps; the direction is that of padded rows."""
    four_bit = settings.pop("load_in_4bit", False)
    runs = {}
    for mode in ("on", "off"):
        torch.manual_seed(0)
        model, _ = load_model(knowing_folder, load_in_4bit=four_bit)
        runs[mode] = unlearn(
            model,
            prefix_sharing=mode,
            trainer_kwargs={"peft_config": LORA},
            **{"optim": "sgd", "max_steps": 3, "learning_rate": 0.05, "loss_type": "idk_dpo"},
            **settings,
        )
    assert runs["on"].state.log_history[0]["tokens/shared"] > 0.1
    allowed = 0.02 if "bf16" in settings else 1e-4
    torch.testing.assert_close(losses(runs["on"]), losses(runs["off"]), rtol=allowed, atol=allowed)
    moved = {mode: trained_vector(run.model) for mode, run in runs.items()}
    assert torch.cosine_similarity(moved["on"], moved["off"], dim=0) > 1 - allowed


def trained_vector(model: torch.nn.Module) -> torch.Tensor:
    """The B matrices of the adapter, which start at zero, so that this is what training did."""
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n and p.requires_grad])


def test_dropout_refuses_sharing_only_where_it_was_demanded(unlearn, knowing_folder):
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    settings = {"trainer_kwargs": {"peft_config": lora}, "disable_dropout": False, "train": False}
    with pytest.raises(ValueError, match="disable_dropout=True"):
        unlearn(prefix_sharing="on", **settings)
    lm = causal_lm(unlearn(prefix_sharing="auto", **settings).model)
    assert not packs_in_training(lm)
    assert lm._prefix_sharing.mode == "auto"  # evaluation has no dropout
