"""Calls without marks: an answer that begins with `{"name": ..., ...}` is calls, any other is text."""

from __future__ import annotations

from sagellm_gateway.pieces import Piece
from sagellm_gateway.tool_formats.base import text_pieces
from sagellm_gateway.tool_formats.json_call import JsonCall

_SEPARATORS = ";,"


class BareJsonParser:
    """Reads such answers; `prefix` may stand in front of the first call."""

    def __init__(self, index: int, prefix: str = "") -> None:
        self._index, self._prefix = index, prefix
        self._pending = ""
        self._is_text = False
        self._call: JsonCall | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        if self._is_text:
            return text_pieces(self._index, text)
        self._pending += text
        pieces: list[Piece] = []
        while self._pending and not self._is_text:
            before = (self._pending, self._call)
            pieces += self._begin() if self._call is None else self._read(self._call)
            if (self._pending, self._call) == before:
                break
        return pieces

    def end(self) -> list[Piece]:
        """What was held back."""
        call, self._call = self._call, None
        held, self._pending = self._pending, ""
        if call is None:
            return text_pieces(self._index, held if held.strip() or not self._num_calls else "")
        if call.is_announced:
            return call.rest()
        return text_pieces(self._index, call.text + held)

    def _begin(self) -> list[Piece]:
        """A call starts, or the rest is text."""
        start = self._pending.lstrip()
        if self._num_calls == 0 and self._prefix:
            if start.startswith(self._prefix):
                start = start[len(self._prefix) :].lstrip()
            elif start and self._prefix.startswith(start):
                return []
        if self._num_calls and start[:1] in _SEPARATORS:
            start = start[1:].lstrip()
        if start.startswith("{"):
            self._pending, self._call = start, JsonCall(self._index, self._num_calls)
            return []
        return self._to_text() if start else []

    def _read(self, call: JsonCall) -> list[Piece]:
        pieces, self._pending = call.feed(self._pending)
        if not call.is_complete:
            return pieces
        self._call = None
        if call.is_call:
            self._num_calls += 1
            return pieces
        self._pending = call.text + self._pending
        return [*pieces, *self._to_text()]

    def _to_text(self) -> list[Piece]:
        self._is_text = True
        text, self._pending = self._pending, ""
        return text_pieces(self._index, text)
