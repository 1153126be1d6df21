"""Reward and KL on fresh samples: against exact values, and with the samples of a policy that has moved."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from negtune import HFSampler, SamplingParams
from negtune.eval.frontier import better, primary, reward_and_kl, under
from negtune.models.load import load_model
from negtune.rollouts.sampler import Rollout, Sampler


class Coin(Sampler):
    """One token a completion: `a` with the chance given, else `b`."""

    tokenizer = None

    def __init__(self, chance: float, n: int) -> None:
        self.policy, self._made = "coin", []
        for i in range(n):
            token = int(i >= round(chance * n))
            logp = math.log(1 - chance if token else chance)
            self._made.append((token, logp))

    def draw(self, requests, params):
        return [
            Rollout(
                **{"key": str(i), "prompt": r.prompt, "prefix": "", "number": r.number, "prompt_ids": [0]},
                **{"completion_ids": [token], "logps": [logp], "text": "ab"[token], "finish_reason": "stop"},
                **{"temperature": 1.0, "seed": 0, "policy": "coin", "engine": "coin"},
            )
            for i, (r, (token, logp)) in enumerate(zip(requests, self._made, strict=True))
        ]


def test_kl_of_a_biased_coin_to_a_fair_one_is_exact_where_the_samples_have_their_shares():
    found = reward_and_kl(
        Coin(0.75, 100),
        lambda prompts, completions, completion_ids: [float(c == "a") for c in completions],
        ["toss"],
        lambda rollouts: [math.log(0.5)] * len(rollouts),
        n=100,
        params=SamplingParams(),
    )
    assert found.metrics["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found.metrics["reward"] == 0.75
    assert found.by_prompt() == [0.75]
    assert (found.metrics["length"], found.metrics["truncated"], found.metrics["unscored"]) == (1.0, 0.0, 0.0)


def test_unscored_samples_are_left_out_and_counted():
    def some(prompts, completions, completion_ids):
        return [None if c == "b" else 1.0 for c in completions]

    found = reward_and_kl(Coin(0.75, 8), some, ["toss"], lambda r: [0.0] * len(r), n=8, params=SamplingParams())
    assert found.metrics["reward"] == 1.0
    assert found.metrics["unscored"] == 0.25


def test_a_policy_is_at_no_distance_from_itself_and_at_some_once_it_has_moved(chain_folder, prompts):
    model, tokenizer = load_model(chain_folder)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

    def start(rollouts):
        with model.disable_adapter():
            return under(model, tokenizer, batch_size=3)(rollouts)

    def measure():
        sampler = HFSampler(model, tokenizer, batch_size=64)
        texts = [row["prompt"] for row in prompts]
        lengths = {"n": 8, "params": SamplingParams(max_tokens=16)}
        return reward_and_kl(sampler, lambda completion_ids, **_: [1.0] * len(completion_ids), texts, start, **lengths)

    assert measure().metrics["kl"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    moved = measure().metrics
    assert moved["kl"] > 0.05
    assert moved["kl_low"] < moved["kl"] < moved["kl_high"]


def test_a_prompt_that_stands_there_twice_is_two():
    found = reward_and_kl(
        Coin(0.5, 4),
        lambda completions, **_: [float(c == "a") for c in completions],
        ["toss", "toss"],
        lambda rollouts: [0.0] * len(rollouts),
        n=2,
        params=SamplingParams(),
    )
    assert found.by_prompt() == [1.0, 0.0]


def test_which_way_is_better():
    assert [better(name) for name in ("reward", "minus start", "kl", "length")] == ["higher", "higher", "lower", None]
    names = ["unscored", "kl", "reward_low", "reward", "minus start"]
    assert primary(names) == ["reward", "reward_low", "minus start", "kl"]
