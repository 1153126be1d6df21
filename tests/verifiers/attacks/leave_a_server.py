"""First half: leave a detached process (at most 120 s) that serves an abstract socket for find_a_server.py."""

import os
import signal
import socket

_NAME = "\0negtune_attack_server"


def _serve():
    try:
        if os.fork():
            return
    except Exception:
        return
    try:
        signal.alarm(120)
        os.setsid()
        if os.fork():
            os._exit(0)
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        except Exception:
            pass
        signal.alarm(120)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(_NAME)
        server.listen(8)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(0, 256):
            if fd not in (server.fileno(), null):
                try:
                    os.dup2(null, fd) if fd < 3 else os.close(fd)
                except OSError:
                    pass
        while True:
            peer, _ = server.accept()
            try:
                peer.sendall(b"negtune-server")
                peer.close()
            except OSError:
                pass
    except BaseException:
        pass
    finally:
        os._exit(0)


_serve()


def solve(a, b):
    return "wrong"
