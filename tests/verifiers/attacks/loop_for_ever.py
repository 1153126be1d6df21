"""Burn processor time for ever, swallowing every exception a timeout throws into the loop."""


def solve(a, b):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
