"""What StepGRPOTrainer trains on and what it says of positives and negatives, both against plain forward passes."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from negtune import StepGRPOTrainer
from tests.trainers.test_advantage import bad_steps, is_good


def plain_logps(model, batch, temperature: float = 1.0) -> torch.Tensor:
    """`[B T]`: each completion behind its prompt, without padding, one by one; 0 where nothing counts."""
    found = torch.zeros(batch["completion_ids"].shape)
    for i, mask in enumerate(batch["completion_mask"].bool()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        answer = batch["completion_ids"][i][mask]
        if len(answer):
            logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
            scores = (logits.float() / temperature).log_softmax(-1)
            found = found.index_put(
                (torch.tensor(i), torch.arange(len(answer))), scores.gather(-1, answer[:, None])[:, 0]
            )
    return found


class Heard(StepGRPOTrainer):
    """Keeps every batch with its loss and plain log-probabilities: what was generated, trained on and evaluated."""

    def __init__(self, *args, **kwargs):
        self.generated, self.trained, self.evaluated = [], [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            self.generated.append({**out, "logps": plain_logps(self.model, out, self.temperature)})
        return out

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            logps = plain_logps(self.model, inputs, self.temperature)
        loss = super().compute_loss(model, inputs, **kwargs)
        kept = self.trained if self.model.training else self.evaluated
        kept.append({**inputs, "logps": logps, "loss": loss.item()})
        return loss


def of_sides(batches) -> dict[str, float]:
    """What is logged of both signs, each a mean over all tokens of all batches."""
    found, masks = {}, [batch["completion_mask"].bool() for batch in batches]
    for side, sign in (("positive", 1), ("negative", -1)):
        tokens = [mask & (sign * batch["advantages"] > 0) for mask, batch in zip(masks, batches, strict=True)]
        logps = torch.cat([batch["logps"][t] for batch, t in zip(batches, tokens, strict=True)])
        advantages = torch.cat([batch["advantages"][t] for batch, t in zip(batches, tokens, strict=True)])
        found |= {
            f"{side}/tokens": len(logps) / sum(mask.sum().item() for mask in masks),
            f"{side}/logp": logps.mean().item(),
            f"{side}/probability": logps.exp().mean().item(),
            f"{side}/advantage": advantages.mean().item(),
        }
    return found


def dataset(prompts):
    from datasets import Dataset

    return Dataset.from_list(prompts)


def test_signs_are_logged_over_the_tokens_of_all_micro_batches(grpo, prompts):
    """Of two optimiser steps of two micro-batches, at the training temperature, an evaluation in between."""
    trainer = grpo(
        Heard, steps=bad_steps, max_steps=2, gradient_accumulation_steps=2, logging_steps=2, temperature=0.7,
        per_device_train_batch_size=8, kwargs={"eval_dataset": dataset(prompts[:1])},
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8,
    )  # fmt: skip
    assert len(trainer.trained) == 4
    log = next(row for row in trainer.state.log_history if "loss" in row)
    for name, value in of_sides(trainer.trained).items():
        assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    for batch, row in zip(trainer.evaluated, evaluations, strict=True):
        for name, value in of_sides([batch]).items():
            assert row[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def noted(line: str, n: int) -> float:
    """A number of its own for every line at every place."""
    return (zlib.crc32(f"{n}{line.strip()}".encode()) % 1000 - 500) / 500


def notes(prompts, completions, steps, **columns):
    return [[noted(line, n) for n, line in enumerate(lines)] for lines in steps]


def advantages_by_hand(trainer, batch) -> list[list[float]]:
    """.5 x (reward - mean of the group) + 2 x the note of the line a token is on, three times that where negative.

    None of a completion that was cut.
    """
    whole = batch["completion_mask"].any(1).tolist()
    ids = [row[mask] for row, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    found = []
    for i, row in enumerate(ids):
        group = [float(texts[j].endswith("good")) for j in range(i // 8 * 8, i // 8 * 8 + 8) if whole[j]]
        before = [trainer.processing_class.decode(row[:t]).count("\n") for t in range(len(row))]
        outcome = texts[i].endswith("good") - sum(group) / len(group)
        sums = [0.5 * outcome + 2 * noted(texts[i].splitlines()[n], n) for n in before]
        found.append([3 * value if value < 0 else value for value in sums])
    return found


def of_row(batch, i) -> tuple:
    """What tells a completion from the others, however it is padded."""
    prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
    return (*prompt, *batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist())


def test_each_pass_over_a_generation_trains_its_completions_on_their_own_advantages(grpo):
    """Two passes over a generation that four micro-batches of two optimiser steps share, shuffled."""
    trainer = grpo(
        Heard, steps=notes, max_steps=4, num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=2,
        per_device_train_batch_size=4, outcome_weight=0.5, step_weight=2.0, negative_weight=3.0, scale_rewards="none",
    )  # fmt: skip
    (generated,) = trainer.generated
    by_hand = advantages_by_hand(trainer, generated)
    known = {of_row(generated, i): (by_hand[i], generated["logps"][i]) for i in range(16)}
    tokens, ratios = generated["completion_mask"].sum().item(), []
    assert len(trainer.trained) == 8
    assert len(known) > 8
    for batch in trainer.trained:
        total = 0.0
        for i in range(4):
            advantages, old = known[of_row(batch, i)]
            assert batch["advantages"][i][: len(advantages)].tolist() == pytest.approx(advantages, abs=1e-5)
            for t, advantage in enumerate(advantages):
                ratio = math.exp(batch["logps"][i, t] - old[t])
                total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
                ratios.append(ratio)
        assert batch["loss"] == pytest.approx(total / (tokens / 4 * 2), rel=1e-4, abs=1e-5)
    assert max(ratios) > 1.2
    assert min(ratios) < 0.8
    for first, second in zip(trainer.trained[:4], trainer.trained[4:], strict=True):
        assert torch.equal(first["completion_ids"], second["completion_ids"])
        assert torch.equal(first["advantages"], second["advantages"])


def scored(prompts, completions, **columns):
    return [None if c.startswith("no") else float(c.endswith("good")) for c in completions]


def test_an_evaluation_leaves_out_what_could_not_be_scored(grpo, prompts):
    """Twelve completions in batches of eight and four; training knows nothing of them."""
    trainer = grpo(
        Heard, reward=[scored, is_good], reward_weights=[1.0, 0.5], steps=notes, train=False,
        kwargs={"eval_dataset": dataset(prompts[:3])}, num_generations_eval=4, per_device_eval_batch_size=8,
        scale_rewards="none", step_weight=0.0, max_steps=1,
    )  # fmt: skip
    before = [p.clone() for p in trainer.model.parameters()]
    metrics = trainer.evaluate()
    assert [len(batch["advantages"]) for batch in trainer.evaluated] == [8, 4]
    rewards, unscored = [], 0
    for batch in trainer.evaluated:
        texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        values = [None if t.startswith("no") else 1.5 * t.endswith("good") for t in texts]
        unscored += values.count(None)
        for i, value in enumerate(values):
            group = [v for v in values[i // 4 * 4 : i // 4 * 4 + 4] if v is not None]
            expected = 0.0 if value is None else value - sum(group) / len(group)
            assert batch["advantages"][i].tolist() == pytest.approx([expected] * batch["advantages"].shape[1], abs=1e-5)
        given = [v for v in values if v is not None]
        rewards.append(sum(given) / len(given))
    assert 0 < unscored < 12
    assert metrics["eval_reward"] == pytest.approx(sum(rewards) / 2)
    for name, value in of_sides(trainer.evaluated).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.train()
    for name, value in of_sides(trainer.trained).items():
        assert trainer.state.log_history[-2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"num_iterations": 2, "beta": 0.1},  # log-probabilities of the generation and the reference right before
    ],
)
def test_gradient_norms_are_those_of_the_policy_term_on_each_sign(grpo, chain_folder, settings):
    """Of the last micro-batch. The entropy bonus is in the loss of every token and in neither norm."""
    trainer = grpo(
        Heard, steps=bad_steps, max_steps=1, gradient_norms_every=1, entropy_coef=0.1, negative_weight=3.0, **settings
    )
    batch, model = trainer.trained[-1], AutoModelForCausalLM.from_pretrained(chain_folder)
    mask, gradients = batch["completion_mask"].bool(), []
    for sign in (1, -1):
        tokens = mask & (sign * batch["advantages"] > 0)
        loss = -(batch["advantages"] * plain_logps(model, batch))[tokens].sum() / mask.sum()
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    up, down = gradients
    log = trainer.state.log_history[0]
    assert log["positive/grad_norm"] == pytest.approx(up.norm().item(), rel=1e-4)
    assert log["negative/grad_norm"] == pytest.approx(down.norm().item(), rel=1e-4)
    assert log["grad_cosine"] == pytest.approx(torch.cosine_similarity(up, down, 0).item(), rel=1e-3)


def test_measuring_gradients_changes_nothing(grpo, prompts):
    """Neither weights nor dropout nor a metric, in training or evaluation; measured at every second step."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.3)
    measured, plain = (
        grpo(
            steps=bad_steps, max_steps=3, gradient_norms_every=every, gradient_accumulation_steps=2, beta=0.1,
            per_device_train_batch_size=8, learning_rate=1e-2, eval_strategy="steps", eval_steps=3,
            kwargs={"peft_config": lora, "eval_dataset": dataset(prompts[:1])}, per_device_eval_batch_size=8,
        )
        for every in (2, 0)
    )  # fmt: skip
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    new = {"positive/grad_norm", "negative/grad_norm", "grad_cosine"}
    for step, (a, b) in enumerate(zip(measured.state.log_history, plain.state.log_history, strict=True), start=1):
        assert set(a) - set(b) == (new if step == 2 else set())
        assert not set(b) - set(a)
        same = [name for name in b if not any(word in name for word in ("time", "second", "runtime"))]
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
