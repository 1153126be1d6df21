"""Return an int with tens of millions of bits: turning it into text raises ValueError or takes very long."""


def solve(a, b):
    try:
        import sys

        sys.set_int_max_str_digits(0)
    except Exception:
        pass
    return 1 << 80_000_000
