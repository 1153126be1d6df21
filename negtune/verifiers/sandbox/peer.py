"""Calls in both directions over one connection: each side keeps its objects and gives the other numbers for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from negtune.verifiers.sandbox.wire import WireError, decode, encode, receive, send


class Reference:
    """Stands for an object of the other side; subclasses say what can be done with it."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._number = peer, number


class Peer:
    """One end of the connection.

    Args:
        fd: socket to the other end.
        serve: `(operation, arguments) -> value` for requests of the other side.
        wrap: stands for an object of the other side, from what its `describe` said of it.
        describe: what the other side is told of an object of ours, besides its number.
        failed: what the other side is told of an exception; see `raised`.
        raised: makes an exception from that.
    """

    def __init__(
        self,
        fd: int,
        serve: Callable[[str, list[Any]], Any],
        wrap: Callable[[int, Any], Any],
        describe: Callable[[Any], Any],
        failed: Callable[[BaseException], Any],
        raised: Callable[[Any], BaseException],
    ) -> None:
        self.fd, self._serve, self._wrap, self._describe = fd, serve, wrap, describe
        self._failed, self._raised = failed, raised
        self._ours: list[Any] = []
        self._theirs: dict[int, Any] = {}

    def request(self, operation: str, *arguments: Any) -> Any:
        """Ask the other side and wait for its answer; meanwhile its own requests are served."""
        send(self.fd, ["ask", operation, [self._encode(a) for a in arguments]])
        while True:
            kind, content = self._next()
            if kind == "answer":
                return self._decode(content)
            if kind == "error":
                raise self._raised(content)
            self._answer(*content)

    def serve_forever(self) -> None:
        """Answer requests until the other side is gone."""
        while True:
            kind, content = self._next()
            if kind != "ask":
                raise WireError(f"nobody asked for this {kind}")
            self._answer(*content)

    def _next(self) -> tuple[str, Any]:
        message = receive(self.fd)
        if not isinstance(message, list) or len(message) < 2:
            raise WireError("no message")
        kind, *content = message
        if kind == "ask" and len(content) == 2 and isinstance(content[0], str) and isinstance(content[1], list):
            return kind, content
        if kind in ("answer", "error") and len(content) == 1:
            return kind, content[0]
        raise WireError("no message")

    def _answer(self, operation: str, arguments: list[Any]) -> None:
        try:
            answer = ["answer", self._encode(self._serve(operation, [self._decode(a) for a in arguments]))]
        except WireError as error:
            answer = ["error", self._failed(ValueError(str(error)))]
        except BaseException as error:  # whatever the code of the side that was asked raised
            answer = ["error", self._failed(error)]
        send(self.fd, answer)

    def number_of(self, value: Any) -> int | None:
        """The number under which the other side knows an object of ours."""
        return next((i for i, ours in enumerate(self._ours) if ours is value), None)

    def known(self, number: Any) -> Any:
        """What stands for the object that the other side numbered so, or None."""
        return self._theirs.get(number) if isinstance(number, int) else None

    def _encode(self, value: Any) -> Any:
        return encode(value, self._number)

    def _decode(self, data: Any) -> Any:
        return decode(data, self._object)

    def _number(self, value: Any) -> Any:
        if isinstance(value, Reference):  # goes back to where it came from
            return {"object": ["yours", value._number, None]}
        self._ours.append(value)
        return {"object": ["mine", len(self._ours) - 1, self._describe(value)]}

    def _object(self, content: Any) -> Any:
        whose, number, description = content
        if not isinstance(number, int):
            raise WireError("no object")
        if whose == "yours":
            if not 0 <= number < len(self._ours):
                raise WireError("no such object")
            return self._ours[number]
        if number not in self._theirs:
            self._theirs[number] = self._wrap(number, description)
        return self._theirs[number]
