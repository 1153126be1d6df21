"""Collections in TREC's layout: judgements `qid iter docid rel`, and texts from files or from memory.

Runs are read by `data.retrieval.read_run`; `retrieval.retrievers.RunRetriever` makes candidate lists of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from negtune.data.completions import RowError
from negtune.data.retrieval import RetrievalTask, file_lines, finite_number, json_lines, judged_task

Texts = str | Path | Mapping[str, str]
"""A file of `id <tab> text` lines or of JSON lines as in BEIR (each also `.gz`), or texts by id."""


def load_trec(corpus: Texts, queries: Texts, qrels: str | Path, *, empty: str = "refuse") -> RetrievalTask:
    """A collection with TREC's judgements; of its queries those that are judged.

    Args:
        corpus, queries: see `Texts`.
        qrels: file, see `read_qrels`.
        empty: `refuse`, `drop` or `keep` documents without text, as in `data.retrieval.load_beir`.

    Returns:
        what has no line in the judgements is unjudged, which is something else than judged 0.

    Raises:
        OSError: a file is missing.
        RowError: a line that cannot be used, by file and line; or a judgement of what is not there, by query.
    """
    return judged_task(_records(corpus, "corpus"), _records(queries, "queries"), read_qrels(qrels), empty)


def read_qrels(path: str | Path) -> dict[str, dict[str, float]]:
    """Read TREC's judgements, `qid iter docid rel` by white space (also `.gz`): query id to {document id: gain}.

    The second column is not read. Grades below 0, with which some collections mark spam, are 0.

    Raises:
        RowError: by line, where it has not four columns or no finite grade, or contradicts an earlier line.
    """
    qrels: dict[str, dict[str, float]] = {}
    for where, line in file_lines(Path(path).expanduser()):
        columns = line.split()
        if len(columns) != 4:
            raise RowError(
                f"{where} has {len(columns)} columns; judgements of TREC have four: qid iter docid rel. For BEIR's "
                "three, with a header, there is load_beir"
            )
        query_id, _, document_id, grade = columns
        gain = max(finite_number(grade, where, "rel"), 0.0)
        if qrels.setdefault(query_id, {}).setdefault(document_id, gain) != gain:
            raise RowError(
                f"{where}: query {query_id} gave document {document_id} another grade before; delete one of the two"
            )
    return qrels


def _records(texts: Texts, name: str) -> Iterator[tuple[str, Any]]:
    """As lines of BEIR's files."""
    if isinstance(texts, Mapping):
        for text_id, text in texts.items():
            yield f"{name} {text_id}", {"_id": text_id, "text": text}
        return
    path = Path(texts).expanduser()
    if {".json", ".jsonl"} & set(path.suffixes):
        yield from json_lines(path)
        return
    for where, line in file_lines(path):
        text_id, tab, text = line.partition("\t")
        if not tab or "\t" in text:
            raise RowError(
                f"{where} has {1 + line.count(chr(9))} columns by tabs; it must be an id, a tab and the text"
            )
        yield where, {"_id": text_id, "text": text}
