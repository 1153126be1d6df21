"""STAR: train a retriever on hard negatives that stay what they are, beside the documents of the batch, and evaluate.

Paper       Optimizing Dense Retrieval Model Training with Hard Negatives, https://arxiv.org/abs/2104.08051
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact); left out: made up.
Paper's     Hard negatives: one for each query and positive, drawn from the first 200 of a warm-up model, without the
            relevant ones. 256 queries a step, LAMB, rate 1e-4 (released code).
Here        Start: --model_name_or_path (minilm, wordllama, a folder, a Hub id), with --warm_steps first trained with
            masked InfoNCE on lists of BM25. Its first --depth are searched once, and lists of --n_documents drawn
            from them, up to half of a list relevant. No document that is judged relevant to a query is a negative of
            it.
            --loss_type star (--alpha: weight of the batch beside a query's own negatives; left out: all pairs alike)
            or masked_infonce.
Expected    STAR above random negatives (MS MARCO passage, MRR@10 .340 to .301, the authors' README).
Measured    recipes/README.md

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/retrieval/star.py \
        --config recipes/retrieval/star.yaml --data FOLDER

--use_peft trains an adapter; --smoke: made-up data and a tiny model.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from search_task import METRICS, TaskArguments, at_least, bm25_run, measured, mined, numbers, read_task, to_train
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig, TrlParser, get_peft_config

from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.eval.ranking import against, with_interval
from negtune.eval.run import Run
from negtune.report import write_report
from negtune.retrieval.evaluation import RetrievalEvaluator
from negtune.retrieval.mining import to_rows, write_lists
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from negtune.trainers.ranking_config import OBJECTIVE

SMOKE = {
    **{"model_name_or_path": "tiny", "max_steps": 4, "warm_steps": 2, "n_documents": 6, "logging_steps": 1},
    **{"per_device_train_batch_size": 4, "eval_steps": 2, "depth": 40},
}
PAPER = {
    "title": "Optimizing Dense Retrieval Model Training with Hard Negatives",
    "url": "https://arxiv.org/abs/2104.08051",
}


@dataclass
class StarArguments(TaskArguments):
    depth: int = field(default=200, metadata={"help": "Of the search that hard negatives are drawn from."})
    n_documents: int = field(default=4, metadata={"help": "Of a list, relevant ones among them."})
    warm_steps: int = field(default=0, metadata={"help": "Optimiser steps of masked InfoNCE on BM25's lists before."})
    warm_learning_rate: float = field(default=2e-5, metadata={"help": "Of them."})
    evaluate_search: bool = field(default=True, metadata={"help": "Search the test queries at every evaluation."})

    def __post_init__(self) -> None:
        at_least(self, depth=1, n_documents=2, warm_steps=0)


@dataclass
class StarConfig(RankingConfig):
    loss_type: str = field(default="star", metadata={"help": "star, masked_infonce, or another with in_batch."})


def main() -> None:
    given, args, model_args = parsed(TrlParser((StarArguments, StarConfig, ModelConfig)), SMOKE)
    no_push(args)
    if not args.in_batch or args.model_kind not in ("auto", "bi_encoder"):
        raise ValueError(
            f"this recipe trains bi-encoders on documents of the batch, got --loss_type {args.loss_type} --model_kind "
            f"{args.model_kind}; take star or masked_infonce, or --in_batch true with another objective"
        )
    if not given.evaluate_search:
        args.eval_strategy = IntervalStrategy.NO
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "minilm"
    split = read_task(given.data, train_split=given.train_split, test_share=given.test_share, seed=args.seed)
    model, peft = to_train(name, args, model_args), get_peft_config(model_args)
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Ranking with static hard negatives", "paper": PAPER},
        redacted=args.redact,
        **{"recipe": "recipes/retrieval/star.py", "objective": args.loss_type, "model": name},
        **{"data": given.data or "made-up topics", "artefact": "the trained encoder"},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    lexical, seen = bm25_run(split.test), {}

    def add(arm: str) -> None:
        found = measured(model, split.test, lexical)
        seen[arm] = found.per_query()
        metrics = {**with_interval(found.stages["search"], METRICS[0]), **found.metrics()}
        first = next(iter(seen))
        if not PartialState().is_main_process:
            return
        run.add_arm(arm, metrics if arm == first else {**metrics, **against(seen[arm], seen[first], first)})
        if not args.redact:
            run.add_answers("found first", found.answers(split.test), arm)
        print(f"{arm}: {numbers(found.metrics())}", flush=True)

    add("start")
    lengths = {"n_documents": given.n_documents, "seed": args.seed}
    if given.warm_steps > 0:
        warm = replace(
            args,
            **dict.fromkeys(OBJECTIVE),
            **{"loss_type": "masked_infonce", "loss_kwargs": None, "max_steps": given.warm_steps},
            **{"learning_rate": given.warm_learning_rate, "output_dir": str(folder / "warm")},
            **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        )
        rows = to_rows(mined(model, split.train, **lengths, bm25=True, dense=False), task=split.train)
        RankingTrainer(model=model, args=warm, train_dataset=rows, peft_config=peft).train()
        peft = None
        add("warm-up")
    lists = mined(model, split.train, **lengths, depth=given.depth, select="random")
    if PartialState().is_main_process:
        print(lists.counts(), flush=True)
        if not args.redact:
            write_lists(folder / "candidates.jsonl", lists.lists)
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=to_rows(lists, task=split.train),
        evaluator=RetrievalEvaluator(split.test) if given.evaluate_search else None,
        peft_config=peft,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add(args.loss_type)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
