"""Per-token log-probs against full logits: every padding, adapter and head, and nonsense where nothing may look."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from negtune.data.completions import collate
from negtune.models.forward import (
    attach_scoring,
    check_layer,
    check_scoring,
    completion_logps,
    completion_statistics,
    run,
    scored_tokens,
)
from negtune.models.reference import AdapterReference, FrozenCopy, weights_hash
from negtune.models.structure import causal_lm, eval_mode
from negtune.models.tiny import tiny_lm

ROWS = [
    {"prompt_ids": [11, 12, 13], "completion_ids": [14, 15, 16, 17]},
    {"prompt_ids": [19, 18, 17, 16, 15], "completion_ids": [21, 1]},
    {"prompt_ids": [30], "completion_ids": [1]},
]


def expected(model, rows):
    """Each row alone, no padding, full logits."""
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        start = len(row["prompt_ids"])
        found.append(logps[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]])
    return found


def model64(**kwargs):
    model = tiny_lm(dtype=torch.float64, **kwargs)
    attach_scoring(model)
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [0, 1, 99])  # 1 is the EOS: a mask made from `ids != pad` would lose it
def test_log_probs_equal_full_logits_for_any_padding(side, pad):
    model = model64()
    logps = completion_logps(model, collate(ROWS, pad, side))
    for got, want, row in zip(logps, expected(model, ROWS), ROWS, strict=True):
        n = len(row["completion_ids"])
        torch.testing.assert_close(got[:n], want, rtol=1e-12, atol=1e-12)
        assert (got[n:] == 0).all()


def test_learned_positions_survive_left_padding():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32)).double().eval()
    attach_scoring(model)
    for got, want in zip(completion_logps(model, collate(ROWS, 0, "left")), expected(model, ROWS), strict=True):
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-10, atol=1e-10)


def test_what_stands_behind_the_mask_changes_nothing():
    model, batch = model64(), collate(ROWS, 0)
    clean = completion_logps(model, batch)
    dirty = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77))
    assert torch.equal(completion_logps(model, dirty), clean)


def test_a_later_token_does_not_reach_an_earlier_one():
    model = model64()
    changed = [{**ROWS[0], "completion_ids": [14, 15, 16, 99]}]
    before, after = completion_logps(model, collate(ROWS[:1], 0)), completion_logps(model, collate(changed, 0))
    assert torch.equal(before[0, :3], after[0, :3])
    assert before[0, 3] != after[0, 3]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_through_full_logits(frozen, tied):
    ours, theirs = model64(tied=tied), tiny_lm(dtype=torch.float64, tied=tied)
    for model in (ours, theirs):
        if frozen:
            model.get_output_embeddings().weight.requires_grad_(False)
    weight = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (completion_logps(ours, collate(ROWS, 0))[scored_tokens(collate(ROWS, 0)).mask] * weight).sum().backward()
    (torch.cat(expected(theirs, ROWS)) * weight).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.mark.parametrize("config", [LoraConfig(**LORA), LoraConfig(**LORA, task_type="CAUSAL_LM")])
def test_adapter_on_and_off(config):
    model = model64()
    base = completion_logps(model, collate(ROWS, 0)).detach()
    adapted = get_peft_model(model, config).double()
    on = completion_logps(adapted, collate(ROWS, 0))
    for got, want in zip(on, expected(adapted, ROWS), strict=True):
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-10, atol=1e-10)
    off = AdapterReference().logps(adapted, collate(ROWS, 0))
    torch.testing.assert_close(off, base, rtol=1e-12, atol=1e-12)
    assert (on - off).abs().max() > 1e-2
    assert not off.requires_grad
    torch.testing.assert_close(completion_logps(adapted, collate(ROWS, 0)), on)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_output_is_what_the_layer_module_returns_and_carries_its_gradient(side, checkpointing):
    model, rows = model64(layers=3), ROWS
    layer = model.model.layers[1]
    want = []
    for row in rows:
        caught = []
        hook = layer.register_forward_hook(lambda module, args, out, caught=caught: caught.append(out))
        model(input_ids=torch.tensor([row["prompt_ids"] + row["completion_ids"]]))
        hook.remove()
        output = caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0]
        want.append(output[0, len(row["prompt_ids"]) :])
    (expected_gradient,) = torch.autograd.grad(torch.cat(want).square().sum(), model.model.layers[0].mlp.up_proj.weight)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    attach_scoring(model)
    batch = collate(rows, 0, padding_side=side)
    out = run(model, batch, scored_tokens(batch), lambda hidden, head, layers: {"inner": layers[1]}, (1,))["inner"]
    torch.testing.assert_close(out, torch.cat(want), rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, expected_gradient, rtol=1e-8, atol=1e-10)
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=f"between 0 and 2 for this model, got {layer}"):
        check_layer(model64(layers=3), layer)


def test_a_layer_with_nothing_trained_below_it_is_refused():
    model = model64(layers=3).requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    check_layer(model, 1)
    with pytest.raises(ValueError, match="nothing that is trained lies at or below layer 0"):
        check_layer(model, 0)


def test_a_head_in_modules_to_save_is_used_when_on_and_its_original_when_off():
    model = model64()
    base = completion_logps(model, collate(ROWS, 0)).detach()
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(model, config).double()
    with torch.no_grad():
        causal_lm(adapted).get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    for got, want in zip(completion_logps(adapted, collate(ROWS, 0)), expected(adapted, ROWS), strict=True):
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-10, atol=1e-10)
    reference = AdapterReference()
    torch.testing.assert_close(reference.logps(adapted, collate(ROWS, 0)), base)
    hidden, head = reference.hidden(adapted, collate(ROWS, 0), scored_tokens(collate(ROWS, 0)))
    tokens = scored_tokens(collate(ROWS, 0))
    got = head(hidden).log_softmax(-1).gather(-1, tokens.targets[:, None])[:, 0]
    torch.testing.assert_close(got, base[tokens.mask])


def test_four_bit_weights_score_as_their_own_logits_say(tiny_folder):
    from negtune.models.load import load_model

    model, _ = load_model(tiny_folder, load_in_4bit=True)
    attach_scoring(model)
    with torch.no_grad():
        logps = completion_logps(model, collate(ROWS, 0))
        for got, want in zip(logps, expected(model, ROWS), strict=True):
            torch.testing.assert_close(got[: len(want)], want.float(), rtol=2e-2, atol=2e-2)


SCALED = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, sliding_window=64,
        )
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, logits_scaling=3.0,
        )
    ),
    "cohere2": lambda: Cohere2ForCausalLM(
        Cohere2Config(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, logit_scale=0.3, sliding_window=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SCALED))
def test_scaled_and_soft_capped_heads(name):
    torch.manual_seed(0)
    model = SCALED[name]().eval()
    attach_scoring(model)
    check_scoring(model)
    for got, want in zip(completion_logps(model, collate(ROWS, 0)), expected(model, ROWS), strict=True):
        torch.testing.assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-4)


def test_an_unknown_logit_scale_is_noticed():
    model = model64()
    head = model.lm_head.forward
    attached = model.forward
    check_scoring(model)
    model.forward = lambda *args, **kwargs: attached(*args, **kwargs)
    original = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            out.logits = out.logits * 3
            return out

    scaled = copy.deepcopy(tiny_lm())
    scaled.__class__ = Scaled
    attach_scoring(scaled)
    with pytest.raises(ValueError, match="does not compute its logits as LM head"):
        check_scoring(scaled)
    assert head is not None


def test_without_the_keyword_the_forward_and_generate_are_the_original():
    plain, patched = tiny_lm().eval(), tiny_lm().eval()
    attach_scoring(patched)
    attach_scoring(patched)
    ids = torch.tensor([[11, 12, 13]])
    assert torch.equal(plain(input_ids=ids).logits, patched(input_ids=ids).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    assert torch.equal(
        plain.generate(ids, attention_mask=mask, **settings), patched.generate(ids, attention_mask=mask, **settings)
    )


def test_a_copy_scores_with_its_own_weights():
    model = model64()
    frozen = FrozenCopy(model)
    before = frozen.logps(model, collate(ROWS, 0))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(frozen.logps(model, collate(ROWS, 0)), before, rtol=0, atol=0)
    deep = copy.deepcopy(model)
    attach_scoring(deep)
    with torch.no_grad():
        deep.lm_head.weight.mul_(2)
    assert (completion_logps(deep, collate(ROWS, 0)) - completion_logps(model, collate(ROWS, 0))).abs().max() > 0.01


def test_statistics_say_which_tokens_greedy_decoding_would_give():
    model = model64()
    _logps, hits, mask = completion_statistics(model, collate(ROWS, 0))
    for i, row in enumerate(ROWS):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        best = model(input_ids=ids).logits[0].argmax(-1)
        start, n = len(row["prompt_ids"]), len(row["completion_ids"])
        assert hits[i, :n].tolist() == (best[start - 1 : -1] == ids[0, start:]).tolist()
        assert mask[i].sum() == n
        assert not hits[i, n:].any()


def test_no_full_logits_are_made(monkeypatch):
    """The largest tensor the head ever returns is one tile."""
    import negtune.ops

    model, sizes = model64(), []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[0]))
    monkeypatch.setattr(negtune.ops, "TILE_ELEMENTS", 2 * 512)
    model.requires_grad_(False)
    model.model.requires_grad_(True)
    completion_logps(model, collate(ROWS, 0)).sum().backward()
    assert sizes == [2, 2, 2, 1]


def test_eval_mode_gives_every_module_its_own_mode_back():
    model = tiny_lm().train()
    model.model.layers[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_the_weights_hash_sees_values_names_and_nothing_else():
    assert weights_hash(tiny_lm(seed=0)) == weights_hash(tiny_lm(seed=0))
    assert weights_hash(tiny_lm(seed=0)) != weights_hash(tiny_lm(seed=1))
    model = tiny_lm()
    all_names = weights_hash(model)
    assert weights_hash(model, lambda name: "lm_head" not in name) != all_names
