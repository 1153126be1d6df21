"""PreferenceTrainer on fresh samples: what becomes a pair, what gets better, and what must change nothing."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback

from negtune import HFSampler, PreferenceConfig, PreferenceTrainer
from negtune.losses.preference import PREFERENCE_LOSSES
from negtune.models.load import load_tokenizer
from negtune.models.moving import MovingReference
from negtune.rollouts.attest import StaleEngineError
from negtune.rollouts.sampler import SamplingParams
from negtune.rollouts.store import RecordStore
from negtune.trainers.guards import Guards, GuardStop, displaced_chosen
from negtune.trainers.rounds import NoSignalError
from negtune.verifiers.verdict import TooManyUnscored
from tests.conftest import chain_text

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
FLAT = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def load(folder: str, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def losses(trainer) -> list[float]:
    return logged(trainer, "loss")


def text_of(trainer, ids) -> str:
    return trainer.processing_class.decode(ids, skip_special_tokens=True)


def is_good(prompts, completions, **columns) -> list[float]:
    return [float(text.endswith("good")) for text in completions]


def how_many_ok(prompts, completions, **columns) -> list[float]:
    return [float(text.count("ok")) for text in completions]


@pytest.fixture
def offline_pairs(prompts) -> list[dict]:
    return [
        {"prompt": r["prompt"], "chosen": chain_text(["ok"] * 3), "rejected": chain_text(["ok", "no", "ok"])}
        for r in prompts
    ]


@pytest.fixture
def online(tmp_path, chain_folder, prompts):
    """`online(model=..., reward=..., kwargs={...}, ...)` -> trainer; every other keyword is a setting."""

    def build(model=None, train=True, data=None, reward=how_many_ok, kwargs=None, resume=None, **settings):
        defaults = {
            **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 4},
            **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none"},
            **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3},
            **{"max_completion_length": 24, "num_generations": 4},
        }
        given = {"sampler": lambda model, tokenizer: HFSampler(model, tokenizer, batch_size=64), "reward_funcs": reward}
        trainer = PreferenceTrainer(
            model=model if model is not None else chain_folder,
            args=PreferenceConfig(**{**defaults, **settings}),
            train_dataset=data if data is not None else prompts,
            processing_class=load_tokenizer(chain_folder),
            **{**given, **(kwargs or {})},
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return build


# --- Direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({"loss_type": "dpo"}, False),
        pytest.param(
            {"loss_type": "dpo", "steps_per_round": 2, "reuse": 2, "importance_cap": 2.0}, True, marks=pytest.mark.slow
        ),
        ({"loss_type": "ipo", "pair_selection": "all", "pairs_per_prompt": 4}, True),
        pytest.param({"loss_type": "simpo", "pair_selection": "random"}, False, marks=pytest.mark.slow),
        pytest.param({"loss_type": "chosen_nll", "nll_weight": 0.1}, False, marks=pytest.mark.slow),
        ({"loss_type": "dpo", "reference_decay": 0.5, "reference_every": 2}, True),
    ],
)
def test_fresh_samples_get_better(online, prompts, settings, adapter):
    kwargs = {"eval_dataset": prompts, **({"peft_config": LORA} if adapter else {})}
    trainer = online(
        kwargs=kwargs,
        train=False,
        per_device_train_batch_size=16,
        max_steps=12,
        learning_rate=2e-3 if adapter else 5e-4,
        eval_num_generations=16,
        **settings,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_reward"] < 2.3
    assert after["eval_reward"] > before["eval_reward"] + 0.25
    row = trainer.state.log_history[2]
    assert {"rounds/reward", "rounds/ties", "rounds/gap", "chosen/logp", "rejected/logp", "sampled_tokens"} <= set(row)
    assert row["rounds/chosen_score"] > row["rounds/rejected_score"]


def test_a_judge_trains_like_the_reward_it_judges_by(online, prompts):
    def judge(prompts, completions, **columns):
        return [0.5 if a.count("ok") == b.count("ok") else float(b.count("ok") > a.count("ok")) for a, b in completions]

    settings = {"per_device_train_batch_size": 8, "max_steps": 3}
    by_reward = online(**settings)
    by_judge = online(
        kwargs={"judge": judge, "reward_funcs": None}, output_dir=by_reward.args.output_dir + "2", **settings
    )
    assert losses(by_judge) == losses(by_reward)
    for record in RecordStore(f"{by_judge.args.output_dir}/rounds", "scores"):
        assert record["score"] is None or 0 <= record["score"] <= 1


def test_a_reward_model_scores_pairs(online, chain_folder):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = load_tokenizer(chain_folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **sizes))
    trainer = online(reward=model, kwargs={"reward_processing_classes": tokenizer}, max_steps=1)
    scores = {r["rollout"]: r["score"] for r in RecordStore(f"{trainer.args.output_dir}/rounds", "scores")}
    record = next(r for r in RecordStore(f"{trainer.args.output_dir}/rounds") if scores[r["key"]] is not None)
    ids = tokenizer(record["prompt"] + record["text"], return_tensors="pt", add_special_tokens=False)
    assert scores[record["key"]] == pytest.approx(model(**ids).logits.item(), abs=1e-5)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_best_and_the_worst_sample_of_their_prompt(online):
    trainer = online(max_steps=1)
    drawn, scores = (list(RecordStore(f"{trainer.args.output_dir}/rounds", n)) for n in ("rollouts", "scores"))
    score = {r["rollout"]: r["score"] for r in scores}
    rows = trainer.on_policy.round.rows
    assert len(rows) == 4
    for row in rows:
        group = [r for r in drawn if r["key"] in row["key"].split(":")]
        assert len({r["prompt"] for r in group}) == 1
        mates = [score[r["key"]] for r in drawn if r["prompt"] == group[0]["prompt"] and score[r["key"]] is not None]
        assert row["chosen_score"] == text_of(trainer, row["chosen_ids"]).count("ok") == row["chosen_score"]
        assert row["chosen_score"] > row["rejected_score"]
        assert {row["chosen_score"], row["rejected_score"]} <= set(mates)
        assert len(row["chosen_behaviour"]) == len(row["chosen_ids"])


def test_ties_are_skipped_counted_and_replaced(online):
    """The reward tells samples of two of the four prompts apart."""

    def some(prompts, completions, **columns):
        told = ("Walk to Rome.", "Walk to Oslo.")
        return [float(c.count("ok")) if p in told else 1.0 for p, c in zip(prompts, completions, strict=True)]

    plain = online(reward=some, dynamic_sampling=False, max_steps=1)
    filled = online(reward=some, max_refills=8, max_steps=1, output_dir=plain.args.output_dir + "2")
    assert logged(plain, "rounds/ties")[0] >= 0.5
    assert len(plain.on_policy.round.rows) <= 2
    assert len(filled.on_policy.round.rows) == 4
    assert logged(filled, "rounds/refills")[0] >= 1
    assert logged(plain, "rounds/pairs") == [float(len(plain.on_policy.round.rows))]


def test_first_pit_cuts_the_rejected_answer_behind_the_step_that_ruined_it(online):
    def steps(prompts, completions, steps, **columns):
        return [[-1.0 if line.startswith("no") else 1.0 for line in lines] for lines in steps]

    trainer = online(
        kwargs={"step_credit": steps}, pair_selection="first_pit", pairs_per_prompt=2, max_steps=1, reward=is_good
    )
    rows = trainer.on_policy.round.rows
    assert rows
    eos = trainer.processing_class.eos_token_id
    for row in rows:
        rejected = text_of(trainer, row["rejected_ids"]).strip().split("\n")
        assert rejected.index("no") == len(rejected) - 1
        assert row["rejected_ids"][-1] != eos
        assert row["chosen_ids"][-1] == eos
        assert len(row["rejected_behaviour"]) == len(row["rejected_ids"])


def test_first_pit_by_values_is_the_first_step_with_the_lowest(online):
    def values(prompts, completions, steps, rewards, **columns):
        return [[0.5, *[0.5] * (len(s) - 3), 0.0, 0.0, float(r)] for s, r in zip(steps, rewards, strict=True)]

    trainer = online(
        kwargs={"step_credit": values}, pair_selection="first_pit", step_scores="values", max_steps=1, reward=is_good
    )
    for row in trainer.on_policy.round.rows:  # four lines: the second is the first with value 0
        assert text_of(trainer, row["rejected_ids"]).strip().count("\n") == 1


def test_unscored_and_cut_samples_are_in_no_pair(online):
    def some(prompts, completions, **columns):
        return [None if c.startswith("no") else float(c.count("ok")) for c in completions]

    trainer = online(reward=some, max_steps=1, max_unscored=0.9, pair_selection="all", pairs_per_prompt=2)
    eos = trainer.processing_class.eos_token_id
    for row in trainer.on_policy.round.rows:
        for side in ("chosen", "rejected"):
            assert not text_of(trainer, row[f"{side}_ids"]).startswith("no")
            assert row[f"{side}_ids"][-1] == eos
    ids = [r["completion_ids"] for r in RecordStore(f"{trainer.args.output_dir}/rounds")]
    limit = sorted(map(len, ids))[len(ids) // 2]  # about half are longer
    cut = online(max_completion_length=limit, max_steps=1, output_dir=trainer.args.output_dir + "2")
    assert logged(cut, "rounds/truncated")[0] > 0.1
    assert len(cut.on_policy.round.rows) > 0
    assert all(row[f"{side}_ids"][-1] == eos for row in cut.on_policy.round.rows for side in ("chosen", "rejected"))


def test_cut_samples_are_scored_as_they_stand_where_they_are_not_masked(online):
    def short(completion_ids, **columns):
        return [-float(len(ids)) for ids in completion_ids]

    settings = {"max_completion_length": 12, "max_steps": 2, "displacement_pairs": 0, "pair_selection": "best_worst"}
    trainer = online(reward=short, mask_truncated_completions=False, **settings)
    assert logged(trainer, "rounds/truncated")[0] > 0.1
    assert logged(trainer, "rounds/unscored")[0] == 0
    eos, rows = trainer.processing_class.eos_token_id, trainer.on_policy.round.rows
    worse = [row["rejected_ids"] for row in rows]
    assert any(len(ids) == 12 and ids[-1] != eos for ids in worse)
    assert all(len(row["chosen_ids"]) < len(row["rejected_ids"]) for row in rows)
    assert [len(row["rejected_behaviour"]) for row in rows] == list(map(len, worse))
    masked = online(reward=short, output_dir=trainer.args.output_dir + "2", **settings)
    assert logged(masked, "rounds/unscored") == pytest.approx(logged(masked, "rounds/truncated"))


# --- Mixing -----------------------------------------------------------------------------------------------------------


def test_every_step_takes_its_share_from_the_data_set(online, offline_pairs, monkeypatch):
    """Half of the four pairs: two fresh ones and two of the data set, all of which come up before any again."""
    seen = []
    original = PreferenceTrainer.compute_loss

    def watch(self, model, inputs, *args, **kwargs):
        seen.append(inputs["rows"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", watch)
    mixed = online(data=offline_pairs, on_policy_fraction=0.5, max_steps=4, displacement_pairs=0)
    assert [sum(row < 0 for row in rows) for rows in seen] == [2, 2, 2, 2]
    drawn = [row for rows in seen for row in rows if row >= 0]
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == [0, 1, 2, 3]
    assert len(mixed.on_policy.round.rows) == 2


def test_prompts_and_pairs_may_be_two_sets(online, offline_pairs, prompts):
    data = {"prompts": prompts, "pairs": Dataset.from_list(offline_pairs[:2])}
    trainer = online(data=data, on_policy_fraction=0.75, importance_cap=1.0)
    assert len(losses(trainer)) == 4
    streamed = {"prompts": prompts, "pairs": Dataset.from_list(offline_pairs).to_iterable_dataset()}
    assert len(losses(online(data=streamed, on_policy_fraction=0.5))) == 4
    with pytest.raises(ValueError, match="reads a stream twice"):
        online(data=Dataset.from_list(offline_pairs).to_iterable_dataset(), on_policy_fraction=0.5, train=False)


# --- Invariances ------------------------------------------------------------------------------------------------------


def test_micro_batches_of_a_round_change_nothing(online, offline_pairs, chain_folder):
    settings = {
        **{"max_steps": 4, "steps_per_round": 2, "on_policy_fraction": 0.5, "data": offline_pairs, "nll_weight": 0.2},
        **{"kl_weight": 0.1, "importance_cap": 1.5, "reuse": 2, "prefix_sharing": "off", **FLAT},
    }
    whole = online(load(chain_folder, torch.float64), **settings)
    for micro, accumulate in ((1, 4), (2, 2)):
        parts = online(
            load(chain_folder, torch.float64),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            output_dir=whole.args.output_dir + str(micro),
            **settings,
        )
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-6, abs=1e-7)
        for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_round_with_too_few_pairs_still_makes_every_step(online):
    """One prompt in four has pairs: some micro-batches are a filler, which counts in no loss and no metric."""

    def some(prompts, completions, **columns):
        return [
            float(c.count("ok")) if p == "Walk to Rome." else 1.0 for p, c in zip(prompts, completions, strict=True)
        ]

    settings = {
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "dynamic_sampling": False},
        **{"reward": some, "max_steps": 1, **FLAT},
    }
    trainer = online(**settings)
    assert len(trainer.on_policy.round.rows) == 1
    whole = online(
        **{**settings, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        output_dir=trainer.args.output_dir + "2",
    )
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-6)
    assert logged(trainer, "chosen/logp") == pytest.approx(logged(whole, "chosen/logp"), rel=1e-5)
    for a, b in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_reference_is_asked_once_for_every_pair_of_a_round(online, chain_folder):
    """Two rounds of four pairs, three passes over each; the numbers are those of asking every time."""
    settings = {"max_steps": 6, "steps_per_round": 3, "reuse": 3, "displacement_pairs": 0}
    asked = []

    def counted(trainer):
        inner = trainer.reference.logps
        trainer.reference.logps = lambda model, batch: asked.append(len(batch["rows"])) or inner(model, batch)
        return trainer

    once = counted(online(load(chain_folder), train=False, **settings))
    once.train()
    assert asked == [4, 4]
    always = online(load(chain_folder), train=False, output_dir=once.args.output_dir + "2", **settings)
    always.on_policy._prepare = None
    counted(always).train()
    assert asked[2:] == [4] * 6
    assert losses(always) == pytest.approx(losses(once), rel=1e-5)
    assert losses(once)[-1] != pytest.approx(losses(once)[0], rel=1e-2)


def test_importance_weighs_pairs_of_later_passes_down_and_never_above_the_cap(online, chain_folder):
    """The first pass is on-policy: ratio 1, and the run is the one without weights up to there."""
    settings = {"max_steps": 3, "steps_per_round": 3, "reuse": 3, "learning_rate": 2e-3}
    plain = online(load(chain_folder, torch.float64), **settings)
    capped = online(
        load(chain_folder, torch.float64),
        importance_cap=1.0,
        output_dir=plain.args.output_dir + "2",
        **settings,
    )
    assert losses(capped)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    assert logged(plain, "ratio_p50")[0] == pytest.approx(1, abs=1e-4)
    assert logged(plain, "ratio_p50")[1] != pytest.approx(1, abs=1e-2)
    assert losses(capped)[1] < losses(plain)[1]


@pytest.mark.parametrize(
    ("place", "moving"),
    [
        *((5, False), (6, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, False), (6, False), (4, True), (5, True))),
    ],
)
def test_a_resumed_round_is_the_uninterrupted_one(online, offline_pairs, tmp_path, place, moving):
    """Rounds of four steps, two passes over each, half of every step from the data set."""
    settings = {
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "steps_per_round": 4, "reuse": 2},
        **{"data": offline_pairs, "on_policy_fraction": 0.5, "gradient_accumulation_steps": 2},
        **({"reference_decay": 0.7} if moving else {}),
    }
    kwargs = {"peft_config": LORA} if moving else {}
    whole = online(output_dir=str(tmp_path / "whole"), kwargs=kwargs, **settings)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{place}")
    resumed = online(output_dir=str(tmp_path / "again"), kwargs=kwargs, resume=checkpoint, **settings)
    assert losses(resumed)[place:] == losses(whole)[place:]
    assert logged(resumed, "chosen/drift")[place:] == logged(whole, "chosen/drift")[place:]
    assert resumed.on_policy.state == whole.on_policy.state
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    drawn = {record["key"] for record in RecordStore(tmp_path / "again" / "rounds")}
    assert drawn < {record["key"] for record in RecordStore(tmp_path / "whole" / "rounds")}


class Killed(Exception):
    pass


def test_samples_of_a_killed_round_are_used_and_none_is_drawn_twice(online, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "steps_per_round": 2}
    whole = online(output_dir=str(tmp_path / "whole"), **settings)

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


def test_prompts_per_round_says_how_many_steps_a_round_has(online):
    trainer = online(prompts_per_round=8, reuse=2, max_steps=4)
    assert trainer.args.steps_per_round == 4
    assert len(list(RecordStore(f"{trainer.args.output_dir}/rounds"))) >= 8 * 4
    assert len(trainer.on_policy.round.rows) == 8


@pytest.mark.parametrize("loss_type", sorted(set(PREFERENCE_LOSSES) - {"step_dpo"}))
def test_every_objective_trains_on_fresh_pairs(online, loss_type):
    """Three passes over one round: the margin between those answers grows."""
    settings = {"max_steps": 3, "steps_per_round": 3, "reuse": 3, "per_device_train_batch_size": 8}
    trainer = online(loss_type=loss_type, learning_rate=3e-4, **settings)
    rising = "chosen/logp" if loss_type in ("chosen_nll", "orpo") else "margin"
    assert logged(trainer, rising)[-1] > logged(trainer, rising)[0] + 1e-3


def test_qlora_draws_from_and_trains_a_four_bit_policy(online, chain_folder):
    from transformers import BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        chain_folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    settings = {"max_steps": 6, "steps_per_round": 3, "reuse": 3, "learning_rate": 3e-3}
    trainer = online(quantised, kwargs={"peft_config": LORA}, **settings)
    margins = logged(trainer, "margin")
    assert margins[2] > margins[0] + 0.1
    assert margins[5] > margins[3] + 0.1


def test_evaluation_takes_pairs_and_prompts(online, prompts, offline_pairs):
    sets = {"pairs": offline_pairs, "prompts": prompts}
    trainer = online(kwargs={"eval_dataset": sets}, eval_strategy="steps", eval_steps=2, eval_num_generations=2)
    metrics = trainer.evaluate()
    assert {"eval_pairs_loss", "eval_pairs_margin", "eval_pairs_chosen/logp"} <= set(metrics) | set(
        trainer.state.log_history[-2]
    )
    assert {"eval_prompts_reward", "eval_prompts_length"} <= set(metrics)
    assert len(logged(trainer, "eval_prompts_reward")) == 3
    assert len(logged(trainer, "eval_pairs_accuracy")) == 3


# --- Displacement -----------------------------------------------------------------------------------------------------


@pytest.fixture
def entangled(prompts) -> list[dict]:
    """Pairs that differ in their last word alone."""
    return [
        {"prompt": r["prompt"], "chosen": "ok\nok\nno\nbad good", "rejected": "ok\nok\nno\nbad bad"} for r in prompts
    ]


@pytest.mark.parametrize("reaction", ["warn", "anchor", "stop"])
def test_the_guard_sees_chosen_answers_fall_while_the_margin_grows(online, entangled, reaction, caplog):
    kwargs = {"sampler": None, "reward_funcs": None}
    settings = {
        **{"data": entangled, "loss_type": "dpo", "beta": 0.5, "learning_rate": 3e-3, "max_steps": 16},
        **{"max_chosen_drop": 0.02, "displacement_guard": reaction, "gradient_norms_every": 1},
    }
    with caplog.at_level(logging.WARNING):
        if reaction == "stop":
            with pytest.raises(GuardStop, match="limit max_chosen_drop=0.02"):
                online(kwargs=kwargs, **settings)
            return
        trainer = online(kwargs=kwargs, **settings)
    assert sum("likelihood displacement" in r.message for r in caplog.records) == 1
    assert trainer.guards.anchored == (reaction == "anchor")
    assert {"ches", "grad_push", "grad_cosine", "chosen/grad_norm"} <= set(trainer.state.log_history[0])
    if reaction == "anchor":
        plain = online(kwargs=kwargs, **{**settings, "displacement_guard": "off"})
        assert logged(trainer, "chosen/drift")[-1] > logged(plain, "chosen/drift")[-1]


def test_the_guard_keeps_quiet_while_better_answers_take_the_place_of_the_first():
    watch = displaced_chosen("stop", 0.5)
    fallen = {"chosen/drift": -1.0, "drift/margin": 2.0}
    guards = Guards(watch)
    guards.check({**fallen, "chosen/drift": 0.0, "rounds/reward": 0.3}, 1)
    guards.check({**fallen, "rounds/reward": 0.4}, 2)
    guards.check(fallen, 2)  # a step in the middle of a round
    again = Guards(watch)
    again.restore(guards.state())
    again.check(fallen, 2)
    with pytest.raises(GuardStop):
        guards.check({**fallen, "rounds/reward": 0.2}, 3)
    resumed = Guards(watch)
    resumed.restore(guards.state())
    resumed.check({**fallen, "rounds/reward": 0.4}, 4)
    with pytest.raises(GuardStop):
        Guards(watch).check(fallen, 1)


def test_following_pairs_and_measuring_gradients_changes_nothing(online, entangled):
    kwargs = {"sampler": None, "reward_funcs": None}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.3)
    runs = [
        online(
            data=entangled,
            kwargs={**kwargs, "peft_config": lora},
            disable_dropout=False,
            displacement_pairs=pairs,
            gradient_norms_every=every,
        )
        for pairs, every in ((0, 0), (4, 1))
    ]
    assert losses(runs[0]) == losses(runs[1])
    assert "ches" not in runs[0].state.log_history[0]
    assert logged(runs[1], "chosen/drift")[0] == 0


@pytest.mark.parametrize("fresh", [True, False])
def test_a_drift_is_that_of_the_logged_step_alone(online, offline_pairs, fresh):
    """The pairs are measured at the first step too, where nothing has moved."""
    given = {} if fresh else {"data": offline_pairs, "kwargs": {"sampler": None, "reward_funcs": None}}
    every = online(logging_steps=1, **given)
    fourth = online(logging_steps=4, output_dir=every.args.output_dir + "4", **given)
    for name in ("chosen/drift", "rejected/drift", "drift/margin", "ches"):
        assert logged(fourth, name) == [pytest.approx(logged(every, name)[3])], name
    assert logged(fourth, "chosen/drift")[0] != 0


def test_grad_push_says_which_way_the_chosen_answers_go(online, entangled, chain_folder):
    """One small step of SGD along g_w - g_l moves their log-probability by its rate times |g_w|^2 grad_push."""
    rate = 1e-5

    def step(chosen, rejected):
        return -(chosen.sums - rejected.sums)

    trainer = online(
        load(chain_folder, torch.float64),
        data=entangled,
        kwargs={"sampler": None, "reward_funcs": None, "objective": step},
        **{**FLAT, "learning_rate": rate, "max_steps": 2, "gradient_norms_every": 1, "displacement_pairs": 4},
    )
    before, after = logged(trainer, "chosen/logp")
    tokens = len(trainer.train_dataset[0]["chosen_ids"])
    predicted = rate * logged(trainer, "chosen/grad_norm")[0] ** 2 * logged(trainer, "grad_push")[0]
    assert (after - before) * tokens == pytest.approx(predicted, rel=0.05)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        ({"num_generations": 1}, {}, "a pair needs at least 2 samples"),
        ({"pairs_per_prompt": 3}, {}, "more than the 2 that pair_selection=best_worst makes of num_generations=4"),
        ({"pairs_per_prompt": 7, "pair_selection": "all"}, {}, "more than the 6 that pair_selection=all"),
        ({"pairs_per_prompt": 3, "pair_selection": "all"}, {}, "no whole number of prompts with pairs_per_prompt=3"),
        ({"min_gap": float("nan")}, {}, "min_gap >= 0, got 1 and nan"),
        ({"kl_weight": float("nan")}, {}, "kl_weight must be at least 0, got nan"),
        ({"loss_kwargs": {"label_smoothing": None}, "loss_type": "cdpo"}, {}, "label_smoothing must be a number"),
        ({"on_policy_fraction": 0.3}, {}, "no whole number; 1 of them is 0.25"),
        ({"on_policy_fraction": 0.0}, {}, "need 0 < on_policy_fraction"),
        ({"prompts_per_round": 3}, {}, "fill no whole number of optimiser steps of 4"),
        ({"steps_per_round": 3, "reuse": 2}, {}, "must be a multiple of reuse=2"),
        ({"pair_selection": "best"}, {}, "pair_selection must be one of best_worst"),
        ({"pair_selection": "first_pit"}, {}, "pass both, or neither"),
        ({}, {"step_credit": lambda **k: []}, "pass both, or neither"),
        ({"loss_type": "step_dpo"}, {}, "which fresh ones do not; use dpo"),
        ({"tokens_per_batch": 100}, {}, "leave it out with a sampler"),
        ({"importance_cap": 1.0, "top_p": 0.9}, {}, "top_p"),
        ({"importance_cap": 1.0, "temperature": 0.7}, {}, "set temperature to 1"),
        ({"importance_cap": 0.0}, {}, "importance_cap must be above 0"),
        ({"reference_decay": 1.0}, {}, "below 1"),
        ({"reference_decay": 0.5, "reference": "copy"}, {}, "leave one of them out"),
        ({"reference_decay": 0.5, "loss_type": "simpo"}, {}, "reads none"),
        ({"reference": "cached"}, {}, "needs the rows beforehand"),
        ({"displacement_guard": "loud"}, {}, "displacement_guard must be one of"),
        ({}, {"reward_funcs": None}, "something that scores"),
        ({}, {"judge": lambda **k: []}, "pass one of the three"),
        ({}, {"sampler": None}, "pass a sampler too"),
        ({"temperature": 0.0}, {}, "temperature must be positive"),
        ({"prompts_per_round": 8, "steps_per_round": 4}, {}, "makes 2 steps, and steps_per_round=4"),
        ({"displacement_guard": "stop", "displacement_pairs": 0}, {}, "follows none"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(online, settings, kwargs, message):
    with pytest.raises(ValueError, match=message):
        online(train=False, kwargs=kwargs, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"on_policy_fraction": 0.5}, {"reuse": 2, "steps_per_round": 2}, {"importance_cap": 1.0}, {"min_gap": 0.5}],
)
def test_settings_of_fresh_samples_are_refused_where_there_are_none(online, offline_pairs, settings):
    with pytest.raises(ValueError, match="is about fresh samples; pass a sampler too"):
        online(train=False, data=offline_pairs, kwargs={"sampler": None, "reward_funcs": None}, **settings)


@pytest.mark.parametrize("reaction", ["anchor", "stop"])
def test_a_guard_that_could_not_act_is_refused(online, offline_pairs, reaction):
    stream = Dataset.from_list(offline_pairs).to_iterable_dataset()
    kwargs = {"sampler": None, "reward_funcs": None}
    with pytest.raises(ValueError, match="which a stream has not beforehand"):
        online(train=False, data=stream, kwargs=kwargs, displacement_guard=reaction)


@pytest.mark.parametrize("which", [True, "checkpoint-2"])
def test_a_checkpoint_of_pairs_that_has_nothing_but_the_hosts_files_is_gone_on_from(
    online, offline_pairs, tmp_path, which
):
    settings = {"save_strategy": "steps", "save_steps": 1, "data": offline_pairs, "output_dir": str(tmp_path / "run")}
    kwargs = {"sampler": None, "reward_funcs": None}
    whole = online(kwargs=kwargs, max_steps=3, **settings)
    for file in (tmp_path / "run").glob("checkpoint-*/round.json"):
        file.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    resume = which if which is True else str(tmp_path / "run" / which)
    assert losses(online(kwargs=kwargs, max_steps=3, resume=resume, **settings)) == losses(whole)


def _implicit(pairs):
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in pairs]


def _with_chats(pairs):
    """UltraFeedback's layout."""

    def chat(row, side):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]

    return [{"prompt": row["prompt"], **{side: chat(row, side) for side in ("chosen", "rejected")}} for row in pairs]


def test_data_that_cannot_work_is_refused_at_construction(online, prompts, offline_pairs):
    for data, settings, message in (
        ([], {}, "train_dataset is empty"),
        (prompts, {"on_policy_fraction": 0.5}, "column 'chosen' is missing"),
        ({"prompts": prompts, "pairs": offline_pairs}, {}, "one set of prompts"),
        ({"prompts": prompts}, {"on_policy_fraction": 0.5}, "mapping of prompts and pairs"),
        ({"prompts": prompts, "pairs": [{**offline_pairs[0], "rejected": ""}]}, {"on_policy_fraction": 0.5}, "empty"),
        ([{"question": "Who?"}], {}, "has the columns question, and no prompt"),
        (Dataset.from_list([{"question": "Who?"}]), {}, "has the columns question, and no prompt"),
        ([{"prompt": "Who?", "completions": "me"}], {}, "have the column completions"),
        (_implicit(offline_pairs), {"on_policy_fraction": 0.5}, "and no prompt"),
        (_with_chats(offline_pairs), {"on_policy_fraction": 0.5}, "prompt is text beside chats"),
    ):
        with pytest.raises(ValueError, match=message):
            online(train=False, data=data, **settings)


def test_scores_that_are_all_alike_stop_the_run_and_say_what_they_were(online):
    with pytest.raises(NoSignalError, match="no two completions of a prompt made a pair.*16 x 1;") as caught:
        online(
            reward=lambda prompts, completions, **k: [1.0] * len(completions),
            max_empty_rounds=2,
            max_refills=0,
            max_steps=5,
        )
    assert "2 rounds in a row" in str(caught.value)


def test_a_round_without_a_pair_moves_nothing(online, chain_folder):
    """After one round of pairs everything ties: neither momentum nor weight decay goes on."""
    rounds = []

    def once(prompts, completions, trainer_state, **columns):
        rounds.append(trainer_state.global_step)
        return [float(c.count("ok")) if trainer_state.global_step == 0 else 1.0 for c in completions]

    settings = {"reward": once, "weight_decay": 0.1, "max_refills": 0, "per_device_train_batch_size": 8}
    one = online(max_steps=1, **settings)
    three = online(max_steps=3, output_dir=one.args.output_dir + "2", **settings)
    assert set(rounds) == {0, 1, 2}
    for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_rounds_is_refused(online, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    online(output_dir=str(tmp_path / "run"), steps_per_round=4, **settings)
    other = online(output_dir=str(tmp_path / "run"), steps_per_round=2, train=False, **settings)
    with pytest.raises(ValueError, match="rounds with steps_per_round=4, and now it is 2"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_the_settings_of_the_caller_are_left_alone(prompts, chain_folder, tmp_path):
    args = PreferenceConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", num_train_epochs=1, num_generations=2
    )
    given = {"model": chain_folder, "args": args, "sampler": HFSampler, "reward_funcs": is_good}
    trainer = PreferenceTrainer(train_dataset=prompts, **given)
    assert trainer.args.max_steps > 0 > args.max_steps


@pytest.mark.parametrize("kind", ["prompts", "pairs", "stream of pairs"])
def test_a_run_that_is_resumed_at_its_end_takes_no_step(online, offline_pairs, kind):
    """Also where it ended in the middle of an epoch, or of a stream that has none."""
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "constant"}
    if kind != "prompts":
        given |= {"kwargs": {"sampler": None, "reward_funcs": None}, "data": offline_pairs}
    if kind == "stream of pairs":
        given["data"] = Dataset.from_list(offline_pairs).to_iterable_dataset()
        given["displacement_guard"] = "off"
    done = online(**given)
    again = online(resume=True, **given)
    assert again.state.global_step == 3
    for a, b in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(Path(again.args.output_dir).glob("checkpoint-4"))


def test_epochs_are_those_of_the_prompts(online, prompts):
    """16 prompts, 6 a round, two steps each: an epoch has three rounds."""
    data = prompts * 4
    given = {
        **{"max_steps": -1, "num_train_epochs": 2, "steps_per_round": 2, "per_device_train_batch_size": 3},
        **{"eval_strategy": "epoch", "save_strategy": "epoch", "kwargs": {"eval_dataset": prompts[:2]}},
    }
    assert len(data) == 16
    trainer = online(data=data, **given)
    assert trainer.state.max_steps == 12
    evaluated = [(row["step"], row["epoch"]) for row in trainer.state.log_history if "eval_reward" in row]
    assert evaluated == [(6, 1.0), (12, 2.0)]
    assert logged(trainer, "epoch")[:3] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    folder = Path(trainer.args.output_dir)
    shutil.rmtree(folder / "checkpoint-12")
    given |= {"save_strategy": "steps", "save_steps": 4}
    whole = online(data=data, output_dir=str(folder) + "2", **given)
    resumed = online(
        data=data, output_dir=str(folder) + "3", resume=str(folder) + "2/checkpoint-4", **given
    )  # in the middle of an epoch
    kept = [[row for row in t.state.log_history if row["step"] > 4] for t in (whole, resumed)]
    for name in ("loss", "epoch", "eval_reward", "rounds/reward"):
        assert [r[name] for r in kept[0] if name in r] == [r[name] for r in kept[1] if name in r], name


def test_cut_answers_count_in_an_evaluation_as_in_the_training(online, prompts):
    def fewest(prompts, completions, completion_ids, **columns):
        return [-len(ids) / 13 for ids in completion_ids]

    given = {"reward": fewest, "max_completion_length": 13, "max_steps": 1, "eval_num_generations": 16}
    kwargs = {"eval_dataset": prompts}
    for masked in (False, True):
        trainer = online(train=False, kwargs=kwargs, mask_truncated_completions=masked, **given)
        found = trainer.evaluate()
        assert 0 < found["eval_truncated"] < 1
        cut, whole = found["eval_truncated"], found["eval_length"]
        assert found["eval_unscored"] == 0
        if not masked:
            assert found["eval_reward"] == pytest.approx(-whole / 13)
        else:
            assert found["eval_reward"] == pytest.approx(-(whole - 13 * cut) / (1 - cut) / 13)


def test_answers_of_the_same_tokens_are_ties(online):
    scores = itertools.count()
    given = {"reward": lambda prompts, completions, **k: [float(next(scores)) for _ in completions], "top_k": 1}
    trainer = online(max_steps=1, max_empty_rounds=0, dynamic_sampling=False, **given)
    assert logged(trainer, "rounds/ties") == [1.0]
    assert logged(trainer, "rounds/pairs") == [0.0]
    with pytest.raises(NoSignalError, match="nor do answers of the same tokens"):
        online(max_steps=3, max_empty_rounds=1, **given)


def test_a_stop_text_may_be_given_as_one():
    args = PreferenceConfig(output_dir="unused", use_cpu=True, stop="END")
    assert args.sampling_params().stop == ("END",)


def test_an_evaluation_that_would_say_nothing_is_refused(online, prompts):
    judge = {"judge": lambda prompts, completions: [0.5] * len(completions), "reward_funcs": None}
    with pytest.raises(ValueError, match="half of them win whatever the policy"):
        online(train=False, kwargs={**judge, "eval_dataset": prompts})
    with pytest.raises(ValueError, match="half of them win whatever the policy"):
        online(train=False, kwargs=judge).evaluate(prompts)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="set metric_for_best_model to eval_reward"):
        online(train=False, kwargs={"eval_dataset": prompts}, save_steps=1, **best)


def test_a_judge_sees_each_draw_of_a_prompt_as_a_group_of_its_own(online, prompts):
    """One prompt only, four groups of two: four questions in either order."""
    asked = []

    def judge(prompts, completions):
        asked.append(len(completions))
        return [0.0] * len(completions)

    trainer = online(
        data=prompts[:1], kwargs={"judge": judge, "reward_funcs": None}, num_generations=2, max_steps=1, max_refills=0
    )
    assert asked == [8]
    assert "rounds/reward" not in trainer.state.log_history[0]


def test_a_scorer_that_fails_stops_the_run(online):
    with pytest.raises(TooManyUnscored, match="could not be scored"):
        online(reward=lambda prompts, completions, **k: [None] * len(completions), per_device_train_batch_size=16)


def test_an_engine_with_other_weights_stops_the_run_before_the_next_round(online, chain_folder):
    class Stuck(HFSampler):
        """Goes on drawing from a copy of the first weights."""

        def update(self, model, policy):
            super().update(getattr(self, "model", model), policy)

    sampler = Stuck(load(chain_folder), load_tokenizer(chain_folder))
    trainer = online(kwargs={"sampler": sampler}, train=False, max_steps=3, learning_rate=1e-2)
    with pytest.raises(StaleEngineError, match="nats a token"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_engine_that_keeps_the_trained_model_at_hand_is_not_taken_at_its_word(online, chain_folder):
    class Behind(HFSampler):
        """Has the trained model and draws from the first weights."""

        def draw(self, requests, params):
            return HFSampler(first, self.tokenizer, policy=self.policy).draw(requests, params)

    first = load(chain_folder)
    with pytest.raises(StaleEngineError, match="nats a token"):
        online(kwargs={"sampler": Behind}, max_steps=3, learning_rate=1e-2)


def test_a_checkpoint_without_the_moving_reference_is_refused(online, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    online(output_dir=str(tmp_path / "fixed"), kwargs={"peft_config": LORA}, **settings)
    moving = online(
        output_dir=str(tmp_path / "moving"),
        train=False,
        reference_decay=0.5,
        kwargs={"peft_config": LORA},
        **settings,
    )
    assert isinstance(moving.reference, MovingReference)
    with pytest.raises(ValueError, match="run with a fixed reference"):
        moving.train(resume_from_checkpoint=str(tmp_path / "fixed" / "checkpoint-1"))


def test_a_checkpoint_with_a_moving_reference_is_not_gone_on_from_with_a_fixed_one(online, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    online(output_dir=str(tmp_path / "moving"), kwargs={"peft_config": LORA}, reference_decay=0.5, **settings)
    fixed = online(output_dir=str(tmp_path / "fixed"), train=False, kwargs={"peft_config": LORA}, **settings)
    with pytest.raises(ValueError, match="is of a moving reference; set reference_decay"):
        fixed.train(resume_from_checkpoint=str(tmp_path / "moving" / "checkpoint-1"))


def test_ratios_are_logged_only_where_both_distributions_are_at_one_temperature(online):
    plain = online(max_steps=1)
    cooler = online(max_steps=1, temperature=0.7, output_dir=plain.args.output_dir + "2")
    assert logged(plain, "ratio_p50")[0] == pytest.approx(1, abs=1e-4)
    assert logged(cooler, "ratio_p50") == []


def test_sampling_settings_reach_the_sampler(online):
    seen = []

    class Watching(HFSampler):
        def draw(self, requests, params):
            seen.append(params)
            return super().draw(requests, params)

    online(kwargs={"sampler": Watching}, max_steps=1, temperature=0.8, top_p=0.9, stop=["good"])
    assert {(p.temperature, p.top_p, p.stop) for p in seen if isinstance(p, SamplingParams) and p.max_tokens == 24} == {
        (0.8, 0.9, ("good",))
    }
