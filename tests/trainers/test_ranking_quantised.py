"""QLoRA for rankers made of language models: 4-bit weights, on a CPU."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs negtune[retrieval]")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'negtune[quant]'")

from peft import LoraConfig
from transformers import BitsAndBytesConfig

from negtune.models.load import resolve
from negtune.retrieval.encoder import causal_encoder
from negtune.retrieval.rankers import causal_reranker
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from tests.retrieval.tiny_rankers import needs_adapters


def four_bit():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return {"quantization_config": config, "device_map": {"": "cpu"}}


BUILD = {
    "encoder": lambda: causal_encoder(resolve("tiny"), model_kwargs=four_bit(), device="cpu"),
    "reranker": lambda: causal_reranker("tiny", yes="a", no="b", max_length=128, model_kwargs=four_bit()),
}


def trainer(model, folder, peft_config, **settings):
    fixed = {"per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    args = RankingConfig(output_dir=str(folder), k=2, learning_rate=1e-2, logging_steps=1, **{**fixed, **settings})
    made = [{"query": f"{i}", "documents": [f"{i}", "none", "other"], "gains": [1.0, 0.0, 0.0]} for i in range(1, 9)]
    return RankingTrainer(model=model, args=args, train_dataset=made, peft_config=peft_config)


@needs_adapters
@pytest.mark.parametrize("kind", sorted(BUILD))
@pytest.mark.parametrize("cached", [None, 3])
def test_an_adapter_on_four_bit_weights_learns_and_the_weights_stay(tmp_path, kind, cached):
    model = BUILD[kind]()
    scale = 10.0 if kind == "encoder" else 4.0
    config = LoraConfig(r=4, target_modules="all-linear")
    ours = trainer(model, tmp_path, config, max_steps=20, mini_batch_size=cached, scale=scale, loss_type="lambda_rank")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ours.train()
    losses = [row["loss"] for row in ours.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(p, frozen[name], atol=0, rtol=0)
    assert any("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_four_bit_weights_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"4-bit and 8-bit weights need peft_config=LoraConfig"):
        trainer(BUILD["encoder"](), tmp_path, None)
