"""The process of the tests. The solution's names stand in it for functions and objects of the other process.

What comes back over the connection is plain data, compared here with Python's own operators. An object of a class of
the solution's own can be called, iterated and asked for attributes; it is compared, or asked what it contains, only
if the test made it itself by calling that class: elsewhere the test means plain data, and the solution's `__eq__`
would decide about the solution.
"""

from __future__ import annotations

import ast
import builtins
import sys
import traceback
import types
import unittest
from collections import deque
from collections.abc import Mapping
from typing import Any

from negtune.verifiers.sandbox.errors import describe_error, local_error
from negtune.verifiers.sandbox.peer import Peer, Reference
from negtune.verifiers.sandbox.wire import WireError

LONGEST_REASON = 300


class Remote(Reference):
    """An object of the solution's process."""

    __slots__ = ("_is_class", "_made_here", "_name")

    def __init__(self, peer: Peer, number: int, name: str, *, is_class: bool) -> None:
        super().__init__(peer, number)
        self._name, self._is_class, self._made_here = name, is_class, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value, changed, changed_by_name = self._peer.request("call", self, list(args), kwargs)
        for argument, after in zip(args, changed, strict=False):
            _change(argument, after)
        for name, after in changed_by_name.items():
            _change(kwargs.get(name), after)
        if self._is_class and isinstance(value, Remote):
            value._made_here = True
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_peer", "_number", "_name", "_is_class", "_made_here"):
            object.__setattr__(self, name, value)
        else:
            self._peer.request("setattr", self, name, value)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self._peer.request("isinstance", value, self))

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self._peer.request("issubclass", value, self))

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: Any) -> Any:
        if self is other:
            return True
        return False if other is None else self._relation("eq", other)

    def __ne__(self, other: Any) -> Any:
        if self is other:
            return False
        return True if other is None else self._relation("ne", other)

    def _relation(self, operation: str, *others: Any) -> Any:
        if not self._made_here:
            raise TypeError(f"the solution gave a {self._name} where the test needs plain data")
        return self._peer.request(operation, self, *others)


def _question(operation: str) -> Any:
    return lambda self: self._peer.request(operation, self)


def _relation(operation: str) -> Any:
    return lambda self, *others: self._relation(operation, *others)


for _name in ("len", "iter", "next", "str", "repr", "bool", "int", "float"):
    setattr(Remote, f"__{_name}__", _question(_name))
for _name in ("lt", "le", "gt", "ge", "contains", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg"):
    setattr(Remote, f"__{_name}__", _relation(_name))
for _name in ("setitem", "delitem", "enter", "exit"):
    setattr(Remote, f"__{_name}__", _relation(_name))
for _name in ("and_", "or_", "xor"):
    setattr(Remote, f"__{_name.rstrip('_')}__", _relation(_name))
Remote.__getitem__ = lambda self, key: self._peer.request("getitem", self, key)  # ty: ignore[missing-attribute]


def _change(argument: Any, after: Any) -> None:
    """Do to `argument` what the solution did to its copy of it."""
    if after is None or type(after) is not type(argument) or after is argument:
        return
    if isinstance(argument, list | bytearray):
        argument[:] = after
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(after)
    elif isinstance(argument, deque):
        argument.clear()
        argument.extend(after)
    elif type(argument).__name__ == "ndarray" and argument.shape == after.shape:
        argument[...] = after


def judge(tests: str, entry_point: str | None, fd: int, module: str) -> dict[str, str]:
    """Run `tests` against the solution at the other end of `fd`; `outcome` (correct, wrong, unscored) and `reason`."""
    peer = _connect(fd)
    try:
        tree = ast.parse(tests)
        compiled = compile(tree, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        return _verdict("unscored", f"the tests are no Python: {error}")
    if not _checks_something(tree):
        return _verdict("unscored", "the tests check nothing: no assert, no unittest method")
    try:
        exported = peer.request("load")
    except WireError as error:
        return _verdict("wrong", f"the solution did not load: {error}")
    except Exception as error:
        return _verdict("wrong", f"the solution did not load: {type(error).__name__}: {error}")
    if entry_point is not None and entry_point not in exported:
        return _verdict("wrong", f"the solution does not define {entry_point}")
    try:
        namespace = _namespace(peer, exported, tree, entry_point, module)
        exec(compiled, namespace)
        count = _run_what_was_defined(namespace, entry_point)
    except ImportError as error:
        outcome = "wrong" if hasattr(error, "raised_by_solution") else "unscored"
        return _verdict(outcome, _where(error, tests))
    except (KeyboardInterrupt, SystemExit) as error:
        return _verdict("unscored", f"the tests ended their own process: {type(error).__name__}")
    except BaseException as error:
        return _verdict("wrong", _where(error, tests))
    return _verdict("correct", "") if count else _verdict("unscored", "all tests were skipped")


def _connect(fd: int) -> Peer:
    def wrap(number: int, description: Any) -> Any:
        described = description if isinstance(description, Mapping) else {}
        name, kind = str(described.get("name"))[:100], described.get("kind")
        if kind != "exception":
            return Remote(peer, number, name, is_class=kind == "class")
        nearest = (getattr(builtins, str(n), None) for n in described.get("names") or ())
        base = next((b for b in nearest if isinstance(b, type) and issubclass(b, Exception)), Exception)
        return type(name, (base,), {})

    def raised(content: Any) -> Exception:
        error = local_error(content, peer.known(content.get("number")) if isinstance(content, dict) else None)
        error.raised_by_solution = True  # ty: ignore[missing-attribute]
        return error

    peer = Peer(
        fd,
        serve=_answer,
        wrap=wrap,
        describe=lambda value: None,
        failed=describe_error,
        raised=raised,
    )
    return peer


def _answer(operation: str, arguments: list[Any]) -> Any:
    """What the solution may do with an object that a test passed to it: call it, iterate it, and read and set public
    attributes if its class is the tests' own. Frames, globals and everything else of this process stay out of reach."""
    value, *rest = arguments
    if not isinstance(value, Remote):
        if operation == "call":
            args, kwargs = rest
            return value(*args, **kwargs)
        if operation in ("iter", "next"):
            return (iter if operation == "iter" else next)(value)
        if operation in ("getattr", "setattr") and type(value).__module__ == "tests" and str(rest[0])[:1] != "_":
            return getattr(value, rest[0]) if operation == "getattr" else setattr(value, *rest)
    raise WireError("the solution may not ask for this")


def _namespace(
    peer: Peer, exported: Mapping[str, Any], tree: ast.AST, entry_point: str | None, module: str
) -> dict[str, Any]:
    """What the tests see. A solution cannot replace a builtin, unless that is the function it was asked to write."""

    def exported_name(name: str) -> Any:
        if name not in exported:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return peer.request("get", name)

    solution = types.ModuleType(module)
    solution.__getattr__ = exported_name
    sys.modules[module] = solution
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name in used & set(exported):
        if name == entry_point or not hasattr(builtins, name):
            namespace[name] = peer.request("get", name)
    if entry_point is not None:
        namespace.setdefault(entry_point, peer.request("get", entry_point))
        namespace.setdefault("candidate", namespace[entry_point])
    return namespace


def _run_what_was_defined(namespace: dict[str, Any], entry_point: str | None) -> int:
    """Run `check(candidate)`, `test...` functions and unittest classes; 0 if there are only the last, all skipped."""
    classes = [v for v in namespace.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]
    ran = 0 if classes else 1
    check = namespace.get("check")
    if isinstance(check, types.FunctionType) and entry_point is not None:
        check(namespace[entry_point])
    for name, value in list(namespace.items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
    for case in classes:
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        for _, trace in (*result.failures, *result.errors):
            raise AssertionError(trace.strip().splitlines()[-1])
        ran += result.testsRun - len(result.skipped)
    return ran


def _checks_something(tree: ast.AST) -> bool:
    def checks(node: ast.AST) -> bool:
        if isinstance(node, ast.Assert):
            return True
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        return name.startswith("assert") or name in ("raises", "fail")

    return any(map(checks, ast.walk(tree)))


def _where(error: BaseException, tests: str) -> str:
    """The line of the tests at which it happened, and what."""
    lines = tests.splitlines()
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    number = numbers[-1] if numbers else None
    line = lines[number - 1].strip() if number and number <= len(lines) else ""
    if isinstance(error, AssertionError) and not str(error):
        return f"failed: {line}"
    return f"{type(error).__name__}: {error}" + (f" at: {line}" if line else "")


def _verdict(outcome: str, reason: str) -> dict[str, str]:
    return {"outcome": outcome, "reason": reason[:LONGEST_REASON]}
