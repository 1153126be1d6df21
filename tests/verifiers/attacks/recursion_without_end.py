"""Recurse without end (through C as well) with the limit lifted, to overflow the stack of the process."""

import sys


class _Deep:
    def __repr__(self):
        return repr([self, _Deep()])

    def __eq__(self, other):
        return [self] == [other]


def solve(a, b):
    try:
        sys.setrecursionlimit(1_000_000)
        repr(_Deep())
    except RecursionError:
        pass
    return solve(a, b)
