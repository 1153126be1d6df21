"""The recipe of the didactic experiments on step-level credit runs end to end."""

import json
import runpy
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "step_rl" / "theory.py"


def test_recipe_writes_numbers_and_a_plot(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--smoke", "--seeds", "1", "--output_dir", str(out)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    planted, forms, stars = (
        json.loads((out / f"{part}.json").read_text()) for part in ("planted", "closed_forms", "star_graph")
    )
    assert len(planted["online"]["outcome @ 16"]["0.9"]) == 1  # one number per seed
    assert "per-step DPO @ 10, 50 responses, 20 steps" in planted["offline"]
    assert {"shortcut L=5 d=3, RFT", "entropy, token 0 down", "tilt, beta 0.1"} <= forms.keys()
    assert stars["over-trained, push-down, on-policy"]["lr"] == 1e-3
    assert (out / "theory.png").stat().st_size > 10_000
