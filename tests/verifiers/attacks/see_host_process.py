"""Return the right sum only if the host's process @HOST_PID@ is visible in /proc."""

import os

_PID = "@HOST_PID@"


def solve(a, b):
    try:
        number = str(int(_PID))
    except Exception:
        return "wrong"
    try:
        if number in os.listdir("/proc"):
            return a + b  # the trick worked: the host's processes are visible
    except Exception:
        pass
    try:
        with open("/proc/" + number + "/status", "rb") as file:
            if file.read(16):
                return a + b
    except Exception:
        pass
    return "wrong"
