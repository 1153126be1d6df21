"""PreferenceTrainer with the real vLLM, in this process and behind a server: attested every round, and resumed."""

from __future__ import annotations

import importlib.util

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from negtune.rollouts.store import RecordStore
from tests.rollouts.test_server import Server
from tests.trainers.test_advantage_vllm import engine, on_a_cpu  # noqa: F401
from tests.trainers.test_online_preference import logged, offline_pairs, online  # noqa: F401

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
    ),
    pytest.mark.slow,
]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


def run(online, engine, prompts, folder, **kwargs):  # noqa: F811
    """Two passes over every round, corrected by behaviour log-probabilities; killed in the second round and resumed."""
    settings = {
        **{"per_device_train_batch_size": 16, "max_steps": 10, "steps_per_round": 2, "reuse": 2, "importance_cap": 2.0},
        **{"learning_rate": 2e-3 if kwargs else 5e-4, "save_strategy": "steps", "save_steps": 2},
        **{"eval_num_generations": 16, "output_dir": str(folder), "dynamic_sampling": False, "num_generations": 4},
    }
    trainer = online(kwargs={"sampler": engine, "eval_dataset": prompts, **kwargs}, train=False, **settings)
    before = trainer.evaluate()
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        trainer.train()
    kept = {r["seed"] for r in RecordStore(folder / "rounds")}
    trainer.remove_callback(Kill)
    trainer.train(resume_from_checkpoint=True)
    seeds = [r["seed"] for r in RecordStore(folder / "rounds")]
    assert kept <= set(seeds)
    assert len(set(seeds)) == len(seeds) == 5 * 16 * 4
    assert all(abs(ratio - 1) < 0.05 for ratio in logged(trainer, "ratio_p50")[::2])  # engine and trainer agree
    assert any(abs(ratio - 1) > 0.05 for ratio in logged(trainer, "ratio_p50")[1::2])  # until the second pass
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + 0.2
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
def test_pairs_of_vllm_samples(online, engine, prompts, tmp_path, adapter):  # noqa: F811
    run(online, engine, prompts, tmp_path / "run", **({"peft_config": LORA} if adapter else {}))


def test_pairs_of_a_servers_samples(online, prompts, tmp_path, chain_folder):  # noqa: F811
    from negtune import VLLMServerSampler

    server = Server(chain_folder, tmp_path / "log")
    server.start()
    try:
        server.wait()
        made = []

        def connect(model, tokenizer):
            made.append(VLLMServerSampler(model, tokenizer, server.url))
            return made[-1]

        run(online, connect, prompts, tmp_path / "run", peft_config=LORA)
        assert {r["engine"] for r in RecordStore(tmp_path / "run" / "rounds")} == {"vllm server"}
        made[0].close()
    finally:
        server.kill()
