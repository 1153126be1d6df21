"""TOFU end to end: fine-tune on everything, fine-tune the retain-only oracle, unlearn, evaluate, report.

Papers      TOFU, https://arxiv.org/abs/2401.06121 (task, metrics); Negative Preference Optimization,
            https://arxiv.org/abs/2404.05868 (objective, NPO+RT).
Paper       Llama-2-7b-chat; fine-tuned 5 epochs at 1e-5, batch 32; unlearned 10 epochs at 1e-5, batch 32, warm-up one
            epoch, linear decay, weight decay .01, beta .1, coefficients 1 (the YAML holds these).
Expected    Forget quality (KS p-value against the oracle, higher is better) / model utility of Llama-2-7b-chat in an
            independent rerun (open-unlearning): fine-tuned 1.27e-3/.63, oracle 1/.63, GA+RT 3.0e-3/.57, NPO+RT .40/.58.
Measured    See recipes/README.md and recipes/LOG.md.
Differences Row-mean NPO next to a token-mean retain term, both over the whole optimiser step; retain rows drawn anew
            every epoch (the authors' code pairs each forget row with the same retain row for ever); greedy answers.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/unlearning/npo_tofu.py \
        --config recipes/unlearning/npo_tofu.yaml [--data_dir FOLDER] [--loss_type simnpo] [--use_peft] [--load_in_4bit]
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, TrlParser, get_peft_config

from negtune import UnlearningConfig, UnlearningTrainer
from negtune.cli.recipe import no_push, run_recipe
from negtune.data.tofu import tofu_task
from negtune.eval.run import Run
from negtune.eval.unlearning import oracle_truth_ratios
from negtune.models.load import load_model
from negtune.report.terminal import report
from negtune.trainers.card import paper_of
from negtune.trainers.finetune import fine_tune


@dataclass
class TofuArguments:
    data_dir: str | None = field(default=None, metadata={"help": "Folder with TOFU's files; default: the Hub."})
    forget_split: str = field(default="forget01", metadata={"help": "forget01, forget05 or forget10."})
    retain_rows: int | None = field(default=None, metadata={"help": "Only the first so many retain rows."})
    eval_rows: int | None = field(default=None, metadata={"help": "At most so many rows per retained evaluation set."})
    plain: bool = field(default=False, metadata={"help": "Question/Answer text in place of the chat template."})
    stage_dir: str | None = field(default=None, metadata={"help": "Fine-tuned models; share it between runs."})
    finetune_epochs: float = field(default=5, metadata={"help": "Of both fine-tuning stages."})
    finetune_learning_rate: float = field(default=1e-5, metadata={"help": "Of both fine-tuning stages."})
    finetune_batch_size: int = field(default=32, metadata={"help": "Per device."})
    check_4bit: bool = field(default=False, metadata={"help": "Measure the merged model in 4-bit as well."})
    smoke: bool = field(default=False, metadata={"help": "Tiny random model and synthetic authors, in seconds."})


def main() -> None:
    tofu, args, model_args = TrlParser((TofuArguments, UnlearningConfig, ModelConfig)).parse_args_and_config()
    no_push(args)
    base = model_args.model_name_or_path
    if tofu.smoke:
        base, args.max_steps, args.learning_rate, args.eval_max_new_tokens = "tiny", 4, 3e-3, 8
        tofu.finetune_epochs, tofu.finetune_learning_rate, tofu.finetune_batch_size = 20, 5e-3, 8
    task = tofu_task(
        tofu.forget_split,
        tofu.data_dir,
        retain_rows=tofu.retain_rows,
        eval_rows=tofu.eval_rows,
        plain=tofu.plain,
        synthetic=tofu.smoke,
    )
    stages = Path(tofu.stage_dir or Path(args.output_dir, "stages"))
    tuning = {"epochs": tofu.finetune_epochs, "learning_rate": tofu.finetune_learning_rate, "seed": args.seed}
    tuning |= {"batch_size": tofu.finetune_batch_size, "max_length": args.max_length, "use_cpu": args.use_cpu}
    tuned, oracle = (
        str(fine_tune(base, rows, stages / name, **tuning))
        for name, rows in (("full", task.full), ("retain", task.retain))
    )
    run = Run(
        args.output_dir,
        seed=args.seed,
        redacted=args.redact,
        title=f"TOFU {'synthetic' if tofu.smoke else tofu.forget_split}: {args.loss_type}",
        recipe="recipes/unlearning/npo_tofu.py",
        objective=f"{args.loss_type} + {args.retain_loss_type}",
        paper=paper_of(args.loss_type),
        data=", ".join(f"{len(rows)} {name} rows" for name, rows in task.sets.items()),
        model=base,
        artefact="trained weights" if not model_args.use_peft else "adapter on the fine-tuned model",
        arguments={**vars(tofu), **args.to_dict()},
    )
    scoring = {"batch_size": args.per_device_eval_batch_size, "max_new_tokens": args.eval_max_new_tokens}
    truth = oracle_truth_ratios(run.measure("oracle", *load_model(oracle), task.sets, **scoring).records)
    model, tokenizer = load_model(tuned, dtype=model_args.dtype, load_in_4bit=model_args.load_in_4bit)
    scoring["oracle"] = truth
    run.measure("fine-tuned", model, tokenizer, task.sets, **scoring)
    trainer = UnlearningTrainer(
        model=model,
        args=args,
        train_dataset={"forget": task.forget, "retain": task.retain},
        eval_dataset=task.sets,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        oracle=truth,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trained = Path(args.output_dir, "adapter" if model_args.use_peft else "model")
    trainer.save_model(str(trained))
    run.measure("unlearned", trainer.model, tokenizer, task.sets, **scoring)
    if model_args.use_peft:
        run.ship(tuned, trained, task.sets, check_4bit=tofu.check_4bit, **scoring)
    if trainer.is_world_process_zero():
        report(args.output_dir)


if __name__ == "__main__":
    run_recipe(main)
