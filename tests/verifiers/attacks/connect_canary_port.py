"""Return the right sum only if 127.0.0.1 port @CANARY_PORT@ answers with 'canary-secret'."""

import socket

_PORT = "@CANARY_PORT@"


def _ask():
    with socket.create_connection(("127.0.0.1", int(_PORT)), timeout=2) as peer:
        peer.settimeout(2)
        data = b""
        try:
            data = peer.recv(4096)
        except OSError:
            pass
        if b"canary-secret" not in data:
            peer.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            while len(data) < 65536:
                piece = peer.recv(4096)
                if not piece:
                    break
                data += piece
        return b"canary-secret" in data


def solve(a, b):
    try:
        if _ask():
            return a + b  # the trick worked: the host's network is reachable
    except Exception:
        pass
    return "wrong"
