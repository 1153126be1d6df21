"""Two gloo processes against one: the same rows, pairs, losses and weights."""

from __future__ import annotations

import json

import pytest

from tests.launching import run_script

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from functools import partial
from negtune import UnlearningConfig, UnlearningTrainer
from negtune.losses.unlearning import rmu
from negtune.models.load import load_tokenizer

out, folder, rows, batch, loss_type, lora = sys.argv[1:7]
rows = json.load(open(rows))
peft = None
if lora == "lora":
    from peft import LoraConfig
    peft = LoraConfig(r=4, target_modules="all-linear")
special, losses = {"reference": "cached", "loss_type": loss_type}, {}
if loss_type == "rmu":  # layers above get no gradient, which DDP has to be told
    special = {"retain_loss_kwargs": {"layer": 0}, "retain_loss_type": "activation_mse"}
    losses = {"forget_loss": partial(rmu, layer=0)}
args = UnlearningConfig(
    output_dir=out, per_device_train_batch_size=int(batch), max_steps=4, learning_rate=0.05,
    optim="sgd", logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3,
    per_device_eval_batch_size=2, **special,
)
torch.manual_seed(0)
trainer = UnlearningTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), args=args,
    train_dataset={k: rows[k] for k in ("forget", "retain")}, eval_dataset=rows, peft_config=peft,
    processing_class=load_tokenizer(folder), **losses,
)
trainer.train()
metrics = trainer.evaluate()
weights = sum(float(p.double().abs().sum()) for p in trainer.model.parameters() if p.requires_grad)
if PartialState().is_main_process:
    history = [r for r in trainer.state.log_history if "loss" in r]
    json.dump({"world": PartialState().num_processes, "history": history, "metrics": metrics, "weights": weights},
              open(out + "/result.json", "w"))
PartialState().destroy_process_group()  # gloo aborts at exit now and then without it
"""


LOGGED = {"npo": "forget/log_ratio", "kto": "forget/log_ratio", "rmu": "forget/activation_norm"}


@pytest.fixture
def launch(tmp_path, knowing_folder, forget_rows, retain_rows):
    (tmp_path / "rows.json").write_text(json.dumps({"forget": forget_rows, "retain": retain_rows}))

    def run(processes: int, batch: int, loss_type: str, lora: str) -> dict:
        out = tmp_path / f"{processes}"
        out.mkdir()
        arguments = (out, knowing_folder, "rows.json", batch, loss_type, lora)
        run_script(SCRIPT, tmp_path, *arguments, processes=processes, first_port=29100)
        return json.loads((out / "result.json").read_text())

    return run


@pytest.mark.parametrize(("loss_type", "lora"), [("npo", "full"), ("kto", "lora"), ("rmu", "full")])
def test_two_processes_train_like_one(launch, loss_type, lora):
    one, two = launch(1, 4, loss_type, lora), launch(2, 2, loss_type, lora)
    assert (one["world"], two["world"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "forget/logp", "retain/logp", LOGGED[loss_type]):
            # Packed as trees or padded, the order of sums differs, and RMSNorm is float32 in a float64 model.
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-7), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-9)
    for name in ("eval_forget/probability", "eval_retain/probability"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5), name
