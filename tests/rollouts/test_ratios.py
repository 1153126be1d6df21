"""Importance ratios: right where the whole distribution was drawn from, refused or left out elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import asdict

import pytest
import torch

from negtune.models.tiny import tiny_lm, tiny_tokenizer
from negtune.rollouts.attest import policy_logps
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.ratios import TruncatedSamplingWarning, behaviour_logps, use_ratios
from negtune.rollouts.sampler import Request, Rollout, SamplingParams, make_rollout

PROMPTS = ["Where is Rome?", "Who"]
CUTS = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0}]


@pytest.fixture
def sampler():
    return HFSampler(tiny_lm(dtype=torch.float64), tiny_tokenizer())


@pytest.mark.parametrize("cut", CUTS)
def test_ratios_of_a_cut_distribution_are_refused_or_left_out_with_a_warning(cut):
    params = SamplingParams(**cut)
    name = next(iter(cut))
    with pytest.raises(ValueError, match=f"{name}={cut[name]}.*draw with top_p=1, top_k=0, min_p=0 and"):
        use_ratios(params, wanted=True)
    with pytest.warns(TruncatedSamplingWarning, match=f"{name}={cut[name]} and are switched off"):
        assert not use_ratios(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_ratios(params, wanted=False)


@pytest.mark.parametrize("wanted", [True, None])
def test_the_whole_distribution_gives_ratios_at_any_temperature(wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_ratios(SamplingParams(temperature=0.7), wanted)


@pytest.mark.parametrize("cut", CUTS)
def test_a_record_remembers_that_its_distribution_was_cut(sampler, cut):
    whole = sampler.sample(PROMPTS, params=SamplingParams(max_tokens=4))
    drawn = sampler.sample(PROMPTS, params=SamplingParams(max_tokens=4, **cut))
    again = [Rollout.from_record(asdict(rollout)) for rollout in drawn]
    with pytest.raises(ValueError, match=f"rollout {again[0].key} was drawn"):
        behaviour_logps([*whole, *again])


def test_behaviour_logps_are_padded_and_masked(sampler):
    rollouts = [
        rollout
        for length in (6, 3)
        for rollout in sampler.sample(PROMPTS, n=3, params=SamplingParams(max_tokens=length, temperature=0.8))
    ]
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    logps, mask = behaviour_logps(rollouts)
    assert mask.sum(1).tolist() == [len(r.completion_ids) for r in rollouts]
    assert logps[~mask].abs().sum() == 0
    ratios = policy_logps(sampler.model, sampler.tokenizer, rollouts, 0.8) - logps[mask]
    assert ratios.abs().max() < 1e-6  # nothing was trained in between; generate scores in float32
    assert behaviour_logps([])[0].shape == (0, 0)


def test_the_expected_ratio_of_another_policy_is_one(sampler):
    """Over every token that can be drawn; over the 12 that `top_k` would have left it is far from 1."""
    other, tokenizer = tiny_lm(seed=1, dtype=torch.float64), sampler.tokenizer
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        behaviour = torch.log_softmax(sampler.model(torch.tensor([ids])).logits[0, -1], -1)
    rollouts = [
        make_rollout(
            Request(PROMPTS[0], "", token),
            SamplingParams(max_tokens=1),
            sampler,
            "by hand",
            prompt_ids=ids,
            completion_ids=[token],
            logps=[behaviour[token].item()],
            reason="length",
        )
        for token in range(len(behaviour))
    ]
    logps = behaviour_logps(rollouts)[0][:, 0]
    weighed = logps.exp() * (policy_logps(other, tokenizer, rollouts, 1.0) - logps).exp()
    assert weighed.sum().item() == pytest.approx(1, abs=1e-9)
    assert weighed[logps.topk(12).indices].sum().item() < 0.5
