"""Retrieval collections: documents, queries and judgements in BEIR's layout, runs in TREC's, and a synthetic twin.

A judgement of 0 says that the document was looked at and found not relevant; a document without a judgement is
*unknown*, which is something else. Both facts survive here, in `qrels`.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negtune.data.completions import RowError
from negtune.records import write_text

QRELS_HEADER = ["query-id", "corpus-id", "score"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Run = dict[str, dict[str, float]]
"""Query id to {document id: score}, best document first."""


@dataclass(frozen=True)
class RetrievalTask:
    """A corpus, the queries asked of it, and what is known of the answers.

    Attributes:
        corpus: document id to text; title and text joined by a space, as BEIR does.
        queries: query id to text.
        qrels: query id to {document id: gain}, at least one for every query; 0 is judged and not relevant, absent is
            unjudged.

    Raises:
        RowError: nothing judged, or a judgement names a query or document that is not there.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        if not self.corpus:
            raise RowError("the corpus has no documents: its file is empty, or all of them are without text")
        if not any(self.qrels.values()):
            raise RowError("no query has a judgement; name the split or qrels file that judges them")
        for query_id, gains in self.qrels.items():
            if query_id not in self.queries:
                raise RowError(f"qrels judge query {query_id}, which is not among the queries; add it or drop the line")
            for document_id in gains:
                if document_id not in self.corpus:
                    raise RowError(
                        f"qrels of query {query_id} judge document {document_id}, which the corpus lacks; add it or "
                        "drop the line"
                    )
        for query_id in self.queries:
            if not self.qrels.get(query_id):
                raise RowError(f"query {query_id} has no judgement; drop it, a task holds judged queries only")

    def positives(self, query_id: str) -> dict[str, float]:
        """Relevant documents of one query and their gains, all above 0."""
        return {document_id: gain for document_id, gain in self.qrels[query_id].items() if gain > 0}

    def only(self, query_ids: Iterable[str]) -> RetrievalTask:
        """The same corpus with some of the queries, in the order of this task."""
        wanted = set(query_ids)
        queries = {query_id: text for query_id, text in self.queries.items() if query_id in wanted}
        return RetrievalTask(self.corpus, queries, {query_id: self.qrels[query_id] for query_id in queries})

    def pooled(self, run: Run) -> RetrievalTask:
        """The task as if only the documents of a run had been judged, with the queries that keep a relevant one."""
        kept = {
            query_id: {document_id: gain for document_id, gain in gains.items() if document_id in run[query_id]}
            for query_id, gains in self.qrels.items()
        }
        kept = {query_id: gains for query_id, gains in kept.items() if any(gain > 0 for gain in gains.values())}
        return RetrievalTask(self.corpus, {query_id: self.queries[query_id] for query_id in kept}, kept)


def load_beir(
    name_or_folder: str | Path,
    split: str = "test",
    *,
    qrels_file: str | Path | None = None,
    empty: str = "refuse",
) -> RetrievalTask:
    """A collection in BEIR's layout; of its queries those that the split judges.

    Args:
        name_or_folder: folder with `corpus.jsonl`, `queries.jsonl` (each also `.gz`) and `qrels/<split>.tsv`; or a Hub
            id such as `BeIR/scifact`, whose judgements are in `BeIR/scifact-qrels`. No code of a Hub id is run.
        split: of the judgements.
        qrels_file: judgements from this file instead.
        empty: `refuse`, `drop` or `keep` documents without title and text. They cannot be found, yet they may be judged
            relevant: published figures count them (`keep`, as empty text), training should not see them (`drop`, with
            their judgements). By default they are refused, since the choice moves the figures.

    Returns:
        scores of the file as gains; negative ones, with which some collections mark spam, are 0.

    Raises:
        OSError: a file is missing, or the Hub cannot be reached.
        RowError: a line that cannot be used, by file and line; or judgements of what is not there, by query.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        documents, questions = (json_lines(_find(folder, name)) for name in ("corpus", "queries"))
    elif HUB_ID.fullmatch(str(name_or_folder)):
        documents, questions = (_from_hub(str(name_or_folder), name, name) for name in ("corpus", "queries"))
    else:
        raise FileNotFoundError(f"no folder {folder}; give one with corpus.jsonl, or a Hub id such as BeIR/scifact")
    if qrels_file is not None:
        judgements = _tab_separated(Path(qrels_file).expanduser())
    elif folder.is_dir():
        judgements = _tab_separated(_find_qrels(folder, split))
    else:
        judgements = _from_hub(f"{name_or_folder}-qrels", None, split)
    return judged_task(documents, questions, _qrels(judgements), empty)


def judged_task(
    documents: Iterable[tuple[str, Any]],
    questions: Iterable[tuple[str, Any]],
    qrels: dict[str, dict[str, float]],
    empty: str = "refuse",
) -> RetrievalTask:
    """A task of the queries that are judged.

    Args:
        documents, questions: `(place, for messages; record with _id, text and for documents title)`.
        qrels, empty: see `RetrievalTask` and `load_beir`.
    """
    corpus, dropped = _corpus(documents, empty)
    queries = {query_id: text for query_id, text in _queries(questions).items() if query_id in qrels}
    if dropped:
        qrels = {query_id: {d: g for d, g in gains.items() if d not in dropped} for query_id, gains in qrels.items()}
        qrels = {query_id: gains for query_id, gains in qrels.items() if gains}
        queries = {query_id: text for query_id, text in queries.items() if query_id in qrels}
    return RetrievalTask(corpus, queries, qrels)


def split_queries(task: RetrievalTask, share: float, seed: int = 0) -> tuple[RetrievalTask, RetrievalTask]:
    """Two tasks over one corpus and disjoint queries: the rest, and about `share` of the queries (0 to 1).

    Queries with the same text stay together, or the second part would be known from the first.
    """
    groups, wanted = _shuffled_groups(task, seed), round(share * len(task.queries))
    second: list[str] = []
    while groups and len(second) < wanted:
        second += groups.pop()
    if not second or not groups:
        raise ValueError(
            f"share={share} of {len(task.queries)} queries leaves one part empty; splitting takes at least two queries "
            "of different texts, and 0 < share < 1"
        )
    return task.only(query_id for group in groups for query_id in group), task.only(second)


def query_folds(task: RetrievalTask, n: int, seed: int = 0) -> list[tuple[RetrievalTask, RetrievalTask]]:
    """`(train, test)` of every fold of a cross-validation; each query is tested once, equal texts in the same fold."""
    groups = _shuffled_groups(task, seed)
    if not 2 <= n <= len(groups):
        raise ValueError(f"need 2 <= n <= different queries, got n={n} and {len(groups)} queries")
    folds: list[list[str]] = [[] for _ in range(n)]
    for group in groups:
        min(folds, key=len).extend(group)
    return [(task.only(task.queries.keys() - set(fold)), task.only(fold)) for fold in folds]


def text_key(text: str) -> str:
    """What makes two documents the same: their text, whatever the white space."""
    return " ".join(text.split())


def duplicate_documents(task: RetrievalTask) -> list[list[str]]:
    """Ids of documents with equal text, in groups of two or more; those without text are not counted.

    They share the probability that one of them would have, and one judged relevant makes its twin a false negative.
    """
    groups: dict[str, list[str]] = {}
    for document_id, text in task.corpus.items():
        groups.setdefault(text_key(text), []).append(document_id)
    return [ids for text, ids in groups.items() if text and len(ids) > 1]


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str = "negtune") -> None:
    """Write a run as TREC does, `qid Q0 docid rank score tag`, atomically; ranks count from 1 in the order given.

    Raises:
        RowError: an id with white space in it, or a score that is not finite.
    """
    lines = []
    for query_id, documents in run.items():
        for rank, (document_id, score) in enumerate(documents.items(), 1):
            for name in (query_id, document_id, tag):
                if not name or name.split() != [name]:
                    raise RowError(f"a TREC run cannot hold the name {name!r}; its columns are separated by spaces")
            if not math.isfinite(score):
                raise RowError(f"query {query_id}, document {document_id}: score {score} cannot be ranked")
            lines.append(f"{query_id} Q0 {document_id} {rank} {float(score)!r} {tag}\n")
    write_text(path, "".join(lines))


def read_run(path: str | Path) -> Run:
    """Read a TREC run (also `.gz`): documents by falling score, equal scores in the order of the file.

    The rank column is not read, as in trec_eval.

    Raises:
        RowError: by line, where it has not six columns, no finite score, or a document that its query had before.
    """
    run: Run = {}
    for where, line in file_lines(Path(path)):
        columns = line.split()
        if len(columns) != 6:
            raise RowError(f"{where} has {len(columns)} columns; a run has six: qid Q0 docid rank score tag")
        query_id, _, document_id, _, score, _ = columns
        documents = run.setdefault(query_id, {})
        if document_id in documents:
            raise RowError(f"{where}: query {query_id} had document {document_id} before; delete one of the two lines")
        documents[document_id] = finite_number(score, where, "score")
    return {query_id: dict(sorted(documents.items(), key=lambda item: -item[1])) for query_id, documents in run.items()}


def synthetic_retrieval(
    n_topics: int = 8, documents_per_topic: int = 12, queries_per_topic: int = 6, seed: int = 0
) -> RetrievalTask:
    """A made-up collection in which queries and documents say the same in other words, most of the time.

    Every topic has three aspects. A concept has one word that documents use and one that most queries use, so that
    bags of words find some of what is relevant and a model that learns the pairs finds the rest, also for new queries.

    Args:
        n_topics: 1 to 40.
        documents_per_topic, queries_per_topic: dealt to the three aspects in turn.
        seed: equal seeds give equal collections.

    Returns:
        ids tell topic and aspect (`d3-1-0` and `q3-1-4` share both). Gains: 2 for the query's aspect, 1 for its topic,
        0 for five judged documents of other topics; the rest is unjudged, and not relevant either.
    """
    if not 1 <= n_topics <= 40 or documents_per_topic < 3 or queries_per_topic < 1:
        raise ValueError(
            "synthetic_retrieval takes 1 to 40 topics, at least 3 documents and 1 query for each, got "
            f"{n_topics}, {documents_per_topic}, {queries_per_topic}"
        )
    draw = random.Random(seed)
    words = iter(draw.sample(SYNTHETIC_WORDS, len(SYNTHETIC_WORDS)))
    common = [next(words) for _ in range(40)]
    corpus, queries, qrels = {}, {}, {}
    for topic in range(n_topics):
        shared = [(next(words), next(words)) for _ in range(4)]
        aspects = [[(next(words), next(words)) for _ in range(3)] for _ in range(3)]
        for i in range(documents_per_topic):
            concepts = draw.choices(shared, k=5) + draw.choices(aspects[i % 3], k=4)
            corpus[f"d{topic}-{i % 3}-{i // 3}"] = _shuffled([d for d, _ in concepts] + draw.choices(common, k=5), draw)
        for i in range(queries_per_topic):
            concepts = draw.sample(shared, 2) + draw.sample(aspects[i % 3], 2)
            said = [draw.choices((document, query), (1, 3))[0] for document, query in concepts]
            queries[f"q{topic}-{i % 3}-{i // 3}"] = _shuffled([*said, draw.choice(common)], draw)
    for query_id in queries:
        topic, aspect, _ = query_id[1:].split("-")
        own = {d: 1.0 + d.startswith(f"d{topic}-{aspect}-") for d in corpus if d.startswith(f"d{topic}-")}
        others = sorted(corpus.keys() - own)
        qrels[query_id] = own | dict.fromkeys(draw.sample(others, min(5, len(others))), 0.0)
    return RetrievalTask(corpus, queries, qrels)


SYNTHETIC_WORDS = tuple(a + b + c + d for a in "bdgklmns" for b in "aeiou" for c in "bdgklmns" for d in "aeiou")
"""The 1,600 words of `synthetic_retrieval`; `negtune.models.tiny_encoder` reads each as one token."""


def _shuffled(words: list[str], draw: random.Random) -> str:
    return " ".join(draw.sample(words, len(words)))


def _shuffled_groups(task: RetrievalTask, seed: int) -> list[list[str]]:
    """Ids of the queries, those with equal text in one group, in an order that depends on the ids and the seed only."""
    groups: dict[str, list[str]] = {}
    for query_id in sorted(task.queries):
        groups.setdefault(text_key(task.queries[query_id]), []).append(query_id)
    return random.Random(seed).sample(list(groups.values()), len(groups))


def _corpus(rows: Iterable[tuple[str, Any]], empty: str) -> tuple[dict[str, str], set[str]]:
    """Texts by id, and the ids of those left out."""
    if empty not in ("refuse", "drop", "keep"):
        raise ValueError(f"empty={empty!r} is none of refuse, drop, keep")
    corpus: dict[str, str] = {}
    dropped: set[str] = set()
    seen: set[str] = set()
    for where, record in rows:
        document_id = _new_id(record, seen, where, "document")
        title = record.get("title") or ""
        if not isinstance(title, str):
            raise RowError(f"{where}: title must be text, not {type(title).__name__}")
        text = f"{title} {_text(record, where)}".strip()
        if not text and empty == "refuse":
            raise RowError(
                f"{where}: document {document_id} has no title and no text; pass empty='drop' to leave such documents "
                "and their judgements out, or empty='keep' to count them as empty text"
            )
        if text or empty == "keep":
            corpus[document_id] = text
        else:
            dropped.add(document_id)
    return corpus, dropped


def _queries(rows: Iterable[tuple[str, Any]]) -> dict[str, str]:
    queries: dict[str, str] = {}
    seen: set[str] = set()
    for where, record in rows:
        query_id = _new_id(record, seen, where, "query")
        queries[query_id] = _text(record, where).strip()
        if not queries[query_id]:
            raise RowError(f"{where}: query {query_id} is empty; write its text or delete the line")
    return queries


def _qrels(rows: Iterable[tuple[str, Any]]) -> dict[str, dict[str, float]]:
    qrels: dict[str, dict[str, float]] = {}
    for where, record in rows:
        missing = [name for name in QRELS_HEADER if record.get(name) is None]
        if missing:
            raise RowError(f"{where} has no column {missing[0]!r}; judgements have {', '.join(QRELS_HEADER)}")
        query_id, document_id, score = (record[name] for name in QRELS_HEADER)
        gain = max(finite_number(score, where, "score"), 0.0)
        gains = qrels.setdefault(str(query_id), {})
        if gains.setdefault(str(document_id), gain) != gain:
            raise RowError(
                f"{where}: query {query_id} gave document {document_id} another score before; delete one of the two"
            )
    return qrels


def _new_id(record: Any, seen: set[str], where: str, kind: str) -> str:
    if not isinstance(record, Mapping):
        raise RowError(f"{where} is no JSON object but {type(record).__name__}")
    value = record.get("_id")
    if not isinstance(value, str | int) or str(value) == "":
        raise RowError(f"{where} has no _id; it has {', '.join(map(str, record))}")
    if str(value) in seen:
        raise RowError(f"{where}: {kind} {value} was there before; ids are unique, rename or delete one of the two")
    seen.add(str(value))
    return str(value)


def _text(record: Mapping[str, Any], where: str) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise RowError(f"{where} has no text, which must be a string; it has {', '.join(map(str, record))}")
    return text


def finite_number(value: Any, where: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{where}: {column} {value!r} is no number")
    return number


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz, as BEIR lays a collection out")


def _find_qrels(folder: Path, split: str) -> Path:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        splits = ", ".join(sorted(found.stem for found in path.parent.glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"no judgements {path}; splits that are there: {splits}. Name one, or pass qrels_file")
    return path


def file_lines(path: Path) -> Iterator[tuple[str, str]]:
    """`(file line number, text)` of every line with something on it."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path} line {number}", line.rstrip("\r\n")
        except (EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise RowError(
                f"{path} cannot be read after line {number} ({error}); copy it again, or save it as UTF-8 text"
                + (", zipped by gzip" if path.suffix == ".gz" else "")
            ) from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in file_lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(f"{where} is not JSON ({error}); each line holds one object") from None


def _tab_separated(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    lines = file_lines(path)
    where, header = next(lines, (f"{path}", ""))
    if header.split("\t") != QRELS_HEADER:
        raise RowError(f"{where} must be the header {' '.join(QRELS_HEADER)}, separated by tabs; it is {header!r}")
    for where, line in lines:
        columns = line.split("\t")
        if len(columns) != len(QRELS_HEADER):
            raise RowError(f"{where} has {len(columns)} columns; judgements have {', '.join(QRELS_HEADER)}, by tabs")
        yield where, dict(zip(QRELS_HEADER, columns, strict=True))


def _from_hub(hub_id: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except (OSError, RuntimeError) as error:  # RuntimeError: a collection that needs its own loading code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"cannot read {hub_id} {split} from the Hub ({reason}); without it pass a folder in BEIR's layout"
        ) from None
    for number, record in enumerate(rows):
        yield f"{hub_id} {split} row {number}", record
