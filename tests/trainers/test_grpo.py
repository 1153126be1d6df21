"""StepGRPOTrainer: TRL's own where nothing is asked for, advantages per step where something is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from negtune import HFSampler, SamplingParams
from negtune.rollouts.steps import RolloutCredit, Search
from negtune.trainers.guards import PenaltyWarning
from negtune.verifiers.verdict import FromRewardFunction, TooManyUnscored
from tests.trainers.test_advantage import bad_steps, is_good


def lines_of(trainer, batch, i) -> list[tuple[str, float]]:
    """Text and advantage of every step of a completion, from its tokens."""
    found: list[tuple[str, float]] = []
    text, last = "", None
    for token, on, value in zip(
        batch["completion_ids"][i], batch["completion_mask"][i], batch["advantages"][i], strict=True
    ):
        if not on:
            break
        if text and (value.item() != last or text.endswith("\n")):
            found.append((text.strip(), last))
            text = ""
        text, last = text + trainer.processing_class.decode([token], skip_special_tokens=True), value.item()
    return [*found, (text.strip(), last)]


def test_without_steps_it_is_trl(grpo):
    """Same samples, same losses, same weights."""
    ours = grpo(mask_truncated_completions=False)
    peer = grpo(GRPOTrainer, GRPOConfig, bf16=False)
    assert ours.seen[0]["advantages"].shape == ours.seen[0]["completion_ids"].shape
    assert torch.equal(ours.seen[0]["completion_ids"], peer.seen[0]["completion_ids"])
    assert torch.equal(ours.seen[0]["advantages"][:, 0], peer.seen[0]["advantages"])
    for a, b in zip(ours.model.parameters(), peer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_have_their_own_advantages(grpo):
    trainer = grpo(steps=bad_steps, outcome_weight=0.0, max_steps=1)
    batch, seen = trainer.seen[0], set()
    for i in range(16):
        for text, advantage in lines_of(trainer, batch, i):
            if text in ("ok", "no"):
                seen.add((text, advantage))
    assert {("ok", 1.0), ("no", -1.0)} <= seen <= {("ok", 1.0), ("no", -1.0), ("ok", 0.0), ("no", 0.0)}


def test_outcome_and_step_are_weighed_and_the_sign_dial_comes_last(grpo):
    def fives(prompts, completions, steps, **columns):
        return [[0.5] * len(s) for s in steps]

    plain = grpo(max_steps=1)
    mixed = grpo(steps=fives, max_steps=1, outcome_weight=2.0, step_weight=4.0, negative_weight=3.0)
    a, b = plain.seen[0], mixed.seen[0]
    assert torch.equal(a["completion_ids"], b["completion_ids"])
    expected = 2 * a["advantages"] + 4 * 0.5
    expected = torch.where(expected > 0, expected, 3 * expected)
    mask = b["completion_mask"].bool()
    assert torch.allclose(b["advantages"][mask], expected[mask], atol=1e-5)


def test_one_none_beside_a_one_is_unscored_and_out_of_the_baseline(grpo):
    """TRL would count the None as 0 and the completion as 0 + 1."""

    def some(prompts, completions, **columns):
        return [None if c.startswith("no") else float(c.endswith("good")) for c in completions]

    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    trainer = grpo(reward=[some, one], max_steps=1, scale_rewards="none", mask_truncated_completions=False)
    batch = trainer.seen[0]
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert any(t.startswith("no") for t in texts)
    for start in range(0, 16, 8):
        group = range(start, start + 8)
        scored = {i: float(texts[i].endswith("good")) + 1 for i in group if not texts[i].startswith("no")}
        mean = sum(scored.values()) / len(scored)
        for i in group:
            expected = scored[i] - mean if i in scored else 0.0
            assert batch["advantages"][i, 0].item() == pytest.approx(expected, abs=1e-5)


def test_a_function_of_weight_zero_cannot_make_a_completion_unscored(grpo):
    def nothing(prompts, completions, **columns):
        return [None] * len(completions)

    trainer = grpo(reward=[nothing, is_good], reward_weights=[0.0, 1.0], max_steps=1)
    assert trainer.seen[0]["advantages"].abs().max() > 0


def test_cut_completions_are_in_no_baseline(grpo):
    """Cut ones would all be wrong: with them the right ones of a group would look better than they are."""
    trainer = grpo(max_completion_length=11, max_steps=1, scale_rewards="none")
    batch, eos = trainer.seen[0], trainer.processing_class.eos_token_id
    whole = [(batch["completion_ids"][i] == eos).any().item() for i in range(16)]
    assert 0 < sum(whole) < 16
    for start in range(0, 16, 8):
        group = [i for i in range(start, start + 8) if whole[i]]
        assert sum(batch["advantages"][i, 0].item() for i in group) == pytest.approx(0, abs=1e-5)
    assert all((batch["advantages"][i] == 0).all() for i in range(16) if not whole[i])


@pytest.mark.parametrize(("loss_type", "adapter"), [("dapo", False), ("dapo", True), ("dr_grpo", False)])
def test_bad_steps_disappear(grpo, adapter, loss_type):
    kwargs = {"peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")} if adapter else {}
    trainer = grpo(
        steps=bad_steps, kwargs=kwargs, max_steps=10, outcome_weight=0.0, per_device_train_batch_size=32,
        learning_rate=5e-3 if adapter else 1e-3, loss_type=loss_type,
    )  # fmt: skip
    shares = []
    for batch in (trainer.seen[0], trainer.seen[-1]):
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        shares.append(sum("no" in t for t in texts) / len(texts))
    assert shares[1] < shares[0] - 0.2


def test_monte_carlo_values_are_those_of_the_chain(grpo, tmp_path):
    """Behind a `no` nothing ends well: its advantage takes away all that was left, and nothing behind it matters."""
    holder = {}

    def credit(*args, **kwargs):
        return holder["credit"](*args, **kwargs)

    trainer = grpo(steps=credit, train=False, outcome_weight=0.0, step_scores="values", max_steps=1)
    holder["credit"] = RolloutCredit(
        HFSampler(trainer.model, trainer.processing_class, batch_size=128),
        FromRewardFunction(is_good, one_by_one=False),
        SamplingParams(max_tokens=24),
        search=Search("all", num_rollouts=12),
        folder=tmp_path / "credit",
    )
    trainer.train()
    ups, downs = [], []
    for i in range(16):
        for text, advantage in lines_of(trainer, trainer.seen[0], i):
            (ups if text == "ok" else downs if text == "no" else []).append(advantage)
    assert sum(downs) / len(downs) < -0.2
    assert sum(ups) / len(ups) > 0.02
    assert holder["credit"].drawn > 200


def test_the_policy_of_step_credit_has_the_weights_in_its_name(grpo):
    """Or rollouts of an earlier run in the same folder would be taken for those of this one."""

    class Told:
        names = []

        def update(self, model, policy):
            self.names.append(policy)

        def __call__(self, prompts, completions, steps, **columns):
            return [[0.0] * len(s) for s in steps]

    grpo(steps=Told(), max_steps=2)
    grpo(steps=Told(), max_steps=1, learning_rate=0.5)
    assert len(set(Told.names)) == 2
    assert Told.names[0] == Told.names[2]


def test_a_penalty_that_the_group_scale_cancels_is_named(grpo):
    def harsh(prompts, completions, **columns):
        return [1.0 if c.endswith("good") else -9.0 for c in completions]

    with pytest.warns(PenaltyWarning, match="scale_rewards=group divides .* the penalty -9 cancels"):
        grpo(reward=harsh, max_steps=1)


def test_what_cannot_work_is_refused(grpo):
    with pytest.raises(ValueError, match="gradient_norms_every must be >= 0, got -1"):
        grpo(gradient_norms_every=-1, train=False)
    with pytest.raises(ValueError, match="needs args=StepGRPOConfig"):
        grpo(config=GRPOConfig, train=False)
    with pytest.raises(ValueError, match="step_split must be one of lines, sentences, got 'words'"):
        grpo(step_split="words", train=False)
    with pytest.raises(ValueError, match="sign weights cannot be negative"):
        grpo(negative_weight=-1.0, train=False)
    with pytest.raises(ValueError, match="gave 1 numbers for"):
        grpo(steps=lambda prompts, completions, steps, **k: [[0.0] for _ in steps], max_steps=1)


@pytest.mark.parametrize("kind", ["rewards", "values"])
def test_a_step_score_that_is_no_number_is_refused_before_it_makes_the_loss_one(grpo, kind):
    def nan(prompts, completions, steps, **columns):
        return [[float("nan")] * len(s) for s in steps]

    with pytest.raises(ValueError, match="gave nan for a step of .* give None for a step that was not judged"):
        grpo(steps=nan, step_scores=kind, max_steps=1)


def test_a_reward_function_that_scores_nothing_stops_the_run(grpo):
    """64 completions of two functions, one of which never answers: TRL would go on at loss 0."""

    def silent(prompts, **columns):
        return [None] * len(prompts)

    with pytest.raises(TooManyUnscored, match="could not be scored .limit 90%.: .* silent returned None"):
        grpo(reward=[silent, is_good], max_steps=8)
    assert grpo(reward=[silent, is_good], max_steps=2, max_unscored=1.0).state.global_step == 2


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda steps: [1.0 for _ in steps], "gave 1.0 for a completion; give a list with one number for each"),
        (lambda steps: [None for _ in steps], "gave None for a completion"),
        (lambda steps: [[0.0] * len(of) for of in steps][1:], "lists for [0-9]+ completions"),
    ],
)
def test_step_credit_that_is_no_list_of_numbers_is_named(grpo, gives, words):
    with pytest.raises(ValueError, match=words):
        grpo(max_steps=1, steps=lambda prompts, completions, steps, **columns: gives(steps))


def test_a_resumed_run_goes_on(grpo, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "steps": bad_steps}
    grpo(**settings)
    again = grpo(train=False, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == 3
