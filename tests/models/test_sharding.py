"""torch's own `fully_shard` on two gloo processes: log-probs, references and weights equal the unsharded ones.

accelerate ignores FSDP on a CPU and wraps in DDP, so FSDP2 through accelerate is left to tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.launching import AT_ONCE

SCRIPT = """
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from negtune.data.completions import collate
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.reference import AdapterReference
from negtune.models.tiny import tiny_lm

ROWS = [
    {"prompt_ids": [11, 12, 13], "completion_ids": [14, 15, 16, 17]},
    {"prompt_ids": [19], "completion_ids": [21, 1]},
]
batch = collate(ROWS, 0)

def build():
    torch.manual_seed(0)
    model = get_peft_model(tiny_lm(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    attach_scoring(model)
    return model

whole = build()
expected, off = completion_logps(whole, batch), AdapterReference().logps(whole, batch)
expected.sum().backward()
gradients = {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}

sharded = build()
mesh = init_device_mesh("cpu", (2,))
lm = sharded.get_base_model()
for layer in lm.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(lm, mesh=mesh)
assert any(isinstance(p, DTensor) for p in sharded.parameters())
torch.testing.assert_close(AdapterReference().logps(sharded, batch), off)
got = completion_logps(sharded, batch)
torch.testing.assert_close(got, expected)
got.sum().backward()
for name, parameter in sharded.named_parameters():
    if parameter.grad is not None:
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients.pop(name), rtol=1e-4, atol=1e-6)
assert not gradients, gradients.keys()
full = whole.state_dict()
for name, tensor in sharded.state_dict().items():
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    torch.testing.assert_close(tensor, full[name], rtol=0, atol=0)
dist.barrier()
dist.destroy_process_group()
print("EQUAL", flush=True)
"""


def test_sharded_weights_score_and_train_like_whole_ones(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + AT_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29618"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 2
