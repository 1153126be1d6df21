"""CET: train a ranker on judgements of a pool, beside a model of which documents got into the pool; evaluate both.

Paper       Hard Negatives or False Negatives: Correcting Pooling Bias in Training Neural Ranking Models (CET),
            https://arxiv.org/abs/2209.05072
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact); left out: made up. --pool_depth 10 forgets
            judgements of documents that BM25 had not among its first ten: a pool whose bias is known. The test queries
            keep all of theirs.
Release's   Two cross-encoders (bert-base-uncased), each weighing the other's negatives by 1 + exp(logit/10), learning
            rate 3e-6, 32 pairs of a query a step, gradients clipped at 1 each. That is --model_kind cross_encoder
            --model_name_or_path NAME --selection_model NAME --mode official --learning_rate 3e-6, NAME being the folder
            or Hub id of a cross-encoder.
Here        --mode em with selection learned from where BM25 and the start had the documents: two models that read the
            same text cannot be told apart (docs/retrieval.md). --baseline: first the same steps, labels taken as they
            are.
Expected    With a pool that left relevant documents out: higher nDCG@10 than the baseline. With complete judgements:
            no gain.
Measured    recipes/README.md

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/retrieval/cet.py \
        --config recipes/retrieval/cet.yaml --data FOLDER --pool_depth 10 --baseline

--use_peft trains an adapter of the ranker; --smoke: made-up data and a tiny model.
"""

import copy
import sys
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
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.selection import provenance
from negtune.trainers.coupled import CoupledConfig, CoupledTrainer

SMOKE = {
    **{"model_name_or_path": "tiny", "max_steps": 4, "n_documents": 10, "logging_steps": 1, "pool_depth": 20},
    **{"per_device_train_batch_size": 4, "eval_steps": 2, "baseline": True, "uniform_steps": 1, "mode": "em"},
}
FEATURES_RATE = 1e-2
"""Of a model of few features, which the ranker's rate would not move; a second cross-encoder does not survive it."""
PAPER = {
    "title": "Correcting Pooling Bias in Training Neural Ranking Models",
    "url": "https://arxiv.org/abs/2209.05072",
}


@dataclass
class CetArguments(TaskArguments):
    n_documents: int = field(default=16, metadata={"help": "Of a candidate list."})
    pool_depth: int | None = field(
        default=None, metadata={"help": "Train on judgements of BM25's first so many only. Default: on all."}
    )
    selection_model: str | None = field(
        default=None, metadata={"help": "Cross-encoder that models selection. Default: features of the mined lists."}
    )
    baseline: bool = field(default=False, metadata={"help": "Train the same steps without weights too, and compare."})
    evaluate_search: bool = field(default=True, metadata={"help": "Search the test queries at every evaluation."})

    def __post_init__(self) -> None:
        at_least(self, n_documents=2, pool_depth=1)


def main() -> None:
    given, args, model_args = parsed(TrlParser((CetArguments, CoupledConfig, ModelConfig)), SMOKE)
    no_push(args)
    if args.mode.startswith("ips"):
        raise ValueError(f"--mode {args.mode} needs propensities that are known, and those of mined lists are not")
    if 0 < args.max_steps <= args.uniform_steps:
        raise ValueError(
            f"--uniform_steps {args.uniform_steps} of --max_steps {args.max_steps} leaves no step with weights: labels "
            "would be taken as they are; lower it"
        )
    searches = args.model_kind in ("auto", "bi_encoder")
    if not given.evaluate_search or not searches:
        args.eval_strategy = IntervalStrategy.NO
    if args.selection_learning_rate is None and given.selection_model is None:
        args.selection_learning_rate = FEATURES_RATE
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "minilm"
    split = read_task(given.data, train_split=given.train_split, test_share=given.test_share, seed=args.seed)
    train = split.train if given.pool_depth is None else split.train.pooled(bm25_run(split.train, given.pool_depth))
    model = to_train(name, args, model_args, "bi_encoder" if searches else args.model_kind)
    selection = given.selection_model and load_ranker(given.selection_model, "cross_encoder")
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Ranking with pooling bias corrected", "paper": PAPER},
        **{"recipe": "recipes/retrieval/cet.py", "objective": args.mode, "model": name, "redacted": args.redact},
        **{"data": given.data or "made-up topics", "artefact": "the trained ranker and its model of selection"},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    lexical, seen = bm25_run(split.test), {}
    first = METRICS[0] if searches else f"rerank/{METRICS[0]}"

    def add(arm: str, ranker: object) -> None:
        found = measured(ranker, split.test, lexical, search=searches)
        seen[arm] = found.per_query(first)
        stage, prefix = ("search", "") if searches else ("rerank", "rerank/")
        known = with_interval(found.stages[stage], METRICS[0])
        metrics = {**{f"{prefix}{name}": value for name, value in known.items()}, **found.metrics()}
        if not PartialState().is_main_process:
            return
        before = [other for other in ("labels as they are", "start") if other in seen and other != arm]
        run.add_arm(arm, {**metrics, **(against(seen[arm], seen[before[0]], before[0]) if before else {})})
        if not args.redact:
            run.add_answers("found first", found.answers(split.test), arm)
        print(f"{arm}: {numbers(found.metrics())}", flush=True)

    add("start", model)
    lists = mined(model, train, n_documents=given.n_documents, seed=args.seed, bm25=True, dense=searches)
    rows = to_rows(lists.lists)
    if given.selection_model is None:
        rows = [{**row, "selection_features": found} for row, found in zip(rows, provenance(lists.lists), strict=True)]
    if PartialState().is_main_process:
        print(lists.counts(), flush=True)
        if not args.redact:
            write_lists(folder / "candidates.jsonl", lists.lists)
    settings = {"train_dataset": rows, "selection": selection}
    if given.baseline:
        plain = replace(
            args,
            **{"uniform_steps": sys.maxsize, "output_dir": str(folder / "labels")},
            **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
        )
        untrained = {**settings, "selection": copy.deepcopy(selection)}
        other = CoupledTrainer(copy.deepcopy(model), plain, peft_config=get_peft_config(model_args), **untrained)
        other.train()
        add("labels as they are", other.model)
    trainer = CoupledTrainer(
        model,
        args,
        evaluator=RetrievalEvaluator(split.test) if args.eval_strategy != IntervalStrategy.NO else None,
        peft_config=get_peft_config(model_args),
        **settings,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add(f"CET {args.mode}", trainer.model)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
