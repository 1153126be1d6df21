"""CUDA paths of policy gradient and per-step preference: bf16 autocast, fresh samples from the trained weights.

Run with `pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CHAIN_QUESTIONS, chain_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]


def settings(folder, **more) -> dict:
    return {
        **{"output_dir": str(folder), "per_device_train_batch_size": 32, "max_steps": 12, "learning_rate": 1e-3},
        **{"lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 3},
        **more,
    }


def is_good(prompts, completions, **columns) -> list[float]:
    return [float(text.endswith("good")) for text in completions]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss_type", ["reinforce", "clipped"])
def test_fresh_samples_in_bf16_get_better(tmp_path, chain_folder, lora, loss_type):
    """Every round is attested: sampling and training see the same distribution under autocast."""
    from peft import LoraConfig

    from negtune import AdvantageConfig, AdvantageTrainer, HFSampler
    from negtune.models.load import load_tokenizer

    prompts = [{"prompt": question} for question in CHAIN_QUESTIONS]
    more = {"learning_rate": 5e-3} if lora else {}
    trainer = AdvantageTrainer(
        model=chain_folder,
        args=AdvantageConfig(
            **settings(tmp_path, loss_type=loss_type, max_completion_length=24, eval_num_generations=32, **more)
        ),
        train_dataset=prompts,
        eval_dataset=prompts,
        processing_class=load_tokenizer(chain_folder),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if lora else None,
        sampler=HFSampler,
        reward_funcs=is_good,
    )
    assert trainer.args.bf16
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.1
    for quantile in ("p10", "p50", "p90"):
        assert trainer.state.log_history[1][f"ratio_{quantile}"] == pytest.approx(1, abs=0.1)
    assert "negative/grad_norm" in trainer.state.log_history[1]


@pytest.mark.parametrize("loss_type", ["dpo", "step_dpo"])
def test_pairs_that_part_at_a_step_train_in_bf16(tmp_path, chain_folder, loss_type):
    from negtune import PreferenceConfig, PreferenceTrainer
    from negtune.models.load import load_tokenizer

    tokenizer = load_tokenizer(chain_folder)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = []
    for question in CHAIN_QUESTIONS:
        good = [*ids("ok\nok\ngood"), tokenizer.eos_token_id]
        pairs.append(
            {
                **{"prompt_ids": ids(question) + ids("ok\n"), "chosen_ids": good, "rejected_ids": ids("no\n")},
                **{"chosen_step": [0, 3], "rejected_step": [0, 2]},
            }
        )
    trainer = PreferenceTrainer(
        model=chain_folder,
        args=PreferenceConfig(**settings(tmp_path, loss_type=loss_type, learning_rate=1e-4)),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["rejected/log_ratio"] < 0


def test_step_grpo_in_bf16(tmp_path, chain_folder):
    from datasets import Dataset

    from negtune import StepGRPOConfig, StepGRPOTrainer
    from negtune.models.load import load_tokenizer

    def bad_steps(prompts, completions, steps, **columns):
        return [[-1.0 if line.startswith("no") else 0.2 for line in lines] for lines in steps]

    trainer = StepGRPOTrainer(
        model=chain_folder,
        args=StepGRPOConfig(**settings(tmp_path, num_generations=8, max_completion_length=24, outcome_weight=0.0)),
        train_dataset=Dataset.from_list([{"prompt": q} for q in CHAIN_QUESTIONS]),
        processing_class=load_tokenizer(chain_folder),
        reward_funcs=is_good,
        step_reward_funcs=bad_steps,
    )
    trainer.train()
    shares = [row["negative/tokens"] for row in trainer.state.log_history if "negative/tokens" in row]
    assert shares[-1] < shares[0]
    assert chain_text(["ok"])
