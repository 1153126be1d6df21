"""Hang while the module is being imported, in one long call into C that signals' handlers cannot enter."""


def solve(a, b):
    return "wrong"


sum(iter(int, 1))
