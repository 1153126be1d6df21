"""VLLMSampler with the real vLLM: the weights that are trained, exactly, after every update; and who notices if not."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

from negtune.data.completions import prompt_token_ids
from negtune.models.load import load_model
from negtune.models.tiny import save_tiny
from negtune.rollouts.adapters import lora_rank, refuse_unservable
from negtune.rollouts.attest import (
    StaleEngineError,
    attest,
    computes_in_half,
    difference,
    policy_logps,
    served_weights_hash,
)
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import SamplingParams
from negtune.rollouts.vllm import VLLMSampler
from negtune.rollouts.worker import WorkerExtension

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install 'negtune[vllm]', or make test"
)
if importlib.util.find_spec("llvmlite") is not None:
    import llvmlite.binding  # noqa: F401  beside which vLLM does not start by itself, see tolerate_lazy_modules

PROMPTS = ["Where is Rome?", "Who", [{"role": "user", "content": "Hi"}]]
PARAMS = SamplingParams(max_tokens=8)
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(scope="module")
def engines(tiny_folder, tmp_path_factory):
    """Engines for full training, the same with a tied LM head, and LoRA: starting one takes longer than its tests."""
    os.environ |= {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    tied = save_tiny(tmp_path_factory.mktemp("tied"), tied=True)
    folders = {"full": tiny_folder, "lora": tiny_folder, "tied": tied}
    made: dict[str, tuple] = {}

    def engine(kind: str) -> tuple:
        if kind not in made:
            torch.manual_seed(0)
            model, tokenizer = load_model(folders[kind])
            model = get_peft_model(model, LoraConfig(**LORA)) if kind == "lora" else model
            made[kind] = (model, tokenizer, VLLMSampler(model, tokenizer, enforce_eager=True, max_model_len=384))
        return made[kind]

    yield engine
    for _, _, sampler in made.values():
        sampler.close()


@pytest.fixture(params=["full", "tied", "lora"])
def served(request, engines):
    """Model, tokenizer and sampler, in step with each other."""
    model, tokenizer, sampler = engines(request.param)
    sampler.update(model, "start")
    return model, tokenizer, sampler


def train_a_bit(model: torch.nn.Module, size: float = 0.05) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            parameter.data.add_(torch.randn_like(parameter) * size)


def largest_difference(model, tokenizer, rollouts, temperature: float = 1.0) -> float:
    engine = torch.cat([torch.tensor(r.logps, dtype=torch.float64) for r in rollouts])
    return difference(engine, policy_logps(model, tokenizer, rollouts, temperature)).max().item()


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logps_are_the_trainers_after_every_update(served, temperature):
    model, tokenizer, sampler = served
    params = SamplingParams(max_tokens=8, temperature=temperature)
    for version in ("1", "2", "3"):
        train_a_bit(model)
        stale = sampler.sample(PROMPTS, n=3, params=params)
        assert largest_difference(model, tokenizer, stale, temperature) > 0.05
        sampler.update(model, version)
        rollouts = sampler.sample(PROMPTS, n=3, params=params)
        assert largest_difference(model, tokenizer, rollouts, temperature) < 1e-5
        assert {r.policy for r in rollouts} == {version}


@needs_vllm
def test_records_are_those_of_the_other_sampler(served):
    """Same prompts, ids, seeds and keys; the engines' random numbers differ, so other tokens."""
    model, tokenizer, sampler = served
    ours = HFSampler(model, tokenizer, policy=sampler.policy)
    for a, b in zip(sampler.sample(PROMPTS, n=2, params=PARAMS), ours.sample(PROMPTS, n=2, params=PARAMS), strict=True):
        assert (a.key, a.seed, a.prompt_ids, a.policy) == (b.key, b.seed, b.prompt_ids, b.policy)
        assert a.engine == "vllm"
        assert len(a.logps) == len(a.completion_ids)


@needs_vllm
def test_greedy_completions_are_those_of_transformers(served):
    model, tokenizer, sampler = served
    greedy = SamplingParams(temperature=0, max_tokens=8)
    ours = HFSampler(model, tokenizer).sample(PROMPTS, params=greedy)
    for a, b in zip(sampler.sample(PROMPTS, params=greedy), ours, strict=True):
        assert a.completion_ids == b.completion_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


@needs_vllm
def test_a_completion_depends_on_its_request_alone(served):
    _, _, sampler = served
    together = [r.completion_ids for r in sampler.sample(PROMPTS, n=3, params=PARAMS)]
    alone = [r.completion_ids for p in PROMPTS for r in sampler.sample([p], n=3, params=PARAMS)]
    assert alone == together
    assert len(set(map(tuple, together))) > 6


@needs_vllm
def test_cut_distributions_stop_texts_and_prefixes(served):
    model, tokenizer, sampler = served
    for rollout in sampler.sample(PROMPTS, params=SamplingParams(max_tokens=4, top_k=1)):
        assert rollout.logps == pytest.approx([0.0] * len(rollout.logps), abs=1e-5)
    rollout = sampler.sample(["Where"], params=PARAMS)[0]
    word = tokenizer.decode(rollout.completion_ids[2:3])
    stopped = sampler.sample(["Where"], params=SamplingParams(max_tokens=8, stop=word))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_ids == rollout.completion_ids[: len(stopped.completion_ids)]
    assert word in stopped.text
    chat = PROMPTS[2]
    continued = sampler.sample([chat], params=PARAMS, prefixes=["First"])[0]
    step = tokenizer("First", add_special_tokens=False)["input_ids"]
    assert continued.prompt_ids == prompt_token_ids(chat, tokenizer) + step
    assert largest_difference(model, tokenizer, [continued]) < 1e-5


@needs_vllm
def test_a_prompt_that_does_not_fit_is_named_before_anything_is_drawn(served):
    with pytest.raises(ValueError, match="leaves no room in max_model_len=384"):
        served[2].sample(["ok", "x" * 3000])


@needs_vllm
def test_more_prompt_tokens_than_one_step_of_the_engine_takes(served):
    """With chunked prefill vLLM 0.31 on a CPU winds back a seeded request's generator, which its kind cannot."""
    model, tokenizer, sampler = served
    prompts = [f"Where is Rome {i}? " * 25 for i in range(40)]
    rollouts = sampler.sample(prompts, params=SamplingParams(max_tokens=2))
    assert sum(len(r.prompt_ids) for r in rollouts) > 4096
    assert largest_difference(model, tokenizer, rollouts[:4]) < 1e-5
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="must be off on a CPU"):
            VLLMSampler(model, tokenizer, enable_chunked_prefill=True)


@needs_vllm
def test_adapters_of_the_past_are_gone(engines):
    model, _, sampler = engines("lora")
    for version in ("1", "2"):
        sampler.update(model, version)
    assert len(os.listdir(sampler._folder)) == 1
    assert sampler.llm.llm_engine.list_loras() <= {sampler._adapter.lora_int_id}


@needs_vllm
def test_attestation_passes_clean_rounds_and_finds_an_update_that_was_forgotten(served):
    model, tokenizer, sampler = served
    for round_ in range(10):
        train_a_bit(model, 0.01)
        sampler.update(model, str(round_))
        found = attest(sampler, model, tokenizer, temperature=0.7)
        assert found.max_difference < 1e-4
        assert found.tokens == 32
    train_a_bit(model, 1e-4)
    with pytest.raises(StaleEngineError, match="the engine is stale: it serves policy '9'"):
        attest(sampler, model, tokenizer)


@needs_vllm
@pytest.mark.slow
def test_two_hundred_clean_rounds_raise_no_alarm_and_every_fault_of_three_tolerances_does(engines):
    """Faults of all sizes under an unchanged hash, as a stale cache would be: what the canaries alone find."""
    model, tokenizer, sampler = engines("full")
    largest = 0.0
    for round_ in range(200):
        train_a_bit(model, 0.005)
        sampler.update(model, str(round_))
        largest = max(largest, attest(sampler, model, tokenizer).mean_difference)
    assert largest < 1e-4  # a tenth of the tolerance
    missed, found = [], 0
    for size in [10 ** (-x / 4) for x in range(4, 21)]:
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train_a_bit(model, size)
        sampler.served_hash = served_weights_hash(model)
        apart = attest(sampler, model, tokenizer, tolerance=float("inf")).mean_difference
        if apart >= 3e-3:
            found += 1
            try:
                attest(sampler, model, tokenizer)
                missed.append((size, apart))
            except StaleEngineError:
                pass
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data.copy_(before[name])
    assert found >= 4
    assert missed == []


@needs_vllm
def test_attestation_finds_stale_cached_prefixes(engines, monkeypatch):
    """Weights replaced without emptying the prefix cache: the same hash, and the canaries' prompts are in the cache."""
    model, tokenizer, sampler = engines("full")
    sampler.update(model, "before")
    attest(sampler, model, tokenizer)
    train_a_bit(model)
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: True)
    sampler.update(model, "after")
    with pytest.raises(StaleEngineError, match="same weights .* the engine is stale"):
        attest(sampler, model, tokenizer)
    monkeypatch.undo()
    sampler.update(model, "after")
    attest(sampler, model, tokenizer)


@needs_vllm
def test_attestation_finds_an_adapter_that_the_engine_did_not_take(engines):
    model, tokenizer, sampler = engines("lora")
    sampler.update(model, "before")
    old = sampler._adapter
    kept = sampler._folder / "kept"
    os.rename(old.lora_path, kept)  # the engine has it loaded
    train_a_bit(model)
    os.mkdir(old.lora_path)
    sampler.update(model, "after")
    new, sampler._adapter = sampler._adapter, type(old)("again", 10_000, str(kept))
    with pytest.raises(StaleEngineError, match="does not use what it was given"):
        attest(sampler, model, tokenizer)
    sampler._adapter = new
    attest(sampler, model, tokenizer)


def test_attestation_finds_log_probabilities_before_temperature(tiny):
    """An engine with logprobs_mode=raw_logprobs, played by a sampler that reports them."""
    model, tokenizer = tiny

    class Raw(HFSampler):
        def sample(self, prompts, n=1, params=PARAMS, prefixes=None):
            rollouts = super().sample(prompts, n, params, prefixes)
            raw = iter(policy_logps(self.model, tokenizer, rollouts, 1.0).tolist())
            for rollout in rollouts:
                rollout.logps[:] = [next(raw) for _ in rollout.logps]
            return rollouts

    model.lm_head.weight.data.mul_(20)
    attest(Raw(model, tokenizer), model, tokenizer)
    with pytest.raises(StaleEngineError, match="leave out the temperature"):
        attest(Raw(model, tokenizer), model, tokenizer, temperature=0.5)
    attest(HFSampler(model, tokenizer), model, tokenizer, temperature=0.5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules trained in full"),
        ({"use_dora": True}, "DoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks of their own"),
        ({"alpha_pattern": {"q_proj": 4}}, "scales of their own"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "biases in an adapter"),
        ({"trainable_token_indices": [1, 2]}, "trained token embeddings"),
        ({"init_lora_weights": "pissa"}, "rewrote the base weights"),
        ({"init_lora_weights": "olora"}, "rewrote the base weights"),
    ],
)
def test_adapters_that_vllm_would_serve_wrongly_are_refused(tiny, config, words):
    model = get_peft_model(tiny[0], LoraConfig(r=2, target_modules=["q_proj"], **config))
    with pytest.raises(ValueError, match=words):
        refuse_unservable(model)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_adapters_that_it_serves_are_not(tiny, config):
    refuse_unservable(get_peft_model(tiny[0], LoraConfig(r=2, target_modules=["q_proj"], **config)))


def test_two_adapters_at_once_are_refused(tiny):
    model = get_peft_model(tiny[0], LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter at a time"):
        refuse_unservable(model)


def test_weights_that_no_process_has_whole_are_refused(tiny):
    tiny[0].lm_head.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    with pytest.raises(ValueError, match="split over processes"):
        refuse_unservable(tiny[0])


def test_lora_in_float32_is_refused_on_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = get_peft_model(tiny[0], LoraConfig(**LORA))
    with pytest.raises(ValueError, match="in half precision only; load the model with dtype=torch.bfloat16"):
        VLLMSampler(model, tiny[1])


def test_four_bit_models_are_refused_with_the_way_out(tiny_folder):
    model, _ = load_model(tiny_folder, load_in_4bit=True)
    with pytest.raises(ValueError, match="HFSampler"):
        refuse_unservable(model)


def test_the_rank_is_one_that_vllm_has(tiny):
    model = get_peft_model(tiny[0], LoraConfig(r=20, target_modules=["q_proj"]))
    assert lora_rank(model) == 32


@needs_vllm
def test_an_interrupted_draw_leaves_nothing_in_the_engine(served, monkeypatch):
    model, _, sampler = served
    expected = sampler.sample(PROMPTS, n=2, params=PARAMS)
    engine, steps = sampler.llm.llm_engine, iter(range(3))
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: step() if next(steps) < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(PROMPTS, n=2, params=SamplingParams(max_tokens=64))
    monkeypatch.undo()
    sampler.update(model, sampler.policy)  # its prefix cache can be emptied
    assert [r.completion_ids for r in sampler.sample(PROMPTS, n=2, params=PARAMS)] == [
        r.completion_ids for r in expected
    ]


@needs_vllm
def test_an_update_that_fails_changes_nothing(engines, monkeypatch):
    model, tokenizer, sampler = engines("lora")
    sampler.update(model, "good")
    before, folders = sampler.sample(PROMPTS, params=PARAMS), set(sampler._folder.iterdir())

    def refuse(request):
        raise ValueError("unsupported LoRA weight")

    monkeypatch.setattr(sampler.llm.llm_engine, "add_lora", refuse)
    train_a_bit(model)
    with pytest.raises(ValueError, match="unsupported LoRA weight"):
        sampler.update(model, "bad")
    assert sampler.sample(PROMPTS, params=PARAMS) == before
    assert set(sampler._folder.iterdir()) == folders
    with pytest.raises(StaleEngineError, match="serves policy 'good'"):
        attest(sampler, model, tokenizer)


@needs_vllm
def test_a_completion_ends_where_the_trainers_tokenizer_says(served, monkeypatch):
    """Whatever the checkpoint's own EOS is."""
    _, _, sampler = served
    long = sampler.sample(["Who"], params=SamplingParams(max_tokens=8))[0]
    monkeypatch.setattr(sampler, "_eos", [long.completion_ids[3]])
    ended = sampler.sample(["Who"], params=SamplingParams(max_tokens=8))[0]
    assert ended.finish_reason == "stop"
    assert ended.completion_ids == long.completion_ids[: long.completion_ids.index(long.completion_ids[3]) + 1]


class Wrapped(torch.nn.Module):
    """As DDP wraps: the model is `.module`."""

    def __init__(self, model):
        super().__init__()
        self.module = model


@needs_vllm
def test_a_wrapped_model_is_unwrapped(served):
    model, tokenizer, sampler = served
    train_a_bit(model)
    sampler.update(Wrapped(model), "wrapped")
    assert attest(sampler, Wrapped(model), tokenizer).max_difference < 1e-4


@pytest.mark.parametrize(
    ("how", "half"),
    [("float32", False), ("bfloat16 weights", True), ("autocast", True), ("accelerate", True), ("engine", True)],
)
def test_the_tolerance_follows_the_coarsest_arithmetic(tiny, how, half):
    from contextlib import nullcontext

    model, tokenizer = tiny
    sampler = HFSampler(model, tokenizer)
    if how == "bfloat16 weights":
        model.bfloat16()
    if how == "accelerate":
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        AcceleratorState._reset_state()
    if how == "engine":
        sampler.dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        assert computes_in_half(sampler, model) == half
        attest(sampler, Wrapped(model), tokenizer)  # no false alarm


def test_a_sleeping_engine_is_woken_once_before_it_is_used(tiny, monkeypatch):
    """The order of calls only: vLLM sleeps on CUDA, where tests/gpu has the real one."""
    calls: list[str] = []

    class Engine:
        llm_engine = property(lambda self: self)
        model_config = property(lambda self: self)
        max_model_len = 384

        def generate(self, *args, **kwargs):
            calls.append("generate")
            return []

        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append(name) is None

    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.llm, sampler.tokenizer, sampler.policy, sampler._adapter = Engine(), tiny[1], "0", None
    sampler._sleeps, sampler._asleep, sampler._in_this_process = True, False, True
    sampler._quantization, sampler._eos = None, [1]
    sampler.sleep()
    sampler.sleep()
    sampler.update(tiny[0], "1")
    assert calls[:3] == ["sleep", "wake_up", "collective_rpc"]
    calls.clear()
    sampler.draw([], PARAMS)
    sampler.sleep()
    sampler.draw([], PARAMS)
    assert calls == ["generate", "sleep", "wake_up", "generate"]
    sampler._sleeps, sampler._asleep = False, False
    calls.clear()
    sampler.sleep()
    assert calls == []


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 2])
def test_products_with_one_adapter_are_what_vllm_gathers(dtype, adapters, monkeypatch):
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    names = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    gathered = {name: getattr(lora_ops, name) for name in names}
    seen: list[tuple] = []
    for name, function in gathered.items():
        for module in (lora_ops, punica_cpu):  # put back after the test
            monkeypatch.setattr(module, name, lambda *a, _f=function, **k: (seen.append(a), _f(*a, **k))[1])
    WorkerExtension().multiply_by_one_adapter()
    torch.manual_seed(0)
    x, small = torch.randn(5, 12, dtype=dtype), torch.randn(5, 4, dtype=torch.float32)
    down, up = torch.randn(adapters, 1, 4, 12, dtype=dtype), torch.randn(adapters, 1, 8, 4, dtype=dtype)
    index = torch.tensor([0, adapters - 1, 0, 0, adapters - 1])
    calls = [
        ("bgmv_shrink", (x, down), torch.zeros(5, 6, dtype=torch.float32), (index, 2.0)),
        ("bgmv_expand", (small, up), torch.ones(5, 10, dtype=dtype), (index, True)),
        ("bgmv_expand", (small, up), torch.ones(5, 6, dtype=dtype), (index, False)),
        ("bgmv_expand_slice", (small, up), torch.ones(5, 20, dtype=dtype), (index, 3, 8, True)),
    ]
    for module in (lora_ops, punica_cpu):
        for name, inputs, out, more in calls:
            ours, theirs = out.clone(), out.clone()
            getattr(module, name)(*inputs, ours, *more)
            gathered[name](*inputs, theirs, *more)
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert bool(seen) == (adapters == 2)  # several adapters are left to vLLM


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a CUDA device only")
def test_sleep_without_a_gpu_is_refused(tiny):
    with pytest.raises(ValueError, match="enable_sleep_mode needs a CUDA device"):
        VLLMSampler(*tiny, enable_sleep_mode=True)
