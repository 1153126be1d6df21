"""Second half: return the right sum only if the process left by leave_a_server.py still answers."""

import socket

_NAME = "\0negtune_attack_server"


def solve(a, b):
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2)
            client.connect(_NAME)
            if client.recv(64) == b"negtune-server":
                return a + b  # the trick worked: a process survived the earlier run
    except Exception:
        pass
    return "wrong"
