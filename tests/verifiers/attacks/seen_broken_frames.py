"""Sends frames that are no JSON, too long, or nested without end, to break the judge."""

import os
import struct

for data in (
    b"{",
    b"[" * 100000,
    b'["answer"]',
    b'["answer", {"tuple": 3}]',
    b'["answer", {"int": "zz"}]',
    b"\xff\xfe",
):
    for fd in range(3, 32):
        try:
            os.write(fd, struct.pack(">I", len(data)) + data)
        except OSError:
            pass
for fd in range(3, 32):
    try:
        os.write(fd, b"\xff\xff\xff\xff")
    except OSError:
        pass


def solve(a, b):
    return None
