"""CodeVerifier on honest code: what is correct, what is wrong and why, what cannot be scored."""

from __future__ import annotations

import os
import signal

import pytest

from negtune.verifiers.code import CodeVerifier, extract_code

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"


def verdict(verifier, code, tests=TESTS, **columns):
    return verifier.verify(["p"], [code], tests=[tests], **{k: [v] for k, v in columns.items()})[0]


CORRECT = {
    "asserts": (ADD, TESTS),
    "a list of asserts": (ADD, TESTS.splitlines()),
    "unittest": (
        ADD,
        "import unittest\nclass Case(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)",
    ),
    "test functions": (ADD, "def test_add():\n    assert add(1, 2) == 3"),
    "import by name": (ADD, "from solution import add as plus\nassert plus(1, 2) == 3"),
    "import of the module": (ADD, "import solution\nassert solution.add(1, 2) == 3"),
    "all plain types": (
        "def same(x):\n    return x",
        "from collections import deque\nfrom decimal import Decimal\nfrom fractions import Fraction\nimport datetime\n"
        "values = [None, True, 0, -5, 10**400, 1.5, float('inf'), 2j, 'é\\n', b'\\x00\\xff', [1, [2]], (1, (2,)), {1: 'a', "
        "(1, 2): [3]}, {1, 2}, frozenset({3}), range(3), deque([1]), Decimal('1.10'), Fraction(1, 3), bytearray(b'x'), "
        "datetime.date(2024, 2, 29), datetime.timedelta(1, 2, 3)]\n"
        "for v in values:\n    w = same(v)\n    assert w == v and type(w) is type(v), v",
    ),
    "subclasses of plain types arrive as plain": (
        "from collections import Counter, defaultdict, namedtuple\nfrom enum import IntEnum\n"
        "P = namedtuple('P', 'x y')\nclass E(IntEnum):\n    A = 3\n"
        "def f(i):\n    return [Counter('aab'), defaultdict(list, a=[1]), P(1, 2), E.A][i]",
        "assert f(0) == {'a': 2, 'b': 1}\nassert f(1) == {'a': [1]}\nassert f(2) == (1, 2)\nassert f(3) == 3",
    ),
    "changed arguments": (
        "def fill(items, table):\n    items.sort()\n    table['n'] = len(items)",
        "a, t = [3, 1, 2], {}\nfill(a, t)\nassert a == [1, 2, 3] and t == {'n': 3}",
    ),
    "generators": (
        "def count(n):\n    for i in range(n):\n        yield i",
        "assert list(count(3)) == [0, 1, 2]\nassert next(iter(count(1))) == 0\nassert sum(count(4)) == 6",
    ),
    "functions as arguments and results": (
        "def twice(f):\n    return lambda x: f(f(x))\ndef sort_by(items, key):\n    return sorted(items, key=key)",
        "assert twice(lambda x: x + 3)(1) == 7\nassert sort_by(['bb', 'a'], len) == ['a', 'bb']\n"
        "assert sort_by([1, 2], lambda x: -x) == [2, 1]",
    ),
    "classes": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n"
        "        return self\n    def pop(self):\n        return self.items.pop()\n    def __len__(self):\n"
        "        return len(self.items)\n    def __contains__(self, x):\n        return x in self.items\n"
        "    def __eq__(self, other):\n        return self.items == other.items",
        "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and 2 in s and s.pop() == 2 and s.items == [1]\n"
        "assert isinstance(s, Stack)\nt = Stack()\nt.push(1)\nassert s == t\nt.label = 'x'\nassert t.label == 'x'",
    ),
    "exceptions": (
        "class Empty(ValueError):\n    pass\ndef f(kind):\n    if kind == 0:\n        raise Empty('nothing here')\n"
        "    raise KeyError(kind)",
        "import unittest\ntry:\n    f(0)\n    assert False\nexcept Empty as error:\n    assert 'nothing' in str(error)\n"
        "with unittest.TestCase().assertRaises(KeyError):\n    f(1)",
    ),
    "helpers and dataclasses with postponed annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def helper(n):\n    return n + 1\ndef f(n):\n    return helper(n)",
        "assert f(1) == 2 and helper(2) == 3 and P(4).x == 4",
    ),
    "objects of the tests' own class": (
        "def total(node):\n    n = 0\n    while node is not None:\n        n += node.value\n        node = node.next\n    return n",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
        "assert total(Node(1, Node(2))) == 3",
    ),
    "threads": (
        "import threading\ndef f():\n    out = []\n    t = threading.Thread(target=lambda: out.append(1))\n    t.start()\n"
        "    t.join()\n    return out",
        "assert f() == [1]",
    ),
    "scratch files": (
        "import tempfile, os\ndef f():\n    with tempfile.TemporaryDirectory() as d:\n"
        "        open(os.path.join(d, 'x'), 'w').write('hi')\n        return open(os.path.join(d, 'x')).read()",
        "assert f() == 'hi'",
    ),
    "numpy": (
        "import numpy as np\ndef f(x):\n    return np.asarray(x) * 2.0\ndef g(a):\n    a *= 2",
        "import numpy as np\nassert np.allclose(f([1, 2]), [2, 4])\nassert f([1]).dtype == np.float64\n"
        "assert float(np.mean(f([1, 3]))) == 4\na = np.ones(3)\ng(a)\nassert a.tolist() == [2, 2, 2]",
    ),
    "a function with a builtin's name, if that was asked for": (
        "def sum(a, b):\n    return a + b",
        "assert sum(1, 2) == 3",
    ),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct(verifier, name):
    code, tests = CORRECT[name]
    entry = {"entry_point": "sum"} if "builtin's name" in name else {}
    found = verdict(verifier, code, tests, **entry)
    assert (found.outcome, found.reason) == ("correct", "")


WRONG = {
    "another value": (ADD.replace("+", "-"), TESTS, r"failed: assert add\(2, 3\) == 5"),
    "an error in the call": (
        "def add(a, b):\n    return a / 0",
        TESTS,
        "ZeroDivisionError: division by zero at: assert",
    ),
    "an error at import": ("raise OSError('x')\n" + ADD, TESTS, "did not load: OSError: x"),
    "no Python": ("def add(a, b:", TESTS, "did not load: SyntaxError"),
    "another name": ("def plus(a, b):\n    return a + b", TESTS, "NameError: name 'add' is not defined"),
    "endless loop": ("def add(a, b):\n    while True: pass", TESTS, "CPU time limit"),
    "endless loop at import": ("while True: pass", TESTS, "CPU time limit"),
    "too much memory": ("def add(a, b):\n    return len(bytearray(10 << 30))", TESTS, "MemoryError"),
    "endless recursion": ("def add(a, b):\n    return add(a, b)", TESTS, "RecursionError"),
    "a missing package": ("import no_such_package\n" + ADD, TESTS, "ModuleNotFoundError"),
    "a failing unittest": (
        ADD,
        "import unittest\nclass Case(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 4)",
        "3 != 4",
    ),
    "an object where data was meant": (
        "class Sum:\n    pass\ndef add(a, b):\n    return Sum()",
        TESTS,
        "gave a Sum where the test needs plain data",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(verifier, name):
    code, tests, words = WRONG[name]
    found = verdict(verifier, code, tests)
    assert found.outcome == "wrong"
    import re

    assert re.search(words, found.reason), found.reason


UNSCORED = {
    "tests that are no Python": ("assert add(2, 3 ==", "the tests are no Python"),
    "tests that check nothing": ("add(2, 3)", "the tests check nothing"),
    "tests that need a missing package": ("import no_such_package\nassert add(1, 2) == 3", "no_such_package"),
    "tests that exit": ("import sys\nassert add(1, 2) == 3\nsys.exit(0)", "ended their own process"),
    "tests that are all skipped": (
        "import unittest\n@unittest.skip('x')\nclass C(unittest.TestCase):\n    def test(self):\n        self.fail()",
        "all tests were skipped",
    ),
}


@pytest.mark.parametrize("name", UNSCORED)
def test_unscored(verifier, name):
    tests, words = UNSCORED[name]
    found = verdict(verifier, ADD, tests)
    assert found.outcome == "unscored"
    assert found.score is None
    assert words in found.reason


def test_humaneval_form(verifier):
    row = {
        "code_prefix": "def add(a, b):\n",
        "entry_point": "add",
        "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    }
    columns = {name: [value] * 2 for name, value in row.items()}
    verdicts = verifier.verify(["p"] * 2, ["    return a + b\n", "    return a * b\n"], **columns)
    assert [v.outcome for v in verdicts] == ["correct", "wrong"]


def test_programs_are_compared_outside(verifier):
    code = "n = int(input())\nprint(n * 2)\nif n == 7:\n    raise SystemExit(3)\n"
    columns = {"inputs": [["1\n", "2\n"], ["1\n"], ["7\n"]], "outputs": [["2\n", "4"], ["3"], ["14"]]}
    verdicts = verifier.verify(["p"] * 3, [code] * 3, **columns)
    assert [v.outcome for v in verdicts] == ["correct", "wrong", "wrong"]
    assert "printed '2\\n', expected '3'" in verdicts[1].reason
    assert "exit code 3" in verdicts[2].reason
    endless = verifier.verify(["p"], ["while True: print('x' * 1000)"], inputs=[[""]], outputs=[["x"]])[0]
    assert endless.outcome == "wrong"


def test_many_completions_keep_their_order(verifier):
    completions = [f"def add(a, b):\n    return a + b + {i % 2}\n" for i in range(40)]
    verdicts = verifier.verify(["p"] * 40, completions, tests=[TESTS] * 40)
    assert [v.outcome for v in verdicts] == ["correct", "wrong"] * 20


def test_a_killed_sandbox_is_unscored_then_a_fresh_one_works():
    with CodeVerifier(workers=1) as verifier:
        assert verdict(verifier, ADD).outcome == "correct"
        os.kill(verifier._all[0]._process.pid, signal.SIGKILL)
        first, second = verdict(verifier, ADD), verdict(verifier, ADD)
        assert first.outcome in ("unscored", "correct")  # the death may be noticed before the job is sent
        assert second.outcome == "correct"


def test_rows_without_tests_and_impossible_sandboxes_are_refused(verifier):
    with pytest.raises(ValueError, match="row 0 has no tests"):
        verifier.verify(["p"], [ADD])
    with pytest.raises(ValueError, match="sandbox must be auto"):
        CodeVerifier(sandbox="docker")
    with pytest.raises(ValueError, match="seconds > 0"):
        CodeVerifier(seconds=0)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("First\n```\na\n```\nthen\n```py\nb\n```", "b\n"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_code_is_the_last_fenced_block(text, code):
    assert extract_code(text) == code
