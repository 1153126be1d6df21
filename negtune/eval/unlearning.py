"""What a model still knows of the forget set, and whether it kept the rest: rows -> records -> metrics.

A set is a list of rows `{"prompt", "completion"}` (text or chat messages), optionally with `paraphrase`, the answer in
other words, and `perturbed`, a list of wrong answers (both text, or in the row's own format). Names with a meaning:

- `forget`: the rows to be forgotten; its truth ratio is aggregated as mean min(R, 1/R), that of other sets as
  mean max(0, 1 - R).
- `real_authors`, `world_facts`: their probability is normalised by the wrong answers, as in TOFU; the plain one is
  `raw_probability`.
- `non_members`: rows like the forget rows that no model was trained on; they serve `min_k_auc` and nothing else.

Every completion ends with an EOS that counts as one of its tokens, in all metrics (see `negtune.metrics.unlearning`).
Truth ratios are geometric (log-losses averaged), as in the released code behind the published forget qualities; the
records keep each answer's loss for the other convention. Answers are generated greedily.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
from torch import nn

from negtune.data.completions import RowError
from negtune.eval.scoring import generate_answers, score_completions, tokenize_completion
from negtune.metrics import unlearning as metrics
from negtune.models.reference import eval_mode

FORGET = "forget"
NON_MEMBERS = "non_members"
NORMALIZED_SETS = ("real_authors", "world_facts")

Row = Mapping[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Outcome of `evaluate`.

    Args:
        records: one per row, in the order of the sets: `set`, `row`, `key` (content hash), the texts, and the row's
            numbers. Losses (`nll`, `paraphrase_nll`, `perturbed_nll`) are per token.
        metrics: flat names to numbers, e.g. `forget/probability`, `model_utility`.
        notes: what a reader of the numbers has to know, e.g. how many rows were cut.
    """

    records: list[Record]
    metrics: dict[str, float]
    notes: list[str]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, Iterable[Row]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 200,
    generate: bool = True,
    oracle: Mapping[str, float] | None = None,
    redact: bool = False,
) -> Evaluation:
    """Score every row of every set, teacher-forced and (with `generate`) by a greedy answer.

    Run it on all processes at once: they share the rows and all get the same result. The model's train/eval modes are
    restored and no random number is drawn.

    Args:
        model: causal LM, plain, with an adapter, or wrapped for several processes.
        tokenizer: with an EOS token, and a chat template if rows are chats.
        sets: name to rows; see the module's description.
        batch_size: sequences per forward pass. Changes nothing but speed and memory.
        max_length: prompt plus completion, as in training; longer completions are cut, which the notes count.
        max_new_tokens: length limit of a generated answer.
        generate: without it there is no ROUGE and hence no model utility.
        oracle: `oracle_truth_ratios` of the retain-only model on the same forget rows; gives forget quality.
        redact: keep prompts, answers and generations out of the records; content hashes and numbers stay.

    Raises:
        ValueError: a set that cannot be scored, or an oracle of other rows; before the model is used. After it, if the
            model's log-probabilities are not finite.
    """
    rows = _flatten(sets)
    _check_oracle(rows, oracle)
    completions = [_completions(name, index, row) for name, index, row in rows]
    asked = [generate and name != NON_MEMBERS for name, _, _ in rows]
    prompts = [row["prompt"] for (_, _, row), ask in zip(rows, asked, strict=True) if ask]
    with eval_mode(model):
        scores = iter(score_completions(model, tokenizer, list(chain(*completions)), batch_size, max_length))
        answers = iter(generate_answers(model, tokenizer, prompts, batch_size, max_new_tokens))
    records = [
        _record(name, index, row, list(islice(scores, len(own))), next(answers) if ask else None, redact)
        for (name, index, row), own, ask in zip(rows, completions, asked, strict=True)
    ]
    return Evaluation(records, *aggregate(records, oracle))


def check_sets(
    sets: Mapping[str, Iterable[Row]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    oracle: Mapping[str, float] | None = None,
) -> None:
    """Raise now what `evaluate` would raise on these sets, without a model: for callers that evaluate much later."""
    if not sets:
        return
    rows = _flatten(sets)
    _check_oracle(rows, oracle)
    for item in chain(*(_completions(name, index, row) for name, index, row in rows)):
        tokenize_completion(item, tokenizer, max_length)


def aggregate(
    records: Sequence[Mapping[str, Any]], oracle: Mapping[str, float] | None = None
) -> tuple[dict[str, float], list[str]]:
    """Metrics and notes of a list of records, for instance of a `records.jsonl` read back.

    Args:
        records: from `Evaluation.records`.
        oracle: see `evaluate`.
    """
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["nll"] is None or not math.isfinite(record["nll"]):
            raise ValueError(
                f"the model gives {record['set']} row {record['row']} no finite log-probability; its weights are broken"
            )
        by_set.setdefault(record["set"], []).append(record)
    out: dict[str, float] = {}
    notes: list[str] = []
    for name, group in by_set.items():
        _set_metrics(name, group, out)
        notes += _set_notes(name, group)
    if all(name in out for name in metrics.UTILITY_NAMES):
        out["model_utility"] = metrics.model_utility(out)
    if NON_MEMBERS in by_set and FORGET in by_set:
        out["min_k_auc"] = metrics.membership_auc(
            _column(by_set[FORGET], "min_k"), _column(by_set[NON_MEMBERS], "min_k")
        )
    if oracle is not None:
        _forget_quality(by_set.get(FORGET, []), oracle, out, notes)
    return out, notes


def oracle_truth_ratios(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Truth ratio of each forget row by content hash: what `evaluate(oracle=)` takes, from the retain-only model."""
    ratios = {record["key"]: record["truth_ratio"] for record in records if record["set"] == FORGET}
    if not ratios or any(ratio is None for ratio in ratios.values()):
        raise ValueError("an oracle needs records of a forget set with perturbed answers")
    return ratios


def row_key(row: Row) -> str:
    """Content hash of a row, whatever its position: 16 hexadecimal digits over prompt and all answers."""
    content = [row["prompt"], row["completion"], row.get("paraphrase") or None, row.get("perturbed") or None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def better(name: str) -> Literal["higher", "lower"] | None:
    """Which way a metric of `evaluate` should go; None where a middle value is the aim.

    Sets whose name starts with `forget` (`forget_unseen`) are to be forgotten, all others to be kept.
    """
    if name in ("min_k_auc", f"{FORGET}/truth_ratio"):
        return None
    if name.startswith("forget_quality"):
        return "higher"
    known_means_higher = not name.endswith("/nll")
    return "higher" if known_means_higher != name.startswith(FORGET) else "lower"


def text_of(side: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt or completion as a person reads it: the text, or the chat messages' texts."""
    return side if isinstance(side, str) else "\n".join(str(message.get("content") or "") for message in side)


def rouge_l_recall(gold: str, answer: str) -> float | None:
    """Share of the gold answer's words that the generated one has in the same order (ROUGE-L recall, stemmed).

    Lin 2004, https://aclanthology.org/W04-1013 . 0 for an empty answer; None if the gold answer has no a-z or 0-9,
    the only characters that the `rouge-score` package reads.
    """
    if not re.search("[a-z0-9]", gold.lower()):
        return None
    return float(_rouge_scorer().score(gold, answer)["rougeL"].recall)


# --- rows ----------------------------------------------------------------------------------------------------------


def _flatten(sets: Mapping[str, Iterable[Row]]) -> list[tuple[str, int, Row]]:
    """All rows with their set and position, once it is sure that each set can be scored as a whole."""
    rows = []
    for name, group in sets.items():
        group = list(group)
        if not group:
            raise ValueError(f"the set {name!r} is empty; leave it out or give it rows")
        for index, row in enumerate(group):
            for column in ("prompt", "completion"):
                if row.get(column) is None:
                    raise RowError(f"{name} row {index} has no {column!r}")
            if bool(row.get("perturbed")) != bool(group[0].get("perturbed")):
                raise RowError(f"{name}: rows 0 and {index} differ in having 'perturbed' answers; give all or none")
            rows.append((name, index, row))
        if name in NORMALIZED_SETS and not group[0].get("perturbed"):
            raise RowError(
                f"{name} rows have no 'perturbed' answers, by which this set's probability is normalised; "
                "add the column or give the set another name"
            )
    if not rows:
        raise ValueError("there is no set to evaluate")
    return rows


def _check_oracle(rows: Sequence[tuple[str, int, Row]], oracle: Mapping[str, float] | None) -> None:
    if oracle is None:
        return
    forget = {row_key(row): index for name, index, row in rows if name == FORGET and row.get("perturbed")}
    if not forget:
        raise ValueError("forget quality needs a set 'forget' with 'perturbed' answers; add it or drop the oracle")
    _match_oracle(forget, oracle)


def _match_oracle(forget: Mapping[str, int], oracle: Mapping[str, float]) -> None:
    unknown = [index for key, index in forget.items() if key not in oracle]
    extra = len(oracle.keys() - forget.keys())
    if unknown or extra:
        first = f" (the first is row {unknown[0]})" if unknown else ""
        raise ValueError(
            f"the oracle was evaluated on other rows: {len(unknown)} of {len(forget)} forget rows are not among its "
            f"{len(oracle)}{first}, and {extra} of its rows are not in the forget set; evaluate the retain-only model "
            "on this forget set, with the same prompt format"
        )


def _completions(name: str, index: int, row: Row) -> list[dict[str, Any]]:
    """What is scored of a row: the answer, then the paraphrase if there is one, then the wrong answers."""
    named = [("answer", row["completion"])]
    if row.get("perturbed") and name != NON_MEMBERS:
        named += [("paraphrase", row["paraphrase"])] if row.get("paraphrase") else []
        named += [("perturbed answer", wrong) for wrong in row["perturbed"]]
    chat = not isinstance(row["prompt"], str)
    return [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": text}] if chat and isinstance(text, str) else text,
            "name": f"{name} row {index}, {role}",
        }
        for role, text in named
    ]


# --- numbers -------------------------------------------------------------------------------------------------------


def _record(name: str, index: int, row: Row, scores: list[dict[str, Any]], answer: str | None, redact: bool) -> Record:
    gold = text_of(row["completion"])
    record = {
        "set": name,
        "row": index,
        "key": row_key(row),
        "prompt": None if redact else text_of(row["prompt"]),
        "gold": None if redact else gold,
        "generation": None if redact else answer,
        **scores[0],
    }
    if answer is not None:
        record["rouge"] = rouge_l_recall(gold, answer)
    if len(scores) > 1:
        others = [score["nll"] for score in scores[1:]]
        wrong = others[-len(row["perturbed"]) :]
        record["paraphrase_nll"] = others[0] if row.get("paraphrase") else record["nll"]
        record["perturbed_nll"] = wrong
        record["truth_ratio"] = float(metrics.truth_ratio_geometric(record["paraphrase_nll"], wrong))
        record["normalized_probability"] = float(
            metrics.normalized_probability(record["probability"], metrics.probability(wrong, 1))
        )
    return record


def _set_metrics(name: str, group: Sequence[Mapping[str, Any]], out: dict[str, float]) -> None:
    if name == NON_MEMBERS:
        return
    for quantity in ("probability", "nll", "exact_memorization", "extraction_strength", "rouge"):
        values = [record[quantity] for record in group if record.get(quantity) is not None]
        if values:
            out[f"{name}/{quantity}"] = float(np.mean(values))
    if "truth_ratio" in group[0]:
        summary = metrics.forget_truth_ratio if name == FORGET else metrics.retained_truth_ratio
        out[f"{name}/truth_ratio"] = summary(_column(group, "truth_ratio"))
    if name in NORMALIZED_SETS:
        out[f"{name}/raw_probability"] = out[f"{name}/probability"]
        out[f"{name}/probability"] = float(_column(group, "normalized_probability").mean())


def _set_notes(name: str, group: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if cut := sum(record["truncated"] for record in group):
        yield f"{name}: {cut} of {len(group)} answers were cut at max_length (and have no EOS)"
    if unscored := sum(record.get("rouge", 0.0) is None for record in group):
        yield f"{name}: {unscored} of {len(group)} answers have no a-z or 0-9, which ROUGE needs, and have no ROUGE"
    own = sum(record.get("paraphrase_nll") == record["nll"] for record in group)
    if own and name not in NORMALIZED_SETS:
        yield f"{name}: {own} of {len(group)} rows have no paraphrase; their truth ratio uses the answer itself"


def _forget_quality(
    group: Sequence[Mapping[str, Any]], oracle: Mapping[str, float], out: dict[str, float], notes: list[str]
) -> None:
    _match_oracle({record["key"]: record["row"] for record in group}, oracle)
    ratios = _column(group, "truth_ratio")
    quality = metrics.forget_quality(ratios, np.array([oracle[record["key"]] for record in group], float))
    out["forget_quality"], out["forget_quality_log10"] = quality.p_value, quality.log10
    if quality.at_floor:
        notes.append(
            f"forget quality is at its floor, 10^{quality.floor_log10:.1f} for {len(group)} rows: the truth ratios do "
            "not overlap with the oracle's at all, and how far apart they are does not show"
        )


def _column(group: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in group], float)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
