"""How an exception crosses between the processes: by the names of its builtin classes and its text."""

from __future__ import annotations

import builtins
from typing import Any

LONGEST_TEXT = 2000


def describe_error(error: BaseException, number: int | None = None) -> dict[str, Any]:
    """What the other side is told; `number` is that of the exception's class, if the other side has one."""
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    try:
        text = str(error)
    except BaseException:  # __str__ of a stranger's class
        text = ""
    return {"names": names, "class": type(error).__name__, "text": text[:LONGEST_TEXT], "number": number}


def local_error(description: Any, known: Any = None) -> Exception:
    """An exception like the described one: of the class `known`, else of its nearest builtin class.

    Classes that are no `Exception` (SystemExit, KeyboardInterrupt) become RuntimeError: a stranger's exit ends nobody
    else's process.
    """
    if not isinstance(description, dict):
        return RuntimeError("an exception without description")
    text, name = str(description.get("text")), str(description.get("class"))
    if isinstance(known, type) and issubclass(known, Exception):
        return known(text)
    for builtin in description.get("names") or ():
        kind = getattr(builtins, builtin, None) if isinstance(builtin, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            if issubclass(kind, UnicodeError):  # its constructor wants five arguments
                kind = ValueError
            return kind(text) if builtin == name else kind(f"{name}: {text}")
    return RuntimeError(f"{name}: {text}")
