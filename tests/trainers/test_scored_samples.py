"""Objectives on scored samples through AdvantageTrainer: best-of-n, RWR, PMPO, and what they are equal to."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from negtune.credit import advantages, best_of_group
from tests.trainers.test_advantage import FLAT, advantage, is_good, load, logged, losses, online, rows  # noqa: F401

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def how_many_ok(prompts, completions, **columns) -> list[float]:
    return [float(text.count("ok")) for text in completions]


# --- Credit -----------------------------------------------------------------------------------------------------------


def test_the_best_of_each_group_is_the_first_of_the_highest_scored():
    rewards = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [9.0, 0.5, 0.0], [5.0, 0.0, 0.0]])
    scored = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]).bool()
    expected = [[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]  # the second ties, the last has nothing beside it
    assert best_of_group(rewards, scored).int().tolist() == expected
    assert best_of_group(rewards, scored, least=1.0).int().tolist() == [[0, 1, 0], [0] * 3, [0] * 3, [0] * 3]


def test_of_one_sample_the_best_is_that_sample_if_it_is_scored():
    rewards, scored = torch.tensor([[3.0], [0.0]]), torch.tensor([[True], [False]])
    assert best_of_group(rewards, scored).tolist() == [[True], [False]]
    assert best_of_group(rewards, scored, least=4.0).tolist() == [[False], [False]]


def test_reinforce_with_the_lowest_reward_as_baseline_pushes_nothing_down():
    """Then it is fine-tuning weighted by r - min r."""
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    everything = torch.ones(3, 4, dtype=torch.bool)
    weights = advantages(rewards, everything, baseline="none", running=rewards.min().item())
    assert (weights >= 0).all()
    assert_close(weights, rewards - rewards.min())


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({"selection": "best", "per_device_train_batch_size": 8}, False),
        ({"loss_type": "rwr", "loss_kwargs": {"tau": 0.5}}, True),
        ({"loss_type": "pmpo", "loss_kwargs": {"alpha": 0.5, "beta": 0.5}}, True),
        ({"loss_type": "clipped", "steps_per_round": 2, "reuse": 2}, False),
    ],
)
def test_fresh_samples_get_better(online, prompts, settings, adapter):  # noqa: F811
    kwargs = {"eval_dataset": prompts, **({"peft_config": LORA} if adapter else {})}
    given = {"per_device_train_batch_size": 32, "max_steps": 12, "learning_rate": 5e-3 if adapter else 1e-3}
    trainer = online(kwargs=kwargs, reward=how_many_ok, train=False, eval_num_generations=16, **{**given, **settings})
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + 0.2


def test_best_of_n_trains_on_one_sample_of_every_prompt_with_advantage_one(online):  # noqa: F811
    trainer = online(reward=how_many_ok, selection="best", per_device_train_batch_size=4, max_steps=1)
    made = trainer.on_policy.round.rows
    assert len({row["group"] for row in made}) == len(made)
    assert {a for row in made for a in row["step_advantages"]} == {1.0}
    assert trainer.on_policy.state.completions == 4 * 8


def test_best_of_one_is_fine_tuning_on_own_samples(online, advantage, chain_folder):  # noqa: F811
    """Against the offline trainer with advantage 1 on the very samples that were drawn."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "prefix_sharing": "off", **FLAT}
    fresh = online(selection="best", num_generations=1, model=load(chain_folder), **settings)
    own = [{n: r[n] for n in ("prompt_ids", "completion_ids")} | {"advantage": 1.0} for r in fresh.on_policy.round.rows]
    stored = advantage(load(chain_folder), data=own, output_dir=fresh.args.output_dir + "2", **settings)
    assert losses(fresh) == pytest.approx(losses(stored), rel=1e-6)
    for a, b in zip(fresh.model.parameters(), stored.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_rwr_with_a_large_tau_is_fine_tuning_on_all_samples(online, advantage, chain_folder):  # noqa: F811
    settings = {"max_steps": 1, "per_device_train_batch_size": 16, "prefix_sharing": "off", **FLAT}
    fresh = online(model=load(chain_folder), loss_type="rwr", loss_kwargs={"tau": 3e3}, reward=how_many_ok, **settings)
    assert fresh.args.baseline == "batch"
    own = [{n: r[n] for n in ("prompt_ids", "completion_ids")} | {"advantage": 1.0} for r in fresh.on_policy.round.rows]
    stored = advantage(load(chain_folder), data=own, output_dir=fresh.args.output_dir + "2", **settings)
    assert losses(fresh) == pytest.approx(losses(stored), rel=1e-3)
    start = load(chain_folder)
    for a, b, c in zip(fresh.model.parameters(), stored.model.parameters(), start.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=2e-3 * (b - c).abs().max().item() + 1e-9)


def test_ppo_at_ratio_one_is_reinforce(online, chain_folder):  # noqa: F811
    settings = {"max_steps": 1, "per_device_train_batch_size": 16, "reward": is_good, **FLAT}
    runs = [online(model=load(chain_folder, torch.float64), loss_type=n, **settings) for n in ("clipped", "reinforce")]
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_pmpo_holds_the_policy_near_the_reference(online, chain_folder):  # noqa: F811
    settings = {"loss_type": "pmpo", "per_device_train_batch_size": 16, "max_steps": 6, "learning_rate": 1e-3}
    free = online(loss_kwargs={"beta": 0.01}, **settings)
    tied = online(loss_kwargs={"beta": 10.0}, output_dir=free.args.output_dir + "2", **settings)
    start = load(chain_folder)

    def moved(trainer) -> float:
        pairs = zip(trainer.model.parameters(), start.parameters(), strict=True)
        return sum(float((a.detach() - b.detach()).square().sum()) for a, b in pairs)

    assert logged(free, "rounds/reward")
    assert moved(tied) < moved(free)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "worst"}, "selection must be one of all, best"),
        ({"selection": "best", "baseline": "group"}, "leave baseline and scale_advantages out"),
        ({"min_reward": 1.0}, "min_reward is a limit for selection=best"),
        ({"loss_type": "rwr", "negative_weight": 2.0}, "have no meaning beside loss_type=rwr"),
        ({"loss_type": "rwr", "dynamic_sampling": True}, "dynamic_sampling scores a round in parts"),
        ({"loss_type": "rwr", "loss_kwargs": {"tau": 0.0}}, "tau must be positive"),
        ({"loss_type": "pmpo", "temperature": 0.5}, "a reference do not go together"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(online, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        online(train=False, **settings)
