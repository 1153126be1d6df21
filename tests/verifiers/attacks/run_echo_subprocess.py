"""Return the right sum only if another program (echo) can be started, by any of several calls."""

import os


def _by_subprocess():
    import subprocess

    done = subprocess.run(["echo", "alive"], capture_output=True, timeout=5)
    return b"alive" in done.stdout


def _by_shell():
    with os.popen("echo alive") as pipe:
        return "alive" in pipe.read()


def _by_spawn():
    source, sink = os.pipe()
    path = "/bin/echo" if os.path.exists("/bin/echo") else "/usr/bin/echo"
    actions = [(os.POSIX_SPAWN_DUP2, sink, 1)]
    pid = os.posix_spawn(path, ["echo", "alive"], {}, file_actions=actions)
    os.close(sink)
    try:
        return b"alive" in os.read(source, 64)
    finally:
        os.close(source)
        os.waitpid(pid, 0)


def solve(a, b):
    for attempt in (_by_subprocess, _by_shell, _by_spawn):
        try:
            if attempt():
                return a + b  # the trick worked: a program was started
        except Exception:
            pass
    return "wrong"
