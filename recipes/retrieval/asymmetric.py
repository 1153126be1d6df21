"""Which text is in which: an encoder whose norms say how much a text holds, against cosine, word counts and shingles.

Paper       Asymmetrical-similarity learning (A Benchmark and Asymmetrical-Similarity Learning for Practical Image Copy
            Detection), https://arxiv.org/abs/2205.12358
Data        --text FILE ... (plain text, also .gz), cut into passages; left out: made up. Queries are crops, extracts
            and quotations of passages, and texts that contain a passage (hard negatives: the same cosine, the wrong way
            round). A quarter of the passages is not among the documents.
Paper's     images; norm-ratio loss beside a metric-learning loss, discard the pair if |query| > |reference|.
Here        A learned magnitude on top of --model_name_or_path (minilm, a folder, a Hub id); InfoNCE of cosines plus the
            norm-ratio loss, sentence-transformers' own trainer. Weight and ratio of the scores are fitted on held-out
            passages.
Expected    Cosine finds the pair and takes it either way; norms tell the direction where word counts cannot.
Measured    recipes/README.md

    python recipes/retrieval/asymmetric.py --config recipes/retrieval/asymmetric.yaml --text FILE

--use_peft trains an adapter and the head; --weight 0 trains the cosines alone; --smoke: made-up text, a tiny model.
"""

import gzip
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from search_task import at_least
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from negtune._st_compat import has_static_embedding_input
from negtune.cli.recipe import no_push, parsed, run_recipe
from negtune.data.containment import (
    ContainmentTask,
    containment_rows,
    containment_task,
    passages_of,
    shingle_containment,
    synthetic_passages,
)
from negtune.eval.run import Run
from negtune.metrics.stats import middle_of
from negtune.report import write_report
from negtune.retrieval.asymmetric import NormRatioLoss, add_magnitude
from negtune.retrieval.containment import (
    RATIOS,
    WEIGHTS,
    Compared,
    ContainmentEvaluator,
    balanced,
    both_ways,
    containment_metrics,
    fitted,
    micro_ap_draws,
    truth,
)
from negtune.retrieval.rankers import load_ranker

SMOKE = {
    **{"model_name_or_path": "tiny", "max_steps": 4, "train_passages": 24, "fit_passages": 8, "test_passages": 16},
    **{"per_device_train_batch_size": 8, "logging_steps": 1, "eval_steps": 2, "learning_rate": 1e-2},
}
PAPER = {
    "title": "A Benchmark and Asymmetrical-Similarity Learning for Practical Image Copy Detection",
    "url": "https://arxiv.org/abs/2205.12358",
}
BLOCK = 8
"""Neighbouring passages that stay together: a text that contains a passage has words of the next one."""


@dataclass
class ContainmentArguments:
    text: list[str] | None = field(default=None, metadata={"help": "Plain text files, also .gz; default: made up."})
    train_passages: int = field(default=400, metadata={"help": "To train on, each in pairs of four kinds."})
    fit_passages: int = field(default=80, metadata={"help": "To choose weight and ratio of the scores on."})
    test_passages: int = field(default=160, metadata={"help": "To measure on."})
    absent: float = field(default=0.25, metadata={"help": "Share of test passages that are not among the documents."})
    weight: float = field(default=1.0, metadata={"help": "Of the norm-ratio loss."})
    margin: float | None = field(default=None, metadata={"help": "Ratio of norms that is enough; default: none is."})
    scale: float = field(default=20.0, metadata={"help": "Cosines times this in the contrastive loss."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a text."})
    smoke: bool = field(default=False, metadata={"help": "Tiny and quick, unless a flag says otherwise."})

    def __post_init__(self) -> None:
        at_least(self, max_length=1)


def main() -> None:
    given, args, model_args = parsed(
        TrlParser((ContainmentArguments, SentenceTransformerTrainingArguments, ModelConfig)), SMOKE
    )
    no_push(args)
    folder, name = Path(args.output_dir), model_args.model_name_or_path or "minilm"
    train, fit, test = read_passages(given, args.seed)
    rows = containment_rows(train, seed=args.seed)
    tasks = {
        "fit": containment_task(fit, absent=given.absent, seed=args.seed),
        "test": containment_task(test, absent=given.absent, seed=args.seed),
    }
    set_seed(args.seed)
    model = load_ranker(name)
    if not has_static_embedding_input(model):
        model.max_seq_length = min(given.max_length, model.max_seq_length or given.max_length)
    if (peft := get_peft_config(model_args)) is not None:
        model.add_adapter(peft)
    add_magnitude(model)
    loss = NormRatioLoss(
        model,
        **{"weight": given.weight, "margin": given.margin, "scale": given.scale},
        probes=[text for row in rows[:8] for text in (row["smaller"], row["larger"])],  # all larger ones may be cut
    )
    run = Run(
        folder,
        **{"seed": args.seed, "task": "ranking", "title": "Which text is in which", "paper": PAPER},
        **{"recipe": "recipes/retrieval/asymmetric.py", "objective": "norm ratio", "model": name},
        **{"data": ", ".join(given.text or ["made-up passages"]), "artefact": "the trained encoder"},
        arguments={**vars(given), **vars(model_args), **args.to_dict()},
    )
    arms = Arms(run, tasks)
    arms.add("start", model)
    arms.shingles()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        evaluator=ContainmentEvaluator(tasks["fit"]),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    arms.add("trained", model)
    if PartialState().is_main_process:
        print(write_report(folder)[-1])


def read_passages(given: ContainmentArguments, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Passages to train, fit and test on: blocks of neighbours, dealt out by seed.

    Raises:
        ValueError: there are too few.
    """
    counts = (given.train_passages, given.fit_passages, given.test_passages)
    if given.text is None:
        found = synthetic_passages(sum(counts) + 3 * BLOCK, seed=seed)
    else:
        found = list(dict.fromkeys(passage for file in given.text for passage in passages_of(read_text(file))))
    blocks = [found[start : start + BLOCK] for start in range(0, len(found), BLOCK)]
    random.Random(seed).shuffle(blocks)
    parts: list[list[str]] = []
    for count in counts:
        part: list[str] = []
        while len(part) < count and blocks:
            part += blocks.pop()
        if len(part) < count:
            raise ValueError(
                f"the text has {len(found)} passages, fewer than --train_passages, --fit_passages and --test_passages "
                f"ask for ({', '.join(map(str, counts))}, in blocks of {BLOCK}); lower them or give more text"
            )
        parts.append(part[:count])
    return parts[0], parts[1], parts[2]


def read_text(file: str) -> str:
    path = Path(file).expanduser()
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is no text in UTF-8, plain or gzipped ({error})") from None


class Arms:
    """Scores of the test pairs, fitted on the others, as arms of a run; intervals are over passages.

    Args:
        run: that they are added to.
        tasks: `fit` and `test`.
    """

    def __init__(self, run: Run, tasks: Mapping[str, ContainmentTask]) -> None:
        self.run, self.tasks = run, tasks
        self.groups = [query_id.rpartition("-")[-1] for query_id in tasks["test"].queries]
        self.first: tuple[str, float, np.ndarray] | None = None

    def shingles(self) -> None:
        task = self.tasks["test"]
        inside = shingle_containment(task.queries, task.documents)
        around = shingle_containment(task.documents, task.queries)
        self._add(
            "shingles",
            torch.tensor([list(scores.values()) for scores in inside.values()]),
            torch.tensor([list(scores.values()) for scores in around.values()]).T,
            {},
        )

    def add(self, name: str, model: object) -> None:
        """The cosine, the filters by words and by norms, and the soft score, of one model."""
        fit, test = (Compared.of_model(model, self.tasks[part]) for part in ("fit", "test"))
        words = tuple(pairs.by_words(self.tasks[part]) for part, pairs in (("fit", fit), ("test", test)))
        for called, pairs, searched in (
            ("cosine", (fit, test), {}),
            ("filter by words", words, {"ratios": RATIOS}),
            ("soft by words", words, {"weights": WEIGHTS}),
            ("filter", (fit, test), {"ratios": RATIOS}),
            ("soft", (fit, test), {"weights": WEIGHTS}),
        ):
            chosen = fitted(self.tasks["fit"], pairs[0], **searched)
            known = containment_metrics(self.tasks["fit"], *both_ways(pairs[0], **chosen))
            self._add(f"{name}, {called}", *both_ways(pairs[1], **chosen), {**chosen, "fit": balanced(known)})

    def _add(self, arm: str, inside: torch.Tensor, around: torch.Tensor, more: Mapping[str, float]) -> None:
        task = self.tasks["test"]
        metrics = containment_metrics(task, inside, around)
        value = balanced(metrics)
        ways = zip((inside, around), truth(task), strict=True)
        draws = np.mean([micro_ap_draws(scores, true, self.groups) for scores, true in ways], 0)
        row = {"micro_ap": value, **dict(zip(("micro_ap_low", "micro_ap_high"), middle_of(draws), strict=True))}
        if self.first is None:
            self.first = arm, value, draws
        else:
            first, theirs, their_draws = self.first  # of the same passages
            low, high = middle_of(draws - their_draws)
            row |= {f"minus {first}": value - theirs, f"minus {first}_low": low, f"minus {first}_high": high}
        finite = {key: value for key, value in more.items() if value != float("inf")}
        if not PartialState().is_main_process:
            return
        self.run.add_arm(arm, {**row, **metrics, **finite})
        print(f"{arm}: " + "  ".join(f"{key} {value:.4f}" for key, value in {**row, **metrics}.items()), flush=True)


if __name__ == "__main__":
    run_recipe(main)
