"""PreferenceTrainer on fresh samples in two gloo processes: prompts, seeds, samples, pairs and weights of one."""

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
from negtune import PreferenceConfig, PreferenceTrainer, HFSampler
from negtune.models.load import load_tokenizer

out, folder, batch, kind, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
questions = ["Walk to Rome.", "Walk to Oslo.", "Walk to Lima.", "Walk to Perth."]
pairs = [{"prompt": q, "chosen": "ok\\nok\\nok\\ngood", "rejected": "no\\nok\\nok\\nbad"} for q in questions]

def how_many_ok(prompts, completions, **columns):
    return [None if c.startswith("no") else float(c.count("ok")) for c in completions]

def judge(prompts, completions, **columns):
    return [0.5 if a.count("ok") == b.count("ok") else float(b.count("ok") > a.count("ok")) for a, b in completions]

mixed = kind == "mixed"
trainer = PreferenceTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
    args=PreferenceConfig(
        output_dir=out, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, max_steps=5,
        learning_rate=0.01, optim="sgd", lr_scheduler_type="constant", logging_steps=1, report_to="none",
        save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True, seed=3, num_generations=3,
        max_completion_length=24, steps_per_round=2, reuse=2, max_unscored=0.9, eval_num_generations=4,
        max_empty_rounds=100, pair_selection="all", importance_cap=2.0, nll_weight=0.1,
        on_policy_fraction=0.5 if mixed else 1.0, reference_decay=0.5 if mixed else None, prefix_sharing="off",
    ),
    train_dataset=pairs,
    eval_dataset={"pairs": pairs[:3], **({} if mixed else {"prompts": [{"prompt": q} for q in questions]})},
    processing_class=load_tokenizer(folder),
    sampler=HFSampler,
    **({"judge": judge} if mixed else {"reward_funcs": how_many_ok}),
)
trainer.train(resume_from_checkpoint=resume or None)
metrics = trainer.evaluate()
if PartialState().is_main_process:
    history = [row for row in trainer.state.log_history if "loss" in row]
    evaluated = {k: v for row in trainer.state.log_history[-2:] for k, v in row.items() if k.startswith("eval_")}
    result = {
        "world": PartialState().num_processes,
        "losses": [row["loss"] for row in history],
        "rewards": [row.get("rounds/reward") for row in history],
        "chosen": [row["chosen/logp"] for row in history],
        "drift": [row["chosen/drift"] for row in history],
        "pairs": [row["key"] for row in trainer.on_policy.round.rows],
        "weights": sum(p.detach().abs().sum().item() for p in trainer.model.parameters()),
        "metrics": {k: v for k, v in evaluated.items() if "per_second" not in k and "runtime" not in k},
    }
    json.dump(result, open(f"{out}/result.json", "w"))
PartialState().destroy_process_group()  # gloo aborts at exit now and then without it
"""


@pytest.fixture
def launch(tmp_path, chain_folder):
    def run(processes: int, batch: int, kind: str, name: str, resume: str = "") -> dict:
        out = tmp_path / name
        arguments = (out, chain_folder, batch, kind, resume)
        run_script(SCRIPT, tmp_path, *arguments, processes=processes, first_port=29400)
        return json.loads((out / "result.json").read_text())

    return run


@pytest.mark.parametrize("kind", ["fresh", pytest.param("mixed", marks=pytest.mark.slow)])
def test_two_processes_are_one(launch, tmp_path, kind):
    """`mixed`: half of every step from the data set, scored by a judge, against a moving reference."""
    one, two = launch(1, 4, kind, "one"), launch(2, 2, kind, "two")
    assert (one["world"], two["world"]) == (1, 2)
    for name, tolerance in (("losses", 1e-6), ("chosen", 1e-6), ("drift", 1e-4), ("weights", 1e-9)):
        assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-7), name
    assert two["rewards"] == one["rewards"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
    assert {"eval_pairs_margin", *(["eval_prompts_reward"] if kind == "fresh" else [])} <= set(one["metrics"])
    drawn, of_key = [], []
    for name in ("one", "two"):
        records = list(RecordStore(tmp_path / name / "rounds"))
        drawn.append({str((r["prompt"], r["seed"])): r["completion_ids"] for r in records})
        of_key.append({r["key"]: str((r["prompt"], r["seed"])) for r in records})
    assert drawn[0] == drawn[1]
    chosen = [
        [[keys[key] for key in pair.split(":")] for pair in result["pairs"]]
        for keys, result in zip(of_key, (one, two), strict=True)
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) > 0
    resumed = launch(2, 2, kind, "again", str(tmp_path / "two" / "checkpoint-3"))
    assert resumed["losses"] == pytest.approx(two["losses"], rel=1e-9)
    assert resumed["weights"] == pytest.approx(two["weights"], rel=1e-12)
