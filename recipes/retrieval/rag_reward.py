"""A retriever is rewarded by what a frozen generator answers with the documents it put first.

Paper       Policy-Gradient Training of Language Models for Ranking, https://arxiv.org/abs/2310.04407, with a black-box
            reward: only whole rankings are scored, so the estimator is leave-one-out.
Data        --questions FILE of JSON lines with query, documents and answer; left out: made-up ones, where a document
            that repeats the question answers nothing.
Reward      1 if the answer is in what --generator says with the first --documents of the ranking, 0 if not; unscored
            where the generator was cut or failed. The generator is a sampler of this project and is never trained.
Expected    Right answers on held-out questions.
Measured    recipes/README.md

    python recipes/retrieval/rag_reward.py --config recipes/retrieval/rag_reward.yaml

--smoke: a tiny generator, which answers nothing rightly; what is tried is the wiring.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, TrlParser

from negtune import HFSampler, SamplingParams, VLLMSampler
from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.data.questions import synthetic_questions
from negtune.eval.ranking import against
from negtune.eval.run import Run
from negtune.metrics.stats import bootstrap_interval
from negtune.models.load import load_model
from negtune.records import read_jsonl
from negtune.report import write_report
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.rankers import load_ranker
from negtune.rollouts.grounded import GroundedReward
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from negtune.verifiers.verdict import Verdict, text_of

SMOKE = {
    **{"generator": "tiny", "model_name_or_path": "tiny", "max_steps": 2, "test_questions": 4, "logging_steps": 1},
    **{"per_device_train_batch_size": 2, "n_samples": 2, "max_tokens": 4},
}


@dataclass
class RagArguments:
    questions: str | None = field(default=None, metadata={"help": "JSON lines: query, documents, answer."})
    generator: str = field(default="smollm2", metadata={"help": "Frozen causal LM: folder, Hub id, smollm2."})
    engine: str = field(default="hf", metadata={"help": "Serves the generator: hf or vllm."})
    documents: int = field(default=1, metadata={"help": "That the generator sees; k of the ranking is set to it."})
    max_tokens: int = field(default=24, metadata={"help": "Of an answer."})
    test_questions: int = field(default=32, metadata={"help": "Held out."})
    smoke: bool = field(default=False, metadata={"help": "Tiny and quick, unless a flag says otherwise."})


class Contains:
    """Correct if the gold answer is in the completion, whatever the case."""

    def verify(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[Verdict]:
        texts, golds = [text_of(c).casefold() for c in completions], columns["answer"]
        return [
            Verdict("correct" if gold.casefold() in text else "wrong") for text, gold in zip(texts, golds, strict=True)
        ]


def main() -> None:
    given, args, model_args = parsed(TrlParser((RagArguments, RankingConfig, ModelConfig)), SMOKE)
    no_push(args)
    if args.loss_type != "pg_rank" or args.estimator not in (None, "loo", "reinforce"):
        raise ValueError("a black-box reward needs loss_type pg_rank with estimator loo or reinforce")
    if args.model_kind not in ("auto", "bi_encoder"):
        raise ValueError(f"this recipe trains bi-encoders, got --model_kind {args.model_kind}")
    args.k, args.estimator = given.documents, args.estimator or "loo"
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "wordllama"
    rows = read_jsonl(Path(given.questions)) if given.questions else synthetic_questions(96, seed=args.seed)
    rows = [{key: row[key] for key in ("query", "documents", "answer")} for row in rows]
    if len(rows) <= given.test_questions:
        raise ValueError(f"{len(rows)} questions, and --test_questions {given.test_questions} holds them all out")
    test, train = rows[: given.test_questions], rows[given.test_questions :]
    if given.engine not in ("hf", "vllm"):
        raise ValueError(f"--engine must be hf or vllm, got {given.engine!r}")
    generator, tokenizer = load_model(given.generator)
    engine = (
        HFSampler(generator, tokenizer, batch_size=32) if given.engine == "hf" else VLLMSampler(generator, tokenizer)
    )
    reward = GroundedReward(
        engine,
        Contains(),
        documents=given.documents,
        params=SamplingParams(temperature=0.0, max_tokens=given.max_tokens),
        score_truncated=True,  # an answer that has been named is named, whatever would have come behind it
    )
    model = load_ranker(name)
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Rewarded by the answers of a frozen generator"},
        **{"recipe": "recipes/retrieval/rag_reward.py", "objective": "pg_rank, leave-one-out", "model": name},
        **{"data": given.questions or "made-up questions", "artefact": "the trained encoder"},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    seen: dict[str, dict[str, float]] = {}

    def add(arm: str) -> None:
        score = scorer(model.eval())
        ranked = []
        for row in test:
            scores = score([(row["query"], text) for text in row["documents"]])
            ranked.append([text for _, text in sorted(zip(scores, row["documents"], strict=True), reverse=True)])
        found = reward([row["query"] for row in test], ranked, answer=[row["answer"] for row in test])
        seen[arm] = {str(i): value for i, value in enumerate(found) if value is not None}
        values = list(seen[arm].values())
        low, high = bootstrap_interval(values)
        metrics = {"accuracy": sum(values) / len(values), "accuracy_low": low, "accuracy_high": high}
        if PartialState().is_main_process:
            run.add_arm(arm, metrics if arm == "start" else {**metrics, **against(seen[arm], seen["start"], "start")})
            print(f"{arm}: {metrics['accuracy']:.3f} of {len(values)} answers right", flush=True)

    add("start")
    trainer = RankingTrainer(model=model, args=args, train_dataset=train, reward_fn=reward)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    add("pg_rank")
    print(f"{reward.asked} answers drawn, {reward.unscored} of them unscored")
    engine.close()
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


if __name__ == "__main__":
    run_recipe(main)
