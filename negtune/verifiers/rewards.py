"""TRL's reward functions, in all the forms that `GRPOTrainer` takes, as one verifier.

A function may be plain or async, and may ask by name for `completion_ids` and for whatever `context` offers. A model
that classifies sequences, or the name of one, is a reward function too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from negtune.verifiers.verdict import Completion, FromRewardFunction, Verdict, Verifier

BATCH = 32
"""Completions that a reward model sees at a time."""


def reward_verifier(
    reward_funcs: Any,
    weights: Sequence[float] | None = None,
    *,
    context: Callable[[], Mapping[str, Any]] | None = None,
    processing_classes: Any = None,
    device: torch.device | str = "cpu",
) -> Verifier:
    """Reward functions with TRL's signature as one verifier: their weighted sum, unscored where any of them is None.

    Args:
        reward_funcs: one, or several: callables, reward models, or names of such.
        weights: one each; 1 by default. A function of weight 0 is called, so that it can log, but does not count, and
            cannot make a completion unscored.
        context: see `FromRewardFunction`.
        processing_classes: tokenizers of the reward models, one per function (None for callables, and where the one
            that belongs to the model is wanted).
        device: of reward models.

    Raises:
        ValueError: a wrong number of weights or tokenizers, or something that is no reward function.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    tokenizers = processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
    if processing_classes is None:
        tokenizers = [None] * len(functions)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    for name, given in (("reward_weights", weights), ("reward_processing_classes", tokenizers)):
        if len(given) != len(functions):
            raise ValueError(f"{name} needs one per reward function, got {len(given)} for {len(functions)}")
    ready = [_callable(f, t, device) for f, t in zip(functions, tokenizers, strict=True)]
    verifiers = [FromRewardFunction(f, one_by_one=False, context=context) for f in ready]
    return verifiers[0] if weights == [1.0] else _WeightedSum(verifiers, weights)


def _callable(function: Any, tokenizer: Any, device: torch.device | str) -> Callable[..., Any]:
    if isinstance(function, str):
        return RewardModel.load(function, tokenizer, device)
    if isinstance(function, torch.nn.Module):
        return RewardModel(function.to(device), tokenizer or _tokenizer_of(function))
    if not callable(function):
        raise ValueError(f"a reward function must be a callable, a reward model or its name, got {function!r}")
    return function


def _tokenizer_of(model: torch.nn.Module) -> Any:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError("a reward model made in memory needs its tokenizer: pass reward_processing_classes")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


class RewardModel:
    """A model with one output for a sequence, as a reward function: the output for prompt and completion together.

    Args:
        model: of sequence classification with one label, on its device.
        tokenizer: of the model; its chat template makes texts of conversations. Without padding token it pads with the
            EOS token.
        batch_size: sequences at a time.

    Raises:
        ValueError: the model has several labels.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = BATCH) -> None:
        labels = getattr(model.config, "num_labels", 1)
        if labels != 1:
            raise ValueError(f"a reward model has one label, {type(model).__name__} has {labels}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # by which the last token is found
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @classmethod
    def load(cls, name: str, tokenizer: Any = None, device: torch.device | str = "cpu") -> RewardModel:
        """From a hub id or folder, in the precision it was saved in."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, use_safetensors=True)
        return cls(model.to(device), tokenizer or AutoTokenizer.from_pretrained(name))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float]:
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            part = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            with torch.inference_mode():
                found += self.model(**part.to(self.model.device)).logits[:, 0].float().tolist()
        return found

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


@dataclass(frozen=True)
class _WeightedSum:
    verifiers: list[FromRewardFunction]
    weights: list[float]
    threshold: float = 0.5

    def verify(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[Verdict]:
        calls = [partial(verifier.verify, prompts, completions, **columns) for verifier in self.verifiers]
        waiting = {i for i, verifier in enumerate(self.verifiers) if _is_async(verifier.function)}
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:  # async ones wait together, while the others work
            started = {i: pool.submit(calls[i]) for i in waiting}
            done = {i: call() for i, call in enumerate(calls) if i not in waiting}
            done |= {i: future.result() for i, future in started.items()}
        return [self._sum(verdicts) for verdicts in zip(*(done[i] for i in range(len(calls))), strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        total = 0.0
        for verdict, weight in zip(verdicts, self.weights, strict=True):
            if weight == 0:
                continue
            if verdict.score is None:
                return verdict
            total += weight * verdict.score
        return Verdict("correct" if total >= self.threshold else "wrong", total, f"weighted sum {total:g}")


def _is_async(function: Callable[..., Any]) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
