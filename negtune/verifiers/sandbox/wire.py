"""Frames between the processes of the sandbox, and Python values as JSON that carries no behaviour.

A value arrives as one of the builtin types, whatever class it had when it left: the receiver compares, adds and hashes
with its own `int` and `list`, never with a method that the sender wrote. What is no plain value travels as a number
that stands for it.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

LARGEST_FRAME = 1 << 24
"""Bytes."""
BUILTINS: dict[str, Any] = {
    f.__name__: f
    for f in (
        *(abs, all, any, bool, chr, complex, dict, divmod, float, frozenset, int, len, list, max, min, ord, pow, range),
        *(repr, reversed, round, set, sorted, str, sum, tuple, zip),
    )
}
"""Builtins that travel by name: they do nothing but compute."""


class WireError(Exception):
    """The other side sent what is no frame or no value, or nothing at all."""


def send(fd: int, message: Any) -> None:
    """Write one message as a frame: four bytes of length, then JSON."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST_FRAME:
        raise WireError(f"a value of {len(data)} bytes; at most {LARGEST_FRAME} can be sent")
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """Read one message. Raises `WireError` at the end of the stream or for anything that is no frame."""
    (size,) = struct.unpack(">I", _exactly(fd, 4))
    if size > LARGEST_FRAME:
        raise WireError(f"a frame of {size} bytes")
    try:
        return json.loads(_exactly(fd, size))
    except (ValueError, RecursionError) as error:
        raise WireError("a frame that is not JSON") from error


def _exactly(fd: int, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        try:
            part = os.read(fd, min(missing, 1 << 16))
        except OSError as error:
            raise WireError(str(error)) from error
        if not part:
            raise WireError("the other process has ended")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def encode(value: Any, by_number: Callable[[Any], Any]) -> Any:
    """`value` for JSON; `by_number(object)` says what stands for an object that is no plain value."""
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    base = next((b for b in _BASES if issubclass(kind, b)), None)
    if base is None:
        array = _array(value)
        if array is not None:
            return array
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and BUILTINS.get(name) is value:
            return {"builtin": name}
        return by_number(value)
    return _ENCODERS[base](value, lambda item: encode(item, by_number))


def decode(data: Any, by_number: Callable[[Any], Any]) -> Any:
    """The value that `encode` wrote; `by_number(data)` gives what stands for an object of the other side."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item, by_number) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise WireError("no value")
    ((kind, content),) = data.items()
    try:
        if kind == "object":
            return by_number(content)
        return _DECODERS[kind](content, lambda item: decode(item, by_number))
    except (KeyError, TypeError, ValueError, ArithmeticError, OverflowError) as error:
        raise WireError(f"no value: {kind}") from error


def _array(value: Any) -> Any:
    """A numpy array or number of a plain dtype."""
    if type(value).__module__ != "numpy":
        return None
    import numpy

    if isinstance(value, numpy.generic):
        value = numpy.asarray(value)
    elif not isinstance(value, numpy.ndarray):
        return None
    if value.dtype.kind not in "biufc":
        return None
    data = base64.b64encode(numpy.ascontiguousarray(value).tobytes()).decode()
    return {"array": [value.dtype.str, list(value.shape), data]}


def _read_array(content: Any, _: Any) -> Any:
    import numpy

    dtype, shape, data = content
    if numpy.dtype(dtype).kind not in "biufc":
        raise WireError("no array")
    array = numpy.frombuffer(base64.b64decode(data), dtype=dtype).reshape(shape)
    return array.copy() if shape else array[()]


# Methods are taken from the builtin types, not from the value: a subclass can override its own.
_Item = Callable[[Any], Any]
_ENCODERS: dict[type, Callable[[Any, _Item], Any]] = {
    str: lambda v, item: str.__str__(v),
    int: lambda v, item: _number(int.__int__(v)),
    float: lambda v, item: float.__float__(v),
    complex: lambda v, item: {"complex": [complex.__complex__(v).real, complex.__complex__(v).imag]},
    list: lambda v, item: [item(x) for x in list.__iter__(v)],
    tuple: lambda v, item: {"tuple": [item(x) for x in tuple.__iter__(v)]},
    dict: lambda v, item: {"dict": [[item(k), item(x)] for k, x in dict.items(v)]},
    set: lambda v, item: {"set": [item(x) for x in set.__iter__(v)]},
    frozenset: lambda v, item: {"frozenset": [item(x) for x in frozenset.__iter__(v)]},
    deque: lambda v, item: {"deque": [item(x) for x in deque.__iter__(v)]},
    bytes: lambda v, item: {"bytes": base64.b64encode(bytes.__getitem__(v, slice(None))).decode()},
    bytearray: lambda v, item: {"bytearray": base64.b64encode(bytes(bytearray.__getitem__(v, slice(None)))).decode()},
    range: lambda v, item: {"range": [v.start, v.stop, v.step]},
    datetime: lambda v, item: {"datetime": datetime.isoformat(v)},
    date: lambda v, item: {"date": date.isoformat(v)},
    timedelta: lambda v, item: {"timedelta": [v.days, v.seconds, v.microseconds]},
    Decimal: lambda v, item: {"decimal": Decimal.__str__(v)},
    Fraction: lambda v, item: {"fraction": [item(int(v.numerator)), item(int(v.denominator))]},
}
_BASES = list(_ENCODERS)


def _number(value: int) -> Any:
    return value if -(1 << 60) < value < 1 << 60 else {"int": hex(value)}  # JSON readers limit decimal digits


_DECODERS: dict[str, Callable[[Any, _Item], Any]] = {
    "int": lambda c, item: int(c, 16),
    "complex": lambda c, item: complex(*c),
    "tuple": lambda c, item: tuple(map(item, c)),
    "dict": lambda c, item: {item(k): item(v) for k, v in c},
    "set": lambda c, item: set(map(item, c)),
    "frozenset": lambda c, item: frozenset(map(item, c)),
    "deque": lambda c, item: deque(map(item, c)),
    "bytes": lambda c, item: base64.b64decode(c),
    "bytearray": lambda c, item: bytearray(base64.b64decode(c)),
    "range": lambda c, item: range(*c),
    "datetime": lambda c, item: datetime.fromisoformat(c),
    "date": lambda c, item: date.fromisoformat(c),
    "timedelta": lambda c, item: timedelta(*c),
    "decimal": lambda c, item: Decimal(c),
    "fraction": lambda c, item: Fraction(*map(item, c)),
    "array": _read_array,
    "builtin": lambda c, item: BUILTINS[c],
}
