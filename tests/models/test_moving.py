"""A reference that follows the policy: by how much, under an adapter and without, and saved and loaded."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from negtune.data.completions import collate
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.moving import MovingReference
from negtune.models.tiny import tiny_lm

BATCH = collate([{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, 6]}], 0)


def policy(adapter: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_lm().double()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    attach_scoring(model)
    return model


def nudge(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def logps(model) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps(model, BATCH)


@pytest.mark.parametrize("adapter", [False, True])
def test_it_stays_where_it_began_until_it_is_updated(adapter):
    model = policy(adapter)
    before = logps(model)
    reference = MovingReference(model, 0.9)
    nudge(model)
    assert not torch.allclose(logps(model), before)
    assert_close(reference.logps(model, BATCH), before)


@pytest.mark.parametrize("adapter", [False, True])
def test_decay_zero_makes_it_the_policy(adapter):
    model = policy(adapter)
    reference = MovingReference(model, 0.0)
    nudge(model)
    reference.update(model)
    assert_close(reference.logps(model, BATCH), logps(model))
    nudge(model, 2)
    assert not torch.allclose(reference.logps(model, BATCH), logps(model))


@pytest.mark.parametrize("adapter", [False, True])
def test_each_weight_is_the_exponential_moving_average(adapter):
    model = policy(adapter)
    reference = MovingReference(model, 0.75)
    average = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for seed in (1, 2, 3):
        nudge(model, seed)
        reference.update(model)
        now = [p for p in model.parameters() if p.requires_grad]
        average = [0.75 * a + 0.25 * p.detach() for a, p in zip(average, now, strict=True)]
    for (mine, _), expected in zip(reference._pairs(model), average, strict=True):
        assert_close(mine, expected)


def test_in_half_precision_small_steps_add_up_also_over_a_checkpoint(tmp_path):
    """600 steps of a thousandth are 45 % of the way; in bfloat16 each would be rounded to nothing."""
    model = policy(False).bfloat16()
    reference = MovingReference(model, 0.999)
    start = [mine.float() for mine, _ in reference._pairs(model)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    for _ in range(300):
        reference.update(model)
    reference.save(model, tmp_path / "reference.safetensors")
    again = MovingReference(model, 0.999)
    again.load(model, tmp_path / "reference.safetensors")
    for _ in range(300):
        again.update(model)
    for (mine, policys), before in zip(again._pairs(model), start, strict=True):
        expected = before + (1 - 0.999**600) * (policys.float() - before)
        assert_close(mine.float(), expected, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_only_the_policy_is_trained_and_saved(adapter, tmp_path):
    model = policy(adapter)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reference = MovingReference(model, 0.5)
    nudge(model)
    reference.update(model)
    reference.logps(model, BATCH)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    if adapter:
        model.save_pretrained(tmp_path)
        assert not any("negtune_reference" in str(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_saved_is_what_is_loaded(adapter, tmp_path):
    model = policy(adapter)
    reference = MovingReference(model, 0.5)
    nudge(model)
    reference.update(model)
    expected = reference.logps(model, BATCH)
    reference.save(model, tmp_path / "reference.safetensors")
    other = policy(adapter)
    fresh = MovingReference(other, 0.5)
    fresh.load(other, tmp_path / "reference.safetensors")
    assert_close(fresh.logps(other, BATCH), expected, rtol=0, atol=0)


def test_a_decay_that_never_moves_and_a_file_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave it out for a fixed one"):
        MovingReference(policy(False), 1.0)
    model = policy(True)
    MovingReference(model, 0.5).save(model, tmp_path / "reference.safetensors")
    whole = policy(False)
    with pytest.raises(ValueError, match="of another model"):
        MovingReference(whole, 0.5).load(whole, tmp_path / "reference.safetensors")
