"""Does harder mining hurt where positives have no label, and which remedy pays how much?

Papers      NV-Retriever (percent of positive), https://arxiv.org/abs/2407.15831; GISTEmbed,
            https://arxiv.org/abs/2402.16829; STAR and ADORE, https://arxiv.org/abs/2104.08051; CET,
            https://arxiv.org/abs/2209.05072; RLHN (relabelling), https://arxiv.org/abs/2505.16967
Data        Collections that are judged well (--data_dir: folders of these names in BEIR's layout), and made up. Of the
            training queries' positives a share is hidden, at least one a query stays: uniformly, or `by rank` of BM25,
            with chances that are known. The test queries keep all labels. Half of the queries are test queries, others
            at each seed: repeated random cross-validation, with paired differences.
Controls    The same split, start, visible labels, steps and queries a step for all arms. Rate and scale are swept for
            each arm once a data set, in one cell (uniform 50 %, or whole), on a seed of its own, by cross-validation of
            the training queries, with all their labels; other cells take what was chosen there.
Arms        `in batch`, `mined` and its filters: masked InfoNCE over the batch, on the same positives. `random
            negatives`, `STAR`: the pairs of STAR. `ADORE`: half of the steps STAR, as chosen for it, half ADORE.
            `pairs` and `GIST`: sentence-transformers, a mined negative for each positive; the guide is the start. CET
            has pairs of a list as objective: compare it with `CET, weights off`. `oracle` knows the hidden positives.
Measured    recipes/LOG.md

    python recipes/retrieval/hidden_positives.py --data_dir FOLDER --output_dir runs/hidden

--only NAME takes a collection of yours too, FOLDER/NAME in BEIR's layout. A run that was stopped goes on with the same
command. --judges_only makes the scores of slow judges beforehand. --smoke: all arms on made-up data.
"""

import argparse
import copy
import gc
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from hidden_report import draw, summary
from hidden_task import BY_RANK, NEGATIVES, ORACLE, UNIFORM, WHOLE, Cell, Collection, Judging, Part
from search_task import file_name, indexed
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from negtune.cli.recipe import run_recipe
from negtune.eval.compare import DO_NOTHING, Arm, Comparison, compare
from negtune.records import write_json
from negtune.retrieval.evaluation import evaluate_retrieval
from negtune.retrieval.mining import CandidateList, to_rows
from negtune.retrieval.selection import provenance
from negtune.trainers.coupled import CoupledConfig, CoupledTrainer
from negtune.trainers.query_encoder import QueryEncoderConfig, QueryEncoderTrainer
from negtune.trainers.ranking import RankingConfig, RankingTrainer
from negtune.trainers.steps import NonFiniteLossError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--grid", type=Path, default=Path(__file__).with_suffix(".yaml"), help="YAML file; see there")
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--data_dir", type=Path, help="folders of collections, named as in the file")
parser.add_argument("--only", nargs="+", help="of the file's data sets only these, or other folders of --data_dir")
parser.add_argument("--arms", nargs="+", help="of the file's only these")
parser.add_argument("--ways", nargs="+", help="of the data sets' only these")
parser.add_argument("--shares", type=float, nargs="+", help="of the data sets' only these")
parser.add_argument("--encoder", help="instead of the file's")
parser.add_argument("--max_length", type=int, help="tokens of a text, of a transformer; instead of the file's")
parser.add_argument("--rates", type=float, nargs="+", help="learning rates to sweep, instead of the file's")
parser.add_argument("--scales", type=float, nargs="+", help="each with every rate, instead of the file's")
parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
parser.add_argument("--steps", type=int, help="instead of the file's")
parser.add_argument("--batch", type=int, help="queries a step; instead of the file's")
parser.add_argument("--judges_only", action="store_true", help="score candidates by the arms' judges, and end")
parser.add_argument("--smoke", action="store_true")

METRICS = ("ndcg@10", "recall@100")
TRAIN = ("lists", "pairs", "gist", "cet", "adore")
BESIDE = (
    "train",
    "negatives",
    "rule",
    "against",
    "margin",
    "judge",
    "only",
    "ways",
    "tuned_as",
    "control",
    "first",
    "found",
)
GIVEN = ("encoder", "max_length", "rates", "scales", "seeds", "steps", "batch")


@dataclass(frozen=True)
class Grid:
    """A grid file; see hidden_positives.yaml."""

    data: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    baseline: str = "mined"
    encoder: str = "wordllama"
    max_length: int | None = None
    test_share: float = 0.5
    n_documents: int = 8
    max_positives: int = 4
    depth: int = 100
    static_depth: int = 200
    steps: int = 60
    batch: int = 16
    rates: list[float] = field(default_factory=lambda: [1e-2])
    scales: list[float] = field(default_factory=lambda: [20.0])
    sweep_seed: int = 0
    folds: int = 3
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])

    def __post_init__(self) -> None:
        for name in ("n_documents", "max_positives", "depth", "static_depth", "batch", "steps", "folds"):
            least = 2 if name in ("steps", "folds") else 1
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)!r}")
        if self.max_positives >= self.n_documents:
            raise ValueError(f"max_positives={self.max_positives} leaves no negative in n_documents={self.n_documents}")
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm; the arms are {', '.join(self.arms)}")
        for name, data in self.data.items():
            _check_data(name, data)
        for name in self.drawn:
            if name not in (DO_NOTHING, *self.arms):
                raise ValueError(f"drawn has {name!r}, which is no arm")
        for name in self.arms:
            self._check_arm(name)

    def _check_arm(self, name: str) -> None:
        arm = self.arms[name]
        if arm.get("train") not in TRAIN or arm.get("negatives", "mined") not in NEGATIVES:
            raise ValueError(
                f"arm {name!r} needs train: one of {', '.join(TRAIN)}, negatives: of {', '.join(NEGATIVES)}"
            )
        if arm.get("rule") is not None and (
            arm["rule"] not in ("relative", "absolute") or not {"margin", "against"} <= arm.keys()
        ):
            raise ValueError(f"arm {name!r}: rule is relative or absolute, and needs margin and against")
        if arm.get("judge", ORACLE) not in (ORACLE, *self.judges):
            raise ValueError(f"arm {name!r}: no judge {arm['judge']!r}; there are {', '.join([ORACLE, *self.judges])}")
        if arm.get("tuned_as", name) not in self.arms or (arm.get("ways") is not None and "tuned_as" not in arm):
            raise ValueError(f"arm {name!r} is not in the cell of the sweep: tuned_as names an arm whose rate it takes")
        if arm.get("found", "drop") not in ("relabel", "drop"):
            raise ValueError(f"arm {name!r}: found is relabel or drop, got {arm['found']!r}")
        if arm.get("first", name) not in self.arms:
            raise ValueError(f"arm {name!r} goes on from {arm['first']!r}, which is no arm here; add it")
        for config in self.configs(name, self.rates[0], self.scales[0], 0, Path("runs")):
            if getattr(config, "mode", None) in ("ips", "ips_posterior") and arm.get("ways") != [BY_RANK]:
                raise ValueError(f"arm {name!r}: chances differ in {BY_RANK} cells only; set ways: [{BY_RANK}]")

    @property
    def judging(self) -> dict[str, Judging]:
        """The judges by name."""
        try:
            return {name: Judging(**settings) for name, settings in self.judges.items()}
        except TypeError as error:
            raise ValueError(f"judges: {error}") from error

    def cells(self, data: str) -> list[Cell]:
        """Of a data set, the one of the sweep first."""
        shares, ways = self.data[data].get("hidden", []), self.data[data].get("ways", [UNIFORM, BY_RANK])
        hidden = [Cell(data, way, share) for way in ways for share in shares]
        hidden.sort(key=lambda cell: (cell.way != UNIFORM, abs(cell.hidden - 0.5)))
        whole = Cell(data)
        return [hidden[0], whole, *hidden[1:]] if hidden else [whole]

    def in_cell(self, cell: Cell) -> list[str]:
        """Names of the arms that are trained there."""
        return [
            name
            for name, arm in self.arms.items()
            if cell.data in arm.get("only", [cell.data])
            and cell.way in arm.get("ways", [cell.way])
            and not (arm.get("judge") == ORACLE and cell.way == WHOLE)
        ]

    def shared(self, rate: float, seed: int, folder: Path, steps: int | None = None) -> dict[str, Any]:
        """Training arguments of all arms."""
        steps = steps or self.steps
        return {
            **{"output_dir": str(folder), "learning_rate": rate, "seed": seed, "max_steps": steps, "use_cpu": True},
            **{"per_device_train_batch_size": self.batch, "warmup_steps": 0.1, "report_to": "none"},
            **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": steps, "lr_scheduler_type": "linear"},
            **{"weight_decay": 0.01, "max_grad_norm": 1.0},
        }

    def configs(
        self, name: str, rate: float, scale: float, seed: int, folder: Path, first: tuple[float, float] | None = None
    ) -> list[Any]:
        """Training arguments of a run of an arm, one for each trainer that it takes; `first`: rate and scale of the
        first of two."""
        arm = {key: value for key, value in self.arms[name].items() if key not in BESIDE}
        kind, shared = self.arms[name]["train"], self.shared(rate, seed, folder)
        ours = {"redact": True, "scale": scale}
        try:
            if kind in ("pairs", "gist"):
                if arm:
                    raise ValueError(f"sentence-transformers' losses have no setting {next(iter(arm))!r} here")
                return [SentenceTransformerTrainingArguments(**shared, batch_sampler=BatchSamplers.NO_DUPLICATES)]
            if kind == "adore":
                before, scale_before = first or (rate, scale)
                half = self.steps // 2
                star = self.shared(before, seed, folder, half) | {"redact": True, "scale": scale_before}
                return [
                    RankingConfig(**star, loss_type="star"),
                    QueryEncoderConfig(
                        **self.shared(rate, seed, folder, self.steps - half), **ours, depth=self.static_depth, **arm
                    ),
                ]
            return [{"lists": RankingConfig, "cet": CoupledConfig}[kind](**shared, **ours, **arm)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {name!r}: {error}") from error

    def own(self, data: str) -> dict[str, Any]:
        """Settings of a data set that stand in for those of the file."""
        return {key: value for key, value in self.data[data].items() if key in ("made_up", "encoder", "rates")}

    def deciding(self, cell: Cell) -> dict[str, Any]:
        """What decides the result of a run, besides its arm, rate, scale and seed."""
        beside = ("data", "arms", "judges", "drawn", "baseline", "rates", "scales", "seeds", "sweep_seed")
        left = {name: value for name, value in vars(self).items() if name not in beside}
        own = {key: value for key, value in self.own(cell.data).items() if key != "rates"}
        return {**left, "data": cell.data, "way": cell.way, "hidden": cell.hidden, **own}

    def settings(self, name: str) -> dict[str, Any]:
        """What decides the result of an arm's runs alone."""
        arm = {
            key: value for key, value in self.arms[name].items() if key not in ("only", "ways", "tuned_as", "control")
        }
        return {**arm, **({"judging": self.judges[arm["judge"]]} if arm.get("judge") in self.judges else {})}


def _check_data(name: str, data: Any) -> None:
    known = {"hidden", "ways", "made_up", "encoder", "rates"}
    if not isinstance(data, dict) or not data.keys() <= known:
        raise ValueError(f"data set {name!r} has settings {', '.join(sorted(known))}, got {data!r}")
    if not all(isinstance(share, float) and 0 < share < 1 for share in data.get("hidden", [])):
        raise ValueError(f"data set {name!r}: shares to hide are between 0 and 1, got {data['hidden']}")
    if not set(data.get("ways", [])) <= {UNIFORM, BY_RANK}:
        raise ValueError(f"data set {name!r}: ways are {UNIFORM!r} and {BY_RANK!r}, got {data['ways']}")


def read_grid(args: argparse.Namespace) -> Grid:
    """The file, with what the command line says instead."""
    found = yaml.safe_load(args.grid.read_text())
    unknown = sorted(set(found) - {f.name for f in fields(Grid)})
    if unknown:
        raise ValueError(f"{args.grid} has {unknown[0]!r}, which a grid does not have")
    found |= {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    for name in args.only or []:
        if name not in found["data"] and args.data_dir is not None and (args.data_dir / name).is_dir():
            found["data"][name] = {"hidden": [0.3, 0.5, 0.7]}
    for name, wanted in (("data", args.only), ("arms", args.arms)):
        for one in wanted or []:
            if one not in found[name]:
                raise ValueError(f"the file has no {name} {one!r}; it has {', '.join(found[name])}")
        if wanted is not None:
            found[name] = {one: settings for one, settings in found[name].items() if one in wanted}
    found["drawn"] = [name for name in found.get("drawn", []) if name in (DO_NOTHING, *found["arms"])]
    for share in args.shares or []:
        if not any(share in data.get("hidden", []) for data in found["data"].values()):
            raise ValueError(f"no data set of the file hides {share:g} of its positives; see hidden there")
    for way in args.ways or []:
        if way not in (UNIFORM, BY_RANK):
            raise ValueError(f"--ways are {UNIFORM!r} and {BY_RANK!r}, got {way!r}")
    for data in found["data"].values():
        if args.shares is not None:
            data["hidden"] = [share for share in data.get("hidden", []) if share in args.shares]
        if args.ways is not None:
            data["ways"] = [way for way in data.get("ways", [UNIFORM, BY_RANK]) if way in args.ways]
    if args.smoke:
        found |= {"data": {"made up": {"hidden": [0.5], "made_up": {"n_topics": 4, "queries_per_topic": 6}}}}
        found |= {"steps": 4, "batch": 4, "seeds": [1, 2], "rates": [1e-2], "scales": [20.0], "encoder": "tiny"}
        found["folds"] = 2
        found["judges"] = {name: {**judge, "model": "tiny"} for name, judge in found.get("judges", {}).items()}
        for judge in found["judges"].values():
            judge |= {"depth": 4, "words": 10, "answers": ["a", "b"]} if judge["kind"] == "causal_lm" else {}
        for arm in found["arms"].values():
            arm.pop("only", None)
    grid = Grid(**found)
    for name, data in grid.data.items():
        if "made_up" not in data and (args.data_dir is None or not (args.data_dir / name).is_dir()):
            raise ValueError(
                f"data set {name!r} is no folder in --data_dir {args.data_dir}; give one, or --only others"
            )
    return grid


class Runner:
    """Trains arms in a cell, on what they share."""

    def __init__(self, grid: Grid, collection: Collection, cell: Cell, folder: Path) -> None:
        self.grid, self.collection, self.cell, self.folder = grid, collection, cell, folder
        self._parts: dict[tuple[int, int | None], Part] = {}
        self.fold: int | None = None

    def part(self, seed: int) -> Part:
        if (seed, self.fold) not in self._parts:
            names = ("test_share", "n_documents", "max_positives", "depth", "static_depth", "folds")
            settings = {name: getattr(self.grid, name) for name in names}
            if any(key[0] != seed for key in self._parts):
                self._parts = {}
            self._parts[seed, self.fold] = Part(self.collection, self.cell, seed, fold=self.fold, **settings)
        return self._parts[seed, self.fold]

    def measure(self, model: Any, seed: int, called: str, index: Any = None) -> dict[str, float]:
        found = evaluate_retrieval(model, self.part(seed).test, metrics=METRICS, index=index)
        if seed != self.grid.sweep_seed:
            file = self.folder / "per_query" / self.cell.name / f"{called}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found.per_query[METRICS[0]])
        return dict(found.means)

    def nothing(self, seed: int) -> dict[str, float]:
        hidden = {"hidden": self.part(seed).hidden.share}
        return {**self.measure(self.collection.start, seed, file_name(DO_NOTHING, 0, seed)), **hidden}

    def __call__(
        self, name: str, first: tuple[float, float] | None, rate: float, seed: int, *, scale: float
    ) -> Mapping[str, float]:
        """Metrics of one run of an arm, in a sweep the means over folds; `first`: rate and scale of the arm that it
        goes on from."""
        if seed != self.grid.sweep_seed:
            return self.trained(name, first, rate, seed, scale)
        found = []
        for fold in range(self.grid.folds):
            self.fold = fold
            found.append(self.trained(name, first, rate, seed, scale))
        self.fold = None
        return {metric: sum(one.get(metric, math.nan) for one in found) / len(found) for metric in found[0]}

    def trained(
        self, name: str, first: tuple[float, float] | None, rate: float, seed: int, scale: float
    ) -> Mapping[str, float]:
        """Of one training."""
        called = file_name(name, rate, seed, {"scale": scale})
        configs = self.grid.configs(name, rate, scale, seed, self.folder / "trained", first)
        arm, model = self.grid.arms[name], copy.deepcopy(self.collection.start)
        found = self.part(seed).lists(arm, self.grid.judging)
        set_seed(seed)
        train = {"lists": self.by_lists, "cet": self.by_cet, "adore": self.by_adore}.get(arm["train"], self.by_pairs)
        try:
            trained, index = train(model, found.lists, configs, seed, scale, arm)
        except NonFiniteLossError:
            return {METRICS[0]: math.nan}
        if not all(p.isfinite().all() for p in trained.parameters()):
            return {METRICS[0]: math.nan}
        spent = {"tokens_sampled": 0.0, "gradient_steps": float(sum(config.max_steps for config in configs))}
        return {**self.measure(trained, seed, called, index), **found.facts, **spent}

    def by_lists(
        self, model: Any, lists: list[CandidateList], configs: list[Any], seed: int, scale: float, arm: Any
    ) -> tuple[Any, Any]:
        rows = to_rows(lists, task=self.part(seed).train)
        trainer = RankingTrainer(model=model, args=configs[0], train_dataset=rows)
        trainer.train()
        return trainer.model, None

    def by_cet(
        self, model: Any, lists: list[CandidateList], configs: list[Any], seed: int, scale: float, arm: Any
    ) -> tuple[Any, Any]:
        rows, part = to_rows(lists), self.part(seed)
        if configs[0].mode.startswith("ips"):
            chances = [[part.chance(one.query_id, d) for d in one.document_ids] for one in lists]
            rows = [{**row, "selection_propensity": chance} for row, chance in zip(rows, chances, strict=True)]
        else:
            rows = [{**row, "selection_features": f} for row, f in zip(rows, provenance(lists), strict=True)]
        trainer = CoupledTrainer(model, configs[0], train_dataset=rows)
        trainer.train()
        return trainer.model, None

    def by_adore(
        self, model: Any, lists: list[CandidateList], configs: list[Any], seed: int, scale: float, arm: Any
    ) -> tuple[Any, Any]:
        task = self.part(seed).train
        model, _ = self.by_lists(model, lists, configs[:1], seed, scale, arm)
        index = indexed(model, task)
        configs[1].depth = min(configs[1].depth, len(index))
        trainer = QueryEncoderTrainer(model, index, configs[1], train_dataset=task)
        trainer.train()
        return trainer.model, index

    def by_pairs(
        self, model: Any, lists: list[CandidateList], configs: list[Any], seed: int, scale: float, arm: Any
    ) -> tuple[Any, Any]:
        rows = Dataset.from_list(triplets(lists))
        model.model_card_data.generate_widget_examples = False
        if arm["train"] == "gist":
            guide = copy.deepcopy(self.collection.start).requires_grad_(False)
            settings: dict[str, Any] = {"contrast_anchors": False, "contrast_positives": False}
            loss: Any = GISTEmbedLoss(model, guide, temperature=1 / scale, **settings)
        else:
            loss = MultipleNegativesRankingLoss(model, scale=scale)
        trainer = SentenceTransformerTrainer(model=model, args=configs[0], train_dataset=rows, loss=loss)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model, None


def triplets(lists: list[CandidateList]) -> list[dict[str, str]]:
    """A row for each positive, with a negative of the list, in turn; lists without a negative have none."""
    rows = []
    for one in lists:
        positives, negatives = (
            [d for d, gain in zip(one.documents, one.gains, strict=True) if (gain > 0) == relevant]
            for relevant in (True, False)
        )
        rows += [
            {"anchor": one.query, "positive": text, "negative": negatives[i % len(negatives)]}
            for i, text in enumerate(positives)
            if negatives
        ]
    return rows


Choices = dict[str, tuple[float, float]]
"""Arm to the rate and scale that were chosen."""


def run_cell(grid: Grid, collection: Collection, cell: Cell, chosen: Choices, folder: Path) -> Comparison:
    """Train the arms of a cell, at the rate and scale that were chosen before, or swept here."""
    runner = Runner(grid, collection, cell, folder)
    swept = grid.data[cell.data].get("rates", grid.rates)

    def arm_of(name: str, before: Choices) -> Arm:
        tuned, first = chosen.get(grid.arms[name].get("tuned_as", name)), before.get(grid.arms[name].get("first", ""))
        rates, scales = ([tuned[0]], [tuned[1]]) if tuned else (swept, grid.scales)
        settings = grid.settings(name) | ({"first_at": first} if first else {})
        return Arm(name, partial(runner, name, first), rates, settings, [{"scale": scale} for scale in scales])

    def compared(names: Iterable[str], before: Choices) -> Comparison:
        return compare(
            [arm_of(name, before) for name in names],
            runner.nothing,
            **{"seeds": grid.seeds, "sweep_seed": grid.sweep_seed, "metric": METRICS[0], "folder": folder},
            baseline=grid.baseline,
            settings=grid.deciding(cell),
        )

    names = grid.in_cell(cell)
    firsts = dict.fromkeys(grid.arms[name]["first"] for name in names if "first" in grid.arms[name])
    if chosen or not firsts:
        return compared(names, chosen)
    return compared(names, choices(compared({grid.baseline: None} | firsts, {})))


def choices(found: Comparison) -> Choices:
    """Of a comparison."""
    return {arm: (rate, found.options[arm]["scale"]) for arm, rate in found.rates.items()}


def collection_of(grid: Grid, name: str, args: argparse.Namespace) -> Collection:
    source = grid.data[name].get("made_up") or args.data_dir / name
    depth = max(grid.depth, grid.static_depth)
    encoder = grid.data[name].get("encoder", grid.encoder)
    return Collection(name, source, encoder, depth, args.output_dir, grid.max_length)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = read_grid(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[Cell, Comparison] = {}
    for name in grid.data:
        collection = collection_of(grid, name, args)
        if args.judges_only:
            used = {arm["judge"] for arm in grid.arms.values() if "judge" in arm and name in arm.get("only", [name])}
            for judge in sorted(used - {ORACLE}):
                collection.judge_scores(judge, grid.judging[judge])
            continue
        gc.collect()
        gc.freeze()  # the host collects garbage in every run, and what stays is much
        chosen: Choices = {}
        for cell in grid.cells(name):
            found[cell] = run_cell(grid, collection, cell, chosen, args.output_dir)
            chosen = choices(found[cell]) | chosen
            (args.output_dir / "summary.md").write_text(summary(grid, found, args.output_dir))
            draw(grid, found, args.output_dir / "hidden_positives.png")
            print(f"{cell.name}: done", flush=True)
    if found:
        print((args.output_dir / "summary.md").read_text())


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
