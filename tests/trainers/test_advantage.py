"""AdvantageTrainer: what is pushed which way, from data and from fresh samples, and what must change nothing."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from negtune import AdvantageConfig, AdvantageTrainer
from negtune.data.completions import RowError, collate, tokenize_row
from negtune.losses.policy import POLICY_LOSSES
from negtune.models.forward import attach_scoring, completion_logps
from negtune.models.load import load_tokenizer
from negtune.rollouts.attest import StaleEngineError
from negtune.rollouts.hf import HFSampler
from negtune.rollouts.sampler import SamplingParams
from negtune.rollouts.store import RecordStore
from negtune.trainers.guards import GuardStop, PenaltyWarning
from negtune.trainers.rounds import NoSignalError, advantages_of_steps
from negtune.verifiers.verdict import TooManyUnscored
from tests.conftest import chain_text

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
FLAT = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def load(folder: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.fixture
def rows(prompts) -> list[dict]:
    """One right and one wrong solution of every prompt: the wrong one's second step is the pit, the third unknown."""
    made = []
    for row in prompts:
        for lines, labels in ((["ok", "ok", "ok"], [1] * 4), (["ok", "no", "ok"], [1, 0, 0, 0])):
            steps = chain_text(lines).split("\n")
            made.append({"prompt": row["prompt"], "steps": steps, "step_labels": labels})
    return made


@pytest.fixture
def advantage(tmp_path, chain_folder, rows):
    """`advantage(model=..., train=True, data=..., kwargs={...}, ...)` -> trainer; every other keyword is a setting."""

    def build(model=None, train=True, data=None, kwargs=None, resume=None, **settings):
        defaults = {
            **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 6},
            **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"},
            **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3},
        }
        trainer = AdvantageTrainer(
            model=model if model is not None else chain_folder,
            args=AdvantageConfig(**{**defaults, **settings}),
            train_dataset=data if data is not None else rows,
            processing_class=load_tokenizer(chain_folder),
            **(kwargs or {}),
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return build


def is_good(prompts, completions, **columns) -> list[float]:
    return [float(text.endswith("good")) for text in completions]


@pytest.fixture
def online(advantage, prompts, chain_folder):
    """`advantage` with a sampler of the trained model and the reward `ends with good`."""

    def build(kwargs=None, data=None, reward=is_good, **settings):
        given = {"sampler": lambda model, tokenizer: HFSampler(model, tokenizer, batch_size=64), "reward_funcs": reward}
        settings = {"max_completion_length": 24, "num_generations": 8, **settings}
        return advantage(data=data if data is not None else prompts, kwargs={**given, **(kwargs or {})}, **settings)

    return build


def step_logps(model, tokenizer, prompts) -> dict[str, float]:
    """Mean log-probability of `ok` and of `no` as the second line behind `ok`."""
    model = load(model) if isinstance(model, str) else model
    attach_scoring(model)
    found = {}
    for word in ("ok", "no"):
        items = [tokenize_row({"prompt": row["prompt"] + "ok\n", "completion": word}, tokenizer) for row in prompts]
        items = [{**item, "completion_ids": item["completion_ids"][:-1]} for item in items]
        with torch.no_grad():
            found[word] = completion_logps(model, collate(items, 0)).sum(-1).mean().item()
    return found


# --- From data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "up", "down", "adapter"),
    [
        ("reinforce", 1, 1, False),
        ("reinforce", 1, 1, True),
        ("psr", 1, 0, False),
        ("nsr", 0, 1, False),
        ("awr", 1, 0, True),
    ],
)
def test_the_pit_loses_and_what_is_right_gains(advantage, prompts, chain_folder, loss_type, up, down, adapter):
    tokenizer = load_tokenizer(chain_folder)
    before = step_logps(chain_folder, tokenizer, prompts)
    kwargs = {"peft_config": LORA} if adapter else {}
    trainer = advantage(loss_type=loss_type, kwargs=kwargs, learning_rate=1e-3 if adapter else 3e-4, max_steps=10)
    after = step_logps(trainer.model, tokenizer, prompts)
    assert after["no"] < before["no"] - (0.3 if down else 0.05)
    assert after["ok"] > before["ok"]  # what a coin's one side loses the other gains
    if up and down:
        assert after["ok"] - after["no"] > before["ok"] - before["no"] + 0.5


def test_steps_behind_the_pit_are_left_alone(advantage, rows):
    """The gradient of a batch does not depend on what stands behind the first error."""
    wrong = [{**rows[1], "step_labels": [1, 0, 0, 0]}]
    other = [{**wrong[0], "steps": [*wrong[0]["steps"][:2], "no", "bad"]}]
    first, second = (
        advantage(data=data, max_steps=1, per_device_train_batch_size=1, reduction="row_sum", **FLAT)
        for data in (wrong, other)
    )
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_reinforce_with_ones_is_supervised_fine_tuning(advantage, rows, chain_folder, tmp_path):
    """Against TRL's SFTTrainer on the same completions: token mean over the batch, one step of SGD."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = [{"prompt": r["prompt"], "completion": "\n".join(r["steps"]), "advantage": 1.0} for r in rows]
    ours = advantage(load(chain_folder), data=data, max_steps=2, **FLAT)
    peer = SFTTrainer(
        model=load(chain_folder),
        args=SFTConfig(
            **{"output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": 8, "max_steps": 2, **FLAT},
            **{"lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "bf16": False},
            **{"save_strategy": "no", "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True},
        ),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in data]),
        processing_class=load_tokenizer(chain_folder),
    )
    peer.train()
    assert losses(ours) == pytest.approx(losses(peer), rel=1e-4)
    start = load(chain_folder)
    for a, b, c in zip(ours.model.parameters(), peer.model.parameters(), start.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-3 * (b - c).abs().max().item() + 1e-8)


@pytest.mark.parametrize("reduction", ["token_mean", "row_mean", "row_sum"])
@pytest.mark.parametrize(("micro", "accumulate"), [(1, 8), (3, 3)])
def test_micro_batches_change_nothing(advantage, chain_folder, reduction, micro, accumulate):
    settings = {"max_steps": 2, "reduction": reduction, "nll_weight": 0.1, **FLAT}
    if reduction == "row_sum":
        settings["learning_rate"] = 0.005
    whole = advantage(load(chain_folder, torch.float64), **settings)
    parts = advantage(
        load(chain_folder, torch.float64),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    assert_close(losses(parts), losses(whole), rtol=1e-6, atol=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("loss_type", "lora"), [*((name, False) for name in sorted(POLICY_LOSSES)), ("topr", True), ("step_kto", True)]
)
def test_sharing_prefixes_changes_nothing(advantage, rows, chain_folder, loss_type, lora):
    tokenizer = load_tokenizer(chain_folder)
    data = []
    for row in rows:
        ids = tokenize_row({"prompt": row["prompt"], "completion": "\n".join(row["steps"])}, tokenizer)
        length = len(ids["completion_ids"])
        ends, credit = [3, 5, length], [1.0, -1.0, None]
        data.append(
            {
                **{name: ids[name] for name in ("prompt_ids", "completion_ids")},
                **{"step_ends": ends, "step_advantages": credit, "behaviour_logps": [-0.5] * length},
            }
        )
    settings = {"max_steps": 2, "loss_type": loss_type, "data": data, "reference": "auto", **FLAT}
    kwargs = {"peft_config": LORA} if lora else {}
    runs = {
        mode: advantage(load(chain_folder, torch.float64), prefix_sharing=mode, kwargs=kwargs, **settings)
        for mode in ("on", "off")
    }
    assert_close(losses(runs["on"]), losses(runs["off"]), rtol=1e-6, atol=1e-6)
    for a, b in zip(runs["on"].model.parameters(), runs["off"].model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert logged(runs["on"], "tokens/shared")[0] > 0.2


def test_the_sign_dial_scales_the_gradient_of_one_side(advantage):
    """The measured gradient norms of positives and negatives follow the dial, and only their own."""
    plain = advantage(max_steps=1)
    louder = advantage(max_steps=1, negative_weight=3.0)
    silent = advantage(max_steps=1, negative_weight=0.0)
    of = {
        name: {t: logged(t, name)[0] for t in (plain, louder, silent)}
        for name in ("positive/grad_norm", "negative/grad_norm")
    }
    assert of["negative/grad_norm"][louder] == pytest.approx(3 * of["negative/grad_norm"][plain], rel=1e-4)
    assert of["negative/grad_norm"][silent] == 0
    assert of["positive/grad_norm"][plain] == of["positive/grad_norm"][louder] == of["positive/grad_norm"][silent] > 0
    assert logged(plain, "grad_cosine")[0] == pytest.approx(logged(louder, "grad_cosine")[0], rel=1e-4)
    assert logged(plain, "negative/advantage") == [-1.0]
    assert logged(louder, "negative/advantage") == [-3.0]


def test_measuring_gradients_changes_nothing(advantage):
    measured, plain = advantage(max_steps=3), advantage(max_steps=3, gradient_norms_every=0)
    assert losses(measured) == losses(plain)
    assert "positive/grad_norm" not in plain.state.log_history[0]
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_kl_term_is_zero_at_the_reference_and_holds_the_policy_there(advantage, chain_folder):
    free = advantage(max_steps=8, learning_rate=1e-3)
    tied = advantage(max_steps=8, learning_rate=1e-3, kl_weight=5.0)
    assert losses(tied)[0] == pytest.approx(losses(free)[0], abs=1e-6)
    start = load(chain_folder)

    def moved(trainer):
        return sum(
            float((a - b).square().sum()) for a, b in zip(trainer.model.parameters(), start.parameters(), strict=True)
        )

    assert abs(logged(tied, "positive/drift")[-1]) < abs(logged(free, "positive/drift")[-1])
    assert moved(tied) > 0


def test_the_anchor_keeps_positives_likely(advantage, rows):
    only_wrong = [{**row, "step_labels": [1, 0, 0, 0]} for row in rows[1::2]]
    settings = {"data": only_wrong, "max_steps": 12, "learning_rate": 2e-3, "per_device_train_batch_size": 4}
    fallen = advantage(loss_type="nsr", **settings)
    held = advantage(loss_type="nsr", nll_weight=1.0, **settings)
    assert logged(held, "positive/logp")[-1] > logged(fallen, "positive/logp")[-1]


@pytest.mark.parametrize("reaction", ["warn", "anchor", "stop"])
def test_the_guard_reacts_to_falling_positives(advantage, rows, reaction, caplog):
    """`no` everywhere is bad and its line end is right: pushing the one takes the other along at this rate."""
    data = [
        {"prompt": r["prompt"], "steps": ["no\n", "no\n", "x"], "step_advantages": [-5.0, 0.001, None]} for r in rows
    ]
    settings = {
        "data": data,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "max_positive_drop": 0.2,
        "positive_guard": reaction,
    }
    with caplog.at_level(logging.WARNING):
        if reaction == "stop":
            with pytest.raises(GuardStop, match="nats each .limit max_positive_drop=0.2"):
                advantage(**settings)
            return
        trainer = advantage(**settings)
    assert sum("push on negatives takes what is right along" in r.message for r in caplog.records) == 1
    assert trainer.guards.anchored == (reaction == "anchor")


def test_a_resumed_run_is_the_uninterrupted_one(advantage, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "per_device_train_batch_size": 2}
    whole = advantage(output_dir=str(tmp_path / "whole"), **settings)
    resumed = advantage(output_dir=str(tmp_path / "again"), resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_streams_train_like_lists(advantage, rows):
    from datasets import Dataset

    plain = [{"prompt": r["prompt"], "completion": "\n".join(r["steps"]), "advantage": -1.0} for r in rows]
    trainer = advantage(data=Dataset.from_list(plain).to_iterable_dataset(), max_steps=3)
    assert len(losses(trainer)) == 3


def test_evaluation_shows_both_sides(advantage, rows):
    trainer = advantage(train=False, kwargs={"eval_dataset": rows})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_positive/logp"] > before["eval_positive/logp"]
    assert after["eval_negative/logp"] < before["eval_negative/logp"]
    assert after["eval_loss"] < before["eval_loss"]


def test_qlora_trains_a_four_bit_policy(advantage, chain_folder):
    from transformers import BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        chain_folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    trainer = advantage(quantised, kwargs={"peft_config": LORA}, max_steps=10, learning_rate=3e-3)
    assert logged(trainer, "positive/logp")[-1] - logged(trainer, "negative/logp")[-1] > (
        logged(trainer, "positive/logp")[0] - logged(trainer, "negative/logp")[0] + 0.5
    )


# --- From fresh samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({"loss_type": "reinforce"}, False),
        ({"loss_type": "nsr", "slower": 4}, True),  # pushing down alone ruins the model at the rate of the others
        ({"loss_type": "clipped", "steps_per_round": 2, "reuse": 2}, True),
        ({"baseline": "group", "scale_advantages": "group", "dynamic_sampling": True}, False),
    ],
)
def test_fresh_samples_get_better(online, prompts, settings, adapter):
    settings = dict(settings)
    slower = settings.pop("slower", 1)
    kwargs = {"peft_config": LORA, "eval_dataset": prompts} if adapter else {"eval_dataset": prompts}
    trainer = online(
        kwargs=kwargs,
        train=False,
        per_device_train_batch_size=32,
        max_steps=12,
        learning_rate=(5e-3 if adapter else 5e-4) / slower,
        eval_num_generations=16,
        **settings,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.55
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.1
    assert after["eval_pass@16"] >= after["eval_accuracy"]
    assert {"rounds/reward", "rounds/entropy", "positive/logp", "negative/logp", "sampled_tokens"} <= set(
        trainer.state.log_history[2]
    )


def bad_steps(prompts, completions, steps, **columns):
    """-1 for the first `no`, nothing known behind it, +1 before."""
    found = []
    for lines in steps:
        first = next((i for i, line in enumerate(lines) if line.startswith("no")), len(lines))
        found.append([1.0] * first + [-1.0] * (first < len(lines)) + [None] * (len(lines) - first - 1))
    return found


def test_step_credit_reaches_the_tokens_of_its_step(online):
    trainer = online(kwargs={"step_credit": bad_steps}, outcome_weight=0.0, per_device_train_batch_size=32, max_steps=1)
    rows = trainer.on_policy.round.rows
    assert len(rows) == 32
    tokenizer = trainer.processing_class
    seen = set()
    for row in rows:
        for a, b, advantage in zip([0, *row["step_ends"]], row["step_ends"], row["step_advantages"], strict=False):
            text = tokenizer.decode(row["completion_ids"][a:b], skip_special_tokens=True).strip()
            if advantage is not None and text in ("ok", "no"):
                seen.add((text, advantage))
    assert seen == {("ok", 1.0), ("no", -1.0)}


def test_values_without_that_of_the_bare_prompt_leave_the_first_step_unjudged():
    assert advantages_of_steps([0.5, 1.0], 2, "values") == [None, 0.5]
    assert advantages_of_steps([0.25, 0.5, 1.0], 2, "values") == [0.25, 0.5]
    assert advantages_of_steps([0.5, None, 1.0], 3, "rewards") == [0.5, None, 1.0]


def test_step_values_become_differences(online):
    def values(prompts, completions, steps, rewards, **columns):
        return [
            [0.5, *[0.5 - 0.1 * i for i in range(1, len(s))], float(r)] for s, r in zip(steps, rewards, strict=True)
        ]

    trainer = online(
        kwargs={"step_credit": values},
        **{"outcome_weight": 0.0, "step_scores": "values", "per_device_train_batch_size": 32, "max_steps": 1},
    )
    for row in trainer.on_policy.round.rows:
        advantages = row["step_advantages"]
        assert advantages[:-1] == pytest.approx([-0.1] * (len(advantages) - 1))
        ends_well = trainer.processing_class.decode(row["completion_ids"], skip_special_tokens=True).endswith("good")
        assert sum(advantages) == pytest.approx(float(ends_well) - 0.5)


def test_unscored_completions_are_neither_trained_on_nor_in_the_baseline(online):
    """The reward leaves out what begins with `no`; a group's other completions are compared among themselves."""

    def some(prompts, completions, **columns):
        return [None if c.startswith("no") else float(c.endswith("good")) for c in completions]

    trainer = online(reward=some, per_device_train_batch_size=32, max_steps=1, max_unscored=0.9)
    tokenizer, rows = trainer.processing_class, trainer.on_policy.round.rows
    assert 0 < len(rows) < 32
    assert logged(trainer, "rounds/unscored")[0] == pytest.approx(1 - len(rows) / 32)
    groups: dict = {}
    for row in rows:
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert not text.startswith("no")
        groups.setdefault(row["group"], []).append((float(text.endswith("good")), row["step_advantages"][0]))
    for members in groups.values():
        for i, (reward, advantage) in enumerate(members):
            others = [r for j, (r, _) in enumerate(members) if j != i]
            assert advantage == pytest.approx(reward - sum(others) / len(others) if others else 0)


def test_one_reward_of_none_makes_a_completion_unscored(online):
    """Beside a second reward of 1: TRL's sum would count the None as 0."""

    def nothing(prompts, completions, **columns):
        return [None if c.startswith("no") else 0.0 for c in completions]

    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    trainer = online(reward=[nothing, one], per_device_train_batch_size=32, max_steps=1, max_unscored=0.9)
    scores = {r["rollout"]: r["score"] for r in RecordStore(f"{trainer.args.output_dir}/rounds", "scores")}
    for record in RecordStore(f"{trainer.args.output_dir}/rounds"):
        assert scores[record["key"]] == (None if record["text"].startswith("no") else 1.0)
    weighed = online(
        reward=[nothing, one], reward_weights=[0.0, 2.0], max_steps=1, output_dir=trainer.args.output_dir + "2"
    )
    scores = {r["score"] for r in RecordStore(f"{weighed.args.output_dir}/rounds", "scores")}
    assert scores == {2.0}


def test_reward_functions_get_what_trl_offers_and_may_log(online, prompts):
    async def length(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        log_metric("longest", max(map(len, completion_ids)))
        log_extra("at", [trainer_state.global_step] * len(completions))
        return [float(c.endswith("good")) for c in completions]

    trainer = online(
        reward=length, per_device_train_batch_size=32, max_steps=2, logging_steps=1, kwargs={"eval_dataset": prompts}
    )
    folder = f"{trainer.args.output_dir}/rounds"
    scores = {r["rollout"]: r for r in RecordStore(folder, "scores")}
    drawn = list(RecordStore(folder))
    assert {r["extra"]["at"] for r in scores.values() if r["score"] is not None} == {0, 1}
    whole = [len(r["completion_ids"]) for r in drawn[:32] if r["finish_reason"] == "stop"]
    assert logged(trainer, "longest")[0] == max(whole)
    assert trainer.evaluate()["eval_longest"] >= 1


def test_cut_completions_are_left_out(online):
    trainer = online(max_completion_length=7, per_device_train_batch_size=32, max_steps=1)
    assert logged(trainer, "rounds/truncated")[0] > 0.5
    eos = trainer.processing_class.eos_token_id
    assert all(row["completion_ids"][-1] == eos for row in trainer.on_policy.round.rows)


def test_dynamic_sampling_fills_the_round_with_groups_that_tell_something(online, prompts):
    """The reward tells completions to two of the four prompts apart, the others always get 1."""

    def some(prompts, completions, **columns):
        return [
            float(c.endswith("good")) if p in ("Walk to Rome.", "Walk to Oslo.") else 1.0
            for p, c in zip(prompts, completions, strict=True)
        ]

    settings = {"reward": some, "per_device_train_batch_size": 32, "max_steps": 1}
    plain = online(**settings)
    filled = online(dynamic_sampling=True, max_refills=8, output_dir=plain.args.output_dir + "2", **settings)
    assert logged(plain, "rounds/no_signal")[0] >= 0.5
    groups = {row["group"] for row in filled.on_policy.round.rows}
    assert len(groups) == 4
    assert len({row["key"] for row in filled.on_policy.round.rows}) == 32  # none is drawn again under another name
    assert all(any(r["step_advantages"][0] for r in filled.on_policy.round.rows if r["group"] == g) for g in groups)
    assert logged(filled, "rounds/refills")[0] >= 1
    assert filled.on_policy.state.cursor > plain.on_policy.state.cursor
    short = online(dynamic_sampling=True, max_refills=0, output_dir=plain.args.output_dir + "3", **settings)
    assert len({row["group"] for row in short.on_policy.round.rows}) <= 2


@pytest.mark.parametrize("place", [4, 5, 6])
def test_a_resumed_round_is_the_uninterrupted_one(online, tmp_path, place):
    """Rounds of four steps, two passes over each: at their border and in the middle of either pass."""
    settings = {
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "steps_per_round": 4, "reuse": 2},
        **{"baseline": "moving_average", "loss_type": "clipped", "gradient_accumulation_steps": 2},
    }
    whole = online(output_dir=str(tmp_path / "whole"), **settings)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{place}")
    resumed = online(output_dir=str(tmp_path / "again"), resume=checkpoint, **settings)
    assert losses(resumed)[place:] == losses(whole)[place:]
    assert resumed.on_policy.state == whole.on_policy.state
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    drawn = {record["key"] for record in RecordStore(tmp_path / "again" / "rounds")}
    assert drawn < {record["key"] for record in RecordStore(tmp_path / "whole" / "rounds")}
    if place == 5:  # the round is in the checkpoint; only the one behind it is drawn
        assert len(drawn) == 32 * (9 // 4 - 1)


class Killed(Exception):
    pass


def test_rollouts_of_a_killed_round_are_used_and_none_is_drawn_twice(online, tmp_path):
    """Killed in the second step of a round that has no checkpoint: the run starts again from the one before."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "steps_per_round": 2,
        "per_device_train_batch_size": 16,
    }
    whole = online(output_dir=str(tmp_path / "whole"), **settings)
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        online(output_dir=str(folder), kwargs={"callbacks": [Kill()]}, **settings)
    kept = {r["key"] for r in RecordStore(folder / "rounds")}
    calls = []

    class Counting(HFSampler):
        def draw(self, requests, params):
            calls.extend(requests if len(requests) > 2 else [])  # not the canaries of the attestation
            return super().draw(requests, params)

    again = online(output_dir=str(folder), resume=True, kwargs={"sampler": Counting}, **settings)
    assert calls == []
    assert {r["key"] for r in RecordStore(folder / "rounds")} == kept
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_of_a_round_change_nothing(online, chain_folder):
    settings = {"max_steps": 4, "steps_per_round": 2, "loss_type": "clipped", "gradient_norms_every": 0, **FLAT}
    whole = online(model=load(chain_folder, torch.float64), per_device_train_batch_size=16, **settings)
    parts = online(
        model=load(chain_folder, torch.float64),
        output_dir=whole.args.output_dir + "2",
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **settings},
    )
    assert_close(losses(parts), losses(whole), rtol=1e-6, atol=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_every_completion_of_a_round_is_trained_on_once_a_pass(online):
    trainer = online(
        train=False,
        steps_per_round=4,
        reuse=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
    )
    seen = []
    for step in range(4):
        trainer.state.global_step = step
        micro = trainer.on_policy.step_rows(step, trainer._sums)
        assert [len(rows) for rows in micro] == [4, 4]
        seen.append([row["key"] for rows in micro for row in rows])
    assert len(set(seen[0] + seen[1])) == 16
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert seen[0] + seen[1] != seen[2] + seen[3]


def test_a_sampler_of_another_model_is_found_out(online, knowing_folder):
    class Other(HFSampler):
        """Keeps the weights it was made with."""

        def update(self, model, policy):
            super().update(getattr(self, "model", model), policy)

    foreign = Other(load(knowing_folder), load_tokenizer(knowing_folder))
    with pytest.raises(StaleEngineError, match="nats a token"):
        online(kwargs={"sampler": foreign}, train=False)


def test_a_reward_that_tells_nothing_stops_the_run_and_says_what_it_saw(online):
    with pytest.raises(NoSignalError, match=r"3 rounds in a row .* 8 x 1; .*Equal rewards within every group"):
        online(reward=lambda prompts, completions, **k: [1.0] * len(completions), max_empty_rounds=3)


def test_a_scorer_that_fails_stops_the_run(online):
    def broken(prompts, completions, **columns):
        raise OSError("the judge is down")

    with pytest.raises(TooManyUnscored, match="the judge is down"):
        online(reward=broken, per_device_train_batch_size=32)


def test_a_penalty_that_the_group_scale_cancels_is_named(online):
    def harsh(prompts, completions, **columns):
        return [1.0 if c.endswith("good") else -9.0 for c in completions]

    with pytest.warns(PenaltyWarning, match="the size of the penalty -9 cancels.*negative_weight"):
        online(reward=harsh, scale_advantages="group", baseline="group", max_steps=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo'"),
        ({"loss_kwargs": {"gamma": 1}}, "reinforce has no hyper-parameter 'gamma'"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, row_mean, row_sum"),
        ({"baseline": "median"}, "baseline must be one of"),
        ({"loss_type": "nsr", "negative_weight": 2.0}, "have no meaning beside loss_type=nsr"),
        ({"negative_weight": -1.0}, "sign weights cannot be negative"),
        ({"loss_type": "awr", "negative_weight": 0.0}, "have no meaning beside loss_type=awr"),
        ({"dynamic_sampling": True, "baseline": "batch"}, "dynamic_sampling scores a round in parts"),
        ({"eval_temperature": 0.0, "eval_num_generations": 4}, "draws the same completion every time"),
        ({"steps_per_round": 3, "reuse": 2}, "steps_per_round=3 must be a multiple of reuse=2"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"temperature": 0.0}, "greedy samples teach nothing new"),
        ({"top_p": 0.0}, "need 0 < top_p <= 1"),
        ({"loss_type": "clipped", "loss_kwargs": {"delta": 1.1}}, "delta must be more than 1 \\+ epsilon_high = 1.2"),
        ({"loss_type": "clipped", "loss_kwargs": {"delta": "2"}}, "delta must be more than .* got 2"),
        ({"loss_type": "topr", "loss_kwargs": {"level": "word"}}, "level must be one of token, step, sequence"),
        ({"loss_type": "clipped", "loss_kwargs": {"epsilon_low": -1}}, "epsilon_low must be between 0 and 1"),
        ({"loss_type": "awr", "loss_kwargs": {"beta": "0.1"}}, "beta must be a number, got '0.1'"),
        ({"loss_type": "nsr", "selection": "best"}, "moves nothing for them"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AdvantageConfig(output_dir="unused", use_cpu=True, **settings)


def test_what_does_not_fit_together_is_refused_at_construction(online, advantage, prompts, rows):
    with pytest.raises(
        ValueError, match="none of step_advantages, step_labels, first_error, advantage; .* pass a sampler"
    ):
        advantage(data=prompts, train=False)
    with pytest.raises(ValueError, match="score fresh completions; pass a sampler too"):
        advantage(train=False, kwargs={"reward_funcs": is_good})
    with pytest.raises(ValueError, match="needs something that scores"):
        online(kwargs={"reward_funcs": None}, train=False)
    with pytest.raises(ValueError, match="a round has 6 completions .* num_generations=8"):
        online(per_device_train_batch_size=6, train=False)
    with pytest.raises(ValueError, match="leave_one_out needs at least 2 samples per prompt"):
        online(num_generations=1, train=False)
    with pytest.raises(ValueError, match=r"importance ratios are wrong for samples drawn with top_p=0.9"):
        online(loss_type="topr", top_p=0.9, train=False)
    with pytest.raises(ValueError, match="train row 0 has no behaviour_logps"):
        advantage(loss_type="topr", train=False)
    with pytest.raises(ValueError, match="temperature=0.7 and a reference do not go together"):
        advantage(temperature=0.7, kl_weight=0.1, train=False)
    with pytest.raises(ValueError, match="round.json is missing: the checkpoint is not of this trainer"):
        online(train=False).train(resume_from_checkpoint="nowhere")
    with pytest.raises(ValueError, match="train_dataset is empty"):
        online(data=[], train=False)


def test_rows_of_another_temperature_are_refused_for_ratios(advantage):
    row = {
        "prompt_ids": [5],
        "completion_ids": [6, 1],
        "advantage": 1.0,
        "behaviour_logps": [-1.0, -1.0],
        "temperature": 0.7,
    }
    with pytest.raises(ValueError, match="drawn at temperature 0.7 and temperature is 1"):
        advantage(data=[row], loss_type="topr", train=False)
    advantage(data=[row], loss_type="topr", temperature=0.7, max_steps=1)


def test_a_stream_of_another_temperature_is_refused_for_ratios_and_gives_no_drift(advantage):
    drawn = {"prompt_ids": [5], "completion_ids": [6, 1], "behaviour_logps": [-1.0, -1.0], "temperature": 0.3}
    rows = [{**drawn, "advantage": sign} for sign in (1.0, -1.0)] * 8

    def stream():
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    with pytest.raises(RowError, match="row 0 was drawn at temperature 0.3 and temperature is 1"):
        advantage(data=stream(), loss_type="topr", max_steps=1)
    trainer = advantage(data=stream(), max_steps=2)
    assert logged(trainer, "positive/drift")[0] == 0  # from the first log-probabilities on, not from those of the draw
    assert not logged(trainer, "ratio_p50")


def test_a_round_is_not_resumed_at_another_temperature(online, tmp_path):
    settings = {"loss_type": "clipped", "steps_per_round": 4, "max_steps": 4, "max_empty_rounds": 100}
    online(save_strategy="steps", save_steps=2, **settings)
    with pytest.raises(RowError, match="was drawn at temperature 1 and temperature is 0.5"):
        online(resume=str(tmp_path / "run" / "checkpoint-2"), temperature=0.5, **settings)


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda steps: [1.0 for _ in steps], "gave 1.0 for a completion; give a list with one number for each"),
        (lambda steps: [None for _ in steps], "gave None for a completion"),
        (lambda steps: [[0.0] * len(of) for of in steps][1:], "lists for [0-9]+ completions"),
        (lambda steps: 0.5, "step credit gave 0.5 for"),
        (lambda steps: [[0.0] * (len(of) + 1) for of in steps], "numbers for the [0-9]+ steps of"),
        (lambda steps: [[float("nan")] * len(of) for of in steps], "gave nan for a step of"),
    ],
)
def test_step_credit_that_is_no_list_of_numbers_is_named(online, gives, words):
    with pytest.raises(ValueError, match=words):
        online(max_steps=1, kwargs={"step_credit": lambda prompts, completions, steps, **columns: gives(steps)})


def test_an_empty_evaluation_is_refused(online):
    with pytest.raises(ValueError, match="the evaluation set is empty"):
        online(train=False, kwargs={"eval_dataset": []}).evaluate()


def test_an_infinite_reward_leaves_its_completion_unscored(online):
    def reward(prompts, completions, **columns):
        return [float("inf") if text.endswith("good") else 0.0 for text in completions]

    with pytest.raises(TooManyUnscored, match="the reward function returned inf"):
        online(max_steps=4, reward=reward, per_device_train_batch_size=32)


def test_log_probabilities_are_those_of_the_temperature(online):
    """At temperature .5 engine and trainer agree, or the ratio of the first step would not be 1."""
    trainer = online(loss_type="clipped", temperature=0.5, max_steps=1, max_empty_rounds=100)
    for quantile in ("p10", "p50", "p90"):
        assert logged(trainer, f"ratio_{quantile}")[0] == pytest.approx(1, abs=1e-4)


def test_a_run_that_is_resumed_at_its_end_takes_no_step(online):
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "constant"}
    done = online(**given)
    again = online(resume=True, **given)
    assert again.state.global_step == 3
    for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_epochs_of_prompts_become_steps(online, prompts):
    trainer = online(train=False, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=16, steps_per_round=2)
    assert trainer.args.max_steps == 6  # rounds of 4 prompts, two steps each


def test_the_samples_of_a_prompt_change_with_the_round(online):
    """Another pass over the prompts draws other noise, or the policy would see the same completions again."""
    trainer = online(max_steps=2, learning_rate=0.0, per_device_train_batch_size=32)
    records = list(RecordStore(f"{trainer.args.output_dir}/rounds"))
    first, second = records[:32], records[32:]
    assert {r["prompt"] for r in first} == {r["prompt"] for r in second}
    assert {r["seed"] for r in first}.isdisjoint(r["seed"] for r in second)


def test_sampling_settings_are_those_of_the_config(online):
    trainer = online(train=False, temperature=0.7, max_completion_length=9, stop=["x"], eval_temperature=0.0)
    assert trainer.on_policy.rounds.params == SamplingParams(0.7, 9, stop=("x",), seed=3)
    assert trainer.args.sampling_params(evaluation=True).temperature == 0


# --- What a sceptic found ---------------------------------------------------------------------------------------------


def test_an_objective_that_reads_no_sign_that_occurs_stops_the_run(online):
    """NSR on rewards of 1 and 0 without a baseline: no advantage is negative, nothing would ever move."""
    settings = {"loss_type": "nsr", "baseline": "none", "max_empty_rounds": 2, "per_device_train_batch_size": 16}
    with pytest.raises(NoSignalError, match="2 rounds in a row no completion had an advantage"):
        online(**settings)
    signed = online(
        reward=lambda prompts, completions, **k: [2.0 * c.endswith("good") - 1 for c in completions], **settings
    )
    assert max(logged(signed, "grad_norm")) > 0


def test_another_base_under_an_equal_adapter_is_another_policy(online, chain_folder, tmp_path):
    """A fresh adapter is the same whatever lies under it; the rollouts are not."""
    settings = {"kwargs": {"peft_config": LORA}, "max_steps": 1, "output_dir": str(tmp_path / "run")}
    online(**settings)
    seen = len(RecordStore(tmp_path / "run" / "rounds"))
    other = load(chain_folder)
    other.model.embed_tokens.weight.data.mul_(1.05)
    online(model=other, **settings)
    assert len(RecordStore(tmp_path / "run" / "rounds")) == 2 * seen


def test_a_second_run_in_the_same_folder_scores_anew(online, tmp_path):
    """Same weights, so the rollouts are there; another reward, so their advantages are not."""
    settings = {"max_steps": 1, "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 32}
    first = online(**settings)
    rows = first.on_policy.round.rows
    turned = online(reward=lambda prompts, completions, **k: [1 - r for r in is_good(prompts, completions)], **settings)
    again = {row["key"]: row["step_advantages"][0] for row in turned.on_policy.round.rows}
    assert len(RecordStore(tmp_path / "run" / "rounds")) == 32
    assert all(again[row["key"]] == pytest.approx(-row["step_advantages"][0]) for row in rows)
    split = online(kwargs={"step_credit": bad_steps}, **settings)
    assert {len(row["step_ends"]) for row in split.on_policy.round.rows} != {1}


def test_guards_and_an_empty_round_are_resumed(online, tmp_path):
    """Every completion is unscored, so that rounds of two steps are empty: resumed in one, it is not drawn again."""
    settings = {
        **{"reward": lambda prompts, completions, **k: [None] * len(completions), "max_unscored": 1.0},
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "steps_per_round": 2, "max_empty_rounds": 100},
    }
    whole = online(output_dir=str(tmp_path / "whole"), **settings)
    whole.guards.anchored = True
    whole.guards._told.add("positives")
    whole.save_model()
    whole._save_checkpoint(whole.model, None)
    again = online(output_dir=str(tmp_path / "again"), train=False, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.on_policy.state == whole.on_policy.state
    again._restore(str(tmp_path / "whole" / "checkpoint-4"))
    assert again.guards.anchored
    assert again.guards.state() == whole.guards.state()


def test_a_checkpoint_that_was_cut_short_is_passed_over(online, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": str(tmp_path / "run")}
    online(**settings)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    again = online(train=False, **{**settings, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert len(logged(again, "loss")) == 3  # one of them from the first run's history


def test_measuring_gradients_draws_no_random_numbers(advantage):
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.3)
    runs = [
        advantage(kwargs={"peft_config": lora}, disable_dropout=False, max_steps=3, gradient_norms_every=every)
        for every in (1, 0)
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_columns_with_the_names_of_what_scorers_get_are_refused(online, prompts):
    with pytest.raises(ValueError, match="the column completion_ids"):
        online(data=[{**row, "completion_ids": [1]} for row in prompts])
    with pytest.raises(ValueError, match="the column completions, a name under which scorers get"):
        online(data=[{**row, "completions": "x"} for row in prompts])
    taken = [{**row, "steps": "x"} for row in prompts]
    online(data=taken, max_steps=1)  # nothing else has this name
    with pytest.raises(ValueError, match="the column steps"):
        online(data=taken, kwargs={"step_credit": bad_steps})


def test_positives_of_a_cut_distribution_are_followed_from_the_first_measurement(online):
    """Their log-probabilities at the draw are those of another distribution, and give no ratio."""
    trainer = online(top_k=2, max_steps=4, max_empty_rounds=100, learning_rate=2e-3)
    drift = logged(trainer, "positive/drift")
    assert drift[0] == 0
    assert abs(drift[-1]) > 1e-3
    assert not logged(trainer, "ratio_p50")


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_norms_every": 0},
        {"logging_steps": 0.34, "logging_first_step": True, "gradient_norms_every": None},
        {"positive_weight": 0.0},
        {"top_k": 4},
    ],
)
def test_the_guard_sees_positives_whatever_else_is_measured(online, settings):
    """A limit below any drift: the guard acts as soon as it is told one."""
    with pytest.raises(GuardStop, match="max_positive_drop=-5"):
        online(max_steps=3, max_empty_rounds=100, positive_guard="stop", max_positive_drop=-5.0, **settings)


def test_rows_of_one_sign_have_an_anchor_though_the_dial_is_at_zero(advantage):
    plain = advantage(max_steps=1, positive_weight=0.0)
    held = advantage(max_steps=1, positive_weight=0.0, nll_weight=5.0)
    share = logged(held, "positive/tokens")[0]
    assert losses(held)[0] - losses(plain)[0] == pytest.approx(-5 * share * logged(held, "positive/logp")[0], rel=1e-4)
    assert logged(plain, "positive/advantage") == [0.0]
    assert logged(plain, "positive/grad_norm") == [0.0]


def test_positives_of_the_first_round_are_followed(online):
    """A reward that punishes what the first round found right: its own fresh samples would show no drift at all."""
    trainer = online(max_steps=6, learning_rate=2e-3, per_device_train_batch_size=32)
    drift = logged(trainer, "positive/drift")
    assert abs(drift[0]) < 1e-3
    assert abs(drift[-1]) > 0.01


def test_several_evaluation_sets_are_solved_apart(online, prompts):
    trainer = online(train=False, kwargs={"eval_dataset": {"a": prompts[:2], "b": prompts[2:]}})
    assert {"eval_a_accuracy", "eval_b_pass@1"} <= set(trainer.evaluate())


def test_rows_of_an_evaluation_need_what_the_objective_needs(advantage, rows):
    drawn = {"prompt_ids": [5], "completion_ids": [6, 1], "advantage": 1.0, "behaviour_logps": [-1.0, -1.0]}
    with pytest.raises(ValueError, match="eval row 0 has no behaviour_logps"):
        advantage(data=[drawn], loss_type="topr", kwargs={"eval_dataset": rows[:1]}, train=False)
