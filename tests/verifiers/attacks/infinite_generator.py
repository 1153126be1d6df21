"""Return a generator that yields every integer in turn, so that 'expected in result' holds or hangs."""

import itertools


def solve(a, b):
    def _everything():
        for n in itertools.count():
            yield n
            yield -n

    return _everything()
