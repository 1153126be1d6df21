"""Settings of hidden_positives.py: which arms, in which cells, with which training arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hidden_task import BY_RANK, NEGATIVES, ORACLE, UNIFORM, WHOLE, Cell, Judging
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from negtune.eval.compare import DO_NOTHING
from negtune.trainers.coupled import CoupledConfig
from negtune.trainers.query_encoder import QueryEncoderConfig
from negtune.trainers.ranking import RankingConfig

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
            raise ValueError(f"baseline {self.baseline!r} is no arm; add it to {'; '.join(self.arms)}")
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
    try:
        found = yaml.safe_load(args.grid.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{args.grid} is no YAML: {error}") from None
    if not isinstance(found, dict) or not {"data", "arms"} <= found.keys():
        raise ValueError(f"{args.grid} is no grid: it needs data and arms, as {Path(__file__).parent.name}/*.yaml")
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
                beside = f", nor is it a folder of --data_dir {args.data_dir}" if name == "data" else ""
                raise ValueError(f"the file has no {name} {one!r}{beside}; it has {'; '.join(found[name])}")
        if wanted is not None:
            found[name] = {one: settings for one, settings in found[name].items() if one in wanted}
    found["drawn"] = [name for name in args.arms or found.get("drawn", []) if name in (DO_NOTHING, *found["arms"])]
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
