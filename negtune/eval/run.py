"""The run folder: what was run, on what, with which versions; read by reports, never by training."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from negtune.eval import frontier, ranking, solving
from negtune.eval.unlearning import Evaluation, better, evaluate
from negtune.models.load import load_model
from negtune.models.merge import merge_adapter
from negtune.records import append_jsonl, write_json, write_jsonl

PACKAGES = (
    *("negtune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "vllm"),
    "sentence-transformers",
)
PRIMARY = (
    "forget_quality",
    "forget_quality_log10",
    "model_utility",
    "forget/probability",
    "forget/rouge",
    "forget/extraction_strength",
    "forget_unseen/probability",
    "forget_unseen/rouge",
    "retain/probability",
    "retain/rouge",
    "retain_unseen/probability",
    "retain_unseen/rouge",
)
"""Metrics of the report's first table, in its order."""
SAMPLES = 5


class Run:
    """Collects what `run.json` and `metrics.json` hold and writes both into `folder`.

    Args:
        folder: run folder, created if missing.
        title, recipe, objective, paper, data, model, artefact: words for the report; `artefact` names what the last
            arm's metrics describe.
        resumed_from: name of the checkpoint that the run went on from, if it did.
        arguments: settings to record; private text must not be among them.
        seed: of the run.
        redacted: whether texts were kept out.
        task: `unlearning`, `solving` for arms with the metrics of `solve`, `preference` for those of `reward_and_kl`,
            `ranking` for those of a retriever or reranker; decides what the report asks.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        seed: int,
        redacted: bool = False,
        task: Literal["unlearning", "solving", "preference", "ranking"] = "unlearning",
        **words: Any,
    ) -> None:
        self.folder, self.started = Path(folder), time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        if redacted:
            for stale in (self.folder / "eval_rows.jsonl", *self.folder.glob("nonfinite_*.json")):
                stale.unlink(missing_ok=True)  # text that an earlier, unredacted run left in this folder
        self.record = {"seed": seed, "redacted": redacted, "task": task, **words}
        self.arms: dict[str, dict[str, float | None]] = {}
        self.samples: dict[tuple[str, str], dict[str, Any]] = {}

    def measure(self, arm: str, model: Any, tokenizer: Any, sets: Mapping[str, Any], **settings: Any) -> Evaluation:
        """`evaluate`, kept as one arm: its metrics, its records (`records.jsonl`) and its first answers.

        The first arm also leaves the rows (`eval_rows.jsonl`, unless redacted), for `negtune export`.

        Args:
            arm: name of the column.
            model, tokenizer, sets, settings: for `evaluate`.
        """
        if not getattr(model, "is_quantized", False) and not getattr(model, "hf_device_map", None):
            model.to(PartialState().device)  # loaded on the CPU; the trainer's own model is there already
        outcome = evaluate(model, tokenizer, sets, redact=self.record["redacted"], **settings)
        if not _is_main_process():
            return outcome
        if not self.arms:
            (self.folder / "records.jsonl").unlink(missing_ok=True)
            if not self.record["redacted"]:
                rows = [{"set": name, **row} for name, group in sets.items() for row in group]
                write_jsonl(self.folder / "eval_rows.jsonl", rows)
        append_jsonl(self.folder / "records.jsonl", [{"arm": arm, **record} for record in outcome.records])
        for record in outcome.records:
            if record["row"] < SAMPLES and "rouge" in record:
                sample = {"side": record["set"], "prompt": record["prompt"], "gold": record["gold"], "answers": {}}
                row = self.samples.setdefault((record["set"], record["key"]), sample)
                row["answers"][arm] = record["generation"]
        write_jsonl(self.folder / "samples.jsonl", self.samples.values())
        self.add_arm(arm, outcome.metrics)
        return outcome

    def ship(
        self,
        base: str | os.PathLike,
        adapter: str | os.PathLike,
        sets: Mapping[str, Any],
        *,
        check_4bit: bool = False,
        **settings: Any,
    ) -> Path:
        """Merge `adapter` into `base`, then measure what was written: loaded back from disk, and quantised to 4-bit.

        Switching an adapter off undoes unlearning, and quantising can; so neither is left to trust.

        Returns:
            folder of the merged model.
        """
        folder = self.folder / "merged"
        if PartialState().is_main_process:
            merge_adapter(base, adapter, folder)
        PartialState().wait_for_everyone()
        self.record["artefact"] = "adapter merged into the base weights, loaded back from disk"
        self.measure("merged", *load_model(folder), sets, **settings)
        if check_4bit:
            self.measure("merged, 4-bit", *load_model(folder, load_in_4bit=True), sets, **settings)
        return folder

    def add_arm(self, name: str, metrics: Mapping[str, float | None]) -> None:
        """Add one column of the report's table and write the folder anew, so that a crash loses nothing."""
        self.arms[name] = dict(metrics)
        self.write()

    def add_answers(self, side: str, rows: Sequence[tuple[str, str | None, str]], arm: str) -> None:
        """Keep prompt, wanted answer (or None) and what an arm said; `samples.jsonl` has them beside other arms'."""
        for prompt, gold, answer in rows:
            sample = {"side": side, "prompt": prompt, "gold": gold, "answers": {}}
            self.samples.setdefault((side, prompt), sample)["answers"][arm] = answer
        write_jsonl(self.folder / "samples.jsonl", self.samples.values())

    def write(self) -> None:
        """Write `run.json` and `metrics.json`."""
        names = dict.fromkeys(name for arm in self.arms.values() for name in arm)
        kinds = {
            "solving": (solving.better, solving.primary),
            "preference": (frontier.better, frontier.primary),
            "ranking": (ranking.better, ranking.primary),
        }
        direction, choose = kinds.get(self.record["task"], (better, _primary))
        directions = {name: direction(name) for name in names if direction(name)}
        primary = choose(names)
        write_json(self.folder / "metrics.json", {"primary": primary, "better": directions, "arms": self.arms})
        write_json(
            self.folder / "run.json",
            {
                **self.record,
                "versions": versions(),
                "machine": machine(),
                "git": repository_commit(),
                "command": _command(),
                "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self.started, 1),
                "peak_rss_mib": peak_rss_mib(),
            },
        )


def _primary(names: Iterable[str]) -> list[str]:
    found = set(names)
    return [name for name in PRIMARY if name in found]


def _is_main_process() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, GPU, memory."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_name(), "cores": cores, "gpu": gpu, "memory_gib": round(pages * size / 2**30, 1)}


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _command() -> str:
    """The command line, values of flags that end in `token` left out."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    secret = [before.endswith("token") and before.startswith("--") for before in ["", *words]]
    words = ["***" if hidden else word for word, hidden in zip(words, secret, strict=False)]
    return " ".join(re.sub(r"(--\S*token=)\S+", r"\1***", word) for word in words)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def repository_commit() -> str | None:
    """Short commit of the repository this package lies in, `+` when it has changes; None when installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None
