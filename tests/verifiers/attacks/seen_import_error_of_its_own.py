"""Raises what a broken test would raise, so as not to be counted as wrong."""


def solve(a, b):
    raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
