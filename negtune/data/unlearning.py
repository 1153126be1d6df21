"""Forget and retain data sets: any accepted input to tokenised rows, with one clear error for a bad row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from negtune.data.completions import RowError, content_key, tokenize_row
from negtune.data.mapping import Overlong, convert_rows, room, tokenizer_digest
from negtune.data.pairing import ForgetRetainDataset, ForgetRetainStream

logger = logging.getLogger(__name__)

_FORMAT = 3  # of the tokenised rows: caches of another one are not read


def prepare_sides(
    data: Mapping[str, Any] | None,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: Overlong,
    with_alternatives: bool,
    retain_needed_by: str | None,
    retain_per_forget: int,
    seed: int,
    in_memory: bool,
) -> ForgetRetainDataset | ForgetRetainStream:
    """Check and tokenise `{"forget": rows, "retain": rows}` and pair the two sides.

    Args:
        data: both sides, each as in `tokenize_side`; retain rows are left out if nothing needs them.
        tokenizer, max_length, overlong, with_alternatives, in_memory: see `tokenize_side`.
        retain_needed_by: name of the objective that holds the retain rows, for the message; None if there is none.
        retain_per_forget, seed: see `ForgetRetainDataset`.

    Raises:
        ValueError, RowError: a side is missing or has a row that cannot be used, or the sides share a row.
    """
    if not isinstance(data, Mapping) or "forget" not in data:
        raise ValueError('train_dataset must be {"forget": rows, "retain": rows}')
    if retain_needed_by is not None and data.get("retain") is None:
        raise ValueError(
            f'retain_loss_type={retain_needed_by!r} needs retain rows: pass train_dataset={{"forget": ..., '
            '"retain": ...}, or set retain_loss_type="none" to unlearn without holding anything'
        )
    convert = partial(tokenize_side, tokenizer=tokenizer, max_length=max_length, overlong=overlong, in_memory=in_memory)
    forget = convert(data["forget"], "forget", with_alternatives=with_alternatives)
    retain = convert(data["retain"], "retain") if retain_needed_by is not None else None
    if not hasattr(forget, "__len__") or (retain is not None and not hasattr(retain, "__len__")):
        return ForgetRetainStream(forget, retain, retain_per_forget=retain_per_forget, seed=seed)
    if retain is not None:
        check_disjoint(forget, retain)
    return ForgetRetainDataset(forget, retain, retain_per_forget=retain_per_forget, seed=seed)


def tokenize_side(
    data: Any,
    side: str,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: Overlong,
    with_alternatives: bool = False,
    in_memory: bool = False,
) -> Any:
    """Tokenise a forget or retain set.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable of rows (held in memory).
        side: `forget` or `retain`, for messages.
        tokenizer: see `tokenize_row`.
        max_length: prompt plus completion.
        overlong: what to do with a longer row: cut its completion, drop the row, or refuse; the same for an
            alternative, and under `drop` a row that has none left goes with it. Counted and logged, except in a stream.
            A prompt that leaves no room for a completion is dropped under `truncate` too.
        with_alternatives: read the column `alternative`, a string or a list of strings.
        in_memory: keep the tokenised rows out of the Arrow cache on disk (private data).

    Returns:
        The same kind of data set with `prompt_ids`, `completion_ids`, `truncated`, `alternatives`, `row`.

    Raises:
        RowError: naming the side, the row and the way out. For a stream, when the row is reached.
    """
    import datasets

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        return _convert(row, index, side, tokenizer, max_length, overlong, with_alternatives)

    settings = [_FORMAT, tokenizer_digest(tokenizer), side, max_length, overlong, with_alternatives]
    rows = convert_rows(data, convert, settings, in_memory)
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda row: not row["dropped"])
    if len(rows) == 0:
        raise RowError(f"the {side} set is empty; an objective needs at least one row")
    dropped, cut, alternatives = (sum(rows[name]) for name in ("dropped", "truncated", "alternatives_overlong"))
    if dropped or cut:
        logger.warning("%s: %d rows longer than max_length=%s cut, %d dropped", side, cut, max_length, dropped)
        rows = rows.select([index for index, gone in enumerate(rows["dropped"]) if not gone])
    if alternatives:
        fate = "dropped" if overlong == "drop" else "cut, so that they have no EOS"
        logger.warning("%s: %d alternative answers longer than max_length=%s %s", side, alternatives, max_length, fate)
    if len(rows) == 0:
        raise RowError(f"every {side} row is longer than max_length={max_length}; raise it")
    return rows


def check_disjoint(forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]]) -> None:
    """Raise `RowError` if a retain row has the same tokens as a forget row: one would undo the other."""
    seen = {content_key(row["prompt_ids"], row["completion_ids"]): row["row"] for row in forget}
    for row in retain:
        key = content_key(row["prompt_ids"], row["completion_ids"])
        if key in seen:
            raise RowError(
                f"retain row {row['row']} is the same as forget row {seen[key]}: it would be pushed down and up at "
                "once; remove it from one of the two sets"
            )


def _convert(
    row: Mapping[str, Any],
    index: int,
    side: str,
    tokenizer: Any,
    max_length: int | None,
    overlong: Overlong,
    with_alternatives: bool,
) -> dict[str, Any]:
    try:
        converted = tokenize_row(row, tokenizer, max_length=None)
        length = len(converted["prompt_ids"]) + len(converted["completion_ids"])
        dropped = False
        if max_length is not None and length > max_length:
            dropped = overlong == "drop" or len(converted["prompt_ids"]) >= max_length
            if overlong == "error":
                raise RowError(f"{length} tokens are more than max_length={max_length}; raise it or set overlong")
            if not dropped:
                converted = tokenize_row(row, tokenizer, max_length=max_length)
        alternatives = [
            tokenize_row({"prompt": row["prompt"], "completion": text}, tokenizer, max_length=None)
            for text in (_alternatives(row) if with_alternatives and not dropped else [])
        ]
        fitting = [a for a in alternatives if len(a["completion_ids"]) <= room(a, max_length)]
        if overlong == "error" and len(fitting) < len(alternatives):
            raise RowError(f"an alternative makes it longer than max_length={max_length}; raise it or set overlong")
    except RowError as error:
        raise RowError(f"{side} row {index}: {error}") from None
    if with_alternatives and not dropped and not alternatives:
        raise RowError(
            f"{side} row {index} has no alternative and this objective needs one on every row; add the column "
            "alternative with a string or a list of strings (for instance a refusal)"
        )
    kept = [
        {"prompt_ids": a["prompt_ids"], "completion_ids": a["completion_ids"][: room(a, max_length)]}
        for a in (fitting if overlong == "drop" else alternatives)
    ]
    return {
        **converted,
        "alternatives": kept,
        "alternatives_overlong": len(alternatives) - len(fitting),
        "dropped": dropped or (bool(alternatives) and not kept),
        "row": index,
    }


def _alternatives(row: Mapping[str, Any]) -> list[Any]:
    """The `alternative` column as a list of completions in the row's own format."""
    given = row.get("alternative")
    if given is None:
        return []
    chat = not isinstance(row["prompt"], str)
    if isinstance(given, str) or (given and isinstance(given[0], Mapping)):
        given = [given]
    return [[{"role": "assistant", "content": a}] if chat and isinstance(a, str) else a for a in given]
