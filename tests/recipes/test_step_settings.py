"""The recipes of per-step credit take settings that decide something, and refuse those that would mislead."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import HfArgumentParser
from trl import ModelConfig, get_peft_config

from negtune import AdvantageConfig
from negtune.models.policy import is_peft
from negtune.rollouts.sampler import SamplingParams
from tests.recipes.test_recipes import ROOT


def test_models_are_loaded_as_the_command_line_says(tmp_path, monkeypatch, chain_folder):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'negtune[quant]'")
    monkeypatch.syspath_prepend(ROOT / "recipes" / "step_rl")
    from models import Models  # ty: ignore[unresolved-import]

    lora = {"use_peft": True, "lora_target_modules": "all-linear"}
    models = Models(chain_folder, ModelConfig(load_in_4bit=True, dtype="bfloat16", **lora), "hf", 4)
    model, tokenizer = models.load()
    assert model.is_loaded_in_4bit
    assert model.dtype == torch.bfloat16
    get_peft_model(model, get_peft_config(models.settings)).save_pretrained(tmp_path)
    policy, _ = models.load(tmp_path)
    assert is_peft(policy)
    assert policy.get_base_model().is_loaded_in_4bit
    assert (
        models.sampler(policy, tokenizer, "trained")
        .sample(["a"], params=SamplingParams(max_tokens=2))[0]
        .completion_ids
    )
    assert Models(chain_folder, ModelConfig(dtype="float32"), "hf", 4).load()[0].dtype == torch.float32


@pytest.mark.parametrize(
    "changed",
    [
        *({"kl_weight": 0.5}, {"reduction": "row_sum"}, {"step_weight": 2.0}, {"positive_guard": "stop"}),
        *({"max_length": 99}, {"optim": "sgd"}, {"top_p": 0.9}, {"adam_beta2": 0.9}),
    ],
)
def test_a_trained_arm_is_not_taken_for_one_of_other_settings(tmp_path, monkeypatch, chain_folder, changed):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "step_rl")
    from arms import Arms  # ty: ignore[unresolved-import]
    from models import Models  # ty: ignore[unresolved-import]
    from stages import StepArguments  # ty: ignore[unresolved-import]

    def trained(mode=None, **settings):
        args = AdvantageConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
        models = Models(chain_folder, ModelConfig(), "hf", 4)
        arms = Arms(StepArguments(), args, models, None, tmp_path, False, mode or {"on_policy": False})
        return arms.trained(None, args, 1e-4, tmp_path / "policy")

    with pytest.raises(TypeError, match="not callable"):  # it would train
        trained()
    (tmp_path / "policy" / "done.json").write_text("7")
    assert trained() == trained(logging_steps=1, save_steps=9, report_to="none") == 7
    with pytest.raises(ValueError, match=f"other settings .{next(iter(changed))}"):
        trained(**changed)
    with pytest.raises(ValueError, match="other settings .on_policy"):
        trained({"on_policy": True})


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--engine", "vlm", "--engine vlm is none of hf, vllm"),
        ("--strategy", "binry", "strategy must be"),
        ("--split", "words", "--split words is none of"),
        ("--num_rollouts", "0", "num_rollouts"),
        ("--best_of", "9", "best_of=9 needs as many rollouts"),
        ("--best_of", "5", "best_of=5 needs the values of all states"),
        ("--rule", "argmin", "rule=argmin needs the values of all states"),
        ("--samples", "0", "--samples must be at least 1"),
    ],
)
def test_settings_are_refused_before_anything_is_trained(tmp_path, monkeypatch, flag, value, said):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "step_rl")
    from stages import StepArguments  # ty: ignore[unresolved-import]

    with pytest.raises(ValueError, match=said):
        HfArgumentParser(StepArguments).parse_args_into_dataclasses([flag, value])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "per-step DPOO"], "'per-step DPOO' is none of 'continued SFT'"),
        (["--seeds", "0", "1"], "--seeds 0 chose the rates"),
        (["--seeds", "1", "1"], "name each number once"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_a_comparison_that_would_mislead_is_refused(tmp_path, monkeypatch, flags, said):
    recipe = runpy.run_path(str(ROOT / "recipes" / "step_rl" / "compare.py"))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output_dir", str(tmp_path), *flags])
    with pytest.raises(ValueError, match=said):
        recipe["main"]()
