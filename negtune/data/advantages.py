"""Completions with credit: rows whose steps have advantages, to tokenised rows and batches.

One column carries the credit, whoever gave it: `step_advantages`, a number per step, or None where a step was not
judged. Text rows say what their steps are by `steps` (texts that join to the completion), tokenised rows by `step_ends`
(index behind each step's last token); a completion with one `advantage` is one step. Step labels (`step_labels`: 1
right, 0 or -1 wrong, None) are turned into advantages by `credit.advantages_from_labels`; so is
`first_error`, the index from 0 of the first wrong step or -1 (ProcessBench's label).
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negtune.credit import advantages_from_labels, labels_from_first_error
from negtune.data.completions import RowError, collate, tokenize_row
from negtune.data.mapping import Overlong, convert_rows, room, tokenizer_digest
from negtune.data.steps import StepError, joined_with, token_steps

logger = logging.getLogger(__name__)

CREDIT = ("step_advantages", "step_labels", "first_error", "advantage")
_FORMAT = 1  # of the tokenised rows: caches of another one are not read


def tokenize_advantages(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: Overlong,
    name: str = "train",
    in_memory: bool = False,
) -> Any:
    """Tokenise rows with credit.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable of rows, each with

            - `prompt` and `completion`, text or chat; or `prompt_ids` and `completion_ids`, taken as they are;
            - one of `step_advantages`, `step_labels`, `first_error`, `advantage`; all but the last with `steps` (texts;
              without a `completion` they are joined by line ends) or `step_ends`;
            - optionally `finished`: False for a text that stops before its end and gets no EOS;
            - optionally, in tokenised rows, `behaviour_logps`, a number per token, and `temperature` of the draw.
        tokenizer: see `tokenize_row`.
        max_length: prompt plus completion.
        overlong: what to do where that is exceeded: cut the completion, drop the row, or refuse. Counted and logged,
            except in a stream.
        name: of the data set, for messages.
        in_memory: keep the tokenised rows out of the Arrow cache on disk (private data).

    Returns:
        The same kind of data set with `prompt_ids`, `completion_ids`, `step_ends`, `step_advantages`,
        `behaviour_logps` (None without), `row`. Rows none of whose steps was judged are left out and counted.

    Raises:
        RowError: naming the row and the way out. For a stream, when the row is reached.
    """
    import datasets

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            return {**_convert(row, tokenizer, max_length, overlong), "row": index}
        except (RowError, StepError) as error:
            raise RowError(f"{name} row {index}: {error}") from None

    if not isinstance(data, datasets.IterableDataset):
        _refuse_neutral_labels(data, name)
    settings = ["advantages", _FORMAT, tokenizer_digest(tokenizer), name, max_length, overlong]
    rows = convert_rows(data, convert, settings, in_memory)
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda row: not row["dropped"] and not row["unknown"])
    if len(rows) == 0:
        raise RowError(f"the {name} set is empty; it needs at least one completion")
    dropped, cut, unknown = (sum(rows[column]) for column in ("dropped", "truncated", "unknown"))
    if dropped or cut:
        logger.warning("%s: %d completions longer than max_length=%s cut, %d dropped", name, cut, max_length, dropped)
    if unknown:
        logger.warning("%s: %d completions without a judged step left out", name, unknown)
    kept = [i for i, (gone, bare) in enumerate(zip(rows["dropped"], rows["unknown"], strict=True)) if not gone | bare]
    if not kept:
        raise RowError(
            f"no {name} completion is left: {dropped} are longer than max_length={max_length}, {unknown} have no "
            "judged step"
        )
    return rows.select(kept) if len(kept) < len(rows) else rows


def collate_advantages(
    items: Sequence[Mapping[str, Any]], pad_token_id: int, *, temperature: float | None = None, ratios: bool = False
) -> dict[str, Tensor]:
    """One batch of completions with credit on their tokens.

    Args:
        items: tokenised rows.
        pad_token_id: of the tokenizer.
        temperature: at which log-probabilities are trained. A row drawn at another one has no behaviour policy to
            compare with: its `behaviour_logps` play no part.
        ratios: the objective needs them; such a row is refused.

    Returns:
        `collate`'s tensors; `advantages` (float32), `known`, `steps` (-1 behind the end) `[B T]`; `behaviour_logps`
        `[B T]` (float32, 0 behind the end) if every row has them; `rows` `[B]` (row numbers in the data set).

    Raises:
        RowError: for ratios of two distributions.
    """
    batch = collate(items, pad_token_id)
    shape = len(items), int(batch["completion_lengths"].max())
    advantages, known = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    steps = torch.full(shape, -1)
    for i, item in enumerate(items):
        start = 0
        for step, (end, advantage) in enumerate(zip(item["step_ends"], item["step_advantages"], strict=True)):
            steps[i, start:end] = step
            if advantage is not None:
                advantages[i, start:end], known[i, start:end] = advantage, True
            start = end
    batch |= {"advantages": advantages, "known": known, "steps": steps}
    logps = [item["behaviour_logps"] for item in items if _behaves(item, temperature, ratios)]
    if len(logps) == len(items):
        batch["behaviour_logps"] = torch.zeros(shape)
        for i, values in enumerate(logps):
            batch["behaviour_logps"][i, : len(values)] = torch.tensor(values)
    batch["rows"] = torch.tensor([item.get("row", -1) for item in items])
    return batch


def _behaves(item: Mapping[str, Any], temperature: float | None, ratios: bool) -> bool:
    """Whether a row's log-probabilities are those of a behaviour policy."""
    if item.get("behaviour_logps") is None:
        return False
    drawn = item.get("temperature")
    if temperature is None or drawn is None or drawn == temperature:
        return True
    if ratios:
        raise RowError(
            f"row {item.get('row', item.get('key'))} was drawn at temperature {drawn:g} and temperature is "
            f"{temperature:g}: the ratio would be one of two distributions; set temperature to that of the draw"
        )
    return False


def _convert(row: Mapping[str, Any], tokenizer: Any, max_length: int | None, overlong: Overlong) -> dict[str, Any]:
    kind = _kind_of_credit(row)
    ids = _token_ids(row, tokenizer)
    completion_ids = ids["completion_ids"]
    ends = _step_ends(row, completion_ids, tokenizer, kind)
    credit = _credit_of(row, kind, len(ends))
    if len(credit) != len(ends):
        raise RowError(f"{len(credit)} {kind} for {len(ends)} steps; give one per step, None where not judged")
    if kind == "step_labels":
        try:
            credit = advantages_from_labels(credit)
        except ValueError as error:
            raise RowError(str(error)) from None
    for i, advantage in enumerate(credit):
        if advantage is not None and not (isinstance(advantage, numbers.Real) and math.isfinite(advantage)):
            raise RowError(
                f"the advantage of step {i + 1} is {advantage!r}; give a finite number, or None for a step that was "
                "not judged"
            )
    behaviour = _behaviour_logps(row, len(completion_ids))
    space = room(ids, max_length)
    too_long = len(completion_ids) > space
    if too_long and overlong == "error":
        length = len(ids["prompt_ids"]) + len(completion_ids)
        raise RowError(f"{length} tokens are more than max_length={max_length}; raise it or set overlong")
    dropped = too_long and (overlong == "drop" or space <= 0)
    length = len(completion_ids) if dropped or not too_long else space
    fit = sum(end < length for end in ends) + 1
    kept = credit[:fit]
    return {
        "prompt_ids": ids["prompt_ids"],
        "completion_ids": completion_ids[:length],
        "step_ends": [min(end, length) for end in ends[:fit]],
        "step_advantages": [None if advantage is None else float(advantage) for advantage in kept],
        "behaviour_logps": None if behaviour is None else behaviour[:length],
        "temperature": _temperature(row),
        "dropped": dropped,
        "truncated": too_long and not dropped,
        "unknown": not dropped and all(advantage is None for advantage in kept),
    }


def _credit_of(row: Mapping[str, Any], kind: str, steps: int) -> list[Any]:
    if kind == "advantage":
        return [row.get("advantage")]
    if kind == "first_error":
        try:
            return list(advantages_from_labels(labels_from_first_error(int(row["first_error"]), steps)))
        except ValueError as error:
            raise RowError(str(error)) from None
    given = list(row[kind])
    if kind == "step_labels" and {0, -1} <= _integers(given):
        raise RowError(f"step_labels have 0 beside -1: {_NEUTRAL}")
    return given


def _refuse_neutral_labels(data: Any, name: str) -> None:
    """Raise RowError for labels in which 0 cannot mean wrong, since rows beside have -1 for it."""
    if not isinstance(data, Sequence) and "step_labels" not in (getattr(data, "column_names", None) or ()):
        return
    rows = data["step_labels"] if hasattr(data, "column_names") else [row.get("step_labels") for row in data]
    first: dict[int, int] = {}
    for i, labels in enumerate(rows):
        for label in _integers(labels or ()):
            first.setdefault(label, i)
    if {0, -1} <= set(first) and first[0] != first[-1]:
        raise RowError(f"step_labels have 0 in {name} row {first[0]} and -1 in row {first[-1]}: {_NEUTRAL}")


def _integers(labels: Iterable[Any]) -> set[int]:
    return {int(label) for label in labels if isinstance(label, numbers.Integral) and not isinstance(label, bool)}


_NEUTRAL = "where 0 is neutral, as in PRM800K, give None for it"


def _temperature(row: Mapping[str, Any]) -> float:
    value = 1.0 if row.get("temperature") is None else float(row["temperature"])
    if row.get("behaviour_logps") is not None and value <= 0:
        raise RowError("behaviour_logps of a greedy draw (temperature 0) give no ratio; leave them out")
    return value


def _kind_of_credit(row: Mapping[str, Any]) -> str:
    found = [name for name in CREDIT if row.get(name) is not None]
    if not found and "advantage" in row:
        return "advantage"  # None: not judged
    if len(found) != 1:
        raise RowError(f"a row needs one of {', '.join(CREDIT)}, this one has {' and '.join(found) or 'none'}")
    return found[0]


def _token_ids(row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    if row.get("prompt_ids") is not None:
        ids = {name: [int(i) for i in row.get(name) or ()] for name in ("prompt_ids", "completion_ids")}
        for name, values in ids.items():
            if not values:
                raise RowError(f"{name} is empty; a tokenised row needs prompt_ids and completion_ids")
        return ids
    if row.get("completion") is None and row.get("steps"):
        row = {**row, "completion": _completion_of_steps(row)}
    ids = tokenize_row(row, tokenizer)
    if not row.get("finished", True):
        ids["completion_ids"] = ids["completion_ids"][:-1]
    return ids


def _completion_of_steps(row: Mapping[str, Any]) -> Any:
    text = "".join(joined_with(row["steps"], "" if row["steps"][0].endswith("\n") else "\n"))
    return text if isinstance(row.get("prompt"), str) else [{"role": "assistant", "content": text}]


def _step_ends(row: Mapping[str, Any], completion_ids: list[int], tokenizer: Any, kind: str) -> list[int]:
    if kind == "advantage":
        return [len(completion_ids)]
    if row.get("step_ends") is not None:
        ends = [int(end) for end in row["step_ends"]]
        if ends != sorted(set(ends)) or ends[:1] == [0] or ends[-1:] != [len(completion_ids)]:
            raise RowError(
                f"step_ends must rise to the number of completion tokens, {len(completion_ids)}, and none be empty; "
                f"got {ends}"
            )
        return ends
    if row.get("steps") is None:
        raise RowError(f"{kind} needs steps (texts) or step_ends (token indices) to say what the steps are")
    given = list(row["steps"])
    if row.get("completion") is None and len(given) > 1 and not given[0].endswith("\n"):
        given = joined_with(given, "\n")
    ends = token_steps(completion_ids, tokenizer, given).ends
    if len(ends) != len(given):
        raise RowError(f"{len(given)} steps end with {len(ends)} different tokens; join steps that share a token")
    return ends


def _behaviour_logps(row: Mapping[str, Any], tokens: int) -> list[float] | None:
    if row.get("behaviour_logps") is None:
        return None
    values = [float(value) for value in row["behaviour_logps"]]
    if row.get("prompt_ids") is None:
        raise RowError("behaviour_logps belong to tokens; give prompt_ids and completion_ids instead of texts")
    if len(values) != tokens:
        raise RowError(
            f"{len(values)} behaviour_logps for {tokens} completion tokens; give one per token, EOS included"
        )
    if not all(math.isfinite(value) and value <= 0 for value in values):
        raise RowError("behaviour_logps must be finite and at most 0: they are log-probabilities")
    return values
