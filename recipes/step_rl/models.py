"""The fine-tuned model of a recipe, the policies trained from it, and the engine that draws from all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from trl import ModelConfig, get_peft_config

from negtune.models.load import load_model
from negtune.models.policy import is_peft
from negtune.rollouts.attest import attest
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import Sampler

ENGINES = ("hf", "vllm")


@dataclass
class Models:
    """Loads and samples in the precision of the command line.

    Args:
        start: folder of the fine-tuned model.
        settings: precision and adapter (`--dtype`, `--load_in_4bit`, `--use_peft`, `--lora_r` ...).
        engine: `hf` or `vllm`.
        batch_size: of `hf`.
    """

    start: str
    settings: ModelConfig
    engine: str
    batch_size: int
    _vllm: Any = field(default=None, init=False, repr=False)

    def load(self, policy: Path | None = None) -> tuple[Any, Any]:
        """The fine-tuned model, or what was trained from it, and the tokenizer."""
        given: dict[str, Any] = {"dtype": self.settings.dtype, "load_in_4bit": self.settings.load_in_4bit}
        if policy is None:
            return load_model(self.start, **given)
        if (policy / "adapter_config.json").exists():
            return load_model(self.start, adapter=policy, **given)
        return load_model(policy, **given)

    def sampler(self, model: Any, tokenizer: Any, policy: str) -> Sampler:
        """Draws from these weights, called `policy`; until the next call of it, if it is vLLM.

        There is one vLLM engine per process, which gets new weights: a second one would take memory a second time, and
        ends the process group of the first.
        """
        if not self.settings.load_in_4bit:
            model = model.to(PartialState().device)
        if self.engine == "hf":
            return HFSampler(model, tokenizer, batch_size=self.batch_size, policy=policy)
        adapter = get_peft_config(self.settings)
        if adapter is not None and not is_peft(model):
            model = get_peft_model(model, adapter)  # it changes nothing yet, and the engine reads adapters
        if self._vllm is None:
            self._vllm = self._started(model, tokenizer, policy)
        else:
            self._vllm.update(model, policy)
        attest(self._vllm, model, tokenizer)
        return self._vllm

    def sleep(self) -> None:
        """Give the GPU to training, until something is drawn."""
        if self._vllm is not None:
            self._vllm.sleep()

    def close(self) -> None:
        """Nothing is drawn any more."""
        if self._vllm is not None:
            self._vllm.close()

    def _started(self, model: Any, tokenizer: Any, policy: str) -> Any:
        from negtune.rollouts.vllm import VLLMSampler

        longest = min(1024, model.config.max_position_embeddings)  # vLLM takes memory for as many
        engine: dict[str, Any] = {"max_model_len": longest, "enable_sleep_mode": torch.cuda.is_available()}
        if self.settings.load_in_4bit:
            engine["quantization"] = "bitsandbytes"
        return VLLMSampler(model, tokenizer, policy=policy, **engine)
