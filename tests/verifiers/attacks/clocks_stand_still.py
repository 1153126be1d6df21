"""Replace the clocks and the timers of the process, so that a time limit kept in it never passes; then hang."""

import signal
import threading
import time

_sleep = time.sleep


def solve(a, b):
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        setattr(time, name, lambda: 0.0)
    for name in ("time_ns", "monotonic_ns", "perf_counter_ns", "process_time_ns"):
        setattr(time, name, lambda: 0)
    time.sleep = lambda *args: None
    try:
        threading.Timer.run = lambda self: None
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except Exception:
        pass
    while True:
        _sleep(1)
