"""Reward functions in all forms that TRL takes: plain, async, models; what they are offered, how they are summed."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from negtune.models.tiny import tiny_tokenizer
from negtune.verifiers.rewards import RewardModel, reward_verifier
from negtune.verifiers.verdict import FromRewardFunction, verdicts_of

PROMPTS, COMPLETIONS, IDS = ["p", "q"], ["a", "bb"], [[1], [2, 3]]


def scores(verifier, **columns):
    return [v.score for v in verdicts_of(verifier, PROMPTS, COMPLETIONS, IDS, columns)]


def test_a_function_gets_what_it_names_of_what_is_offered():
    seen = {}

    def everything(prompts, completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(prompts)

    def ids_only(prompts, completions, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    def neither(prompts, completions):
        return [3.0] * len(prompts)

    context = lambda: {"trainer_state": "now"}  # noqa: E731
    assert scores(reward_verifier(everything, context=context), gold=["x", "y"]) == [0.0, 0.0]
    assert seen == {"gold": ["x", "y"], "completion_ids": IDS, "trainer_state": "now"}
    assert scores(reward_verifier(ids_only, context=context)) == [1.0, 2.0]
    assert scores(reward_verifier(neither, context=context)) == [3.0, 3.0]
    assert scores(FromRewardFunction(ids_only)) == [1.0, 2.0]  # one by one
    unknown = verdicts_of(FromRewardFunction(ids_only), PROMPTS, COMPLETIONS, None, {})
    assert [v.outcome for v in unknown] == ["unscored"] * 2


def test_a_verifier_that_takes_no_ids_is_not_given_them():
    class Strict:
        def verify(self, prompts, completions, *, gold):
            return [gold]

    assert verdicts_of(Strict(), PROMPTS, COMPLETIONS, IDS, {"gold": ["x", "y"]}) == [["x", "y"]]


def test_async_functions_wait_together_and_share_one_loop():
    barrier, loops = threading.Barrier(2, timeout=30), set()

    def waits(value):
        async def reward(prompts, completions, **kwargs):
            loops.add(id(asyncio.get_running_loop()))
            await asyncio.get_running_loop().run_in_executor(None, barrier.wait)  # until the other one is here too
            return [value] * len(prompts)

        return reward

    async def inside_a_loop():  # as in a notebook
        return scores(reward_verifier([waits(1.0), waits(2.0)], [1.0, 10.0]))

    assert scores(reward_verifier([waits(1.0), waits(2.0)], [1.0, 10.0])) == [21.0, 21.0]
    assert asyncio.run(inside_a_loop()) == [21.0, 21.0]
    assert len(loops) == 1


def test_an_async_function_that_fails_scores_nothing():
    async def reward(prompts, completions):
        raise RuntimeError("service down")

    verdicts = reward_verifier(reward).verify(PROMPTS, COMPLETIONS)
    assert [v.outcome for v in verdicts] == ["unscored"] * 2
    assert "RuntimeError: service down" in verdicts[0].reason


def reward_model(num_labels: int = 1):
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config), tokenizer


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_reward_model_scores_prompt_and_completion_whatever_the_padding(batch_size):
    model, tokenizer = reward_model()
    tokenizer.padding_side = "left"
    function = RewardModel(model, tokenizer, batch_size=batch_size)
    prompts, completions = ["Why? ", "Who is it? "], ["Because.", "Nobody that I have ever met."]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]])
        hidden = model.model(ids).last_hidden_state[:, -1]
        expected.append(model.score(hidden).item())
    assert function(prompts=prompts, completions=completions) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = [[{"role": "assistant", "content": text}] for text in completions]
    ids = tokenizer.apply_chat_template([*chats[1], *said[1]], return_tensors="pt", return_dict=True)["input_ids"]
    in_chat = model.score(model.model(ids).last_hidden_state[:, -1]).item()
    assert function(prompts=chats, completions=said)[1] == pytest.approx(in_chat, abs=1e-5)


def test_a_reward_model_may_be_named_or_given_beside_functions(tmp_path):
    model, tokenizer = reward_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = [v.score for v in reward_verifier(str(tmp_path)).verify(PROMPTS, COMPLETIONS)]
    ten = lambda prompts, completions: [10.0] * len(prompts)  # noqa: E731
    both = reward_verifier([model, ten], processing_classes=[tokenizer, None])
    assert [v.score for v in both.verify(PROMPTS, COMPLETIONS)] == pytest.approx([10 + s for s in one], abs=1e-5)


@pytest.mark.parametrize(
    ("given", "kwargs", "words"),
    [
        ([len], {"weights": [1.0, 2.0]}, "reward_weights needs one per reward function, got 2 for 1"),
        ([len], {"processing_classes": [None, None]}, "reward_processing_classes needs one per"),
        ([3], {}, "must be a callable, a reward model or its name, got 3"),
        ([reward_model(2)[0]], {"processing_classes": [tiny_tokenizer()]}, "has one label, .* has 2"),
        ([reward_model()[0]], {}, "made in memory needs its tokenizer"),
    ],
)
def test_what_is_no_reward_function_is_refused(given, kwargs, words):
    with pytest.raises(ValueError, match=words):
        reward_verifier(given, **kwargs)
