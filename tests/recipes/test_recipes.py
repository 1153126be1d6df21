"""Every recipe runs end to end from its own YAML on a tiny model, through `accelerate launch` like a user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl import TrlParser

from negtune import UnlearningConfig
from negtune.losses.unlearning import FORGET_LOSSES
from negtune.rollouts.store import RecordStore

ROOT = Path(__file__).resolve().parents[2]


def launch(recipe: str, folder: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    script = ROOT / "recipes" / recipe
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    if processes > 1:  # of which accelerate starts one only on a CPU
        port = str(29500 + os.getpid() % 100)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", port]
    command += [str(script), "--config", str(script.with_suffix(".yaml")), "--output_dir", str(folder), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if processes > 1:  # as cpu.yaml says for one
        env["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_sampling_and_verifying_goes_on_after_it_was_stopped(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'negtune[verify]'")
    done = launch("rollouts/sample_and_verify.py", tmp_path, "--smoke", "--num_generations", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, verifier in (("gsm8k", "MathVerifier"), ("reasoning_gym", "ReasoningGymVerifier")):
        rollouts, verdicts = (list(RecordStore(tmp_path / name, kind)) for kind in ("rollouts", "verdicts"))
        assert len(rollouts) == len(verdicts) == 6
        assert {v["rollout"] for v in verdicts} == {r["key"] for r in rollouts}
        assert f"{verifier}: correct 0" in done.stdout
        torn = next((tmp_path / name).glob("rollouts-*.jsonl"))
        torn.write_bytes(torn.read_bytes()[:-5])  # as after a kill
    again = launch("rollouts/sample_and_verify.py", tmp_path, "--smoke", "--num_generations", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(RecordStore(tmp_path / "gsm8k")) == len(RecordStore(tmp_path / "gsm8k", "verdicts")) == 6


@pytest.mark.slow
def test_sampling_and_verifying_in_two_processes_gives_what_one_gives(tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'negtune[verify]'")
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch("rollouts/sample_and_verify.py", folder, "--smoke", "--num_generations", "2", processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("6 rollouts of 3 prompts") == 2  # printed once for each store
    for name in ("gsm8k", "reasoning_gym"):
        one, two = (list(RecordStore(tmp_path / i / name)) for i in "12")
        assert {r["key"]: r["seed"] for r in one} == {r["key"]: r["seed"] for r in two}
        found = [v["rollout"] for v in RecordStore(tmp_path / "2" / name, "verdicts")]
        assert sorted(found) == sorted(r["key"] for r in one)
        assert len(list((tmp_path / "2" / name).glob("verdicts-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("recipe", "flags", "arms"),
    [
        ("unlearning/forget_facts.py", [], ["before", "after", "merged"]),
        ("unlearning/npo_tofu.py", [], ["oracle", "fine-tuned", "unlearned"]),
        (
            "unlearning/forget_facts.py",
            ["--loss_type", "rmu", "--loss_kwargs", '{"layer": 0}', "--trainable", "layers.0.*down_proj"],
            ["before", "after", "merged"],
        ),
        (
            "unlearning/npo_tofu.py",
            ["--loss_type", "simnpo", "--use_peft", "--load_in_4bit", "--check_4bit"],
            ["oracle", "fine-tuned", "unlearned", "merged", "merged, 4-bit"],
        ),
    ],
)
def test_smoke(tmp_path, recipe, flags, arms):
    done = launch(recipe, tmp_path, "--smoke", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["arms"]) == arms
    for arm in metrics["arms"].values():
        assert 0 < arm["forget/probability"] < 1
    if "oracle" in arms:
        assert 0 <= metrics["arms"][arms[-1]]["forget_quality"] <= 1
        assert metrics["arms"]["oracle"]["model_utility"] >= 0  # a tiny model knows no real authors
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "history.jsonl").exists()


@pytest.mark.parametrize("recipe", ["forget_facts", "npo_tofu"])
@pytest.mark.parametrize("loss_type", sorted(FORGET_LOSSES))
def test_every_objective_is_one_flag_away_and_keeps_its_own_hyper_parameters(recipe, loss_type, tmp_path):
    config = ROOT / "recipes" / "unlearning" / f"{recipe}.yaml"
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "--loss_type", loss_type]
    args, *_ = TrlParser(UnlearningConfig).parse_args_and_config(flags, return_remaining_strings=True)
    assert args.forget_objective().keywords == {}


def test_a_wrong_flag_is_one_line(tmp_path):
    done = launch("unlearning/forget_facts.py", tmp_path, "--smoke", "--loss_type", "npoo")
    assert done.returncode != 0
    own = done.stderr[: done.stderr.find("Traceback")]  # accelerate adds its own unless told --quiet
    assert "error: unknown loss_type 'npoo'; choose one of" in own


def test_a_broken_file_is_one_line_with_its_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": " "}\n')
    done = launch("unlearning/forget_facts.py", tmp_path / "out", "--smoke", "--forget", str(tmp_path / "rows.jsonl"))
    assert done.returncode != 0
    assert "row 1" in done.stderr
    assert "the completion is empty" in done.stderr
