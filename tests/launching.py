"""Scripts in one process or, under torchrun, in several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

AT_ONCE = """
import os, sys
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""
"""Last lines of a script of several processes. Leaving the ordinary way one of them aborts now and then,
"terminate called without an active exception", behind its last line and with the process group destroyed: threads of
torch's that the end of the interpreter overtakes. Nothing that is tested comes after."""


def run_script(text: str, folder: Path, *arguments: Any, processes: int, first_port: int) -> None:
    """Write `text` to a file in `folder` and run it there with `arguments`; its errors are shown if it fails.

    Args:
        first_port: torchrun takes one of the 200 from here on, by process id, so that two test runs do not meet.
            (Not `accelerate launch --cpu --num_processes 2`, which silently starts one process.)
    """
    script = folder / "script.py"
    script.write_text(text + (AT_ONCE if processes > 1 else ""), encoding="utf-8")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(first_port + os.getpid() % 200)]
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
