"""Per-step DPO: find the step where a solution went wrong, and prefer a step that repairs it over exactly that one.

Paper       RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold,
            https://arxiv.org/abs/2406.14532 (no public code); pipeline after Self-Explore, https://arxiv.org/abs/2404.10346
Data        Made-up arithmetic chains, as many as wanted, or GSM8K (--gsm8k Hub id or folder).
Stages      fine-tune -> draw solutions -> verdicts -> rollouts from their steps -> first pit -> pairs -> DPO -> pass@k
Control     The same steps of fine-tuning on the problems it knows; --rates tries several learning rates on both.
Expected    The paper: eight times the data efficiency of SFT on 7B models. Small models: see recipes/LOG.md.
Measured    See recipes/README.md.
Differences Pits by all_fail with a chosen number of rollouts; the paper's argmin of best-of-5 values is
            --strategy all --rule argmin --best_of 5, and its number of rollouts is not published. The chosen
            continuation is drawn from the state before the pit; loss_type dpo trains on all of it, step_dpo on its
            first step.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/step_rl/per_step_dpo.py \
        --config recipes/step_rl/per_step_dpo.yaml

Every stage is skipped where its files are complete, so the same command goes on after a stop. The stages one by one:
negtune rollouts generate, negtune rollouts verify, negtune steps locate, negtune steps pairs.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import PartialState
from arms import Arms
from models import Models
from stages import VERIFIER, StepArguments, collected, is_chat, shrink, start_model, store_of
from trl import ModelConfig, TrlParser

from negtune import PreferenceConfig, PreferenceTrainer
from negtune.cli.recipe import no_push, run_recipe
from negtune.data.steps import SPLITTERS
from negtune.eval.run import Run
from negtune.models.load import load_tokenizer
from negtune.records import read_jsonl, write_jsonl
from negtune.rollouts.step_rows import pit_pairs
from negtune.rollouts.store import RecordStore


def main() -> None:
    stage, args, model_args = TrlParser((StepArguments, PreferenceConfig, ModelConfig)).parse_args_and_config()
    no_push(args)
    if stage.best_of > 1 and stage.rule in ("all_fail", "two_consecutive"):
        raise ValueError(f"--best_of {stage.best_of} changes no pit by {stage.rule}; add --rule argmin or largest_drop")
    base = model_args.model_name_or_path or "smollm2"
    if stage.smoke:
        base = "arithmetic"
        shrink(stage, args)
    folder, chat, state = Path(args.output_dir), is_chat(base), PartialState()
    start = start_model(stage, base, folder, args.seed)
    models = Models(start, model_args, stage.engine, stage.sample_batch_size)
    judged = collected(stage, models, folder, chat=chat, seed=args.seed, outcomes=("wrong",))
    if state.is_main_process:
        write_pairs(stage, judged, start, folder)
    state.wait_for_everyone()
    run = Run(
        folder,
        seed=args.seed,
        task="solving",
        title="Per-step DPO",
        recipe="recipes/step_rl/per_step_dpo.py",
        objective=args.loss_type,
        paper={"title": "RL on Incorrect Synthetic Data", "url": "https://arxiv.org/abs/2406.14532"},
        data=stage.gsm8k or "arithmetic chains",
        model=base,
        artefact="the trained policy",
        arguments={**vars(stage), **args.to_dict()},
    )
    arms = Arms(stage, args, models, run, folder, chat)
    pairs = read_jsonl(folder / "pairs.jsonl")
    arms.compare(args.loss_type, lambda rate, to: arms.trained(PreferenceTrainer, args, rate, to, train_dataset=pairs))
    models.close()


def write_pairs(stage: StepArguments, judged: list, model: str, folder: Path) -> None:
    """`pairs.jsonl`, and what was left out."""
    dropped: Counter[str] = Counter()
    tokenizer, store = load_tokenizer(model), store_of(stage, folder)
    stores = [RecordStore(store), RecordStore(store, "continuations")]
    verdicts, splitter = RecordStore(store, "verdicts"), SPLITTERS[stage.split]
    given: dict[str, Any] = {"min_distance": stage.min_distance, "dropped": dropped}
    pairs = list(pit_pairs(judged, stores, verdicts, VERIFIER, tokenizer, splitter, **given))
    left_out = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common()) or "none"
    if not pairs:
        raise ValueError(
            f"none of {len(judged)} wrong solutions gave a pair: {left_out}. Draw more problems, samples or "
            "num_rollouts, or start from a model that solves some of them"
        )
    rollouts = sum(record["num_rollouts"] for record in judged)
    print(f"{len(pairs)} pairs of {len(judged)} wrong solutions, {rollouts} rollouts; left out: {left_out}")
    write_jsonl(folder / "pairs.jsonl", pairs)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
