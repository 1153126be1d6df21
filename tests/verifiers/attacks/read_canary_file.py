"""Return the right sum only if 'canary-secret' can be read from a file of the host, by several routes."""

import os

_PATH = "@CANARY_FILE@"


def _read():
    routes = [_PATH, "/proc/self/root" + _PATH, "/proc/self/cwd/" + "../" * 20 + _PATH.lstrip("/")]
    for route in routes:
        try:
            with open(route, "rb") as file:
                yield file.read(65536)
        except Exception:
            pass
    try:
        fd = os.open(_PATH, os.O_RDONLY)
        try:
            yield os.read(fd, 65536)
        finally:
            os.close(fd)
    except Exception:
        pass
    try:
        link = "/tmp/negtune_attack_link_%d" % os.getpid()
        os.link(_PATH, link)
        try:
            with open(link, "rb") as file:
                yield file.read(65536)
        finally:
            os.unlink(link)
    except Exception:
        pass
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        fd = libc.open(_PATH.encode(), 0)
        if fd >= 0:
            buffer = ctypes.create_string_buffer(65536)
            count = libc.read(fd, buffer, 65536)
            libc.close(fd)
            yield buffer.raw[: max(count, 0)]
    except Exception:
        pass


try:
    _AT_IMPORT = any(b"canary-secret" in data for data in _read())
except Exception:
    _AT_IMPORT = False


def solve(a, b):
    if _AT_IMPORT or any(b"canary-secret" in data for data in _read()):
        return a + b  # the trick worked: a file of the host was read
    return "wrong"
