"""Make a real model forget a handful of facts, hold their neighbours, and measure what is shipped.

Paper       Negative Preference Optimization, https://arxiv.org/abs/2404.05868: NPO plus a retain term ("NPO+RT").
Data        Built in: eight questions about Paris to forget, sixteen neighbours to keep, and others of both kinds that
            no step trains on. Your own: --forget FILE --retain FILE, JSONL rows with prompt and completion.
Expected    Forget answers gone, also when asked in other words; neighbours kept, also those never trained on.
Measured    See recipes/README.md.
Differences LoRA on a 135M chat model instead of 7B full fine-tuning; a higher learning rate, since LoRA needs one.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/unlearning/forget_facts.py \
        --config recipes/unlearning/forget_facts.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from negtune import UnlearningConfig, UnlearningTrainer
from negtune.cli.recipe import no_push, run_recipe
from negtune.data.facts import demo_facts
from negtune.eval.run import Run
from negtune.models.load import load_model
from negtune.records import read_jsonl
from negtune.report.terminal import report
from negtune.trainers.card import paper_of


@dataclass
class FactsArguments:
    forget: str | None = field(default=None, metadata={"help": "JSONL rows to forget; default: facts about Paris."})
    retain: str | None = field(default=None, metadata={"help": "JSONL rows to keep."})
    check_4bit: bool = field(
        default=False, metadata={"help": "Also measure the merged model after 4-bit quantisation."}
    )
    smoke: bool = field(default=False, metadata={"help": "Tiny random model, three steps: does it run?"})


def main() -> None:
    facts, args, model_args = TrlParser((FactsArguments, UnlearningConfig, ModelConfig)).parse_args_and_config()
    no_push(args)
    if facts.smoke:
        model_args.model_name_or_path, args.max_steps, args.eval_max_new_tokens = "tiny", 3, 4
    set_seed(args.seed)
    sets = demo_facts() if facts.forget is None else {"forget": read_jsonl(facts.forget)}
    sets |= {"retain": read_jsonl(facts.retain)} if facts.retain else {}
    base = model_args.model_name_or_path or "smollm2"
    model, tokenizer = load_model(base, dtype=model_args.dtype, load_in_4bit=model_args.load_in_4bit)
    run = Run(
        args.output_dir,
        seed=args.seed,
        redacted=args.redact,
        title="Unlearning Paris" if facts.forget is None else "Unlearning facts",
        recipe="recipes/unlearning/forget_facts.py",
        objective=f"{args.loss_type} + {args.retain_loss_type}",
        paper=paper_of(args.loss_type),
        data=", ".join(f"{len(rows)} {name} rows" for name, rows in sets.items()),
        model=base,
        artefact="adapter on the base model",
        arguments={**vars(facts), **args.to_dict(), "lora_r": model_args.lora_r},
    )
    scoring = {"batch_size": args.per_device_eval_batch_size, "max_new_tokens": args.eval_max_new_tokens}
    run.measure("before", model, tokenizer, sets, **scoring)
    trainer = UnlearningTrainer(
        model=model,
        args=args,
        train_dataset=sets,
        eval_dataset=sets,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trained = Path(args.output_dir, "adapter" if model_args.use_peft else "model")
    trainer.save_model(str(trained))
    run.measure("after", trainer.model, tokenizer, sets, **scoring)
    if model_args.use_peft:
        run.ship(base, trained, sets, check_4bit=facts.check_4bit, **scoring)
    if trainer.is_world_process_zero():
        report(args.output_dir)


if __name__ == "__main__":
    run_recipe(main)
