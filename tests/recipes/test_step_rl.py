"""The recipes of per-step credit run end to end from their own YAML, and go on where they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from negtune.report import write_report
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
