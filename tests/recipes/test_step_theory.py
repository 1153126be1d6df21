"""The recipes of the didactic experiments on step-level credit run end to end."""

import json
import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes" / "step_rl"


def run(name: str, folder: Path, monkeypatch, *flags: str) -> dict:
    script = str(RECIPES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, "--smoke", "--seeds", "1", "--output_dir", str(folder), *flags])
    runpy.run_path(script, run_name="__main__")
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return json.loads((folder / f"{name}.json").read_text())


def test_theory_writes_numbers_and_a_plot(tmp_path, monkeypatch):
    results = run("theory", tmp_path, monkeypatch)
    assert len(results["outcome @ 16"]["to 90 %"]) == 1  # one number per seed
    assert {"50 responses, per-step DPO @ 10", "L=5 d=3, RFT", "entropy, token 0 down"} <= results.keys()


def test_star_graph_writes_numbers_and_a_plot(tmp_path, monkeypatch):
    results = run("star_graph", tmp_path, monkeypatch, "--lrs", "1e-4", "1e-3")
    assert len(results["under-trained"]["after"]) == 1
    arm = results["over-trained, push-down, on-policy"]
    assert f"{arm['lr']:g}" == max(arm["swept"], key=lambda lr: arm["swept"][lr]["success"])
