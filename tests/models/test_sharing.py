"""Packed trees against padded rows on real architectures: values, gradients, isolation, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from negtune.data.completions import collate
from negtune.models import sharing
from negtune.models.forward import attach_scoring, completion_hidden, completion_logps, scored_tokens
from negtune.models.load import load_model
from negtune.models.policy import disable_dropout, has_dropout, prepare_policy
from negtune.models.reference import AdapterReference, FrozenCopy
from negtune.models.sharing import packed_batch, set_prefix_sharing
from negtune.models.structure import causal_lm
from negtune.models.tiny import tiny_lm

PAIR = [
    {"prompt_ids": [11, 12, 13, 14], "completion_ids": [15, 16, 17, 1]},
    {"prompt_ids": [11, 12, 13, 14], "completion_ids": [15, 21, 1]},
]
ROWS = [
    *PAIR,
    {"prompt_ids": [30], "completion_ids": [1]},
    {"prompt_ids": [11, 12], "completion_ids": [13, 14, 15, 21]},
    PAIR[0],
]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def with_attention(model: nn.Module, implementation: str) -> nn.Module:
    model.set_attn_implementation(implementation)
    return model


def without_layers(model: nn.Module) -> nn.Module:
    model.model.layers = nn.Sequential(*model.model.layers)
    return model


def gemma2(window: int = 64) -> nn.Module:
    config = Gemma2Config(
        **SMALL, num_key_value_heads=1, head_dim=16, sliding_window=window, attn_implementation="eager"
    )
    return Gemma2ForCausalLM(config)


MODELS = {
    "llama": tiny_lm,
    "llama, eager": lambda: with_attention(tiny_lm(), "eager"),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=16)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2)
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "gemma2, long window": gemma2,
}


def sharing_and_not(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same model twice, in float64 where it can: shared prefixes forced on, and padded rows."""
    model = model if isinstance(model, Qwen3MoeForCausalLM) else model.double()
    other = copy.deepcopy(model)
    for one in (model, other):
        attach_scoring(one)
    set_prefix_sharing(causal_lm(model), "on")
    return model, other


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(packed: nn.Module, padded: nn.Module, rows: list[dict], side: str = "right") -> None:
    """Log-probabilities and all gradients of a weighted sum; the padded model always gets its padding on the right."""
    found, expected = completion_logps(packed, collate(rows, 0, side)), completion_logps(padded, collate(rows, 0))
    exact = 1e-9 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
    weights = torch.linspace(0.5, 2, found.numel(), dtype=found.dtype).view_as(found)
    for model, logps in ((packed, found), (padded, expected)):
        model.zero_grad()
        (logps * weights).sum().backward()
    found_gradients, expected_gradients = gradients(packed), gradients(padded)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # RMSNorm computes in float32 whatever the model's dtype, and sums a shared token's gradients in another order;
        # random rows can cancel, and what is left is that rounding.
        allowed = max(1e-6, (1e-6 if exact == 1e-9 else 1e-4) * gradient.abs().max().item())
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_values_and_gradients_are_those_of_padded_rows(name, side):
    torch.manual_seed(0)
    packed, padded = sharing_and_not(MODELS[name]())
    compare(packed, padded, ROWS, side)


@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_with_an_adapter_and_gradient_checkpointing(training):
    model = get_peft_model(tiny_lm(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    packed, padded = sharing_and_not(model)
    for one in (packed, padded):
        one.train(training)
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable({"use_reentrant": False})
    compare(packed, padded, ROWS)
    assert any("lora" in name for name in gradients(packed))


def test_four_bit_weights_give_the_values_and_gradients_of_padded_rows(tiny_folder):
    found = {}
    for mode in ("on", "off"):
        torch.manual_seed(0)
        model, _ = load_model(tiny_folder, load_in_4bit=True)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        attach_scoring(model)
        set_prefix_sharing(model, mode)
        logps = completion_logps(model, collate(ROWS, 0))
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        found[mode] = {"logps": logps.detach(), **gradients(model)}
    assert len(found["on"]) > 10
    for name, expected in found["off"].items():
        torch.testing.assert_close(
            found["on"][name], expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize(("evaluated", "tolerance"), [("before", 1e-2), ("while training", 1e-4)])
def test_an_evaluation_leaves_the_gradients_of_four_bit_weights_alone(tiny_folder, evaluated, tolerance):
    """On a CPU with AVX512-BF16 bitsandbytes repacks what is evaluated, for a product without a backward pass, and
    rounds its scales to bfloat16."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)

    def measured(model: nn.Module) -> dict[str, torch.Tensor]:
        logps = completion_logps(model.train(), collate(ROWS, 0))
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        return {"logps": logps.detach(), **gradients(model)}

    def load() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=four_bit, device_map="cpu")

    truth = get_peft_model(load(), lora)
    for parent in list(truth.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
                plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
                setattr(parent, name, plain)
    attach_scoring(truth)
    model = load()
    if evaluated == "before":  # by somebody else
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    model = prepare_policy(model, lora)
    if evaluated == "while training":
        with torch.no_grad():
            completion_logps(model.eval(), collate(ROWS, 0))
    expected, found = measured(truth), measured(model)
    assert len(expected) > 10
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=lambda m, n=name: n + m
        )


def test_under_bf16_autocast_a_tree_is_as_close_to_the_truth_as_padded_rows():
    torch.manual_seed(0)
    packed, padded = sharing_and_not(tiny_lm())
    batch = collate(ROWS, 0)

    def measured(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logps = completion_logps(model, batch)
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        return {"logps": logps.detach().double(), **{n: g.double() for n, g in gradients(model).items()}}

    truth = measured(padded)
    with torch.autocast("cpu", torch.bfloat16):
        in_tree, in_rows = measured(packed.float()), measured(padded.float())
    for name, exact in truth.items():
        rounding = (in_rows[name] - exact).norm()
        assert rounding > 0
        assert (in_tree[name] - exact).norm() <= 2 * rounding, name


def test_references_share_too():
    model = get_peft_model(tiny_lm(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    packed, padded = sharing_and_not(model)
    batch = collate(ROWS, 0)
    expected = AdapterReference().logps(padded, batch)
    torch.testing.assert_close(AdapterReference().logps(packed, batch), expected, rtol=1e-9, atol=1e-9)
    frozen = FrozenCopy(packed)
    assert causal_lm(frozen.model)._prefix_sharing.mode == "on"
    torch.testing.assert_close(
        frozen.logps(packed, batch), FrozenCopy(padded).logps(padded, batch), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_hidden_states_and_activations_of_a_layer_are_found_in_the_tree(layer):
    packed, padded = sharing_and_not(tiny_lm())
    batch = collate(ROWS, 0, "left")
    found, expected = (completion_hidden(m, batch, scored_tokens(batch), layer) for m in (packed, padded))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


token_rows = st.lists(
    st.tuples(st.lists(st.integers(5, 7), min_size=1, max_size=5), st.lists(st.integers(5, 7), min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


@given(token_rows, st.integers(1, 30), st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=60)
def test_random_trees_give_the_values_of_their_rows(trees, budget, side):
    torch.manual_seed(0)
    packed, padded = sharing_and_not(tiny_lm())
    set_prefix_sharing(packed, "on", budget=budget)
    compare(packed, padded, [{"prompt_ids": p, "completion_ids": c} for p, c in trees], side)


def test_a_token_reaches_its_own_branch_and_nothing_else():
    model, _ = sharing_and_not(tiny_lm())
    before = completion_logps(model, collate(ROWS, 0))
    changed = copy.deepcopy(ROWS)
    changed[1]["completion_ids"][1] = 22  # the token at which row 1 leaves row 0 and joins row 3
    after = completion_logps(model, collate(changed, 0))
    same = torch.isclose(before, after, rtol=1e-12, atol=1e-12)
    expected = torch.ones_like(same)
    expected[1, 1:3] = False
    assert torch.equal(same, expected)


def test_auto_packs_where_it_saves_work_and_pads_where_it_does_not():
    model = tiny_lm()
    assert set_prefix_sharing(model, "auto") is None
    shared = collate([{"prompt_ids": [7] * 20, "completion_ids": [8 + i, 1]} for i in range(4)], 0)
    alone = collate([{"prompt_ids": [7 + i] * 20, "completion_ids": [8, 1]} for i in range(4)], 0)
    assert packed_batch(model, shared).tokens == 20 + 4 * 2
    assert packed_batch(model, alone) is None
    set_prefix_sharing(model, "on")
    assert packed_batch(model, alone).tokens == 4 * 22
    set_prefix_sharing(model, "off")
    assert packed_batch(model, shared) is None


def test_tokens_are_counted_in_training_forwards_only():
    model = tiny_lm()
    set_prefix_sharing(model, "on")
    batch = collate(PAIR, 0)
    with torch.no_grad():
        packed_batch(model, batch)
    assert model._prefix_sharing.counts.rows == 0
    packed_batch(model, batch)
    counts = model._prefix_sharing.counts
    assert (counts.rows, counts.distinct, counts.processed) == (8 + 7, 10, 10)


def with_adapter(config) -> nn.Module:
    return get_peft_model(tiny_lm(), config)


REFUSED = {
    "local attention": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                **{"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "window_size": 4},
                attention_types=[[["global", "local"], 1]],
            )
        ),
        "local attention layers count distance in memory",
    ),
    "prefix tuning": (
        lambda: with_adapter(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "puts virtual tokens before each row",
    ),
    "activated LoRA": (
        lambda: with_adapter(
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[14, 15])
        ),
        "looks for its invocation tokens",
    ),
    "layers in no list": (lambda: without_layers(tiny_lm()), "keeps its 2 decoder layers in no list"),
    "state space": (
        lambda: MambaForCausalLM(MambaConfig(**{**SMALL, "state_size": 4})),
        "attn_implementation|position_ids",
    ),
    "bias by distance": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)),
        "takes no position_ids|tree mask",
    ),
    "flex on a CPU": (lambda: with_attention(tiny_lm(), "flex_attention"), "CUDA only"),
    "dropout": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)), "disable_dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_share_exactly_say_why_and_go_on_padded(name):
    build, words = REFUSED[name]
    model = build()
    with pytest.raises(ValueError, match=words):
        set_prefix_sharing(model, "on")
    assert set_prefix_sharing(model, "auto")
    assert packed_batch(causal_lm(model).train(), collate(PAIR, 0)) is None


def test_with_dropout_evaluation_is_packed_and_training_is_not():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    assert "disable_dropout" in set_prefix_sharing(model, "auto")
    model._prefix_sharing.cost = sharing.Cost(1.0, 0.0)
    assert packed_batch(model.eval(), collate(PAIR, 0)) is not None
    assert packed_batch(model.train(), collate(PAIR, 0)) is None


def test_attention_dropout_which_is_a_number_and_no_module_counts_as_dropout():
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, attention_dropout=0.1))
    assert "disable_dropout" in set_prefix_sharing(model, "auto")
    disable_dropout(model)
    assert set_prefix_sharing(model, "auto") is None
    ids = torch.arange(5, 20)[None]
    model.train()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_noise_on_the_embeddings_is_refused_in_training_only():
    model = tiny_lm()
    set_prefix_sharing(model, "on")
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # what the host sets when training starts
    assert packed_batch(model.eval(), collate(PAIR, 0)) is not None
    with pytest.raises(ValueError, match="NEFTune"):
        packed_batch(model.train(), collate(PAIR, 0))


def test_noise_that_is_no_dropout_module_is_found_by_running_twice():
    model = tiny_lm()
    layer = model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda x: original(x) + (torch.rand_like(x) if layer.training else 0)
    state = torch.get_rng_state()
    assert "draws random numbers in training" in set_prefix_sharing(model, "auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    model._prefix_sharing.cost = sharing.Cost(1.0, 0.0)
    assert packed_batch(model.eval(), collate(PAIR, 0)) is not None
    assert packed_batch(model.train(), collate(PAIR, 0)) is None


def test_disable_dropout_reaches_numbers_that_modules_hold():
    config = OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3})
    model = OPTForCausalLM(config).train()
    disable_dropout(model)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dropout_is_found_wherever_disable_dropout_takes_it_out():
    held = OPTForCausalLM(OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3}))
    for model in (held, nn.Sequential(nn.Dropout(0.1))):
        assert has_dropout(model)
        disable_dropout(model)
        assert not has_dropout(model)
    assert not has_dropout(tiny_lm())
    assert has_dropout(nn.BatchNorm1d(2))  # its eval mode is another function, too


class DistanceBias(nn.Module):
    """An attention layer that ignores positions and masks: each token sees its neighbour in memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        out, weights = self.layer(hidden_states=hidden_states, **kwargs)
        return out + 0.5 * nn.functional.pad(hidden_states, (0, 0, 1, -1)), weights


def test_the_probe_finds_a_layer_that_looks_at_memory_order_whatever_it_is_called():
    model = tiny_lm()
    model.model.layers[0].self_attn = DistanceBias(model.model.layers[0].self_attn)
    with pytest.raises(ValueError, match="other hidden states"):
        set_prefix_sharing(model, "on")


def test_rows_beyond_an_attention_window_are_padded_or_refused():
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=7))
    set_prefix_sharing(model, "auto")
    model._prefix_sharing.cost = sharing.Cost(1.0, 0.0)
    short = collate([{"prompt_ids": [7] * 5, "completion_ids": [8 + i, 1]} for i in range(4)], 0)
    long = collate([{"prompt_ids": [7] * 6, "completion_ids": [8 + i, 1]} for i in range(4)], 0)
    assert packed_batch(model, short) is not None
    assert packed_batch(model, long) is None
    set_prefix_sharing(model, "on")
    with pytest.raises(ValueError, match="window of 7"):
        packed_batch(model, long)


@pytest.mark.parametrize(
    "build",
    [lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=8)), lambda: gemma2(8)],
)
def test_a_row_that_just_fits_the_window_is_exact(build):
    torch.manual_seed(0)
    packed, padded = sharing_and_not(build())
    compare(packed, padded, PAIR)
