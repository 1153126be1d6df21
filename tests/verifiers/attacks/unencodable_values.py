"""Return text with lone surrogates and NUL, next to NaN and bytes, so that the reply cannot be encoded."""


def solve(a, b):
    return ["\ud800\udfff\x00", float("nan"), float("inf"), b"\xff\xfe", {("a", 1): ...}, {5, 15}]
