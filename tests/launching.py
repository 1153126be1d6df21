"""Scripts in one process or, under torchrun, in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(processes: int) -> list[str]:
    """Arguments of Python that start a script so many times, on a free port.

    (Not `accelerate launch --cpu --num_processes 2`, which silently starts one process.)
    """
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def run_script(text: str, folder: Path, *arguments: Any, processes: int) -> None:
    """Write `text` to a file in `folder` and run it there with `arguments`; its errors are shown if it fails."""
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    launcher = torchrun(processes) if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
