"""What `PreferenceTrainer` refuses at its construction, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from negtune.ops import Needs
from negtune.rollouts.ratios import use_ratios
from negtune.trainers.on_policy import column_names
from negtune.trainers.preference_config import PreferenceConfig
from negtune.trainers.rounds import StepCredit
from negtune.verifiers.judge import Judge

FRESH = {
    *("on_policy_fraction", "prompts_per_round", "reuse", "importance_cap"),
    *("pair_selection", "pairs_per_prompt", "min_gap", "min_chosen"),
}
"""Settings that mean nothing without a sampler."""


def are_pairs(data: Any) -> bool:
    columns = column_names(data)
    return not columns or bool(columns & {"chosen", "chosen_ids"})


def refuse_scorers(*given: Any) -> None:
    if any(g is not None for g in given):
        raise ValueError(
            "reward_funcs, verifier, judge and step_credit score fresh samples; pass a sampler too, or leave them out"
        )


def refuse_fresh(args: PreferenceConfig) -> None:
    """Raise ValueError for settings of fresh pairs, which there are none of."""
    given = {
        f.name: getattr(args, f.name) for f in fields(args) if f.name in FRESH and getattr(args, f.name) != f.default
    }
    if given:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{told} is about fresh samples; pass a sampler too, or leave it out")


def check_evaluation(args: PreferenceConfig, data: Any, judge: Judge | None) -> None:
    """Raise ValueError for prompts to evaluate on that would give no number, or not the one that is wanted."""
    sets = data.values() if isinstance(data, Mapping) else [data]
    kinds = {are_pairs(rows) for rows in sets if rows is not None and not isinstance(rows, str)}
    refuse_judged_prompts(judge, kinds)
    if kinds == {False} and args.load_best_model_at_end and args.metric_for_best_model in (None, "loss", "eval_loss"):
        raise ValueError(
            "load_best_model_at_end wants a loss, which an evaluation on prompts has not; set metric_for_best_model to "
            "eval_reward, and greater_is_better to true"
        )


def refuse_judged_prompts(judge: Judge | None, kinds: set[bool]) -> None:
    """Raise ValueError where a judge would evaluate.

    Args:
        judge: what scores, if it is one.
        kinds: of the sets: whether they are pairs.
    """
    if judge is not None and False in kinds:
        raise ValueError(
            "a judge compares answers to one prompt with each other, and half of them win whatever the policy: it "
            "cannot evaluate on prompts; give eval_dataset pairs, or evaluate with a reward"
        )


def check_fresh(args: PreferenceConfig, needs: Needs, step_credit: StepCredit | None) -> None:
    """Raise ValueError for settings that fresh pairs do not go with."""
    args.round_settings(args.world_size)
    if args.tokens_per_batch is not None:
        raise ValueError("tokens_per_batch fills batches from a data set; leave it out with a sampler")
    if needs.step:
        raise ValueError(
            f"{args.loss_type} needs pairs that say where their answers part, which fresh ones do not; use dpo"
        )
    if (args.pair_selection == "first_pit") != (step_credit is not None):
        raise ValueError(
            "pair_selection=first_pit cuts answers where step_credit says that they went wrong; pass both, or neither"
        )
    use_ratios(args.sampling_params(), wanted=args.importance_cap is not None)
    if args.importance_cap is not None and args.temperature != 1:
        raise ValueError(
            f"importance_cap compares the policy with what drew, and temperature={args.temperature} draws from another "
            "distribution than is trained; set temperature to 1"
        )
