"""What trainers read, made from judged solutions: pairs that part at the first pit, and rows with step advantages.

Both are token ids: a rejected step is unfinished and gets no EOS, a prefix stays within the open assistant turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from negtune.data.steps import Splitter, token_steps
from negtune.rollouts.store import RecordStore

Chosen = Literal["shortest", "all"]


def pit_pairs(
    judged: Iterable[Mapping[str, Any]],
    stores: Sequence[RecordStore],
    verdicts: RecordStore,
    name: str,
    tokenizer: Any,
    splitter: Splitter,
    *,
    chosen: Chosen = "shortest",
    min_distance: float = 0.0,
    dropped: Counter[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Per-step preference pairs: behind the steps before the pit, a continuation that ended well over the pit itself.

    Args:
        judged: records of `steps.judgement`.
        stores: of the solutions, and of the rollouts from their states.
        verdicts, name: store, and the verifier whose verdicts count.
        tokenizer, splitter: as the solutions were cut.
        chosen: the shortest correct continuation (Self-Explore), or one pair for each of them.
        min_distance: of the two steps, as `edit_distance` of their tokens, 0 to 1. Steps of the same words are always
            too near (then it was not the step that failed); above 0 leaves out steps that hardly differ, whose
            common tokens DPO would push down with the wrong ones. In arithmetic one digit is the whole difference.
        dropped: counts why solutions gave no pair: no pit, no correct continuation, or only such as begin with a step
            that is too near; and pairs that were there already (solutions of a prompt often fail in the same words).

    Yields:
        `prompt_ids` (prompt and the steps before the pit), `chosen_ids` (to the end, EOS included), `rejected_ids` (the
        pit alone), `chosen_step` and `rejected_step` ([start, end) of the differing step in each, for `step_dpo`),
        `pit`, `rollout`, and `prompt`, `prefix`, `chosen`, `rejected` as text for people to read.
    """
    dropped = dropped if dropped is not None else Counter()
    judged = list(judged)
    dropped.update(record["reason"] for record in judged if record["pit"] is None)
    with_pit = [record for record in judged if record["pit"] is not None]
    continuations = _correct_continuations(with_pit, stores, verdicts, name)
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for record in with_pit:
        _refuse_other_split(record, tokenizer, splitter)
        pit = record["pit"]
        start, end = ([0, *record["step_ends"]])[pit - 1 : pit + 1]
        prefix, rejected_ids = record["completion_ids"][:start], record["completion_ids"][start:end]
        rejected = record["steps"][pit - 1]
        found = continuations.get(_state(record["prompt"], prefix), [])
        first_steps = [token_steps(r["completion_ids"], tokenizer, splitter) for r in found]
        other = [(r, s) for r, s in zip(found, first_steps, strict=True) if s.texts[0].split() != rejected.split()]
        fit = [
            (r, s) for r, s in other if edit_distance(r["completion_ids"][: s.ends[0]], rejected_ids) >= min_distance
        ]
        if not fit:
            dropped[_why_not(found, other)] += 1
            continue
        if chosen == "shortest":
            fit = [min(fit, key=lambda pair: len(pair[0]["completion_ids"]))]
        for continuation, steps in fit:
            prompt_ids = [*record["prompt_ids"], *prefix]
            pair = tuple(prompt_ids), tuple(continuation["completion_ids"]), tuple(rejected_ids)
            if pair in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(pair)
            yield {
                "prompt_ids": prompt_ids,
                "chosen_ids": continuation["completion_ids"],
                "rejected_ids": rejected_ids,
                "chosen_step": [0, steps.ends[0]],
                "rejected_step": [0, len(rejected_ids)],
                "pit": pit,
                "rollout": record["rollout"],
                "prompt": record["prompt"],
                "prefix": "".join(record["steps"][: pit - 1]),
                "chosen": continuation["text"],
                "rejected": rejected,
            }


def advantage_rows(
    judged: Iterable[Mapping[str, Any]], *, dropped: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows for `AdvantageTrainer`: `prompt_ids`, `completion_ids`, `step_ends`, `step_advantages`, `behaviour_logps`.

    Args:
        judged: records of `steps.judgement` with values.
        dropped: counts why solutions gave no row: prompts that are never or always solved, no known advantage.

    `behaviour_logps` are left out where they could not give a ratio (drawn greedily, or from a cut distribution).
    """
    dropped = dropped if dropped is not None else Counter()
    for record in judged:
        if record["step_advantages"] is None:
            raise ValueError(
                f"solution {record['rollout']} was searched with strategy {record['search']['strategy']}, which gives "
                "no values; use all or adaptive"
            )
        correct, wrong, _ = record["tallies"][0]
        if correct + wrong and not (correct and wrong):
            dropped["always solved" if correct else "never solved"] += 1
        elif all(advantage is None for advantage in record["step_advantages"]):
            dropped["unknown"] += 1
        else:
            row = {name: record[name] for name in ("prompt_ids", "completion_ids", "step_ends", "step_advantages")}
            if not record["truncated"] and record["temperature"] > 0:
                row |= {"behaviour_logps": record["logps"], "temperature": record["temperature"]}
            yield row


def _refuse_other_split(record: Mapping[str, Any], tokenizer: Any, splitter: Splitter) -> None:
    ends = token_steps(record["completion_ids"], tokenizer, splitter).ends
    if ends != record["step_ends"]:
        raise ValueError(
            f"solution {record['rollout']} was searched with steps that end at tokens {record['step_ends']}, this "
            f"splitter ends them at {ends}; use the one of the search"
        )


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Insertions, deletions and substitutions of tokens that make `b` of `a` (Levenshtein), over the longer's length.

    0 for equal sequences, 1 where nothing can be kept.
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1] / max(1, len(a), len(b))


def _why_not(found: Sequence[Any], other: Sequence[Any]) -> str:
    if not found:
        return "no correct continuation"
    return "every correct continuation begins " + ("too near to the pit" if other else "with the pit")


def _state(prompt: Any, prefix: Sequence[int] | str) -> str:
    return f"{prompt}|{','.join(map(str, prefix))}"


def _correct_continuations(
    judged: Sequence[Mapping[str, Any]], stores: Sequence[RecordStore], verdicts: RecordStore, name: str
) -> dict[str, list[dict[str, Any]]]:
    """By the state before each pit: the rollouts from there that ended well."""
    states = set()
    for record in judged:
        start = [0, *record["step_ends"]][record["pit"] - 1]
        states.add(_state(record["prompt"], record["completion_ids"][:start]))
    correct = {r["rollout"] for r in verdicts if r["verifier"] == name and r["outcome"] == "correct"}
    policies = {record["context"].get("policy") for record in judged}
    found: dict[str, list[dict[str, Any]]] = {}
    for rollout in (rollout for store in stores for rollout in store):
        state = _state(rollout["prompt"], rollout["prefix"])
        if rollout["key"] in correct and state in states and rollout["policy"] in policies:
            found.setdefault(state, []).append(rollout)
    return found
