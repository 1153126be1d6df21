"""A run folder, read and checked: all that a report knows.

run.json      what was run, on what, how: title, recipe, objective, paper, data, model, artefact, arguments, seed,
              versions, machine, git, started, seconds, peak_rss_mib, redacted, task (unlearning, solving,
              preference or ranking), resumed_from (a checkpoint: `seconds` are those since then)
metrics.json  {"primary": [name], "better": {name: "lower" | "higher"}, "arms": {arm: {name: number | null}}}
history.jsonl one object per logging step; evaluation rows carry names that start with `eval/`
samples.jsonl {"side", "prompt", "gold", "answers": {arm: text}}; texts are null in a redacted run
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negtune.records import RecordError, read_json, read_jsonl


@dataclass(frozen=True)
class Metrics:
    """`metrics.json`: numbers by arm and name.

    Args:
        primary: names in table order; the rest of a table follows them.
        better: `lower` or `higher` for the names that have a direction.
        arms: in display order, arm to name to number; None is "not measured".
    """

    primary: list[str]
    better: Mapping[str, str]
    arms: dict[str, dict[str, int | float | None]]

    @property
    def others(self) -> list[str]:
        """Names that are measured but not primary, in order of appearance."""
        names = dict.fromkeys(name for values in self.arms.values() for name in values)
        return [name for name in names if name not in self.primary]

    def value(self, arm: str, name: str) -> int | float | None:
        """The number, or None where it was not measured."""
        return self.arms.get(arm, {}).get(name)


@dataclass(frozen=True)
class RunFolder:
    """What is in a run folder; absent files leave their part empty."""

    path: Path
    run: dict[str, Any]
    metrics: Metrics
    history: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The run's title, or the folder's name."""
        return str(self.run.get("title") or self.path.resolve().name)


def read_run_folder(path: str | Path) -> RunFolder:
    """Read a run folder and check its shape.

    Raises:
        FileNotFoundError: no such folder, or neither `run.json` nor `metrics.json` in it.
        RecordError: a file is broken; the message names the file and the line or field.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the output_dir of a run")
    if not (path / "run.json").is_file() and not (path / "metrics.json").is_file():
        raise FileNotFoundError(f"{path} has neither run.json nor metrics.json; give the output_dir of a run")
    return RunFolder(
        path=path,
        run=_run(path / "run.json"),
        metrics=_metrics(path / "metrics.json"),
        history=_rows(path / "history.jsonl"),
        samples=_samples(path / "samples.jsonl"),
    )


def _run(path: Path) -> dict[str, Any]:
    run = _object(path)
    for field in ("paper", "arguments", "versions", "machine"):
        if run.get(field) is not None and not isinstance(run[field], dict):
            raise RecordError(f'{path}: "{field}" must be an object, found {run[field]!r}')
    return run


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise RecordError(f"{path}: expected a JSON object, found {type(value).__name__}; restore or delete the file")
    return value


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _samples(path: Path) -> list[dict[str, Any]]:
    samples = _rows(path)
    for number, sample in enumerate(samples, start=1):
        if not isinstance(sample.get("answers"), dict):
            raise RecordError(f'{path}, record {number}: "answers" must map an arm to its text; delete the record')
    return samples


def _metrics(path: Path) -> Metrics:
    content = _object(path)
    arms = content.get("arms", {})
    if not isinstance(arms, dict) or not all(isinstance(values, dict) for values in arms.values()):
        raise RecordError(f'{path}: "arms" must map an arm to its metrics, {{"before": {{"forget/probability": 0.5}}}}')
    for arm, values in arms.items():
        for name, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise RecordError(f"{path}: {name} of {arm!r} must be a number or null, found {value!r}")
    better = content.get("better", {})
    if not isinstance(better, dict) or not set(better.values()) <= {"lower", "higher"}:
        raise RecordError(f'{path}: "better" must say "lower" or "higher" for each metric, found {better!r}')
    primary = content.get("primary") or list(dict.fromkeys(name for values in arms.values() for name in values))
    if not isinstance(primary, list) or not all(isinstance(name, str) for name in primary):
        raise RecordError(f'{path}: "primary" must be a list of metric names, found {primary!r}')
    return Metrics(primary, better, arms)
