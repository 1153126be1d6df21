"""Return a list nested a million deep: encoders, comparison and repr run out of stack."""


def solve(a, b):
    answer = []
    for _ in range(1_000_000):
        answer = [answer]
    return answer
