"""What a report says, before it is Markdown or HTML: answers first, then numbers, texts, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from negtune.report import preference, ranking, solving
from negtune.report.folder import Metrics, RunFolder
from negtune.report.tables import (
    Table,
    both_sides,
    change,
    compared_arms,
    duration,
    forget_and_other_names,
    headline,
    metrics_table,
    number,
)

PAIRS = 5
SENTENCES = 4
LONGEST_TEXT = 600
REDACTED = "This run is redacted: the texts of its data are not shown."


@dataclass(frozen=True)
class Pair:
    """One question with the wanted answer, if there is one, and what each arm said; a missing text is None."""

    side: str
    prompt: str | None
    gold: str | None
    answers: list[tuple[str, str | None]]

    @property
    def said(self) -> list[tuple[str, str | None]]:
        """The wanted answer, then those of the arms."""
        return self.answers if self.gold is None else [("expected", self.gold), *self.answers]


@dataclass(frozen=True)
class Page:
    """Everything a report shows, as plain text.

    Args:
        headline: one sentence on both sides.
        answers: question and the sentences that answer it.
        table, others: primary metrics and the rest; None when there are none.
        explained: what names in the table mean.
        pairs: up to `PAIRS` questions with answers; `pairs_note` says why there are none.
        facts: how the run was made; paper title and link apart in `paper`.
        arguments: `--name value` lines.
    """

    title: str
    headline: str
    answers: list[tuple[str, list[str]]]
    table: Table | None
    others: Table | None
    explained: str | None
    pairs: list[Pair]
    pairs_note: str | None
    facts: list[tuple[str, str]]
    paper: tuple[str, str] | None
    arguments: list[str]


def build_page(folder: RunFolder, *, redact: bool = False) -> Page:
    """Collect what the folder holds.

    Args:
        redact: leave out every text of the data, also if the run itself is not redacted.
    """
    redact = redact or bool(folder.run.get("redacted"))
    metrics = folder.metrics
    pairs = [] if redact else choose_pairs(folder.samples)
    words = _words(folder)
    return Page(
        title=folder.title,
        headline=words.headline(metrics) if words is not None else headline(metrics),
        answers=_answers(folder),
        table=metrics_table(metrics, metrics.primary) if metrics.primary else None,
        others=metrics_table(metrics, metrics.others) if metrics.others else None,
        explained=ranking.explained(metrics) if words is ranking else None,
        pairs=pairs,
        pairs_note=_pairs_note(folder, redact, pairs),
        facts=_facts(folder.run),
        paper=_paper(folder.run),
        arguments=[f"--{name} {_argument(value)}" for name, value in (folder.run.get("arguments") or {}).items()],
    )


def choose_pairs(samples: list[dict[str, Any]]) -> list[Pair]:
    """Up to `PAIRS` samples: three to be forgotten and two others, filled up where either is short.

    Each in file order, with `forget_unseen` and the like behind `forget`.
    """
    sides = [str(sample.get("side", "")) for sample in samples]
    forget = [sample for sample, side in zip(samples, sides, strict=True) if side.startswith("forget")]
    forget.sort(key=lambda sample: sample["side"] != "forget")
    others = [sample for sample, side in zip(samples, sides, strict=True) if not side.startswith("forget")]
    share = max(PAIRS - len(others), -(-PAIRS // 2))
    chosen = [*forget[:share], *others[: PAIRS - len(forget[:share])]]
    return [
        Pair(
            side=str(sample.get("side", "")),
            prompt=_text(sample.get("prompt")),
            gold=_text(sample.get("gold")),
            answers=[(str(arm), _text(answer)) for arm, answer in sample["answers"].items()],
        )
        for sample in chosen
    ]


def _words(folder: RunFolder) -> Any:
    """What asks and answers for a task that is not unlearning."""
    return {"solving": solving, "preference": preference, "ranking": ranking}.get(str(folder.run.get("task")))


def _answers(folder: RunFolder) -> list[tuple[str, list[str]]]:
    run, metrics = folder.run, folder.metrics
    start, others = compared_arms(metrics)
    arm = others[-1] if len(others) == 1 else None
    objective = f"Objective: {run['objective']}." if run.get("objective") else None
    forgotten = [str(run.get("data") or "The run does not say which data."), *filter(None, [objective])]
    words = _words(folder)
    if words is not None:
        cost = words.cost(metrics) + _time(run)
        return [
            (words.WHAT, forgotten),
            (words.WORKED, words.worked(metrics)),
            (words.COST, cost or ["Not recorded."]),
        ]
    if start is None or not others:
        measured = f"only one arm ({start}) was measured" if start else "nothing was measured"
        worked, cost = [f"Not known: {measured}; it takes two, before and after, to tell."], []
    elif arm is None:
        worked, cost = [f"{other}: {both_sides(metrics, start, other)}" for other in others], []
    else:
        forget, kept = forget_and_other_names(metrics)
        worked = _changes(metrics, forget, start, arm) or ["No forget metric was measured."]
        worked += [
            f"{other}: {both_sides(metrics, start, other)}" for other in metrics.arms if other not in (start, arm)
        ]
        cost = _changes(metrics, kept, start, arm) or ["No retain metric was measured."]
    return [
        ("What was to be forgotten?", forgotten),
        ("Did it work?", worked),
        ("What did it cost?", cost + _time(run) or ["Not recorded."]),
    ]


def _changes(metrics: Metrics, names: list[str], start: str, arm: str) -> list[str]:
    """A sentence per metric; beyond `SENTENCES` the table has to do."""
    sentences = [_capital(change(metrics, name, start, arm)) for name in names]
    rest = len(sentences) - SENTENCES
    return sentences if rest <= 1 else [*sentences[:SENTENCES], f"{rest} more are in the table below."]


def _time(run: Mapping[str, Any]) -> list[str]:
    took = _duration(run)
    if took is None:
        return []
    memory = f", {number(round(run['peak_rss_mib']))} MiB of memory at most" if run.get("peak_rss_mib") else ""
    return [f"{took}{memory}."]


def _duration(run: Mapping[str, Any]) -> str | None:
    """What is known of it: where a run was stopped, what came before is not in it."""
    if not isinstance(run.get("seconds"), int | float):
        return None
    since = f" since it went on from {run['resumed_from']}" if run.get("resumed_from") else ""
    return duration(run["seconds"]) + since


def _pairs_note(folder: RunFolder, redact: bool, pairs: list[Pair]) -> str | None:
    if redact:
        return REDACTED
    if not pairs:
        return "No samples were recorded (samples.jsonl is missing or empty)."
    return f"{len(pairs)} of {len(folder.samples)} recorded." if len(folder.samples) > len(pairs) else None


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = run.get("machine") or {}
    parts = [
        machine.get("gpu"),
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['memory_gib']:g} GiB" if machine.get("memory_gib") else None,
    ]
    facts = {
        "Model": run.get("model"),
        "Data": run.get("data"),
        "Artefact evaluated": run.get("artefact"),
        "Objective": run.get("objective"),
        "Recipe": run.get("recipe"),
        "Machine": ", ".join(str(part) for part in parts if part) or None,
        "Versions": ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items()) or None,
        "Seed": run.get("seed"),
        "Started": run.get("started"),
        "Time": _duration(run),
        "Commit": run.get("git"),
    }
    return [(name, "not recorded" if value in (None, "") else str(value)) for name, value in facts.items()]


def _paper(run: Mapping[str, Any]) -> tuple[str, str] | None:
    paper = run.get("paper") or {}
    return (str(paper["title"]), str(paper.get("url") or "")) if paper.get("title") else None


def _argument(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "none"
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value).strip()
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters)"


def _capital(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."
