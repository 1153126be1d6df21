"""GSM8K: grade school problems whose solutions end in `#### answer`. Cobbe et al. 2021, https://arxiv.org/abs/2110.14168."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from negtune.data.completions import RowError
from negtune.records import stream_jsonl

GSM8K_ID = "openai/gsm8k"
_CALCULATOR_MARKS = re.compile(r"<<[^<>]*>>")


def load_gsm8k(source: str | Path, split: str) -> list[dict[str, Any]]:
    """`question` and `answer` of GSM8K, without its calculator's marks (`<<2*3=6>>`).

    Args:
        source: Hub id, or a folder with train.jsonl and test.jsonl, or the same with .gz.
        split: `train` or `test`.

    Raises:
        OSError: no such folder or file, or the Hub cannot be reached.
        RowError: a row without question or answer, by number.
        RecordError: a line that is no JSON object.
    """
    rows = enumerate(split_records(source, split, "--gsm8k", GSM8K_ID, "main"), 1)
    return [_question(record, f"{source} {split} row {i}") for i, record in rows]


def split_records(source: str | Path, split: str, flag: str, hub_id: str, *config: str) -> Iterator[Any]:
    """The rows of a split, from a folder with `split`.jsonl or .jsonl.gz, or from the Hub.

    Args:
        source: folder or Hub id.
        split: its name.
        flag, hub_id: of the command line, for the message where there is no such thing.
        config: of a Hub data set.

    Raises:
        OSError: no such folder or file, or the Hub cannot be reached.
        RecordError: a line that is no JSON object.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return stream_jsonl(_find(folder, split, flag))
    way_out = f"{flag} takes a Hub id ({hub_id}), or a folder that holds {split}.jsonl or {split}.jsonl.gz"
    return iter(from_hub(str(source), split, way_out, *config))


def _find(folder: Path, split: str, flag: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {split}.jsonl or {split}.jsonl.gz; {flag} names the folder that does")


def from_hub(source: str, split: str, way_out: str, *config: str) -> Any:
    """A split of a Hub data set. Raises OSError, with `way_out`, where there is none."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"no data folder {source}; {way_out}")
    import datasets

    try:
        return datasets.load_dataset(source, *config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"there is no folder {source}, and it cannot be read from the Hub ({reason}); {way_out}"
        ) from None


def _question(record: Any, where: str) -> dict[str, Any]:
    answer = text_of(record, "answer", where)
    return {"question": text_of(record, "question", where), "answer": _CALCULATOR_MARKS.sub("", answer)}


def text_of(record: Any, column: str, where: str) -> str:
    """A column that must be text. Raises RowError that begins with `where`."""
    text = record.get(column)
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{where}: {column} must be text, and not empty, got {text!r}; mend or drop the row")
    return text
