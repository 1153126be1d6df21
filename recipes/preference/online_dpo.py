"""Online DPO: draw answers from the policy, score them, train on the better over the worse, and again.

Paper       Direct Language Model Alignment from Online AI Feedback, https://arxiv.org/abs/2402.04792; the settings are
            axes of https://arxiv.org/abs/2404.14367
Data        Instructions: --prompts FILE|FOLDER|HUB_ID, or made-up ones.
Scores      --reward min_length|mode_length|one_sentence, or --reward_model, a sequence classifier by name or folder.
Axes        --steps_per_round 1 is on-policy, more is semi-online; --reuse passes over a round; --on_policy_fraction
            below 1 mixes in pairs of --pairs; --pair_selection; --loss_type dpo, ipo, simpo ...
Expected    A higher reward on held-out prompts, at some KL from the start.
Measured    See recipes/README.md.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/preference/online_dpo.py \
        --config recipes/preference/online_dpo.yaml

Stopped, the same command goes on: nothing is drawn twice.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from task import REWARDS, instructions, reward_of, start_of
from trl import ModelConfig, TrlParser, get_peft_config

from negtune import HFSampler, PreferenceConfig, PreferenceTrainer, SamplingParams, VLLMSampler
from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.eval.frontier import Measured, reward_and_kl, under
from negtune.eval.run import Run
from negtune.metrics.stats import paired_difference
from negtune.models.load import load_model
from negtune.models.policy import is_peft
from negtune.records import read_jsonl
from negtune.report import write_report
from negtune.rollouts.sampler import Sampler
from negtune.trainers.on_policy import last_whole_checkpoint
from negtune.verifiers.rewards import RewardModel

SHOWN = 5
SMOKE = {
    **{"model_name_or_path": "tiny", "reward": "min_length", "suffix": "", "test_prompts": 8},
    **{"max_completion_length": 16, "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1},
}
PAPER = "Direct Language Model Alignment from Online AI Feedback"


@dataclass
class OnlineArguments:
    prompts: str | None = field(default=None, metadata={"help": "Instructions; default: made-up ones."})
    suffix: str = field(default=" Answer in a few words.", metadata={"help": "Behind every instruction."})
    pairs: str | None = field(default=None, metadata={"help": "JSON lines of pairs to mix in (on_policy_fraction)."})
    reward: str = field(default="min_length", metadata={"help": f"One of {', '.join(REWARDS)}."})
    mode: int = field(default=16, metadata={"help": "Tokens that mode_length wants."})
    reward_model: str | None = field(default=None, metadata={"help": "Scores instead: a sequence classifier."})
    engine: str = field(default="hf", metadata={"help": "Draws the samples: hf or vllm."})
    sample_batch: int = field(default=64, metadata={"help": "Completions at a time, with hf."})
    test_prompts: int = field(default=64, metadata={"help": "Held out."})
    test_samples: int = field(default=2, metadata={"help": "Of each."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model, a few steps, unless a flag says otherwise."})


def main() -> None:
    parser = TrlParser((OnlineArguments, PreferenceConfig, ModelConfig))
    given, args, model_args = parsed(parser, SMOKE)
    refuse(given, args)
    folder = Path(args.output_dir)
    base = start_of(model_args.model_name_or_path or "smollm2", folder)
    model, tokenizer = load_model(base, dtype=model_args.dtype, load_in_4bit=model_args.load_in_4bit)
    chat = tokenizer.chat_template is not None and model_args.model_name_or_path != "tiny"
    prompts = instructions(given.prompts, given.suffix, chat=chat)
    if len(prompts) <= given.test_prompts:
        raise ValueError(
            f"--prompts has {len(prompts)} prompts that fit, and --test_prompts {given.test_prompts} holds them all "
            "out: none is left to train on; lower it"
        )
    test, train = prompts[: given.test_prompts], [{"prompt": p} for p in prompts[given.test_prompts :]]
    reward: Any = reward_of(given.reward, args.max_completion_length, lambda: given.mode)
    if given.reward_model is not None:
        reward = RewardModel.load(given.reward_model, device=args.device)
    data: Any = train
    if given.pairs is not None:
        data = {"prompts": train, "pairs": read_jsonl(Path(given.pairs))}
        if not data["pairs"]:
            raise ValueError(f"--pairs {given.pairs} has no line; leave it out, with --on_policy_fraction 1")
    trainer = PreferenceTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        sampler=lambda model, tokenizer: sampler_of(given, model, tokenizer),
        reward_funcs=reward,
    )
    checkpoint = last_whole_checkpoint(args.output_dir)
    run = Run(
        folder,
        resumed_from=checkpoint and Path(checkpoint).name,
        seed=args.seed,
        task="preference",
        title="Online preference tuning",
        recipe="recipes/preference/online_dpo.py",
        objective=args.loss_type,
        paper={"title": PAPER, "url": "https://arxiv.org/abs/2402.04792"},
        data=given.prompts or "made-up instructions",
        model=model_args.model_name_or_path or "smollm2",
        artefact="the trained policy",
        arguments={**vars(given), **args.to_dict()},
    )
    before = measured(given, args, trainer, reward, test)
    add(run, "start", before, None)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    add(run, args.loss_type, measured(given, args, trainer, reward, test), before)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])
    trainer.on_policy.sampler.close()


def refuse(given: OnlineArguments, args: PreferenceConfig) -> None:
    """Raise ValueError for what cannot work, before anything is loaded."""
    no_push(args)
    if given.reward not in REWARDS:
        raise ValueError(f"--reward must be one of {', '.join(REWARDS)}, got {given.reward!r}")
    if given.engine not in ("hf", "vllm"):
        raise ValueError(f"--engine must be hf or vllm, got {given.engine!r}")
    if (given.pairs is None) != (args.on_policy_fraction == 1):
        raise ValueError("--pairs are mixed in at --on_policy_fraction below 1; give both, or neither")
    for name in ("test_prompts", "test_samples", "sample_batch", "mode"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")


def sampler_of(given: OnlineArguments, model: Any, tokenizer: Any) -> Sampler:
    if given.engine == "hf":
        return HFSampler(model, tokenizer, batch_size=given.sample_batch)
    return VLLMSampler(model, tokenizer, max_model_len=min(1024, model.config.max_position_embeddings))


def measured(given: OnlineArguments, args: PreferenceConfig, trainer: Any, reward: Any, test: list[Any]) -> Measured:
    """The policy as it is now. The start is the model without its adapter; under full fine-tuning `kl` is left out."""
    trainer.on_policy.sync(attested=False)
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    params = SamplingParams(max_tokens=args.max_completion_length, seed=args.seed + 1_000_000)

    def reference(rollouts: Any) -> list[float]:
        if not is_peft(model):
            return [float("nan")] * len(rollouts)
        with model.disable_adapter():
            return under(model, tokenizer)(rollouts)

    return reward_and_kl(trainer.on_policy.sampler, reward, test, reference, n=given.test_samples, params=params)


def add(run: Run, name: str, found: Measured, before: Measured | None) -> None:
    """A column of the table, with the paired difference to the start."""
    metrics: dict[str, Any] = {k: v for k, v in found.metrics.items() if v == v}
    if before is not None:
        names = "minus start", "minus start_low", "minus start_high"
        metrics |= dict(zip(names, paired_difference(found.by_prompt(), before.by_prompt()), strict=True))
    if not PartialState().is_main_process:
        return
    n = len(found.rollouts) // len(found.by_prompt())
    shown = found.rollouts[::n][:SHOWN]
    run.add_arm(name, metrics)
    rows = [(r.prompt if isinstance(r.prompt, str) else r.prompt[-1]["content"], None, r.text) for r in shown]
    run.add_answers("held out", rows, name)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
