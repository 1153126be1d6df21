"""Prompt/completion rows as token ids, and batches of them.

Formats are TRL's: `prompt` and `completion` are both strings, or both lists of chat messages. Three rules:

- *Boundary.* Plain text: prompt and completion are tokenised apart and their ids joined, which is what generation
  from the prompt sees. Chat: the template writes the prompt with the generation prompt, then the whole conversation;
  the prompt's ids must be a prefix of it.
- *EOS.* A completion ends with exactly one EOS, which is scored. Chat: everything a template writes after the turn's
  EOS (often a newline) is dropped, since no model is asked to produce it. A completion cut at `max_length` has none.
- *Masks* come from lengths, never from `ids != pad`: with `pad == eos` such a mask hides the real EOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Message = Mapping[str, str]


class RowError(ValueError):
    """A data row that cannot be used; the message names it."""


def tokenize_row(row: Mapping[str, Any], tokenizer: Any, *, max_length: int | None = None) -> dict[str, Any]:
    """Token ids of one row.

    Args:
        row: `prompt` and `completion`, both strings or both lists of messages.
        tokenizer: with an EOS token, and a chat template if the row is conversational.
        max_length: prompt plus completion; the completion is cut to fit. None for no limit.

    Returns:
        `prompt_ids`, `completion_ids` (EOS included unless cut), `truncated`.

    Raises:
        RowError: missing column, mixed formats, empty completion, or a prompt that leaves no room for a completion.
    """
    prompt, completion = _columns(row)
    if isinstance(prompt, str):
        prompt_ids, completion_ids = _plain(prompt, completion, tokenizer)
    else:
        prompt_ids, completion_ids = _chat(prompt, completion, tokenizer)
    if not prompt_ids:
        raise RowError("the prompt has no tokens; give at least one character or a chat message")
    truncated = max_length is not None and len(prompt_ids) + len(completion_ids) > max_length
    if truncated:
        completion_ids = completion_ids[: max(0, max_length - len(prompt_ids))]
    if not completion_ids:
        raise RowError(
            f"the prompt alone fills max_length={max_length} ({len(prompt_ids)} tokens); raise it or drop the row"
        )
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "truncated": truncated}


def prompt_token_ids(prompt: str | Sequence[Message], tokenizer: Any) -> list[int]:
    """Ids of a prompt as `tokenize_row` writes them: the text, or the chat up to the open assistant turn."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _template(list(prompt), tokenizer, add_generation_prompt=True)


def content_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int:
    """63-bit content hash of a tokenised row, equal on every machine."""
    text = ",".join(map(str, prompt_ids)) + "|" + ",".join(map(str, completion_ids))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int, padding_side: str = "right") -> dict[str, Tensor]:
    """Pad tokenised rows to one batch.

    Args:
        rows: with `prompt_ids` and `completion_ids`.
        pad_token_id: fills `input_ids`; what it is does not matter to any result.
        padding_side: `right` or `left`.

    Returns:
        `input_ids` and `attention_mask` `[B L]`, `prompt_lengths` and `completion_lengths` `[B]`, `keys` `[B]`
        (content hashes).
    """
    sequences = [list(row["prompt_ids"]) + list(row["completion_ids"]) for row in rows]
    width = max(map(len, sequences))
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, ids in enumerate(sequences):
        where = slice(0, len(ids)) if padding_side == "right" else slice(width - len(ids), width)
        input_ids[i, where] = torch.tensor(ids)
        attention_mask[i, where] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prompt_lengths": torch.tensor([len(row["prompt_ids"]) for row in rows]),
        "completion_lengths": torch.tensor([len(row["completion_ids"]) for row in rows]),
        "keys": torch.tensor([content_key(row["prompt_ids"], row["completion_ids"]) for row in rows]),
    }


def padding_id(tokenizer: Any) -> int:
    """What fills shorter rows: the pad token, or EOS where there is none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _columns(row: Mapping[str, Any]) -> tuple[Any, Any]:
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            raise RowError(f"column {name!r} is missing; a row needs prompt and completion, this one has {sorted(row)}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("prompt and completion must both be text or both be lists of chat messages")
    text = completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)
    if not text.strip():
        raise RowError("the completion is empty; an objective has no token to act on")
    return prompt, completion


def _plain(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    completion_ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    eos = _eos(tokenizer)
    if completion_ids[-1:] != [eos]:
        completion_ids.append(eos)
    return list(tokenizer(prompt)["input_ids"]), completion_ids


def _chat(prompt: Sequence[Message], completion: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt_ids = _template(list(prompt), tokenizer, add_generation_prompt=True)
    full_ids = _template([*prompt, *completion], tokenizer, add_generation_prompt=False)
    if full_ids[: len(prompt_ids)] != prompt_ids:
        raise RowError(
            "the chat template rewrites the prompt when the answer follows (its ids are not a prefix of the "
            "conversation's); use a prefix-preserving template, see trl.get_training_chat_template"
        )
    completion_ids = full_ids[len(prompt_ids) :]
    eos = _eos(tokenizer)
    if eos not in completion_ids:
        return prompt_ids, [*completion_ids, eos]
    last = len(completion_ids) - 1 - completion_ids[::-1].index(eos)
    return prompt_ids, completion_ids[: last + 1]


def _template(messages: list[Message], tokenizer: Any, *, add_generation_prompt: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise RowError("the row is a chat but the tokenizer has no chat template; set one or use plain text columns")
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )["input_ids"]
    return list(ids)


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    return tokenizer.eos_token_id
