"""The grid and online DPO, as users run them: table, plot, report, going on after a kill, mistakes in one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from negtune.cli.recipe import parsed
from negtune.records import read_jsonl
from negtune.rollouts.store import RecordStore
from tests.recipes.mistakes import mistake
from tests.recipes.test_recipes import ROOT, launch

GRID = ROOT / "recipes" / "preference" / "grid.py"


def grid(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(GRID), "--output_dir", str(folder), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_grid_compares_its_arms_and_goes_on_where_it_was_stopped(tmp_path):
    flags = ["--smoke", "--arms", "on-policy DPO", "offline DPO", "on-policy best-of-n"]
    done = grid(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = read_jsonl(tmp_path / "runs.jsonl")
    assert len(runs) == 2 + 3 * (2 + 2)  # doing nothing twice; two rates and two seeds of three arms
    table = (tmp_path / "min_length.md").read_text()
    assert all(name in table for name in ("do nothing", "on-policy DPO", "offline DPO", "best/drift", "kl"))
    assert (tmp_path / "frontier_min_length.png").stat().st_size > 10_000
    counts = {run["metrics"].get("samples") for run in runs if run["arm"] != "do nothing"}
    assert counts == {3.0 * 4 * 4}  # every arm may look at as many samples
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    again = grid(tmp_path, *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = [{k: v for k, v in run.items() if k != "seconds"} for run in read_jsonl(tmp_path / "runs.jsonl")]
    assert repeated == [{k: v for k, v in run.items() if k != "seconds"} for run in runs]


@pytest.fixture
def recipe(monkeypatch):
    """The grid's own functions."""
    monkeypatch.syspath_prepend(str(GRID.parent))
    return importlib.import_module("grid"), importlib.import_module("task")


@pytest.mark.parametrize("prompts", [3, 8, 10, 16])
def test_every_arm_has_as_many_prompts_a_step_whatever_the_micro_batch(recipe, tmp_path, prompts):
    functions, task = recipe
    grid = dataclasses.replace(task.read_grid(GRID.with_suffix(".yaml"), arms=None), prompts_per_step=prompts)
    for name, arm in grid.arms.items():
        given = functions.config(grid, {**arm, "rates": [1e-3]}, 1e-3, 0, tmp_path)
        assert given.per_device_train_batch_size <= grid.micro_batch
        rounds = grid.steps if arm.get("steps_per_round") == "all" else 1
        assert given.round_settings(1).prompts_per_round == prompts * rounds, name


def test_a_flag_stands_before_what_a_smoke_run_shrinks(recipe):
    _, task = recipe
    file = GRID.with_suffix(".yaml")
    assert task.read_grid(file, smoke=True, arms=None).model == "tiny"
    given = {"rates": [5e-3], "seeds": [7, 8, 9], "suffix": " Now.", "prompts": "p.jsonl"}
    grid = task.read_grid(file, smoke=True, arms=["RWR"], **given)
    assert {name: getattr(grid, name) for name in given} == given
    assert list(grid.arms) == ["RWR"]


def test_a_rate_may_be_written_without_a_point(recipe, tmp_path):
    _, task = recipe
    file = tmp_path / "grid.yaml"
    file.write_text(GRID.with_suffix(".yaml").read_text().replace("[1.0e-4, 3.0e-4, 1.0e-3]", "[1e-4, 3e-4]"))
    assert task.read_grid(file, arms=None).rates == [1e-4, 3e-4]


def test_an_arm_may_have_what_the_grid_does_not_set(recipe, tmp_path):
    functions, task = recipe
    grid = task.read_grid(GRID.with_suffix(".yaml"), arms=None)
    arm = {"trainer": "preference", "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    given = functions.config(grid, arm, 1e-3, 0, tmp_path)
    assert (given.weight_decay, str(given.lr_scheduler_type)) == (0.1, "SchedulerType.LINEAR")


def test_answers_of_another_draw_are_not_taken_for_those_of_this_one(recipe, tmp_path, chain_folder):
    _, task = recipe
    grid = task.Grid({"a": {"trainer": "preference"}}, model=chain_folder, test_prompts=4, max_tokens=8)
    first = task.Task(grid, tmp_path)
    drawn = first._drawn("test_answers", first.test)
    assert task.Task(grid, tmp_path)._drawn("test_answers", first.test) == drawn
    fewer = task.Task(dataclasses.replace(grid, num_generations=2, max_tokens=5), tmp_path)
    again = fewer._drawn("test_answers", fewer.test)
    assert (len(drawn), len(again)) == (16, 8)
    assert max(len(r.completion_ids) for r in again) <= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "/nowhere.yaml"], "there is no grid file /nowhere.yaml"),
        (["--arms", "DPO"], "--arms 'DPO' is not in"),
        (["--reward", "length"], "reward must be one of min_length, mode_length, one_sentence"),
        (["--prompts", "/nowhere"], "no data folder /nowhere"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(recipe, monkeypatch, capsys, tmp_path, flags, message):
    assert message in mistake(recipe[0].main, monkeypatch, capsys, ["--output_dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "this has ['stepz']"),
        ({"arms": {"a": {"loss_type": "dpo"}}}, "arm 'a' needs trainer: preference or advantage"),
        ({"arms": {"a": {"trainer": "preference", "loss_type": "dpoo"}}}, "unknown loss_type 'dpoo'"),
        ({"arms": {"a": {"trainer": "preference", "losstype": "dpo"}}}, "losstype"),
        ({"arms": {"a": {"trainer": "preference", "num_generations": 8}}}, "arm 'a': num_generations is the same for"),
        ({"arms": {"a": {"trainer": "preference", "beta": "x"}}}, "arm 'a': "),
        ({"arms": {"a": {"trainer": "preference", "pair_selection": "first_pit"}}}, "arm 'a': pair_selection=first"),
        ({"arms": {"a": {"trainer": "preference", "on_policy_fraction": 0.5}}}, "arm 'a': on_policy_fraction below"),
        ({"arms": ["dpo"]}, "a grid needs arms: names"),
        ({"rates": 0.001}, "rates must be numbers, in a list"),
        ({"rates": ["fast"]}, "rates must be numbers, in a list"),
        ({"steps": "x"}, "steps must be a whole number of at least 1, got 'x'"),
        ({"micro_batch": 0}, "micro_batch must be a whole number of at least 1, got 0"),
        ({"seeds": [0.5]}, "seeds and sweep_seed must be whole numbers"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(recipe, monkeypatch, capsys, tmp_path, change, message):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(GRID.with_suffix(".yaml").read_text()), **change}))
    assert message in mistake(
        recipe[0].main, monkeypatch, capsys, ["--output_dir", str(tmp_path), "--grid", str(file), "--smoke"]
    )


def test_a_file_that_is_no_yaml_is_one_line(recipe, monkeypatch, capsys, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("steps: 3\narms: [\n")
    said = mistake(recipe[0].main, monkeypatch, capsys, ["--output_dir", str(tmp_path), "--grid", str(file)])
    assert f"{file}, line 3 is no YAML: expected the node content" in said


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    done = grid(tmp_path, "--grid", "/nowhere.yaml")
    assert done.returncode == 1
    assert "there is no grid file /nowhere.yaml" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_online_dpo_reports_before_and_after_and_goes_on_after_a_kill(tmp_path):
    flags = ["--smoke", "--save_steps", "1", "--save_total_limit", "10"]
    whole = launch("preference/online_dpo.py", tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-3000:]
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["start", "dpo"]
    assert {"reward", "reward_low", "kl", "minus start", "length"} <= set(metrics["arms"]["dpo"])
    assert (tmp_path / "whole" / "report.html").stat().st_size > 10_000
    folder = tmp_path / "killed"
    script = ROOT / "recipes" / "preference" / "online_dpo.py"
    command = [sys.executable, str(script), "--config", str(script.with_suffix(".yaml")), "--output_dir", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-1" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {r["key"] for r in RecordStore(folder / "rounds")}
    done = launch("preference/online_dpo.py", folder, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = [r["key"] for r in RecordStore(folder / "rounds")]
    assert kept <= set(drawn)
    assert sorted(drawn) == sorted(r["key"] for r in RecordStore(tmp_path / "whole" / "rounds"))
    found = json.loads((folder / "metrics.json").read_text())
    assert found["arms"]["dpo"] == metrics["arms"]["dpo"]
    again = launch("preference/online_dpo.py", folder, *flags)  # it has ended, and stays as it is
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((folder / "metrics.json").read_text())["arms"]["dpo"] == metrics["arms"]["dpo"]
    assert not (folder / "checkpoint-4").exists()


def test_a_typed_flag_stands_before_a_smoke_run_and_that_before_the_file(recipe, monkeypatch, tmp_path):
    online = importlib.import_module("online_dpo")
    config = str(ROOT / "recipes" / "preference" / "online_dpo.yaml")

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["x", "--config", config, "--output_dir", str(tmp_path), *flags])
        parser = TrlParser((online.OnlineArguments, online.PreferenceConfig, online.ModelConfig))
        given, args, model = parsed(parser, online.SMOKE)
        return model.model_name_or_path, args.max_steps, args.steps_per_round, given.suffix

    assert parse() == ("smollm2", 32, 1, " Answer with one short sentence.")
    assert parse("--smoke") == ("tiny", 3, 1, "")
    assert parse("--smoke", "--max_steps", "7", "--suffix", " Now.") == ("tiny", 7, 1, " Now.")
    assert parse("--smoke", "--prompts_per_round", "16") == ("tiny", 3, 4, "")  # of 4 rows a step, not 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "length"], "--reward must be one of"),
        (["--engine", "vlm"], "--engine must be hf or vllm"),
        (["--on_policy_fraction", "0.5"], "--pairs are mixed in"),
        (["--num_generations", "1"], "a pair needs at least 2 samples"),
        (["--sample_batch", "0"], "--sample_batch must be at least 1, got 0"),
        (["--mode", "-4"], "--mode must be at least 1, got -4"),
        (["--test_prompts", "1000"], "--test_prompts 1000 holds them all out"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_online_dpo_names_what_cannot_work(recipe, monkeypatch, capsys, tmp_path, flags, message):
    online = importlib.import_module("online_dpo")
    config = str(ROOT / "recipes" / "preference" / "online_dpo.yaml")
    settings = ["--config", config, "--smoke", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
    assert message in mistake(online.main, monkeypatch, capsys, settings)
