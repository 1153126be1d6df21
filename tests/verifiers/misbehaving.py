"""What workers are asked to run in the tests."""

from __future__ import annotations

import os
import time


def misbehave(what: str) -> str:
    if what == "raise":
        raise RuntimeError("out of order")
    if what == "hang":
        while True:
            time.sleep(1)
    if what == "spin":
        while True:
            pass
    if what == "memory":
        return str(len(bytearray(10 << 30)))
    if what == "exit":
        os._exit(3)
    if what == "crash":
        os.abort()
    return f"{what} by {os.getpid()}"
