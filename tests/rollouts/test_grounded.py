"""Rewards from a frozen generator: asked once, cut and failed answers unscored."""

from types import SimpleNamespace

import pytest

from negtune.rollouts.grounded import GroundedReward, grounded_prompt
from negtune.rollouts.sampler import SamplingParams
from negtune.verifiers.exact import ExactVerifier


class Parrot:
    """Answers with the last word of the first document; `long` is cut and `broken` fails."""

    def __init__(self):
        self.prompts = []

    def sample(self, prompts, n, params):
        assert n == 1
        self.prompts += prompts
        first = [prompt[0]["content"].split("\n")[0] for prompt in prompts]
        reasons = {"long": "length", "broken": "error"}
        return [SimpleNamespace(text=t.split()[-1], finish_reason=reasons.get(t.split()[0], "stop")) for t in first]


def reward(**settings):
    parrot = Parrot()
    return parrot, GroundedReward(parrot, ExactVerifier(), **settings)


def test_right_and_wrong_answers_and_those_that_nobody_knows():
    _, grounded = reward()
    rankings = [["says Rome", "x"], ["says Oslo", "x"], ["long Rome", "x"], ["broken Rome", "x"]]
    found = grounded(["q"] * 4, rankings, answer=["Rome"] * 4, documents=[["x"]] * 4)
    assert found == [1.0, 0.0, None, None]
    assert (grounded.asked, grounded.unscored) == (4, 2)


def test_cut_answers_count_where_asked_for_and_failures_never():
    _, grounded = reward(score_truncated=True)
    assert grounded(["q", "q"], [["long Rome"], ["broken Rome"]], answer=["Rome", "Rome"]) == [1.0, None]


def test_the_same_first_documents_are_asked_once():
    parrot, grounded = reward(documents=2)
    rankings = [["a Rome", "b", "c"], ["a Rome", "b", "d"], ["a Rome", "c", "b"], ["a Rome", "b", "c"]]
    assert grounded(["q"] * 4, rankings, answer=["Rome"] * 4) == [1.0] * 4
    assert len(parrot.prompts) == 2
    grounded(["q", "other"], rankings[:2], answer=["Rome"] * 2)
    assert len(parrot.prompts) == 3


def test_columns_stay_with_their_queries_when_some_are_known():
    _, grounded = reward()
    grounded(["q1"], [["says Rome"]], answer=["Rome"])
    rankings = [["says Rome"], ["says Oslo"], ["says Rome"]]
    assert grounded(["q1", "q2", "q3"], rankings, answer=["Rome", "Oslo", "Oslo"]) == [1.0, 1.0, 0.0]


def test_the_generator_sees_the_first_documents_in_order_and_the_question():
    parrot, grounded = reward(documents=2)
    grounded(["who?"], [["first Rome", "second", "third"]], answer=["Rome"])
    assert parrot.prompts == [grounded_prompt("who?", ["first Rome", "second"])]
    text = parrot.prompts[0][0]["content"]
    assert text.index("first Rome") < text.index("second") < text.index("who?")
    assert "third" not in text


def test_too_short_a_ranking_is_refused():
    _, grounded = reward(documents=2)
    with pytest.raises(ValueError, match="is to see 2 documents and ranking 1 has 1; raise k"):
        grounded(["a", "b"], [["x", "y"], ["x"]], answer=["Rome"] * 2)
    with pytest.raises(ValueError, match="documents must be at least 1"):
        reward(documents=0)


def test_a_real_sampler_answers_greedily(tiny):
    from negtune.rollouts.hf import HFSampler

    model, tokenizer = tiny
    params = SamplingParams(temperature=0.0, max_tokens=4)
    grounded = GroundedReward(HFSampler(model, tokenizer), ExactVerifier(), params=params, score_truncated=True)
    rewards = grounded(["who?", "where?"], [["a document"], ["another"]], answer=["nobody", "nowhere"])
    assert rewards == [0.0, 0.0]
    assert grounded.asked == 2
