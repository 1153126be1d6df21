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
import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hidden_grid import METRICS, Grid, read_grid
from hidden_report import draw, summary
from hidden_task import ORACLE, Cell, Collection, Part
from search_task import file_name, indexed
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from negtune.cli.recipe import run_recipe
from negtune.eval.compare import DO_NOTHING, Arm, Comparison, compare
from negtune.records import write_json
from negtune.retrieval.evaluation import evaluate_retrieval
from negtune.retrieval.mining import CandidateList, to_rows
from negtune.retrieval.selection import provenance
from negtune.trainers.coupled import CoupledTrainer
from negtune.trainers.query_encoder import QueryEncoderTrainer
from negtune.trainers.ranking import RankingTrainer
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


def run_collection(grid: Grid, collection: Collection, found: dict[Cell, Comparison], folder: Path) -> None:
    """All cells of a data set, added to `found`; what is known so far is written behind each."""
    chosen: Choices = {}
    for cell in grid.cells(collection.name):
        found[cell] = run_cell(grid, collection, cell, chosen, folder)
        chosen = choices(found[cell]) | chosen
        (folder / "summary.md").write_text(summary(grid, found, folder))
        draw(grid, found, folder / "hidden_positives.png")
        print(f"{cell.name}: done", flush=True)


def collection_of(grid: Grid, name: str, args: argparse.Namespace) -> Collection:
    source = grid.data[name].get("made_up") or args.data_dir / name
    depth = max(grid.depth, grid.static_depth)
    encoder = grid.data[name].get("encoder", grid.encoder)
    return Collection(name, source, encoder, depth, args.output_dir, grid.max_length)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)
    said = f"{ORACLE} gave no verdict"  # on most it has none, and needs none
    logging.getLogger("negtune.retrieval.relabel").addFilter(lambda record: not record.getMessage().startswith(said))
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
        try:
            run_collection(grid, collection, found, args.output_dir)
        finally:
            gc.unfreeze()  # else vLLM's libraries call all of it leaked as the process ends
    if found:
        print((args.output_dir / "summary.md").read_text())


if __name__ == "__main__":
    run_recipe(main, resume="the same command goes on where it was")
