"""Preference pairs: any accepted input to tokenised rows, and batches of chosen above rejected answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negtune.data.completions import RowError, collate, tokenize_row
from negtune.data.mapping import Overlong, convert_rows, room, tokenizer_digest

logger = logging.getLogger(__name__)

PAIR = ("chosen", "rejected")
STEPS = ("chosen_step", "rejected_step")
_FORMAT = 2  # of the tokenised rows: caches of another one are not read


def tokenize_pairs(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: Overlong,
    name: str = "preference",
    in_memory: bool = False,
) -> Any:
    """Tokenise preference pairs.

    Args:
        data: `datasets.Dataset`, `datasets.IterableDataset`, or an iterable of rows (held in memory) with `prompt`,
            `chosen` and `rejected`, text or chat messages; without `prompt`, what both answers begin with is the prompt
            (TRL's implicit prompt). Or tokenised rows with `prompt_ids`, `chosen_ids`, `rejected_ids`, taken as they
            are: an answer without EOS stays unfinished; `chosen_step` and `rejected_step`, [start, end) in each
            answer, name the step that a per-step objective is about.
        tokenizer: see `tokenize_row`.
        max_length: prompt plus the longer answer.
        overlong: what to do where that is exceeded: cut the answers, drop the pair, or refuse. Counted and logged,
            except in a stream. A prompt that leaves no room for an answer is dropped under `truncate` too.
        name: of the data set, for messages.
        in_memory: keep the tokenised rows out of the Arrow cache on disk (private data).

    Returns:
        The same kind of data set with `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`, and the steps if rows have
        them. Pairs whose answers have the
        same tokens, also after cutting, are left out and counted: they say nothing.

    Raises:
        RowError: naming the row and the way out. For a stream, when the row is reached.
    """
    import datasets

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            return {**_convert(row, tokenizer, max_length, overlong), "row": index}
        except RowError as error:
            raise RowError(f"{name} row {index}: {error}") from None

    settings = ["pairs", _FORMAT, tokenizer_digest(tokenizer), name, max_length, overlong]
    rows = convert_rows(data, convert, settings, in_memory)
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(lambda row: not row["dropped"] and not row["tied"])
    if len(rows) == 0:
        raise RowError(f"the {name} set is empty; it needs at least one pair")
    dropped, cut, tied = (sum(rows[column]) for column in ("dropped", "truncated", "tied"))
    if dropped or cut:
        logger.warning("%s: %d pairs longer than max_length=%s cut, %d dropped", name, cut, max_length, dropped)
    if tied:
        logger.warning("%s: %d pairs with two equal answers left out", name, tied)
    kept = [i for i, (gone, equal) in enumerate(zip(rows["dropped"], rows["tied"], strict=True)) if not gone | equal]
    if not kept:
        raise RowError(f"no {name} pair is left: {dropped} are longer than max_length={max_length}, {tied} are ties")
    return rows.select(kept) if len(kept) < len(rows) else rows


def collate_pairs(items: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of `2 B` rows: the chosen answers, then the rejected ones, for a single forward pass.

    Returns:
        `collate`'s tensors; `rows` `[B]` (row numbers in the data set, -1 for fresh samples); `counted` `[B]`, False
        for fillers; `step_mask` `[2 B, T]`, True on the step that each answer is about, if every row says which it is;
        `behaviour_logps` `[2 B, T]`, 0 behind the end, if any row has them, NaN in rows that have none; `ref_logps`
        `[2 B, T]` likewise, if every row has them.
    """
    batch = collate([answer(item, side) for side in PAIR for item in items], pad_token_id)
    batch["counted"] = torch.tensor([not item.get("filler", False) for item in items])
    shape = 2 * len(items), int(batch["completion_lengths"].max())
    for name, column in (("behaviour_logps", "behaviour"), ("ref_logps", "ref")):
        given = [item.get(f"{side}_{column}") for side in PAIR for item in items]
        if any(logps is not None for logps in given) and (name == "behaviour_logps" or None not in given):
            batch[name] = _padded(given, shape)
    spans = [item.get(f"{side}_step") for side in PAIR for item in items]
    if all(span is not None for span in spans):
        places = torch.arange(int(batch["completion_lengths"].max()))
        bounds = torch.tensor(spans)
        batch["step_mask"] = (places >= bounds[:, :1]) & (places < bounds[:, 1:])
    return {**batch, "rows": torch.tensor([item.get("row", -1) for item in items])}


def pair_units(rows: Any, *, by_prompt: bool, shared: bool) -> tuple[list[list[int]], list[int]]:
    """Pairs, or groups of pairs with one prompt, and the tokens each costs: `shared` prompts once, else padded rows."""
    prompts, chosen, rejected = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    units: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        units.setdefault(tuple(prompt) if by_prompt else i, []).append(i)
    sizes = []
    for members in units.values():
        answers = [len(side[i]) for i in members for side in (chosen, rejected)]
        prompt = len(prompts[members[0]])
        sizes.append(prompt + sum(answers) if shared else (prompt + max(answers)) * len(answers))
    return list(units.values()), sizes


def _padded(rows: Sequence[Sequence[float] | None], shape: tuple[int, int]) -> Tensor:
    """`[2 B, T]`, 0 behind the end of a row, NaN where there is none."""
    out = torch.zeros(shape)
    for i, values in enumerate(rows):
        if values is None:
            out[i] = torch.nan
        else:
            out[i, : len(values)] = torch.tensor(values)
    return out


def answer(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """One side of a tokenised pair as a prompt/completion row."""
    return {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"]}


def _convert(row: Mapping[str, Any], tokenizer: Any, max_length: int | None, overlong: Overlong) -> dict[str, Any]:
    ids = _tokenised(row) if row.get("prompt_ids") is not None else _tokenise(_explicit(row), tokenizer)
    prompt_ids = ids["prompt_ids"]
    space = room(ids, max_length)
    answers = {side: ids[f"{side}_ids"] for side in PAIR}
    too_long = max(map(len, answers.values())) > space
    if too_long and overlong == "error":
        length = len(prompt_ids) + max(map(len, answers.values()))
        raise RowError(f"{length} tokens are more than max_length={max_length}; raise it or set overlong")
    dropped = too_long and (overlong == "drop" or space <= 0)
    cut = {f"{side}_ids": ids if dropped else ids[:space] for side, ids in answers.items()}
    tied = not dropped and cut["chosen_ids"] == cut["rejected_ids"]
    steps = {name: ids[name] for name in STEPS if name in ids}
    if not dropped and any(end > len(cut[name.replace("_step", "_ids")]) for name, (_, end) in steps.items()):
        raise RowError(f"a step does not fit max_length={max_length}; raise it, or set overlong to drop")
    flags = {"dropped": dropped, "truncated": too_long and not dropped, "tied": tied}
    return {"prompt_ids": prompt_ids, **cut, **steps, **flags}


def _tokenise(row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    pair = {}
    for side in PAIR:
        try:
            pair[side] = tokenize_row({"prompt": row["prompt"], "completion": row[side]}, tokenizer)
        except RowError as error:
            raise RowError(f"{side}: {error}") from None
    answers = {f"{side}_ids": pair[side]["completion_ids"] for side in PAIR}
    return {"prompt_ids": pair["chosen"]["prompt_ids"], **answers}


def _tokenised(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Ids, and the steps in them, of a row that has been tokenised before."""
    ids = {name: [int(i) for i in row.get(name) or ()] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    for name, values in ids.items():
        if not values:
            raise RowError(f"{name} is empty; a tokenised pair needs prompt_ids, chosen_ids and rejected_ids")
    given = [name for name in STEPS if row.get(name) is not None]
    if len(given) == 1:
        raise RowError(f"the row has {given[0]} alone; give the step of both answers, or of none")
    for name in given:
        span, length = list(row[name]), len(ids[name.replace("_step", "_ids")])
        if len(span) != 2 or not 0 <= span[0] < span[1] <= length:
            raise RowError(f"{name} must be [start, end) within the {length} tokens of its answer, got {span}")
        ids[name] = span
    return ids


def _explicit(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `prompt`, `chosen` and `rejected`, the implicit prompt made explicit.

    A text `prompt` beside two chats is their first question in words (the layout of UltraFeedback), and implicit too.
    """
    missing = [name for name in PAIR if row.get(name) is None]
    if missing:
        raise RowError(f"column {missing[0]!r} is missing; a pair needs chosen and rejected, this has {sorted(row)}")
    both = {name: row[name] for name in PAIR}
    if isinstance(both["chosen"], str) != isinstance(both["rejected"], str):
        raise RowError("chosen and rejected must both be text or both be lists of chat messages")
    chats_with_text = isinstance(row.get("prompt"), str) and not isinstance(both["chosen"], str)
    if row.get("prompt") is not None and not chats_with_text:
        return {"prompt": row["prompt"], **both}
    from trl import extract_prompt

    if not both["chosen"] or not both["rejected"]:
        raise RowError("chosen or rejected is empty; an objective has no token to act on")
    row = extract_prompt(both)
    if not row["prompt"]:
        raise RowError("chosen and rejected share no beginning that could be the prompt; add the column prompt")
    return row
