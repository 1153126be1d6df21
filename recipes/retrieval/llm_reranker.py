"""A language model reranks by the logits of yes and no, trained on the metric of its whole list; nothing is generated.

Paper       Policy-Gradient Training of Language Models for Ranking, https://arxiv.org/abs/2310.04407; yes/no scores as
            in Qwen3-Reranker, https://arxiv.org/abs/2506.05176
Data        --data FOLDER in BEIR's layout or a Hub id; left out: made up. Candidates: BM25's first --depth.
Here        A list is scored by one forward pass a document (--mini_batch_size of them at a time, GradCache), and
            pg_rank sees all scores of it: a listwise reward without a listwise prompt. LoRA by default.
Expected    Higher nDCG@10 of BM25's list. Figures are of the pipeline: what BM25 missed stays lost.
Measured    recipes/README.md

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/retrieval/llm_reranker.py \
        --config recipes/retrieval/llm_reranker.yaml --data FOLDER

--load_in_4bit trains with QLoRA; --smoke: made-up data and a tiny model.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from search_task import TaskArguments, bm25_run, numbers, read_task
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.eval.ranking import against, with_interval
from negtune.eval.run import Run
from negtune.metrics.runs import evaluate_run
from negtune.report import write_report
from negtune.retrieval.evaluation import evaluate_reranking
from negtune.retrieval.mining import mine, to_rows, write_lists
from negtune.retrieval.rankers import causal_reranker
from negtune.retrieval.retrievers import BM25Retriever
from negtune.trainers.ranking import RankingConfig, RankingTrainer

METRICS = ("ndcg@10", "mrr@10")
SMOKE = {
    **{
        "model_name_or_path": "tiny",
        "max_steps": 3,
        "n_documents": 6,
        "k": 3,
        "logging_steps": 1,
        "yes": "a",
        "no": "b",
    },
    **{"per_device_train_batch_size": 2, "depth": 10, "test_queries": 4, "max_length": 200, "lora_r": 2},
}


@dataclass
class RerankerArguments(TaskArguments):
    test_queries: int | None = field(default=None, metadata={"help": "Of them, for a quick look. Default: all."})
    n_documents: int = field(default=10, metadata={"help": "Of a training list."})
    depth: int = field(default=30, metadata={"help": "Documents of BM25 that are reranked."})
    yes: str = field(default="yes", metadata={"help": "One token."})
    no: str = field(default="no", metadata={"help": "One token."})


def main() -> None:
    given, args, model_args = parsed(TrlParser((RerankerArguments, RankingConfig, ModelConfig)), SMOKE)
    no_push(args)
    if args.places is not None and args.places > given.n_documents:
        raise ValueError(f"--k {args.places} is more than the {given.n_documents} documents of a list (--n_documents)")
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "smollm2"
    split = read_task(given.data, train_split=given.train_split, test_share=given.test_share, seed=args.seed)
    test = split.test.only(list(split.test.queries)[: given.test_queries])
    quantised = get_quantization_config(model_args)
    more = None if quantised is None else {"quantization_config": quantised}
    answers = {"yes": given.yes, "no": given.no}
    model = causal_reranker(name, max_length=args.max_length or 512, model_kwargs=more, **answers)
    args.max_length = None  # the model's, which cuts documents and not what stands behind them
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "A language model as reranker", "model": name},
        **{"recipe": "recipes/retrieval/llm_reranker.py", "objective": args.loss_type},
        **{"data": given.data or "made-up topics", "artefact": "the trained reranker", "redacted": args.redact},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    lexical = {query: dict(list(found.items())[: given.depth]) for query, found in bm25_run(test).items()}
    first = evaluate_run(lexical, test.qrels, METRICS)
    if PartialState().is_main_process:
        run.add_arm("BM25", with_interval(first, METRICS[0]))

    def add(arm: str) -> None:
        found = evaluate_reranking(model, test, lexical, metrics=METRICS, depth=given.depth, batch_size=8)
        metrics = with_interval(found, METRICS[0])
        if PartialState().is_main_process:
            run.add_arm(arm, {**metrics, **against(found.per_query[METRICS[0]], first.per_query[METRICS[0]], "BM25")})
            print(f"{arm}: {numbers(found.means)}   (BM25: {numbers(first.means)})", flush=True)

    add("start")
    lists = mine(
        split.train,
        [BM25Retriever(split.train.corpus)],
        **{"n_documents": given.n_documents, "depth": given.depth, "positives": "guaranteed"},
        **{"max_positives": max(1, given.n_documents // 2), "seed": args.seed},
    )
    if PartialState().is_main_process:
        print(lists.counts(), flush=True)
        if not args.redact:
            write_lists(folder / "candidates.jsonl", lists.lists)
    trainer = RankingTrainer(
        model=model, args=args, train_dataset=to_rows(lists.lists), peft_config=get_peft_config(model_args)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add(args.loss_type)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
