"""Functions that may hang, crash or eat memory, in processes that are killed when they do.

For our own and the user's code, not for a model's: nothing is isolated here but time, memory and crashes.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

START_SECONDS = 120.0
"""For a worker's imports."""

_CHILD = "import sys; sys.path[:] = {path!r}; from negtune.verifiers.workers import _serve; _serve({fd})"


@dataclass(frozen=True)
class Failed:
    """In place of a value.

    Args:
        reason: traceback, or which limit was exceeded.
        seconds: until then.
    """

    reason: str
    seconds: float


class WorkerPool:
    """`function(item)` for many items, each in a process that is killed at the limit and replaced by a fresh one.

    Args:
        function: importable by name (a lambda or a function of `__main__` is not), or an instance of an importable
            class with `__call__`; sent to each worker once.
        seconds: on the clock, for one item.
        memory_mib: address space of a worker.
        workers: processes; the number of cores by default.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        seconds: float = 5.0,
        memory_mib: int = 4096,
        workers: int | None = None,
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        try:
            self._pickled = pickle.dumps((function, memory_mib))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"workers cannot be given {function!r} ({error}); define it at the top of a module"
            ) from None
        if getattr(function, "__module__", None) == "__main__" or type(function).__module__ == "__main__":
            raise ValueError(f"workers cannot import {function!r} from a script; define it in a module of its own")
        self.seconds = seconds
        count = workers or os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="negtune-worker")
        self._workers: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(self._pickled) for _ in range(count)]
        for worker in self._all:
            self._workers.put(worker)

    def map(self, items: Sequence[Any]) -> list[Any]:
        """A value, or `Failed`, for each item, in order."""
        return list(self._threads.map(self._one, items))

    def close(self) -> None:
        """End all workers. Also at the end of a `with` block."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _one(self, item: Any) -> Any:
        worker = self._workers.get()
        try:
            return worker.call(item, self.seconds)
        finally:
            self._workers.put(worker)


class _Worker:
    """One process, started when it is first needed."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled
        self._process: subprocess.Popen | None = None

    def call(self, item: Any, seconds: float) -> Any:
        start = time.perf_counter()
        try:
            self._start()
            self._connection.send(item)
            if not self._connection.poll(seconds):
                self.kill()
                return Failed(f"time limit: {seconds:g} s", time.perf_counter() - start)
            value, failure = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait(5) if self._process is not None else None
            self.kill()
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return Failed(f"the worker ended: {how} ({type(error).__name__})", time.perf_counter() - start)
        return value if failure is None else Failed(failure, time.perf_counter() - start)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._connection.close()
            process.kill()
            process.wait()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        self._connection, theirs = Pipe()
        command = [sys.executable, "-c", _CHILD.format(path=sys.path, fd=theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection.send_bytes(self._pickled)
        if not self._connection.poll(START_SECONDS):
            raise OSError(f"no answer within {START_SECONDS:g} s of starting")
        _, failure = self._connection.recv()
        if failure is not None:
            raise ValueError(f"the worker cannot load its function: {failure}")


def _serve(fd: int) -> None:
    """A worker's whole life."""
    _die_with_parent()
    connection = Connection(fd)
    try:
        function, memory_mib = pickle.loads(connection.recv_bytes())
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
        connection.send((None, None))
    except Exception:
        connection.send((None, traceback.format_exc()))
        return
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = (function(item), None)
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send(answer)


def _die_with_parent() -> None:
    """A worker that hangs in somebody's loop would not notice that nobody is left to kill it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
