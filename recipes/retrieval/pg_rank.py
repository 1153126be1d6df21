"""PG-RANK: train a retriever on the metric itself: start warm, mine candidates, climb the expected nDCG, evaluate.

Paper       Policy-Gradient Training of Language Models for Ranking (Neural PG-RANK), https://arxiv.org/abs/2310.04407
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact); left out: made up.
Paper's     "we start with pretrained SBERT / TAS-B"; nDCG@10 of candidate lists as the reward; samples, rate and batch
            were not found.
Here        Start: --model (minilm, wordllama, a folder, a Hub id; a causal LM is pooled at its last token), by default
            first trained with InfoNCE on the same lists (--warm_steps; 0: not). Candidates: BM25 and the start.
Expected    Higher nDCG@10 of the lists; for search of the corpus not more than InfoNCE gives.
Measured    recipes/README.md

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/retrieval/pg_rank.py \
        --config recipes/retrieval/pg_rank.yaml --data FOLDER

--use_peft trains an adapter, --load_in_4bit QLoRA; --smoke: made-up data and a tiny model.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState
from search_task import METRICS, TaskArguments, bm25_run, measured, mined, numbers, read_task, to_train
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
    **{"model_name_or_path": "tiny", "max_steps": 4, "warm_steps": 2, "n_documents": 10, "logging_steps": 1},
    **{"per_device_train_batch_size": 4, "eval_steps": 2},
}
PAPER = {"title": "Policy-Gradient Training of Language Models for Ranking", "url": "https://arxiv.org/abs/2310.04407"}


@dataclass
class RetrievalArguments(TaskArguments):
    n_documents: int = field(default=16, metadata={"help": "Of a candidate list."})
    warm_steps: int = field(default=0, metadata={"help": "Optimiser steps of InfoNCE before; its lists are the same."})
    warm_learning_rate: float = field(default=2e-5, metadata={"help": "Of them."})
    evaluate_search: bool = field(default=True, metadata={"help": "Search the test queries at every evaluation."})


def main() -> None:
    given, args, model_args = parsed(TrlParser((RetrievalArguments, RankingConfig, ModelConfig)), SMOKE)
    no_push(args)
    if args.model_kind not in ("auto", "bi_encoder"):
        raise ValueError(f"this recipe trains bi-encoders, got --model_kind {args.model_kind}; see llm_reranker.py")
    if args.places is not None and args.places > given.n_documents:
        raise ValueError(f"--k {args.places} is more than the {given.n_documents} documents of a list (--n_documents)")
    if not given.evaluate_search:
        args.eval_strategy = IntervalStrategy.NO
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "minilm"
    split = read_task(given.data, train_split=given.train_split, test_share=given.test_share, seed=args.seed)
    model = to_train(name, args, model_args)
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Ranking by policy gradient", "paper": PAPER},
        redacted=args.redact,
        **{"recipe": "recipes/retrieval/pg_rank.py", "objective": args.loss_type, "model": name},
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
    lists = mined(model, split.train, n_documents=given.n_documents, seed=args.seed, bm25=True)
    if PartialState().is_main_process:
        print(lists.counts(), flush=True)
        if not args.redact:
            write_lists(folder / "candidates.jsonl", lists.lists)
    peft = get_peft_config(model_args)
    if given.warm_steps > 0:
        warm = replace(
            args,
            **dict.fromkeys(OBJECTIVE),
            **{"loss_type": "infonce", "loss_kwargs": None, "in_batch": True, "max_steps": given.warm_steps},
            **{"learning_rate": given.warm_learning_rate, "output_dir": str(folder / "warm")},
            **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        )
        RankingTrainer(model=model, args=warm, train_dataset=to_rows(lists.lists), peft_config=peft).train()
        peft = None
        add("InfoNCE")
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=to_rows(lists.lists),
        evaluator=RetrievalEvaluator(split.test) if given.evaluate_search else None,
        peft_config=copy.copy(peft),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add(args.loss_type)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
