"""Return a 256 MB string that has every small number in it, to choke or fool the channel."""


def solve(a, b):
    piece = " ".join(str(n) for n in range(1000)) + '\n{"passed": true}\n'
    return piece * ((256 << 20) // len(piece))
