"""The recipes of per-step credit run end to end from their own YAML, and go on where they were."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import HfArgumentParser
from trl import ModelConfig, get_peft_config

from negtune import AdvantageConfig
from negtune.models.policy import is_peft
from negtune.report import write_report
from negtune.rollouts.sampler import SamplingParams
from negtune.rollouts.store import RecordStore
from tests.recipes.test_recipes import ROOT, launch

pytestmark = pytest.mark.slow
STORES = ("rollouts", "continuations", "steps-binary")


def accuracies(folder) -> dict[str, float]:
    return {arm: m["accuracy"] for arm, m in json.loads((folder / "metrics.json").read_text())["arms"].items()}


def test_per_step_dpo_from_problems_to_pass_at_k(tmp_path):
    done = launch("step_rl/per_step_dpo.py", tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(accuracies(tmp_path)) == ["fine-tuned", "continued SFT", "step_dpo"]
    assert "pairs of" in done.stdout
    drawn = {name: len(RecordStore(tmp_path / "store", name)) for name in STORES}
    assert min(drawn.values()) > 0
    again = launch("step_rl/per_step_dpo.py", tmp_path, "--smoke")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {name: len(RecordStore(tmp_path / "store", name)) for name in drawn} == drawn
    pages = write_report(tmp_path)
    assert "Accuracy on held-out problems: fine-tuned" in (tmp_path / "report.md").read_text()
    assert [p.stem for p in pages[:-2]] == ["likelihood", "before_after"]
    other = launch("step_rl/per_step_dpo.py", tmp_path, "--smoke", "--beta", "0.2")
    assert other.returncode != 0
    assert "is of a run with other settings (beta)" in other.stderr
    assert "minus continued SFT_low" in json.loads((tmp_path / "metrics.json").read_text())["arms"]["step_dpo"]


def vllm_on_a_cpu(monkeypatch) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'negtune[vllm]', or make test")
    for name in ("VLLM_CPU_CI_ENV", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_SIM_MULTI_NUMA", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_two_processes_share_the_stages_and_one_measures(tmp_path, engine, monkeypatch):
    if engine == "vllm":
        vllm_on_a_cpu(monkeypatch)
    flags = ("--smoke", "--engine", engine, "--rates", "1e-5", "1e-4")
    done = launch("step_rl/per_step_dpo.py", tmp_path, *flags, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(accuracies(tmp_path)) == ["fine-tuned", "continued SFT", "step_dpo"]
    assert done.stdout.count("accuracy on validation problems") == 2
    assert len(list(tmp_path.glob("policy/*/done.json"))) == 4
    keys = [record["key"] for record in RecordStore(tmp_path / "store", "continuations")]
    assert len(set(keys)) == len(keys)


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
    "flags", [[], ["--on_policy", "true"], ["--on_policy", "true", "--step_credit", "true", "--engine", "vllm"]]
)
def test_advantages_offline_and_on_policy_are_one_flag_apart(tmp_path, flags, monkeypatch):
    if "vllm" in flags:
        vllm_on_a_cpu(monkeypatch)
    done = launch("step_rl/advantage.py", tmp_path, "--smoke", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(accuracies(tmp_path)) == ["fine-tuned", "continued SFT", "reinforce"]
    stores = list(tmp_path.glob("policy/reinforce-*/rounds")) if flags else [tmp_path / "store"]
    assert stores
    assert all(len(RecordStore(store)) for store in stores)
    if "--step_credit" in flags:
        assert len(RecordStore(next(tmp_path.glob("policy/reinforce-*/credit")), "continuations"))


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


ARMS = ("continued SFT", "per-step DPO", "advantage, labels", "NSR, on-policy", "GRPO (TRL)")
"""One of each way to train."""


def test_the_comparison_runs_and_says_what_pits_cost(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "recipes/step_rl/compare.py", "--output_dir", str(tmp_path), "--smoke"),
            *("--seeds", "1", "2", "--workers", "2", "--curve", "60", "--arms", *ARMS),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "compare.md").read_text()
    for arm in ("do nothing", *ARMS):
        assert f"| {arm} |" in text
    assert "binary: rollouts per pit" in text
    assert "| 60 | " in text
    assert "per-step DPO, 100: " in text
    assert (tmp_path / "curve.png").stat().st_size > 10_000
