"""Step credit as advantages: the same pits and values, pushed up and down token by token.

Paper       RL on Incorrect Synthetic Data, https://arxiv.org/abs/2406.14532, section on advantage-weighted RL; negative
            sample reinforcement, https://arxiv.org/abs/2506.01347; VinePPO's values, https://arxiv.org/abs/2410.01679
Data        Made-up arithmetic chains, or GSM8K (--gsm8k).
Modes       --on_policy false: solutions of the fine-tuned model, values of their steps by rollouts, one training run.
            --on_policy true: fresh samples of the policy every steps_per_round steps, with --step_credit true values of
            their steps by rollouts too.
Control     The same steps of fine-tuning on the problems it knows; --rates tries several learning rates on both.
Expected    More problems solved than by the fine-tuned model.
Measured    See recipes/README.md.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/step_rl/advantage.py \
        --config recipes/step_rl/advantage.yaml
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arms import Arms
from models import Models
from stages import (
    StepArguments,
    collected,
    is_chat,
    make_verifier,
    rows_of,
    shrink,
    start_model,
)
from trl import ModelConfig, TrlParser

from negtune import AdvantageConfig, AdvantageTrainer
from negtune.cli.recipe import no_push, run_recipe
from negtune.eval.run import Run
from negtune.records import read_jsonl, write_jsonl
from negtune.rollouts.step_rows import advantage_rows
from negtune.rollouts.steps import RolloutCredit, Search


@dataclass
class ModeArguments:
    on_policy: bool = field(default=False, metadata={"help": "Train on fresh samples instead of stored ones."})
    step_credit: bool = field(default=False, metadata={"help": "On-policy: values of every step by rollouts."})


def main() -> None:
    parser = TrlParser((ModeArguments, StepArguments, AdvantageConfig, ModelConfig))
    mode, stage, args, model_args = parser.parse_args_and_config()
    no_push(args)
    base = model_args.model_name_or_path or "smollm2"
    if stage.smoke:
        base = "arithmetic"
        shrink(stage, args)
    args.max_completion_length = stage.max_tokens
    folder, chat, state = Path(args.output_dir), is_chat(base), PartialState()
    start = start_model(stage, base, folder, args.seed)
    models = Models(start, model_args, stage.engine, stage.sample_batch_size)
    if not mode.on_policy:
        stage.strategy = stage.strategy if stage.strategy in ("all", "adaptive") else "all"
        outcomes = ("wrong", "correct")
        judged = collected(stage, models, folder, chat=chat, seed=args.seed, outcomes=outcomes)
        if state.is_main_process:
            write_rows(judged, folder)
        state.wait_for_everyone()
    run = Run(
        folder,
        seed=args.seed,
        task="solving",
        title="Advantages of steps",
        recipe="recipes/step_rl/advantage.py",
        objective=args.loss_type + (", on-policy" if mode.on_policy else ""),
        paper={"title": "RL on Incorrect Synthetic Data", "url": "https://arxiv.org/abs/2406.14532"},
        data=stage.gsm8k or "arithmetic chains",
        model=base,
        artefact="the trained policy",
        arguments={**vars(mode), **vars(stage), **args.to_dict()},
    )
    arms = Arms(stage, args, models, run, folder, chat, vars(mode))

    def train(rate: float, to: Path) -> int:
        if not mode.on_policy:
            return arms.trained(AdvantageTrainer, args, rate, to, train_dataset=read_jsonl(folder / "rows.jsonl"))
        rows, given = fresh(mode, stage, args, models, to, chat=chat)
        return arms.trained(AdvantageTrainer, args, rate, to, train_dataset=rows, **given)

    arms.compare(args.loss_type, train)
    models.close()


def fresh(
    mode: ModeArguments, stage: StepArguments, args: AdvantageConfig, models: Models, folder: Path, *, chat: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Prompts, and what the trainer needs to draw and score."""
    rows = rows_of(stage, "train", stage.problems, chat=chat, seed=args.seed + 1)
    prompts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    kwargs: dict[str, Any] = {"sampler": partial(models.sampler, policy="start"), "verifier": make_verifier(stage)}
    if mode.step_credit:
        args.step_scores = "values"
        kwargs["step_credit"] = RolloutCredit(
            None,  # the trainer's own
            make_verifier(stage),
            args.sampling_params(),
            search=Search("all", stage.num_rollouts, best_of=stage.best_of),
            folder=folder / "credit",
            process_index=PartialState().process_index,
        )
    return prompts, kwargs


def write_rows(judged: list, folder: Path) -> None:
    """`rows.jsonl`, and what was left out."""
    dropped: Counter[str] = Counter()
    rows = list(advantage_rows(judged, dropped=dropped))
    left_out = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()) or "none"
    if not rows:
        raise ValueError(f"none of {len(judged)} solutions gave a row: {left_out}. Draw more problems, or easier ones")
    print(f"{len(rows)} rows of {len(judged)} solutions; left out: {left_out}")
    write_jsonl(folder / "rows.jsonl", rows)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
