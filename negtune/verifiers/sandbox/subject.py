"""The process of the foreign code. It knows the code and what it is asked; never a test or an expected value."""

from __future__ import annotations

import builtins
import operator
import os
import sys
import types
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from negtune.verifiers.sandbox.errors import describe_error, local_error
from negtune.verifiers.sandbox.peer import Peer, Reference
from negtune.verifiers.sandbox.wire import WireError

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "contains")},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg")},
    **{name: getattr(operator, name) for name in ("and_", "or_", "xor", "getitem", "setitem", "delitem")},
    **{"len": len, "iter": iter, "next": next, "str": str, "repr": repr, "bool": bool, "int": int, "float": float},
    **{"isinstance": isinstance, "issubclass": issubclass, "getattr": getattr, "setattr": setattr},
    "enter": lambda manager: type(manager).__enter__(manager),
    "exit": lambda manager, *error: bool(type(manager).__exit__(manager, *error)),
}


class Passed(Reference):
    """A function, iterator or object of the tests that was passed as an argument."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.request("call", self, list(args), kwargs)

    def __iter__(self) -> Any:
        return self._peer.request("iter", self)

    def __next__(self) -> Any:
        return self._peer.request("next", self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_peer", "_number"):
            object.__setattr__(self, name, value)
        else:
            self._peer.request("setattr", self, name, value)


def serve(code: str, fd: int, module: str) -> None:
    """Run `code` as a module and answer the judge until it is gone."""
    solution = types.ModuleType(module)
    sys.modules[module] = solution
    own = solution.__dict__

    def load() -> dict[str, str]:
        exec(compile(code, f"<{module}>", "exec"), own)
        return {name: "" for name in own if not name.startswith("__")}

    def call(function: Any, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        value = function(*args, **kwargs)
        changeable = [a if _changeable(a) else None for a in args]
        return [value, changeable, {k: v for k, v in kwargs.items() if _changeable(v)}]

    def answer(operation: str, arguments: list[Any]) -> Any:
        if operation == "load":
            return load()
        if operation == "get":
            return own[arguments[0]]
        if operation == "call":
            return call(*arguments)
        return OPERATIONS[operation](*arguments)

    peer = Peer(
        fd,
        serve=answer,
        wrap=lambda number, description: Passed(peer, number),
        describe=_describe,
        failed=lambda error: describe_error(error, peer.number_of(type(error))),
        raised=local_error,
    )
    with suppress(WireError, OSError):  # the judge has finished
        peer.serve_forever()


def run_as_program(code: str) -> int:
    """Run `code` as `__main__` on this process's standard input and output; returns its exit code."""
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    try:
        exec(compile(code, "<program>", "exec"), program.__dict__)
        code_of_exit = 0
    except SystemExit as stop:
        code_of_exit = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}"[:500])
        code_of_exit = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code_of_exit = 1
    return code_of_exit & 0xFF


def _changeable(value: Any) -> bool:
    return type(value) in (list, dict, set, deque, bytearray) or type(value).__name__ == "ndarray"


def _describe(value: Any) -> dict[str, Any]:
    if not isinstance(value, type):
        return {"kind": "object", "name": type(value).__name__}
    if issubclass(value, BaseException):
        bases = [kind.__name__ for kind in value.__mro__ if getattr(builtins, kind.__name__, None) is kind]
        return {"kind": "exception", "name": value.__name__, "names": bases}
    return {"kind": "class", "name": value.__name__}


def silence() -> None:
    """Standard input, output and error to nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
