"""The caller's side: find the strongest sandbox this machine offers, keep clean parents running, hand them jobs."""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negtune.verifiers.sandbox.wire import WireError, receive

logger = logging.getLogger(__name__)

LEVELS = ("bubblewrap", "namespaces", "rlimits")
"""Strongest first. Each of the first two has no network, sees no file but read-only programs and an empty scratch
folder, and no process but its own; the last has resource limits only. On x86_64 all three filter system calls."""
LARGEST_OUTPUT = 1 << 22
"""Bytes of a program's output, or of a verdict."""
START_SECONDS = 60.0
GRACE_SECONDS = 20.0
"""How much longer than a job's own limit its parent may take to answer."""

_BOOT = "import sys; sys.path[:0] = {path!r}; from negtune.verifiers.sandbox.zygote import main; main(*{arguments!r})"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known of the code."""


@dataclass(frozen=True)
class Limits:
    """What one process of a job may use.

    Args:
        seconds: CPU time; on the clock four times as much, so that a busy machine fails nobody.
        memory_mib: address space.
        scratch_mib: files it writes, all together.
    """

    seconds: float = 5.0
    memory_mib: int = 1024
    scratch_mib: int = 64

    def as_job(self) -> dict[str, Any]:
        return {
            "cpu_seconds": max(1, round(self.seconds)),
            "wall_seconds": 4 * self.seconds,
            "memory_mib": self.memory_mib,
            "scratch_mib": self.scratch_mib,
        }


class Sandbox:
    """One clean parent process. It takes one job at a time; not for several threads at once.

    Args:
        level: one of `LEVELS`.
        packages: whether the code sees this environment's packages (numpy and so on).
        preload: modules that every job finds imported.
    """

    def __init__(self, level: str, *, packages: bool = True, preload: Sequence[str] = ()) -> None:
        self.level, self._packages, self._preload = level, packages, list(preload)
        self._process: subprocess.Popen | None = None
        self._folder: str | None = None

    def run_tests(self, code: str, tests: str, entry_point: str | None, module: str, limits: Limits) -> dict[str, Any]:
        """`outcome` and `reason` of `tests` run against `code`. Raises `SandboxError`."""
        job: dict[str, Any] = {"kind": "tests", "entry_point": entry_point, "module": module, **limits.as_job()}
        data, answer = self._run(job, [code, tests])
        if answer["late"]:
            return {"outcome": "wrong", "reason": f"time limit: {job['wall_seconds']:g} s on the clock"}
        ended = [how_it_ended(*status, job["cpu_seconds"]) for status in answer["statuses"]]
        verdict = _message(data)
        if not isinstance(verdict, dict):
            if "limit" in ended[1]:
                return {"outcome": "wrong", "reason": f"the tests did not finish: {ended[1]}"}
            raise SandboxError(f"the tests did not finish: {ended[1]}")
        if "process has ended" in verdict["reason"] and ended[0]:
            verdict["reason"] += f" ({ended[0]})"
        return verdict

    def run_program(self, code: str, given: str, limits: Limits) -> tuple[str, str]:
        """What `code` printed with `given` on its standard input, and how it ended if not well. Or `SandboxError`."""
        job: dict[str, Any] = {"kind": "program", **limits.as_job()}
        data, answer = self._run(job, [code, given])
        ended = "time limit" if answer["late"] else how_it_ended(*answer["statuses"][0], job["cpu_seconds"])
        return data.decode(errors="replace"), ended

    def close(self) -> None:
        """End the parent and everything it started."""
        process, self._process = self._process, None
        if process is not None:
            self._control.close()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _run(self, job: dict[str, Any], texts: Sequence[str]) -> tuple[bytes, dict[str, Any]]:
        self._start()
        read, write = os.pipe()
        given = [_anonymous_file(text) for text in texts]
        deadline = time.monotonic() + job["wall_seconds"] + GRACE_SECONDS
        try:
            socket.send_fds(self._control, [json.dumps(job).encode()], [*given, write])
        except OSError as error:
            os.close(read)
            self.close()
            raise SandboxError(f"the sandbox's parent process is gone ({error})") from error
        finally:
            for fd in (*given, write):
                os.close(fd)
        try:
            with open(read, "rb", buffering=0) as pipe:  # closed before the answer: who still writes is told so
                data = _read(pipe.fileno(), deadline)
            answer = json.loads(self._reply(deadline))
        except (OSError, ValueError) as error:
            self.close()
            raise SandboxError(f"the sandbox's parent process does not answer ({error})") from error
        if "failed" in answer:
            self.close()
            raise SandboxError(answer["failed"])
        return data, answer

    def _reply(self, deadline: float) -> bytes:
        if not select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError("time is up")
        data = self._control.recv(1 << 16)
        if not data:
            raise OSError("it has ended")
        return data

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder = tempfile.mkdtemp(prefix="negtune-sandbox-")
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed below, after the process has inherited it)
        command = self._command(theirs.fileno())
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        try:
            self._reply(time.monotonic() + START_SECONDS)
        except OSError as error:
            self.close()
            errors.seek(0)
            said = errors.read()[-500:].decode(errors="replace").strip().splitlines()
            raise SandboxError(f"{self.level} does not start here: {said[-1] if said else error}") from error
        finally:
            errors.close()

    def _command(self, fd: int) -> list[str]:
        packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")] if self._packages else []
        here = Path(__file__).resolve().parents[2]
        read_only = [*_SYSTEM, *_DEVICES, sys.base_prefix, sys.base_exec_prefix, str(here), *packages]
        read_only = [path for path in dict.fromkeys(read_only) if os.path.exists(path)]
        scratch = (
            "/scratch" if any(path.startswith("/tmp/") for path in read_only) else "/tmp"
        )  # must hide none of them
        arguments = (fd, self.level, self._folder, read_only, scratch, self._preload)
        boot = _BOOT.format(path=[str(here.parent)], arguments=arguments)
        if packages:
            boot = f"import sys; sys.path += {list(dict.fromkeys(packages))!r}; {boot}"
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", boot]
        return [*_bubblewrap(read_only, scratch), *python] if self.level == "bubblewrap" else python


def _bubblewrap(read_only: Sequence[str], scratch: str) -> list[str]:
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    command += ["--uid", "65534", "--gid", "65534", "--setenv", "OPENBLAS_NUM_THREADS", "1"]
    for path in read_only:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path in _DEVICES else "--ro-bind", path, path]
    return [*command, "--proc", "/proc", "--tmpfs", scratch, "--remount-ro", "/", "--chdir", "/"]


@functools.cache
def strongest_level() -> tuple[str, str]:
    """The strongest of `LEVELS` that starts and isolates here, and why none stronger does."""
    why = []
    for level in LEVELS:
        if level == "bubblewrap" and shutil.which("bwrap") is None:
            why.append("bubblewrap: bwrap is not installed")
            continue
        try:
            with Sandbox(level, packages=False) as sandbox:
                if sandbox.run_program("print(1)", "", Limits()) != ("1\n", ""):
                    raise SandboxError("a trial program printed something else")
            return level, "; ".join(why)
        except (SandboxError, OSError) as error:
            why.append(f"{level}: {error}")
    raise SandboxError("no process with fewer rights starts here: " + "; ".join(why))


def how_it_ended(status: int, seconds: float, limit: float) -> str:
    """A wait status in words; nothing for a process that ended well. `seconds` of CPU time of `limit` were used."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL) and seconds > 0.95 * limit:
            return f"CPU time limit: {limit:g} s"
        return "stopped" if number == signal.SIGKILL else f"killed by {signal.Signals(number).name}"
    return f"exit code {os.WEXITSTATUS(status)}" if status else ""


def _anonymous_file(text: str) -> int:
    fd = os.memfd_create("negtune")
    data = text.encode("utf-8", errors="replace")
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _message(data: bytes) -> Any:
    read, write = os.pipe()
    with open(write, "wb") as file:
        file.write(data[: 1 << 15])
    try:
        return receive(read)
    except WireError:
        return None
    finally:
        os.close(read)


def _read(fd: int, deadline: float) -> bytes:
    """Everything until the other end is closed, at most `LARGEST_OUTPUT`."""
    parts: list[bytes] = []
    size = 0
    while size < LARGEST_OUTPUT:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError("time is up")
        part = os.read(fd, 1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)[:LARGEST_OUTPUT]
