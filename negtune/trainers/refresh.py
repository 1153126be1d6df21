"""Mine candidate lists again while a trainer runs, with the model as it is by then (ANCE)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from negtune.data.retrieval import RetrievalTask
from negtune.records import read_json, write_json
from negtune.retrieval.choice import SimANS, mine_negatives
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import CandidateList, Mined, read_lists, to_rows, write_lists
from negtune.retrieval.negatives import PairScorer
from negtune.retrieval.retrievers import DenseRetriever, Retriever, RunRetriever
from negtune.trainers.ranking import RankingTrainer

FOLDER, FILE, DROPPED = "lists", "step-{step}.jsonl", "dropped-{step}.json"
MODEL = "dense"
"""In rules: the scores of the model that is trained, as it is at each refresh."""


class RefreshNegatives(TrainerCallback):
    """Every n steps: encode the corpus, search, and train on the lists of what is found from the next step on.

        lists = mine(task, [DenseRetriever(model, task.corpus)], positives="guaranteed").lists
        trainer = RankingTrainer(model, args, train_dataset=to_rows(lists))
        trainer.add_callback(RefreshNegatives(trainer, task, lists, every_steps=500, positives="guaranteed"))

    ANCE (https://arxiv.org/abs/2007.00808) does this beside the training, with other machines: its trainer goes on
    with lists of an older checkpoint until the new ones are there. Here training waits. Lists are those of the weights
    that go on, at the price of the time that encoding takes, and the same run twice gives the same lists.

    Rules against false negatives (`rules`, `select=SimANS(...)`, `by`) hold at each refresh, by the scores of the model
    as it is then where they name `dense`: what they read and its search did not give is scored. What a rule took out of
    a query's list is then none of its negatives in a batch either, if rows have `known_positives`. Of a judge's labels
    new lists know what the task's judgements say.

    `lists/step-N.jsonl` in the output folder says where the documents of every list were found, the model's ranks being
    under `dense@N`, and `dropped-N.json` what rules took out. A run that is resumed takes its lists from there. Every
    process mines for itself. A query for which mining finds no list, or one that is shorter than the objective's k,
    keeps the one it has.

    Logged at each refresh: `refresh/changed`, share of negatives that were not in the query's list; `refresh/kept`,
    share of queries that kept theirs; `refresh/seconds`.

    Args:
        trainer: of a bi-encoder.
        task: with the queries of the lists.
        lists: what the trainer's train set was made of, `to_rows(lists)`, or `to_rows(lists, task=task)`: a `Mined`, or
            its lists.
        every_steps, every_epochs: one of the two.
        retrievers: others whose documents are pooled with the model's, such as BM25; asked again each time.
        batch_size: texts embedded at a time.
        settings: of `retrieval.choice.mine_negatives`; `seed` grows by the step.

    Raises:
        ValueError: lists that are not the train set's, settings that mining does not take, or a trainer that cannot
            change its lists: another one than `RankingTrainer`, of a stream, with workers that load data, or with
            scores for each document of a row.
    """

    def __init__(
        self,
        trainer: RankingTrainer,
        task: RetrievalTask,
        lists: Mined | Sequence[CandidateList],
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        retrievers: Sequence[Retriever] = (),
        batch_size: int = 64,
        **settings: Any,
    ) -> None:
        if (every_steps is None) == (every_epochs is None) or (every_steps or every_epochs or 0) < 1:
            raise ValueError(
                f"give every_steps or every_epochs, at least 1, got every_steps={every_steps}, "
                f"every_epochs={every_epochs}"
            )
        _check_trainer(trainer)
        self.trainer, self.task, self.settings = trainer, task, settings
        self.every_steps, self.every_epochs = every_steps, every_epochs
        self.retrievers, self.batch_size = list(retrievers), batch_size
        first = lists if isinstance(lists, Mined) else Mined(list(lists))
        self.lists = first.lists
        self._check_lists(trainer.train_dataset)
        self._check_settings()
        self._use(first.lists, first.dropped)
        self._check_known(trainer.train_dataset)
        if others := set(trainer.train_dataset.column_names) - set(self._rows.column_names):
            raise ValueError(f"train rows have {', '.join(sorted(others))}, which mined lists lack; leave them out")
        trainer.train_dataset = trainer.train_dataset.with_transform(_Current(self))

    # --- when ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Take the lists that were in use; of a new run, write down those that it begins with."""
        if self.every_epochs is not None:
            per_epoch = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            self.every_steps = self.every_epochs * per_epoch
        step, due = state.global_step, state.global_step - state.global_step % (self.every_steps or 1)
        if state.is_world_process_zero:
            for path in [*self._folder.glob(FILE.format(step="*")), *self._folder.glob(DROPPED.format(step="*"))]:
                if int(path.stem.partition("-")[2]) > step:
                    path.unlink()
        if due == 0:
            self._write(0)
        elif self._path(due).exists():
            dropped = self._path(due, DROPPED)
            lists = [self._with_texts(one) for one in read_lists(self._path(due))]
            self._use(lists, read_json(dropped) if dropped.exists() else {})
        elif due == step:  # the run had ended here, and had no use for new lists
            self._refresh(step)
        else:
            raise FileNotFoundError(
                f"{self._path(due)} is missing: it has the lists of step {due}; resume in the folder of the first run"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % (self.every_steps or 1) == 0 and state.global_step < state.max_steps:
            due = control.should_log
            self._refresh(state.global_step)
            control.should_log = due  # the host takes any log of a step for that of its loss

    # --- what ---------------------------------------------------------------------------------------------------------

    def _refresh(self, step: int) -> None:
        start, before = time.perf_counter(), self.lists
        mined = self._mined(step)
        found = {one.query_id: one for one in mined.lists if self._long_enough(one)}
        dropped = {q: d for q, d in self.dropped.items() if q not in found}
        dropped |= {q: d for q, d in mined.dropped.items() if q in found}
        self._use([found.get(one.query_id, one) for one in before], dropped)
        self.trainer.relist = self.rows
        self._write(step)
        new = [
            document_id not in old.document_ids
            for old, one in zip(before, self.lists, strict=True)
            for document_id, gain in zip(one.document_ids, one.gains, strict=True)
            if gain <= 0
        ]
        kept = sum(one.query_id not in found for one in before)
        self.trainer.log(
            {
                "refresh/changed": sum(new) / max(1, len(new)),
                "refresh/kept": kept / len(before),
                "refresh/seconds": time.perf_counter() - start,
            }
        )

    def _mined(self, step: int) -> Mined:
        model, size = self.trainer.model, self.batch_size
        dense = DenseRetriever(model, self.task.corpus, batch_size=size, name=_name(step))
        return mine_negatives(self.task, [dense, *self.retrievers], **self._settings(step, scorer(model, size)))

    def _settings(self, step: int, score: PairScorer) -> dict[str, Any]:
        """Of `mine_negatives` at a step; `score` is that of the model."""
        found = {**self.settings, "seed": self.settings.get("seed", 0) + step}
        if MODEL not in self._read():
            return found

        def named(one: Any) -> Any:
            return replace(one, scorer=_name(step)) if is_dataclass(one) and one.scorer == MODEL else one

        found["rules"] = [named(rule) for rule in found.get("rules", ())]
        found |= {"select": named(found["select"])} if isinstance(found.get("select"), SimANS) else {}
        found |= {"by": _name(step)} if found.get("by") == MODEL else {}
        return {"score": score, "scorer": _name(step), **found}

    def _read(self) -> list[str]:
        """Names of the scorers that rules and choice read."""
        select, by = self.settings.get("select"), self.settings.get("by")
        names = [rule.scorer for rule in self.settings.get("rules", ())]
        return names + ([select.scorer] if isinstance(select, SimANS) else []) + ([by] if by is not None else [])

    def _long_enough(self, one: CandidateList) -> bool:
        return len(one.document_ids) >= (self.trainer.args.places or 1)

    def _use(self, lists: list[CandidateList], dropped: dict[str, dict[str, str]]) -> None:
        self.lists, self.dropped = lists, dropped
        named = "known_positives" in self.trainer.train_dataset.column_names
        rows = to_rows(Mined(lists, dropped=dropped), task=self.task if named else None)
        self._rows = self.trainer.checked_rows(rows, "mined")
        self._place = {row: place for place, row in enumerate(self._rows["row"])}

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of the lists in use, by their numbers."""
        return [self._rows[self._place[number]] for number in numbers]

    # --- on disk ------------------------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / FOLDER

    def _path(self, step: int, name: str = FILE) -> Path:
        return self._folder / name.format(step=step)

    def _write(self, step: int) -> None:
        if not self.trainer.is_world_process_zero():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        redacted = [replace(one, query="", documents=[""] * len(one.documents)) for one in self.lists]
        if self.dropped:
            write_json(self._path(step, DROPPED), self.dropped)
        write_lists(self._path(step), redacted if self.trainer.args.redact else self.lists)

    def _with_texts(self, one: CandidateList) -> CandidateList:
        documents = [self.task.corpus[document_id] for document_id in one.document_ids]
        return replace(one, query=self.task.queries[one.query_id], documents=documents)

    # --- refused ------------------------------------------------------------------------------------------------------

    def _check_lists(self, rows: Any) -> None:
        for one in self.lists:
            if one.query_id not in self.task.queries:
                raise ValueError(f"the task lacks query {one.query_id} of the lists; give the task they were mined for")
        for row in rows.select_columns(["row", "query", "documents"]):
            number = row["row"]
            if number >= len(self.lists) or self.lists[number].query != row["query"]:
                raise ValueError(
                    f"train row {number} is not list {number}; make the train set of the same lists, to_rows(lists)"
                )
            if self.lists[number].documents != row["documents"]:
                raise ValueError(
                    f"train row {number} (query {self.lists[number].query_id}) has other documents than its list; make "
                    "the train set of the same lists, to_rows(lists)"
                )

    def _check_known(self, rows: Any) -> None:
        if "known_positives" not in rows.column_names:
            return
        for row in rows.select_columns(["row", "known_positives"]):
            one = self.lists[row["row"]]
            if row["known_positives"] != self.rows([row["row"]])[0]["known_positives"]:
                raise ValueError(
                    f"train row {row['row']} (query {one.query_id}) has other known_positives than its list and the "
                    "task say; if a rule or a judge took documents out, give the Mined that the rows were made of"
                )

    def _check_settings(self) -> None:
        """Try them on one query, without the model."""
        others = [retriever.name for retriever in self.retrievers]
        if MODEL in others:
            raise ValueError(f"{MODEL!r} is the model that is trained; give the other retriever another name")
        known = [MODEL, *others, *([self.settings["scorer"]] if "scorer" in self.settings else [])]
        for name in self._read():
            if name not in known:
                raise ValueError(f"rules read the scores of {name!r}, and there are those of {', '.join(known)}")
        one = self.task.only([self.lists[0].query_id])
        empty = RunRetriever({}, _name(0))
        try:
            mine_negatives(one, [empty, *self.retrievers], **self._settings(0, lambda pairs: [0.0] * len(pairs)))
        except TypeError as error:
            raise ValueError(f"settings of mine: {error}") from None
        places, longest = self.trainer.args.places or 1, self.settings.get("n_documents", 16)
        if longest < places:
            raise ValueError(f"n_documents={longest} is shorter than the objective's k={places}; raise it, or lower k")


def _name(step: int) -> str:
    """Of the model's ranks and scores."""
    return f"{MODEL}@{step}"


class _Current:
    """Rows of a data set to those of the lists in use. `datasets` pickles and copies what it is given, with all that it
    reaches, and this reaches the model: it is neither."""

    def __init__(self, refresh: RefreshNegatives) -> None:
        self.refresh = refresh

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = self.refresh.rows(batch["row"])
        return {name: [row[name] for row in rows] for name in rows[0]}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Current:
        return self


def _check_trainer(trainer: RankingTrainer) -> None:
    if not isinstance(trainer, RankingTrainer):
        raise ValueError(f"only RankingTrainer takes new lists as it runs, got a {type(trainer).__name__}")
    args = trainer.args
    if trainer.loss.kind != "bi_encoder":
        raise ValueError(f"the corpus is searched with a bi-encoder, and this trainer has a {trainer.loss.kind}")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError("the lists of a stream cannot be mined again; train on a list or a Dataset")
    if args.dataloader_num_workers > 0:
        raise ValueError("workers that load data keep the old lists; set dataloader_num_workers=0")
    if args.kl_weight or trainer.loss.teacher:
        raise ValueError(
            "kl_weight and objectives with a teacher need a score for each document, and mined ones have none; use "
            "another loss_type"
        )
