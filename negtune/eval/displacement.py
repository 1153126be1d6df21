"""Which pairs would push their own chosen answers down: CHES of every pair under a model, and the pairs to keep.

    scores = ches_scores(model, tokenizer, pairs)
    kept = [pairs[i] for i in least_displacing(scores, share=0.5)]

Likelihood displacement: https://arxiv.org/abs/2410.08847.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from negtune.data.completions import padding_id
from negtune.data.preference import collate_pairs, tokenize_pairs
from negtune.metrics.preference import ches
from negtune.models.forward import attach_scoring, completion_logps_and_hidden
from negtune.models.structure import eval_mode


def ches_scores(
    model: nn.Module,
    tokenizer: Any,
    pairs: Any,
    *,
    max_length: int | None = 1024,
    batch_size: int = 8,
    normalize: bool = True,
) -> list[float | None]:
    """CHES of every pair, in order; None for one that training would leave out (tied, or longer than `max_length`).

    Args:
        model, tokenizer: as they are before training.
        pairs: as `PreferenceTrainer` takes them, not a stream.
        max_length: prompt plus answer; longer answers are cut as in training.
        batch_size: pairs at a time.
        normalize: by the answers' lengths.
    """
    rows = tokenize_pairs(pairs, tokenizer, max_length=max_length, overlong="truncate", in_memory=True)
    attach_scoring(model)
    device, scores = next(model.parameters()).device, [None] * len(pairs)
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            items = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {k: v.to(device) for k, v in collate_pairs(items, padding_id(tokenizer)).items()}
            _, sums = completion_logps_and_hidden(model, batch)
            chosen, rejected = sums.chunk(2)
            lengths = batch["completion_lengths"].chunk(2) if normalize else (None, None)
            for item, score in zip(items, ches(chosen, rejected, *lengths).tolist(), strict=True):
                scores[item["row"]] = score
    return scores


def least_displacing(scores: Sequence[float | None], share: float) -> list[int]:
    """Indices, in order, of the `share` of pairs with the lowest scores, at least one; pairs without score are none.

    Raises:
        ValueError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    known = sorted((score, i) for i, score in enumerate(scores) if score is not None)
    return sorted(i for _, i in known[: max(1, round(share * len(known)))])
