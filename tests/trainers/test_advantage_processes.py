"""AdvantageTrainer in two gloo processes: the same completions, losses and weights as in one, also after a resume."""

from __future__ import annotations

import json

import pytest

from negtune.rollouts.store import RecordStore
from tests.launching import run_script

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from negtune import AdvantageConfig, AdvantageTrainer, HFSampler
from negtune.models.load import load_tokenizer

out, folder, batch, kind, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
questions = ["Walk to Rome.", "Walk to Oslo.", "Walk to Lima.", "Walk to Perth."]
rows = [
    {"prompt": q, "steps": ["ok", "no", "ok", "bad"][: 2 + i], "step_advantages": [1.0, -1.0, None, -0.5][: 2 + i]}
    for i, q in [(i % 3, questions[i % 4]) for i in range(8)]
]

def good(prompts, completions, **columns):
    return [None if c.startswith("no") else float(c.endswith("good")) for c in completions]

def steps(prompts, completions, steps, **columns):
    return [[-1.0 if "no" in s else 0.25 for s in texts] for texts in steps]

online = kind == "online"
trainer = AdvantageTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
    args=AdvantageConfig(
        output_dir=out, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=4,
        learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to="none",
        save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True, seed=3, num_generations=4,
        max_completion_length=24, steps_per_round=2, loss_type="clipped" if online else "reinforce",
        max_unscored=0.9, eval_num_generations=4, dynamic_sampling=online, max_empty_rounds=100,
        baseline="moving_average" if online else "none",
    ),
    train_dataset=[{"prompt": q} for q in questions] if online else rows,
    eval_dataset=[{"prompt": q} for q in questions] if online else rows[:5],
    processing_class=load_tokenizer(folder),
    **({"sampler": HFSampler, "reward_funcs": good, "step_credit": steps} if online else {}),
)
trainer.train(resume_from_checkpoint=resume or None)
metrics = trainer.evaluate()
if PartialState().is_main_process:
    history = [row for row in trainer.state.log_history if "loss" in row]
    result = {
        "world": PartialState().num_processes,
        "losses": [row["loss"] for row in history],
        "rewards": [row.get("rounds/reward") for row in history],
        "gradients": [row["negative/logp"] for row in history],
        "weights": sum(p.detach().abs().sum().item() for p in trainer.model.parameters()),
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "runtime" not in k},
    }
    json.dump(result, open(f"{out}/result.json", "w"))
PartialState().destroy_process_group()  # gloo aborts at exit now and then without it
"""


@pytest.fixture
def launch(tmp_path, chain_folder):
    def run(processes: int, batch: int, kind: str, name: str, resume: str = "") -> dict:
        out = tmp_path / name
        arguments = (out, chain_folder, batch, kind, resume)
        run_script(SCRIPT, tmp_path, *arguments, processes=processes, first_port=29300)
        return json.loads((out / "result.json").read_text())

    return run


@pytest.mark.parametrize("kind", ["offline", pytest.param("online", marks=pytest.mark.slow)])
def test_two_processes_are_one(launch, tmp_path, kind):
    """Online: the same prompts, noise, completions (float64), rewards, refills and running baseline."""
    one, two = launch(1, 8, kind, "one"), launch(2, 4, kind, "two")
    assert (one["world"], two["world"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-7)
    assert two["rewards"] == one["rewards"]
    assert two["gradients"] == pytest.approx(one["gradients"], rel=1e-6)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
    if kind == "online":
        found = [
            {
                r["key"][:0] + str((r["prompt"], r["seed"])): r["completion_ids"]
                for r in RecordStore(tmp_path / n / "rounds")
            }
            for n in ("one", "two")
        ]
        assert found[0] == found[1]
        resumed = launch(2, 4, kind, "again", str(tmp_path / "two" / "checkpoint-3"))
        assert resumed["losses"] == pytest.approx(two["losses"], rel=1e-9)
        assert resumed["weights"] == pytest.approx(two["weights"], rel=1e-12)
