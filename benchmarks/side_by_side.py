"""What the benchmarks share: peak memory of one call, and the JSON that every one of them leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from negtune.eval.run import machine, repository_commit, versions

VLLM_ON_A_CPU = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
RESULTS = Path(__file__).parent / "results"


def row(case: str, ours: float, peer: float | None, unit: str, reach: float | None = None, **more: Any) -> dict:
    """One comparison; smaller is better in every unit used here, so `ratio` = peer / ours > 1 means ours is better.

    Args:
        case: what was compared, with whom.
        ours, peer: measured; peer None where there is nobody to compare with.
        unit: of both.
        reach: the ratio aimed at, decided before measuring. There is none to a measure of 0.
        more: further columns.
    """
    ratio = peer / ours if peer is not None and ours else None
    met = None if reach is None or ratio is None else ratio >= reach
    return {"case": case, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "reach": reach, "met": met, **more}


def write_result(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Write `<name>.json` with the command, commit, machine and versions of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])]),
        "commit": repository_commit(),
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _without_folders(argument: str) -> str:
    """Paths of this machine say nothing to others."""
    return f"DATA/{Path(argument).name}" if "/" in argument else argument


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| case | ours | peer | unit | ratio | reach | met |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        words = [r["case"], f"{r['ours']:.4g}", "" if r["peer"] is None else f"{r['peer']:.4g}", r["unit"]]
        words += ["" if r[name] is None else f"{r[name]:.3g}" for name in ("ratio", "reach")]
        lines.append("| " + " | ".join([*words, {None: "", True: "yes", False: "no"}[r["met"]]]) + " |")
    return "\n".join(lines)


def in_fresh_process(arm: str, threads: int) -> Any:
    """What the script that runs now finds out about `arm` in a process of its own.

    It is started with its own arguments and `--one ARM FILE`, and has to write its result to that file as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "one.json")
        command = [sys.executable, *sys.argv, "--one", arm, str(file)]
        subprocess.run(command, check=True, env={**os.environ, **VLLM_ON_A_CPU, "OMP_NUM_THREADS": str(threads)})
        return json.loads(file.read_text())


def peak_above_mib(call: Callable[[], Any]) -> float:
    """Largest memory held during `call` beyond what was held before it: CUDA memory if there is a device, else RSS.

    RSS needs Linux, and a fresh process for every call that is to be compared.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 2**10


def peak_private_mib(call: Callable[[], Any]) -> float:
    """Largest private memory (RssAnon of Linux, read every 5 ms) during `call` beyond what was held before it.

    Pages of a mapped file are left out: the system takes them back whenever it wants them.
    """
    seen, done = [_status_kib("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(_status_kib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return (max(seen) - seen[0]) / 2**10


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
