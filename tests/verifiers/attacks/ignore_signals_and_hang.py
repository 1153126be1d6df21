"""Block every signal that can be blocked, cancel alarms, then sleep (15 min at most) so only SIGKILL helps."""

import signal
import time


def solve(a, b):
    try:
        signal.alarm(0)
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
    except Exception:
        pass
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except Exception:
            pass
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    except Exception:
        pass
    signal.signal = signal.alarm = signal.setitimer = lambda *args: None
    end = time.monotonic() + 900
    while time.monotonic() < end:
        try:
            time.sleep(1)
        except BaseException:
            pass
    return "wrong"
