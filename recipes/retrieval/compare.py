"""Ways to train one retriever on the same lists, compared fairly: contrastive, listwise, and policy gradients.

Paper       Policy-Gradient Training of Language Models for Ranking, https://arxiv.org/abs/2310.04407
Data        A folder in BEIR's layout or a Hub id (--data); left out: made up. Split by query.
Controls    The same start, training queries, mined lists, queries a step and steps for all arms; rate and scale of the
            scores swept per arm with the same budget on held-out training queries; doing nothing and
            sentence-transformers' own loss in the table; fresh seeds; a paired permutation test over queries. InfoNCE
            "in batch" sees one relevant document a query and no mined list, which is what that loss is.
Figures     ndcg@10, mrr@10, recall@100: search of the whole corpus. rerank/: BM25's first hundred (`depth`), reranked.
            guaranteed/: the same lists with all relevant documents put in, as reranking papers report; not comparable.
            With `measure: rerank` (models too slow to embed a corpus, rerankers) only rerank/, and BM25 mines alone.
Expected    The paper claims gains where training and evaluation are the same thing, and none for first-stage search.
Measured    recipes/LOG.md

    python recipes/retrieval/compare.py --data FOLDER --train_split train --output_dir runs/scifact --workers 2

A comparison that was stopped goes on where it was; --smoke runs all arms on made-up data in a minute.
"""

import argparse
import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from search_task import Measured, Split, Start, bm25_run, file_name, measured, mined, read_task
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from negtune.cli.recipe import run_recipe
from negtune.data.retrieval import RetrievalTask, split_queries
from negtune.eval.compare import DO_NOTHING, Arm, Comparison, compare
from negtune.metrics.stats import paired_difference, permutation_test
from negtune.records import read_json, write_json
from negtune.retrieval.mining import CandidateList, to_rows
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from negtune.trainers.steps import NonFiniteLossError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--grid", type=Path, default=Path(__file__).with_suffix(".yaml"), help="YAML file; see compare.yaml"
)
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--data", help="folder in BEIR's layout, or a Hub id; instead of the file's")
parser.add_argument("--train_split", help="judgements to train on; instead of the file's")
parser.add_argument("--encoder", help="wordllama, minilm, a folder or a Hub id; instead of the file's")
parser.add_argument("--arms", nargs="+", help="of the file's only these")
parser.add_argument("--rates", type=float, nargs="+", help="learning rates to sweep, instead of the file's")
parser.add_argument(
    "--scales", type=float, nargs="+", help="of the scores, each with every rate, instead of the file's"
)
parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
parser.add_argument("--steps", type=int, help="instead of the file's")
parser.add_argument("--warm_steps", type=int, help="of InfoNCE before all arms; instead of the file's")
parser.add_argument("--warm_rate", type=float, help="its learning rate; instead of the file's")
parser.add_argument("--test_queries", type=int, help="at most so many are measured; instead of the file's")
parser.add_argument("--max_length", type=int, help="tokens of a text; instead of the file's")
parser.add_argument("--baseline", help="arm that the others are tested against; by default the first")
parser.add_argument("--curve", type=int, help="steps between two measurements of confirmed runs; drawn in curves.png")
parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each")
parser.add_argument("--smoke", action="store_true")

DTYPES = ("float32", "bfloat16")
LATER = ("kind", "yes", "no", "dtype", "lora_r", "measure", "depth", "test_queries")
SHARED = ("per_device_train_batch_size", "max_steps", "learning_rate", "seed", "output_dir", "max_length")


@dataclass(frozen=True)
class Grid:
    """A grid file; see compare.yaml."""

    arms: dict[str, dict[str, Any]]
    encoder: str = "wordllama"
    kind: str = "bi_encoder"
    dtype: str = "float32"
    yes: str = "yes"
    no: str = "no"
    lora_r: int | None = None
    measure: str = "search"
    depth: int = 100
    test_queries: int | None = None
    data: str | None = None
    train_split: str | None = None
    test_share: float = 0.5
    n_documents: int = 16
    steps: int = 100
    batch: int = 16
    max_length: int | None = None
    warm_steps: int = 0
    warm_rate: float = 1e-2
    rates: list[float] = field(default_factory=lambda: [1e-2])
    scales: list[float] | None = None
    sweep_seed: int = 0
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])

    def __post_init__(self) -> None:
        for name in ("n_documents", "steps", "batch"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        allowed = {"kind": ("bi_encoder", "causal_lm"), "measure": ("search", "rerank"), "dtype": DTYPES}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {' or '.join(values)}, got {getattr(self, name)!r}")
        if self.kind == "causal_lm" and self.measure == "search":
            raise ValueError("a causal LM that answers yes or no cannot search a corpus; use measure: rerank")
        for name, arm in self.arms.items():
            if not isinstance(arm, dict) or arm.get("trainer") not in ("mnrl", "ranking"):
                raise ValueError(f"arm {name!r} needs trainer: mnrl or ranking, and settings")
            if arm["trainer"] == "mnrl" and self.kind != "bi_encoder":
                raise ValueError(f"arm {name!r}: mnrl trains bi-encoders, and kind is {self.kind}")
            for option in self.options:
                self.config(name, 1e-3, 0, Path("runs"), **option)

    @property
    def metric(self) -> str:
        """Arms are chosen and tested by it."""
        return "ndcg@10" if self.measure == "search" else "rerank/ndcg@10"

    @property
    def adapter(self) -> LoraConfig | None:
        """What is trained, unless all weights are."""
        if self.lora_r is None:
            return None
        return LoraConfig(r=self.lora_r, lora_alpha=2 * self.lora_r, lora_dropout=0.0, target_modules="all-linear")

    @property
    def options(self) -> list[dict[str, float]]:
        """What is swept beside the rate."""
        return [{}] if self.scales is None else [{"scale": scale} for scale in self.scales]

    def config(self, name: str, rate: float, seed: int, folder: Path, **option: float) -> Any:
        """Training arguments of a run of an arm."""
        arm = {key: value for key, value in self.arms[name].items() if key not in ("trainer", "rates", "negatives")}
        for key in SHARED:
            if key in arm:
                raise ValueError(f"arm {name!r}: {key} is the same for all arms; leave it out")
        for key in option:
            if key in arm:
                raise ValueError(f"arm {name!r}: {key} is swept (--{key}s); leave it out of the arm or of the sweep")
        shared = self.shared(rate, seed, folder)
        try:
            if self.arms[name]["trainer"] == "mnrl":
                if arm:
                    raise ValueError(f"mnrl has no setting {next(iter(arm))!r}; it has negatives")
                return SentenceTransformerTrainingArguments(**shared)
            return RankingConfig(**shared, redact=True, **arm, **option)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {name!r}: {error}") from error

    def shared(self, rate: float, seed: int, folder: Path) -> dict[str, Any]:
        """Training arguments of all arms."""
        return {
            **{"output_dir": str(folder), "learning_rate": rate, "seed": seed, "max_steps": self.steps},
            **{"per_device_train_batch_size": self.batch, "warmup_steps": 0.1, "report_to": "none"},
            **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": max(1, self.steps // 4), "use_cpu": True},
            **{"lr_scheduler_type": "linear", "weight_decay": 0.01, "max_grad_norm": 1.0},
        }

    def deciding(self) -> dict[str, Any]:
        """What decides the result of a run, besides its arm, rate and seed."""
        left_out = ("seeds", "sweep_seed", "rates", "scales", "arms", "data")
        new = {f.name: f.default for f in fields(self) if f.name in LATER}  # so that older runs stay known
        found = {k: v for k, v in vars(self).items() if k not in left_out and not (k in new and v == new[k])}
        return {**found, "data": Path(self.data or "made up").name}


def read_grid(args: argparse.Namespace) -> Grid:
    """The file, with what the command line says instead."""
    found = yaml.safe_load(args.grid.read_text())
    unknown = sorted(set(found) - {f.name for f in fields(Grid)})
    if unknown:
        raise ValueError(f"{args.grid} has {unknown[0]!r}, which a grid does not have")
    given = ("data", "train_split", "encoder", "rates", "scales", "seeds", "steps", "max_length")
    given += ("warm_steps", "warm_rate", "test_queries")
    found |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    if args.arms is not None:
        for name in args.arms:
            if name not in found["arms"]:
                raise ValueError(f"the file has no arm {name!r}; it has {', '.join(found['arms'])}")
        found["arms"] = {name: found["arms"][name] for name in args.arms}
    grid = Grid(**found)
    if not args.smoke:
        return grid
    small: dict[str, Any] = {"steps": 5, "batch": 4, "n_documents": 10, "seeds": [1, 2], "rates": [1e-2]}
    small |= {"encoder": "tiny", "scales": [5.0, 20.0] if grid.scales else None}
    small |= {"yes": "a", "no": "b", "depth": 5, "max_length": 200} if grid.kind == "causal_lm" else {}
    return replace(grid, **small)


def check_arms(grid: Grid, folder: Path) -> None:
    """Refuse before the first run what an arm's own run would refuse after hours of the others'."""
    for name in grid.arms:
        config = grid.config(name, grid.rates[0], grid.sweep_seed, folder, **grid.options[0])
        places = getattr(config, "places", None)
        if places is not None and places > grid.n_documents:
            raise ValueError(f"arm {name!r}: k={places} is larger than n_documents={grid.n_documents}; lower k")


class Task:
    """What all runs share, made once in each process."""

    def __init__(self, grid: Grid, folder: Path, curve: int | None = None) -> None:
        self.grid, self.folder, self.curve = grid, folder, curve
        self.parts: dict[int, tuple[list[CandidateList], RetrievalTask, Any, Any]] = {}

    @cached_property
    def encoder(self) -> Start:
        grid = self.grid
        settings = {"kind": grid.kind, "model_kwargs": {"dtype": getattr(torch, grid.dtype)}}
        return Start(grid.encoder, grid.max_length, answers=(grid.yes, grid.no), **settings)

    def part(self, seed: int) -> tuple[list[CandidateList], RetrievalTask, Any, Any]:
        """Lists to train on, queries to measure by, BM25's run for them, and the model that all arms start from.

        The sweep has training queries only. With `warm_steps` the start is trained with InfoNCE first, on lists mined
        by the encoder as it came, and mines anew.
        """
        if seed not in self.parts:
            grid, model = self.grid, self.encoder.copy()
            split: Split = read_task(grid.data, train_split=grid.train_split, test_share=grid.test_share, seed=seed)
            train, test = split.train, split.test
            if seed == grid.sweep_seed:
                train, test = split_queries(split.train, 0.25, seed)
            test = test.only(list(test.queries)[: grid.test_queries])
            settings = {"n_documents": grid.n_documents, "seed": seed}
            settings |= {"bm25": grid.measure == "rerank", "dense": grid.measure == "search"}
            lists = mined(model, train, **settings).lists
            if grid.warm_steps:
                folder = self.folder / "runs" / f"warm_{seed}"
                args = grid.shared(grid.warm_rate, seed, folder) | {"max_steps": grid.warm_steps}
                args = RankingConfig(**args, loss_type="infonce", redact=True)
                RankingTrainer(model=model, args=args, train_dataset=to_rows(lists)).train()
                lists = mined(model, train, **settings).lists
            self.parts = {seed: (lists, test, bm25_run(test, grid.depth), model)}
        return self.parts[seed]

    def found(self, model: Any, seed: int) -> Measured:
        _, test, lexical, _ = self.part(seed)
        return measured(model, test, lexical, search=self.grid.measure == "search")

    def measure(self, model: Any, seed: int, name: str) -> dict[str, float]:
        found = self.found(model, seed)
        if seed != self.grid.sweep_seed:
            (self.folder / "per_query").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "per_query" / f"{name}.json", found.per_query(self.grid.metric))
        return found.metrics()

    def nothing(self, seed: int) -> dict[str, float]:
        return self.measure(self.part(seed)[3], seed, file_name(DO_NOTHING, 0, seed))

    def trained(self, name: str, rate: float, seed: int, **option: float) -> Mapping[str, float]:
        """Metrics of one run of an arm."""
        lists, _, _, start = self.part(seed)
        arm, model = self.grid.arms[name], copy.deepcopy(start)
        called = file_name(name, rate, seed, option)
        set_seed(seed)  # adapters start alike
        args = self.grid.config(name, rate, seed, self.folder / "runs" / called, **option)
        if arm["trainer"] == "mnrl":
            most = self.grid.n_documents - max(1, self.grid.n_documents // 2)
            rows = Dataset.from_list(tuples(lists, min(arm.get("negatives", 0), most), seed))
            model.model_card_data.generate_widget_examples = False
            if self.grid.adapter is not None:
                model.add_adapter(self.grid.adapter)
            loss = MultipleNegativesRankingLoss(model, **option)
            trainer: Any = SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss)
            trainer.remove_callback(PrinterCallback)
        else:
            trainer = RankingTrainer(
                model=model, args=args, train_dataset=to_rows(lists), peft_config=self.grid.adapter
            )
        curve = Curve(lambda model: self.found(model, seed).metrics()[self.grid.metric], self.curve)
        if self.curve and seed != self.grid.sweep_seed:
            trainer.add_callback(curve)
        try:
            trainer.train()
        except NonFiniteLossError:
            return {self.grid.metric: math.nan}
        if curve.values:
            (self.folder / "curves").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "curves" / f"{called}.json", curve.values)
        if not all(p.isfinite().all() for p in trainer.model.parameters()):
            return {self.grid.metric: math.nan}
        spent = {"tokens_sampled": 0.0, "gradient_steps": float(trainer.state.global_step)}
        return {**self.measure(trainer.model, seed, called), **spent}


class Curve(TrainerCallback):
    """The metric while training."""

    def __init__(self, measure: Callable[[Any], float], every: int | None) -> None:
        self.measure, self.every, self.values = measure, every, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.values[state.global_step] = self.measure(model)
            model.train()


def draw(found: Comparison, folder: Path) -> None:
    """Learning curves: the mean over seeds of the metric at each step, and the start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = found.values(DO_NOTHING, found.metric).values()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, arm in enumerate(found.rates):
        runs = [run for run in found.confirmed if run.arm == arm]
        files = [folder / "curves" / f"{file_name(arm, run.rate, run.seed, run.option)}.json" for run in runs]
        curves = [{int(step): value for step, value in read_json(file).items()} for file in files if file.exists()]
        if not curves:
            continue
        steps = sorted(set.intersection(*map(set, curves)))
        means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
        style = {"marker": "osD^vP*X"[i % 8], "ms": 4, "lw": 1.5}
        axes.plot([0, *steps], [sum(start) / len(start), *means], label=f"{arm} ({means[-1]:.3f})", **style)
    axes.axhline(sum(start) / len(start), color="grey", lw=1, ls="--")
    axes.set(xlabel="optimiser step", ylabel=f"{found.metric} on held-out queries")
    axes.grid(alpha=0.3)
    axes.legend(
        frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), title="last value", alignment="left"
    )
    figure.savefig(folder / "curves.png", dpi=130)
    pyplot.close(figure)


def tuples(lists: list[CandidateList], negatives: int, seed: int) -> list[dict[str, str]]:
    """One relevant document a query, and so many of its irrelevant ones in the order of the list, which is random."""
    rows = []
    for one in lists:
        draw = random.Random(f"{seed} {one.query_id}")
        relevant = [d for d, gain in zip(one.documents, one.gains, strict=True) if gain > 0]
        others = [d for d, gain in zip(one.documents, one.gains, strict=True) if gain == 0][:negatives]
        if len(others) == negatives:
            named = {f"negative_{i}": text for i, text in enumerate(others)}
            rows.append({"query": one.query, "positive": draw.choice(relevant), **named})
    return rows


def tests(found: Comparison, folder: Path, baseline: str) -> str:
    """Paired over queries, each the mean over the seeds in which it was tested."""
    values: dict[str, dict[str, float]] = {}
    for name in found.arms:
        seen: dict[str, list[float]] = defaultdict(list)
        for run in (r for r in found.confirmed if r.arm == name):
            file = folder / "per_query" / f"{file_name(name, run.rate, run.seed, run.option)}.json"
            for query_id, value in (read_json(file) if file.exists() else {}).items():
                seen[query_id].append(value)
        values[name] = {query_id: sum(found) / len(found) for query_id, found in seen.items()}
    lines = [f"| {found.metric} minus that of {baseline} | mean | 95 % | p | queries |", "|---|---|---|---|---|"]
    for name in found.arms:
        shared = [q for q in values[baseline] if q in values[name]]
        if name == baseline or len(shared) < 2:
            continue
        ours, theirs = [values[name][q] for q in shared], [values[baseline][q] for q in shared]
        mean, low, high = paired_difference(ours, theirs)
        p = permutation_test([a - b for a, b in zip(ours, theirs, strict=True)])
        lines.append(f"| {name} | {mean:+.4f} | {low:+.4f} to {high:+.4f} | {p:.4f} | {len(shared)} |")
    note = "\n\nPermutation test by sign flips, not corrected for the number of arms."
    return "\n".join(lines) + note


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = read_grid(args)
    baseline = args.baseline or next(iter(grid.arms))
    if baseline not in (DO_NOTHING, *grid.arms):
        raise ValueError(f"--baseline {baseline!r} is no arm; choose {DO_NOTHING!r} or one of {list(grid.arms)}")
    check_arms(grid, args.output_dir)
    task = Task(grid, args.output_dir, args.curve)
    arms = [
        Arm(name, partial(task.trained, name), tuple(arm.get("rates", grid.rates)), arm, grid.options)
        for name, arm in grid.arms.items()
    ]
    found = compare(
        arms,
        task.nothing,
        seeds=grid.seeds,
        sweep_seed=grid.sweep_seed,
        metric=grid.metric,
        folder=args.output_dir,
        settings=grid.deciding(),
        workers=args.workers,
    )
    text = f"# {grid.encoder} on {Path(grid.data or 'made-up data').name}\n\n{found.markdown()}\n\n"
    text += tests(found, args.output_dir, baseline)
    (args.output_dir / "compare.md").write_text(text)
    if args.curve:
        draw(found, args.output_dir)
    print(text)


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
