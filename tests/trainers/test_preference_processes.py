"""PreferenceTrainer in two gloo processes: same losses, weights and metrics as in one."""

from __future__ import annotations

import json

import pytest

from tests.launching import run_script

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from negtune import PreferenceConfig, PreferenceTrainer
from negtune.models.tiny import tiny_lm, tiny_tokenizer

out, batch, budget, sharing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, sys.argv[4]
words = "France Italy Spain Japan Egypt Kenya Peru Norway".split()
pairs = [
    {"prompt": f"Where is {word}?", "chosen": f" {word} is here" * (i % 3 + 1), "rejected": " I do not know"}
    for i, word in enumerate(words)
]
trainer = PreferenceTrainer(
    model=tiny_lm(dtype=torch.float64),
    args=PreferenceConfig(
        output_dir=out, per_device_train_batch_size=batch, per_device_eval_batch_size=batch, tokens_per_batch=budget,
        num_train_epochs=2, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, reference="copy",
        prefix_sharing=sharing,
    ),
    train_dataset=pairs,
    eval_dataset=pairs[:3],
    processing_class=tiny_tokenizer(),
)
trainer.train()
metrics = trainer.evaluate()
if PartialState().is_main_process:
    result = {
        "world": PartialState().num_processes,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "weights": sum(p.detach().abs().sum().item() for p in trainer.model.parameters()),
        "shared": [row["tokens/shared"] for row in trainer.state.log_history if "loss" in row],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "runtime" not in k},
    }
    json.dump(result, open(f"{out}/result.json", "w"))
PartialState().destroy_process_group()  # gloo aborts at exit now and then without it
"""


@pytest.fixture
def launch(tmp_path):
    def run(processes: int, batch: int, budget: int = 0, sharing: str = "auto") -> dict:
        out = tmp_path / f"run{processes}"
        run_script(SCRIPT, tmp_path, out, batch, budget, sharing, processes=processes, first_port=29700)
        return json.loads((out / "result.json").read_text())

    return run


def test_two_processes_train_and_evaluate_like_one(launch):
    """Three evaluation pairs on two processes: one is scored twice to fill the round, and may count once only."""
    one, two = launch(1, 4), launch(2, 2)
    assert (one["world"], two["world"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-7)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)


def test_shared_prefixes_in_two_processes_train_like_padded_rows_in_one(launch):
    padded, packed = launch(1, 4, sharing="off"), launch(2, 2, sharing="on")
    assert max(padded["shared"]) == 0
    assert min(packed["shared"]) > 0.1
    assert packed["losses"] == pytest.approx(padded["losses"], rel=1e-6, abs=1e-7)
    assert packed["weights"] == pytest.approx(padded["weights"], rel=1e-9)
    assert packed["metrics"] == pytest.approx(padded["metrics"], rel=1e-5, abs=1e-6)


def test_token_budgets_give_two_processes_as_many_steps_and_all_evaluation_rows(launch):
    result = launch(2, 2, budget=60)
    assert result["world"] == 2
    assert len(result["losses"]) >= 4
    assert 0 <= result["metrics"]["eval_accuracy"] <= 1
