"""HFSampler on a tiny model: the distribution, the record, independence of the batch, the open turn."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from negtune.data.completions import collate, prompt_token_ids
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.structure import causal_lm, decoder_layers
from negtune.models.tiny import tiny_lm, tiny_tokenizer
from negtune.rollouts import hf
from negtune.rollouts.hf import HFSampler, cut
from negtune.rollouts.sampler import AGAIN, Rollout, SamplingParams, requests_for, share_of

PROMPTS = ["Where is Rome?", "Who", "A longer prompt, so that there is padding.", [{"role": "user", "content": "Hi"}]]
SHORT = SamplingParams(max_tokens=6)


@pytest.fixture
def sampler():
    return HFSampler(tiny_lm(dtype=torch.float64), tiny_tokenizer(), batch_size=3)


def test_logps_are_those_of_the_policy_at_the_sampling_temperature(sampler):
    for temperature in (1.0, 0.5):
        rollouts = sampler.sample(PROMPTS, n=2, params=SamplingParams(temperature=temperature, max_tokens=6))
        for rollout in rollouts:
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
            logps = (sampler.model(input_ids=ids).logits / temperature).log_softmax(-1)
            drawn = logps[0, len(rollout.prompt_ids) - 1 : -1].gather(-1, ids[0, len(rollout.prompt_ids) :, None])
            torch.testing.assert_close(torch.tensor(rollout.logps, dtype=torch.float64), drawn[:, 0])


def test_they_are_what_the_trainer_computes(sampler):
    """Up to float32, in which `generate` hands out its logits."""
    attach_scoring(sampler.model)
    rollouts = sampler.sample(PROMPTS, n=2, params=SHORT)
    rows = [{"prompt_ids": r.prompt_ids, "completion_ids": r.completion_ids} for r in rollouts]
    logps = completion_logps(sampler.model, collate(rows, 0))
    for rollout, row in zip(rollouts, logps, strict=True):
        assert row[: len(rollout.logps)].tolist() == pytest.approx(rollout.logps, abs=3e-6)


def test_first_tokens_follow_the_softmax(sampler):
    """4000 draws of one token: every bin of the distribution within 5 standard errors."""
    sampler.batch_size = 500
    sampler.model.lm_head.weight.data.mul_(40)  # far from uniform
    params = SamplingParams(max_tokens=1, temperature=0.7)
    rollouts = sampler.sample(["Where"], n=4000, params=params)
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=sampler.model.vocab_size)
    ids = torch.tensor([prompt_token_ids("Where", sampler.tokenizer)])
    expected = (sampler.model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    assert expected.max() > 0.05
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * error + 1e-3).all()


def test_a_completion_depends_on_its_request_alone(sampler):
    requests = requests_for(PROMPTS, 3)
    together = sampler.draw(requests, SHORT)
    sampler.batch_size = 1
    assert [r.completion_ids for r in sampler.draw(requests, SHORT)] == [r.completion_ids for r in together]
    halves = {r.key: r for i in range(2) for r in sampler.draw(list(share_of(requests, i, 2)), SHORT)}
    assert [halves[r.key].completion_ids for r in together] == [r.completion_ids for r in together]
    assert len({tuple(r.completion_ids) for r in together}) > 9


@pytest.mark.parametrize("adapter", [False, True])
def test_a_prompt_is_read_once_for_all_of_its_completions(monkeypatch, adapter):
    """The same completions as when every row reads its own."""
    model, tokenizer = tiny_lm(dtype=torch.float64), tiny_tokenizer()
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    sampler, read = HFSampler(model, tokenizer, batch_size=12), []
    prompts = ["Where is Rome?", "Who", [{"role": "user", "content": "Say it, and then say it again."}]]
    layer = decoder_layers(causal_lm(model))[0]
    hook = layer.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape[:2])))
    shared = sampler.sample(prompts, 4, SamplingParams(max_tokens=8))
    assert read[0][0] == 3  # three prompts, not twelve
    assert read[1] == (12, 1)
    monkeypatch.setattr(HFSampler, "_cache_of_prompts", lambda *args: None)
    read.clear()
    plain = sampler.sample(prompts, 4, SamplingParams(max_tokens=8))
    assert read[0][0] == 12
    hook.remove()
    for a, b in zip(shared, plain, strict=True):
        assert a.completion_ids == b.completion_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-6)


@pytest.mark.parametrize("same_prompt", [False, True])
def test_completions_that_have_ended_are_computed_no_further(monkeypatch, same_prompt):
    """And the others are what they would have been."""
    model, tokenizer = tiny_lm(dtype=torch.float64), tiny_tokenizer()
    sampler, read = HFSampler(model, tokenizer, batch_size=16), []
    prompts = ["Where is Rome?"] if same_prompt else [f"{'far ' * i}Where" for i in range(16)]
    params = SamplingParams(max_tokens=24, stop=("e", "a"))
    hook = decoder_layers(model)[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[0]))
    dropping = sampler.sample(prompts, 16 // len(prompts), params)
    rows, read[:] = read[1:] if same_prompt else list(read), []
    lengths = [len(r.completion_ids) for r in dropping]
    needed = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert len(rows) == len(needed)
    assert all(now <= rows_now <= max(now / hf.GOING_ON, 1) for now, rows_now in zip(needed, rows, strict=True))
    assert len(set(rows)) > 3
    monkeypatch.setattr(hf, "GOING_ON", 0)
    plain = sampler.sample(prompts, 16 // len(prompts), params)
    hook.remove()
    assert set(read[-len(needed) :]) == {16}
    for a, b in zip(dropping, plain, strict=True):
        assert (a.completion_ids, a.finish_reason) == (b.completion_ids, b.finish_reason)
        assert a.logps == pytest.approx(b.logps, abs=1e-6)
    assert len(set(lengths)) > 4


def test_another_seed_gives_other_completions_and_other_keys(sampler):
    first, second = (sampler.sample(PROMPTS[:1], n=4, params=SamplingParams(max_tokens=6, seed=s)) for s in (0, 1))
    assert not {r.key for r in first} & {r.key for r in second}
    assert [r.completion_ids for r in first] != [r.completion_ids for r in second]


def test_prompts_given_twice_are_drawn_twice(sampler):
    rollouts = sampler.sample(["Who", "Who"], n=2, params=SHORT)
    assert [r.number for r in rollouts] == [0, 1, AGAIN, AGAIN + 1]
    assert len({r.key for r in rollouts}) == 4
    more = sampler.sample(["Who", "Who"], n=3, params=SHORT)
    assert [more[i].key for i in (0, 1, 3, 4)] == [r.key for r in rollouts]  # whichever row they belong to


def test_settings_that_are_equal_give_equal_keys():
    whole, decimal = SamplingParams(temperature=1, top_p=1, min_p=0), SamplingParams(temperature=1.0)
    request = requests_for(["Who"], 1)[0]
    assert request.key(whole, "0") == request.key(decimal, "0")


@pytest.mark.parametrize("prompt", ["Who", "Where is Rome? " * 3])
def test_a_completion_ends_with_the_models_positions(sampler, prompt):
    rows = len(sampler.tokenizer(prompt)["input_ids"])
    sampler.model.config.max_position_embeddings = rows + 3
    long = SamplingParams(max_tokens=6)
    other = sampler.sample(["W"], params=long)[0]
    short = sampler.sample([prompt, "W"], params=long)
    assert len(short[0].completion_ids) == 3
    assert short[0].finish_reason == "length"
    assert short[1].completion_ids == other.completion_ids  # whoever is its neighbour
    sampler.model.config.max_position_embeddings = rows
    with pytest.raises(ValueError, match=f"leaves no room in max_position_embeddings={rows}"):
        sampler.sample([prompt], params=SHORT)
    with pytest.raises(ValueError, match="has no tokens; drop the row"):
        sampler.sample([""], params=SHORT)
    with pytest.raises(ValueError, match="at least 0.01, got 0.001"):
        SamplingParams(temperature=0.001)


@pytest.mark.parametrize("early", [False, True])
def test_a_row_at_its_last_position_leaves_a_batch_that_goes_on(early):
    """GPT-2 looks its positions up in a table: there is no row behind the last."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model, tokenizer = GPT2LMHeadModel(config).double().eval(), tiny_tokenizer()
    long, params = "Where is Rome? " * 4, SamplingParams(max_tokens=30)
    prompts = [long, *(f"Who is {i}?" for i in range(9))]
    room = 40 - len(tokenizer(long)["input_ids"])
    assert 0 < room < 30
    if early:  # it has ended before, and its place in the batch would run over
        first = HFSampler(model, tokenizer).sample([long], params=params)[0].completion_ids[0]
        model.generation_config.eos_token_id = [1, first]
    together = HFSampler(model, tokenizer, batch_size=16).sample(prompts, params=params)
    alone = HFSampler(model, tokenizer, batch_size=1).sample(prompts, params=params)
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]
    assert len(together[0].completion_ids) == (1 if early else room) < max(len(r.completion_ids) for r in together)


def test_the_likeliest_token_is_taken_whatever_the_cuts(sampler):
    plain, cut = (sampler.sample(PROMPTS, params=SamplingParams(temperature=0, max_tokens=3, top_k=k)) for k in (0, 2))
    assert [r.logps for r in cut] == [r.logps for r in plain]


def test_temperature_zero_takes_the_likeliest_token(sampler):
    greedy = sampler.sample(["Where"], n=2, params=SamplingParams(temperature=0, max_tokens=4))
    assert greedy[0].completion_ids == greedy[1].completion_ids
    ids = torch.tensor([greedy[0].prompt_ids])
    logps = sampler.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert greedy[0].completion_ids[0] == logps.argmax()
    assert greedy[0].logps[0] == pytest.approx(logps.max().item())


def test_a_completion_ends_at_eos_which_belongs_to_it_or_is_cut(sampler):
    eos = sampler.tokenizer.eos_token_id
    bias = torch.zeros(sampler.model.vocab_size, dtype=torch.float64)
    bias[eos] = 3.0
    sampler.model.lm_head.bias = torch.nn.Parameter(bias)
    rollouts = sampler.sample(PROMPTS, n=8, params=SamplingParams(max_tokens=5))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ended = rollout.completion_ids[-1] == eos
        assert ended == (rollout.finish_reason == "stop")
        assert eos not in rollout.completion_ids[:-1]
        assert len(rollout.completion_ids) <= 5


def test_a_stop_text_ends_a_completion_at_the_token_that_completes_it(sampler):
    plain = sampler.sample(["Where"], n=1, params=SamplingParams(max_tokens=8))[0]
    word = sampler.tokenizer.decode(plain.completion_ids[3:5])
    stopped = sampler.sample(["Where"], n=1, params=SamplingParams(max_tokens=8, stop=word))[0]
    assert stopped.finish_reason == "stop"
    assert word in stopped.text
    assert len(stopped.completion_ids) <= 5


def test_a_stop_text_may_be_a_special_token(sampler):
    bias = torch.zeros(sampler.model.vocab_size, dtype=torch.float64)
    bias[sampler.tokenizer.convert_tokens_to_ids("<|user|>")] = 8.0
    sampler.model.lm_head.bias = torch.nn.Parameter(bias)
    rollout = sampler.sample(["Where"], params=SamplingParams(max_tokens=8, stop="<|user|>"))[0]
    assert rollout.finish_reason == "stop"
    assert sampler.tokenizer.convert_ids_to_tokens(rollout.completion_ids)[-1] == "<|user|>"


def test_a_prefix_stays_inside_the_open_turn(sampler):
    chat = [{"role": "user", "content": "Hi"}]
    rollout = sampler.sample([chat], params=SHORT, prefixes=["First step."])[0]
    opened = prompt_token_ids(chat, sampler.tokenizer)
    step = sampler.tokenizer("First step.", add_special_tokens=False)["input_ids"]
    assert rollout.prompt_ids == opened + step
    by_ids = sampler.sample([chat], params=SHORT, prefixes=[step])[0]
    assert by_ids.prompt_ids == rollout.prompt_ids
    assert by_ids.prefix_text == rollout.prefix_text == "First step."


def test_settings_of_the_checkpoint_have_no_part_in_the_draw(sampler):
    before = sampler.sample(PROMPTS, params=SHORT)
    config = sampler.model.generation_config
    config.do_sample, config.top_k, config.repetition_penalty, config.temperature = True, 2, 1.9, 0.1
    assert sampler.sample(PROMPTS, params=SHORT) == before
    assert sampler.model.generation_config is config


def test_an_adapter_and_training_mode(sampler):
    base = sampler.sample(PROMPTS, params=SHORT)
    model = get_peft_model(sampler.model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    model.train()
    sampler.update(model, "1")
    same = sampler.sample(PROMPTS, params=SHORT)
    assert [r.completion_ids for r in same] == [r.completion_ids for r in base]  # B is zero
    assert {r.policy for r in same} == {"1"}
    assert model.training
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    assert [r.completion_ids for r in sampler.sample(PROMPTS, params=SHORT)] != [r.completion_ids for r in base]


def test_cutting_keeps_what_its_definitions_say():
    logps = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(**settings) -> list[bool]:
        return cut(logps, SamplingParams(**settings))[0].isfinite().tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(min_p=0.3) == [True, True, True, False]
    assert kept() == [True] * 4


def test_records_survive_the_store(sampler):
    rollout = sampler.sample(PROMPTS[-1:], params=SHORT)[0]
    from dataclasses import asdict

    from negtune.records import strict

    assert Rollout.from_record(strict(asdict(rollout))) == rollout


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_p": 0}, "need 0 < top_p"),
        ({"stop": ""}, "must not be empty"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**settings)


def test_requests_need_a_prefix_for_every_prompt():
    with pytest.raises(ValueError, match="one prefix per prompt, got 1 for 2"):
        requests_for(["a", "b"], 1, ["x"])
    with pytest.raises(ValueError, match="need 1 to 999999 completions"):
        requests_for(["a"], 0)
    assert math.isfinite(requests_for(["a"], 1)[0].seed(SamplingParams()))


def test_logits_that_are_no_numbers_are_an_error_and_no_draw():
    model = tiny_lm()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="nothing can be drawn from them"):
        HFSampler(model, tiny_tokenizer()).sample(["Who"], params=SHORT)
