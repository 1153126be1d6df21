"""Return a list that holds itself and a dict that holds both, for walkers that never stop."""


def solve(a, b):
    answer = [5, 15]
    table = {"passed": True}
    answer.append(answer)
    answer.append(table)
    table["answer"] = answer
    table["table"] = table
    return answer
