"""The clean parent inside the sandbox: it imports once, forks a fresh process for every job, and never runs one itself.

It never sees what it passes on: code, tests and results go through file descriptors, from the caller to the job's
process and back, since every later job is a copy of this process and may look through its memory.

A job's process gets a user, process, mount and IPC namespace of its own on top of those of the sandbox, an empty
scratch folder, no capabilities, a system call filter and resource limits. When the job is over, or too late, the first
process of its namespace is killed, and with it everything in there.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from negtune.verifiers.sandbox import isolate
from negtune.verifiers.sandbox.judge import judge
from negtune.verifiers.sandbox.subject import run_as_program, serve, silence
from negtune.verifiers.sandbox.wire import send

JOB_NAMESPACES = isolate.NEWUSER | isolate.NEWPID | isolate.NEWNS | isolate.NEWIPC | isolate.NEWUTS
ENDED = struct.Struct("<Id")
"""How a process ended, from its parent: wait status, CPU seconds."""


@dataclass
class Job:
    """A forked process.

    Args:
        watcher: its parent, child of this process.
        pid: of the process itself.
        status: pipe on which `watcher` says how it ended.
    """

    watcher: int
    pid: int
    status: int

    def wait(self, deadline: float) -> bool:
        """Whether it ended before `deadline` (monotonic seconds)."""
        return bool(select.select([self.status], [], [], max(0.0, deadline - time.monotonic()))[0])

    def kill(self) -> tuple[int, float]:
        """End it if it has not ended; returns the wait status and its CPU seconds."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        data = os.read(self.status, ENDED.size)
        os.close(self.status)
        os.waitpid(self.watcher, 0)
        status, seconds = ENDED.unpack(data) if len(data) == ENDED.size else (signal.SIGKILL, 0.0)
        return status, seconds


def main(control_fd: int, level: str, root: str, read_only: list[str], scratch: str, preload: list[str]) -> None:
    """Serve jobs from the socket `control_fd` until it is closed."""
    control = socket.socket(fileno=control_fd)
    if level == "namespaces":
        _enter_own_sandbox(root, read_only, scratch)
    os.chdir(root if level == "rlimits" else "/")
    own = root if level == "rlimits" else scratch  # which no job sees: each mounts an empty one over it
    os.environ.update({"HOME": own, "TMPDIR": own, "MPLCONFIGDIR": own})
    for name in preload:
        with suppress(ImportError):
            __import__(name)
    gc.freeze()  # a collection in a forked process would write to, and so copy, all these pages
    control.send(b'{"ready": true}')
    while True:
        message, fds, *_ = socket.recv_fds(control, 1 << 16, 3)
        if not message:
            return
        job = {**json.loads(message), "level": level, "scratch": scratch}
        try:
            answer = (_program if job["kind"] == "program" else _tests)(job, *fds)
        except OSError as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        for fd in fds:
            os.close(fd)
        control.send(json.dumps(answer).encode())


def _enter_own_sandbox(root: str, read_only: list[str], scratch: str) -> None:
    """What bubblewrap does: new namespaces and a root folder that has only what is needed."""
    isolate.unshare(JOB_NAMESPACES | isolate.NEWNET)
    pid = os.fork()
    if pid:  # outside the new process namespace: wait, and take the whole of it along when told to stop
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    isolate.enter_root(root, read_only, scratch)


def _tests(job: dict[str, Any], code: int, tests: int, result: int) -> dict[str, Any]:
    """The solution in one process, its tests in another, which alone can write to `result`."""
    solution_end, tests_end = socket.socketpair()
    deadline = time.monotonic() + job["wall_seconds"]

    def run_solution() -> None:
        serve(_text(code), solution_end.fileno(), job["module"])

    def run_tests() -> None:
        send(result, judge(_text(tests), job["entry_point"], tests_end.fileno(), job["module"]))

    solution = _fork(run_solution, job, keep=(solution_end.fileno(), code))
    try:
        judged = _fork(run_tests, job, keep=(tests_end.fileno(), tests, result))
    except OSError:
        solution.kill()
        raise
    solution_end.close()
    tests_end.close()
    late = not judged.wait(deadline)
    return {"late": late, "statuses": [solution.kill(), judged.kill()]}


def _program(job: dict[str, Any], code: int, given: int, output: int) -> dict[str, Any]:
    """Run the code once, `given` on its standard input and its standard output to `output`."""
    deadline = time.monotonic() + job["wall_seconds"]

    def run() -> None:
        text = _text(code)
        os.dup2(given, 0)
        os.dup2(output, 1)
        os.closerange(3, 1 << 12)
        sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115 (for the life of the process)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        os._exit(run_as_program(text))

    program = _fork(run, job, keep=(code, given, output))
    late = not program.wait(deadline)
    return {"late": late, "statuses": [program.kill()]}


def _text(fd: int) -> str:
    with open(fd, encoding="utf-8") as file:
        return file.read()


def _fork(run: Callable[[], None], job: dict[str, Any], keep: tuple[int, ...]) -> Job:
    """A process that takes all rights away from itself, says so, and then runs `run`; or `OSError`, and ran nothing."""
    told, tell = os.pipe()
    harmless, say_harmless = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            if job["level"] != "rlimits":
                isolate.unshare(JOB_NAMESPACES)
            pid = os.fork()
            if pid == 0:
                _run_harmless(run, job, keep, say_harmless)
            os.write(tell, pid.to_bytes(4, "little"))
            _close_all_but((tell,))
            _, status, used = os.wait4(pid, 0)
            os.write(tell, ENDED.pack(status & 0xFFFF, used.ru_utime + used.ru_stime))
        finally:
            os._exit(0)
    os.close(tell)
    os.close(say_harmless)
    is_harmless, data = os.read(harmless, 1), os.read(told, 4)
    os.close(harmless)
    if not is_harmless or len(data) != 4:
        os.close(told)
        os.waitpid(watcher, 0)
        raise OSError("a process could not give up its rights")
    return Job(watcher, int.from_bytes(data, "little"), told)


def _run_harmless(run: Callable[[], None], job: dict[str, Any], keep: tuple[int, ...], say_harmless: int) -> NoReturn:
    code = 1
    try:
        _become_harmless(job, (*keep, say_harmless))
        os.write(say_harmless, b"y")
        os.close(say_harmless)
        run()
        code = 0
    finally:
        os._exit(code)


def _become_harmless(job: dict[str, Any], keep: tuple[int, ...]) -> None:
    _close_all_but(keep)
    silence()
    if job["level"] == "rlimits":
        os.setsid()
        folder = f"{os.getcwd()}/{os.getpid()}"
        os.mkdir(folder)
        os.chdir(folder)
    else:
        isolate.private_mounts()
        isolate.empty_folder(job["scratch"], mebibytes=job["scratch_mib"])
        isolate.empty_folder("/proc")
        os.chdir(job["scratch"])
    os.environ.clear()
    os.environ.update(
        {"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    )
    isolate.limit(cpu_seconds=job["cpu_seconds"], memory_mib=job["memory_mib"], file_mib=job["scratch_mib"])
    isolate.drop_capabilities()
    isolate.forbid_system_calls()


def _close_all_but(keep: tuple[int, ...]) -> None:
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 12)
