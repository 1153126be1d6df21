"""A sampler as a judge: what it was asked, and that failures are no verdicts."""

from __future__ import annotations

from functools import partial

import pytest

from negtune import HFSampler, SamplingParams
from negtune.models.tiny import tiny_tokenizer
from negtune.rollouts.relevance import SamplerJudge
from negtune.rollouts.sampler import Sampler, make_rollout
from negtune.verifiers.relevance import parse_relevance, relevance_prompt


class Scripted(Sampler):
    """Answers by the document's last word."""

    def __init__(self, tokenizer, answers, policy="0"):
        self.tokenizer, self.policy, self.answers, self.prompts = tokenizer, policy, answers, []

    def draw(self, requests, params):
        self.prompts += [request.prompt for request in requests]
        found = []
        for request in requests:
            text, reason = next(
                a for word, a in self.answers.items() if f"{word}\n" in str(request.prompt[0]["content"])
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            more = {"prompt_ids": [1], "completion_ids": ids, "logps": [0.0] * len(ids), "reason": reason}
            found.append(make_rollout(request, params, self, "script", **more))
        return found


ANSWERS = {
    "yes": ("<answer>relevant</answer>", "stop"),
    "no": ("<answer>irrelevant</answer>", "stop"),
    "maybe": ("<answer>partly</answer>", "stop"),
    "mumble": ("well", "stop"),
    "long": ("<answer>relevant</answer>", "length"),
    "broken": ("<answer>relevant</answer>", "abort"),
}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_failures_are_no_verdicts_and_are_counted(tokenizer):
    sampler = Scripted(tokenizer, ANSWERS)
    judge = SamplerJudge(sampler, model="m")
    found = judge(["a query"] * 6, [f"doc {word}" for word in ANSWERS])
    assert found == ["positive", "negative", "drop", None, None, None]
    assert (judge.asked, judge.unread, judge.cut, judge.errors) == (6, 1, 1, 1)
    assert "doc yes" in sampler.prompts[0][0]["content"]


def test_special_tokens_of_the_judge_are_broken_in_documents(tokenizer):
    sampler = Scripted(tokenizer, ANSWERS)
    SamplerJudge(sampler, model="m")(["q"], [f"{tokenizer.eos_token} yes"])
    assert tokenizer.eos_token not in sampler.prompts[0][0]["content"]


def test_another_model_prompt_setting_or_parser_is_another_judge(tokenizer):
    def name(model="m", policy="0", **more):
        return SamplerJudge(Scripted(tokenizer, ANSWERS, policy), model=model, **more).name

    names = [
        name(),
        name(model="n"),
        name(policy="1"),
        name(params=SamplingParams(temperature=0.0, max_tokens=9)),
        name(prompt=partial(relevance_prompt, max_characters=100)),
        name(parse=lambda text: parse_relevance(text.upper())),
    ]
    assert len(set(names)) == len(names)
    assert name() == names[0]
    assert names[0].startswith("m@0/")


def test_a_model_without_training_judges_nothing(tiny):
    judge = SamplerJudge(HFSampler(*tiny), model="tiny", params=SamplingParams(temperature=0.0, max_tokens=4))
    assert judge(["a query", "another"], ["some text", "more text"]) == [None, None]
    assert judge.asked == judge.cut + judge.unread == 2
