"""ADORE: train queries against documents that stay as they are, on what a search finds at every step.

Paper       Optimizing Dense Retrieval Model Training with Hard Negatives (STAR, ADORE), https://arxiv.org/abs/2104.08051
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact); left out: made up.
Paper's     ADORE from STAR: the first 200 documents of an exact index, places up to 200 count, 32 queries a step,
            AdamW 5e-6, 6 epochs (released code).
Here        Start: --model_name_or_path (minilm, wordllama, a folder, a Hub id), by default as it is; --warm_steps:
            InfoNCE on lists of BM25 and the start before it. The index is made once. --loss_type: adore, pg_rank,
            lambda_rank, ...
Expected    MS MARCO passages, MRR@10: STAR .340 to ADORE .347; from in-batch negatives .264 to .316 (released code).
Measured    recipes/README.md

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/retrieval/adore.py \
        --config recipes/retrieval/adore.yaml --data FOLDER

--use_peft trains an adapter on the query side; --smoke: made-up data and a tiny model.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from search_task import (
    METRICS,
    TaskArguments,
    at_least,
    bm25_run,
    indexed,
    measured,
    mined,
    numbers,
    read_task,
    to_train,
)
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig, TrlParser, get_peft_config

from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.eval.ranking import against, with_interval
from negtune.eval.run import Run
from negtune.report import write_report
from negtune.retrieval.evaluation import RetrievalEvaluator
from negtune.retrieval.mining import to_rows
from negtune.trainers.query_encoder import QueryEncoderConfig, QueryEncoderTrainer
from negtune.trainers.ranking import RankingConfig, RankingTrainer

SMOKE = {
    **{"model_name_or_path": "tiny", "max_steps": 4, "warm_steps": 2, "depth": 20, "logging_steps": 1},
    **{"per_device_train_batch_size": 4, "eval_steps": 2, "learning_rate": 1e-3},
}
TITLE = "Optimizing Dense Retrieval Model Training with Hard Negatives"
PAPER = {"title": TITLE, "url": "https://arxiv.org/abs/2104.08051"}


@dataclass
class QueryArguments(TaskArguments):
    warm_steps: int = field(default=0, metadata={"help": "Optimiser steps of InfoNCE on mined lists before."})
    warm_learning_rate: float = field(default=2e-5, metadata={"help": "Of them."})
    evaluate_search: bool = field(default=True, metadata={"help": "Search the test queries at every evaluation."})

    def __post_init__(self) -> None:
        at_least(self, warm_steps=0)


def main() -> None:
    given, args, model_args = parsed(TrlParser((QueryArguments, QueryEncoderConfig, ModelConfig)), SMOKE)
    no_push(args)
    if not given.evaluate_search:
        args.eval_strategy = IntervalStrategy.NO
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "minilm"
    split = read_task(given.data, train_split=given.train_split, test_share=given.test_share, seed=args.seed)
    if args.depth > len(split.train.corpus):
        raise ValueError(f"--depth {args.depth} is more than the {len(split.train.corpus)} documents; lower it")
    model = to_train(name, args, model_args)
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Queries trained against a frozen index", "paper": PAPER},
        redacted=args.redact,
        **{"recipe": "recipes/retrieval/adore.py", "objective": args.loss_type, "model": name},
        **{"data": given.data or "made-up topics", "artefact": "the encoders of queries and documents"},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    lexical, seen = bm25_run(split.test), {}

    def add(arm: str, encoder, index) -> None:
        found = measured(encoder, split.test, lexical, index=index)
        seen[arm] = found.per_query()
        metrics = {**with_interval(found.stages["search"], METRICS[0]), **found.metrics()}
        first = next(iter(seen))
        if not PartialState().is_main_process:
            return
        run.add_arm(arm, metrics if arm == first else {**metrics, **against(seen[arm], seen[first], first)})
        if not args.redact:
            run.add_answers("found first", found.answers(split.test), arm)
        print(f"{arm}: {numbers(found.metrics())}", flush=True)

    if given.warm_steps > 0:
        warm = RankingConfig(
            **{"output_dir": str(folder / "warm"), "loss_type": "infonce", "in_batch": True, "redact": args.redact},
            **{"max_steps": given.warm_steps, "learning_rate": given.warm_learning_rate, "seed": args.seed},
            **{"per_device_train_batch_size": args.per_device_train_batch_size, "use_cpu": args.use_cpu},
            **{"save_strategy": "no", "logging_steps": args.logging_steps},
        )
        lists = mined(model, split.train, n_documents=16, seed=args.seed, bm25=True).lists
        RankingTrainer(model=model, args=warm, train_dataset=to_rows(lists)).train()
    index = indexed(model, split.train)
    add("start", model, index)
    trainer = QueryEncoderTrainer(
        model=model,
        index=index,
        args=args,
        train_dataset=split.train,
        evaluator=RetrievalEvaluator(split.test, index=index) if given.evaluate_search else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add(args.loss_type, trainer.model, index)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
