"""CUDA paths: bf16 autocast, gradient checkpointing, 4-bit, and log-probs on the device.

Run with `pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

ROWS = [
    {"prompt_ids": [11, 12, 13], "completion_ids": [14, 15, 16, 17]},
    {"prompt_ids": [19], "completion_ids": [21, 1]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_equal_full_logits_on_the_device(dtype):
    from negtune.data.completions import collate
    from negtune.models.forward import attach_scoring, completion_logps, scored_tokens
    from negtune.models.tiny import tiny_lm

    model = tiny_lm().to("cuda", dtype)
    attach_scoring(model)
    batch = {name: tensor.cuda() for name, tensor in collate(ROWS, 0).items()}
    tokens = scored_tokens(batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = logits[tokens.rows, tokens.columns - 1].float().log_softmax(-1).gather(-1, tokens.targets[:, None])[:, 0]
    torch.testing.assert_close(completion_logps(model, batch)[tokens.mask], want, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reference", ["adapter", "cached"])
def test_training_in_bf16_forgets(tmp_path, tiny_folder, four_bit, reference):
    from peft import LoraConfig

    from negtune import UnlearningConfig, UnlearningTrainer
    from negtune.models.load import load_model

    model, tokenizer = load_model(tiny_folder, load_in_4bit=four_bit)
    rows = [{"prompt": f"Where is {n}?", "completion": f" {n} is here"} for n in "abcdefgh"]
    trainer = UnlearningTrainer(
        model=model,
        args=UnlearningConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            reference=reference,
        ),
        train_dataset={"forget": rows[:4], "retain": rows[4:]},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert abs(history[0]["forget/log_ratio"]) < 0.05
    assert history[-1]["forget/logp"] < history[0]["forget/logp"]


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_trees_give_the_gradients_of_padded_rows(attention):
    from negtune.data.completions import collate
    from negtune.models.forward import attach_scoring, completion_logps
    from negtune.models.sharing import set_prefix_sharing
    from negtune.models.tiny import tiny_lm

    rows = [{"prompt_ids": [11, 12, 13] * 60, "completion_ids": [14 + i, 15, 16, 1]} for i in range(3)]
    batch = {name: tensor.cuda() for name, tensor in collate(rows, 0).items()}
    found = {}
    for mode in ("on", "off"):
        model = tiny_lm().cuda()
        model.set_attn_implementation(attention if mode == "on" else "sdpa")
        attach_scoring(model)
        set_prefix_sharing(model, mode)
        logps = completion_logps(model, batch)
        logps.sum().backward()
        found[mode] = [logps.detach(), *(p.grad for p in model.parameters())]
    for packed, padded in zip(found["on"], found["off"], strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-3 * padded.abs().max().item() + 1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_an_engine_that_slept_draws_from_the_weights_of_its_last_update(tiny_folder, lora):
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'negtune[vllm]'")
    from peft import LoraConfig, get_peft_model

    from negtune import SamplingParams, VLLMSampler, attest
    from negtune.models.load import load_model

    model, tokenizer = load_model(tiny_folder, dtype=torch.bfloat16 if lora else torch.float32)
    model = model.cuda()
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    sampler = VLLMSampler(model, tokenizer, max_model_len=384, enable_sleep_mode=True)
    for version in ("1", "2"):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        sampler.sleep()
        sampler.update(model, version)
        attest(sampler, model, tokenizer)
        before = sampler.sample(["Where is Rome?"], params=SamplingParams(max_tokens=8))
        held = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        assert torch.cuda.mem_get_info()[0] > held
        assert sampler.sample(["Where is Rome?"], params=SamplingParams(max_tokens=8)) == before
