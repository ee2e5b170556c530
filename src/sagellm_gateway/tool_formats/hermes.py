"""Hermes' notation, that of Qwen 2.5 and 3, too: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_gateway.pieces import Piece
from sagellm_gateway.tool_formats.base import (
    ToolFormat,
    ToolParser,
    call_schema,
    json_rule,
    lark_string,
    one_of,
    possible_start,
    text_pieces,
)
from sagellm_gateway.tool_formats.json_call import JsonCall
from sagellm_protocol import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesFormat(ToolFormat):
    """See the module."""

    name = "hermes"

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return _OPEN in chat_template and '"arguments"' in chat_template.replace("'", '"').replace("\\", "")

    @property
    def mark(self) -> str:
        """The text that always begins a call."""
        return _OPEN

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return HermesParser(index)

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Rules of a grammar."""
        schema = one_of([call_schema(tool, arguments_key="arguments") for tool in tools])
        several = 'calls: call ("\\n" call)*' if parallel else "calls: call"
        opening, closing = lark_string(f"{_OPEN}\n"), lark_string(f"\n{_CLOSE}")
        return f"{several}\ncall: {opening} object {closing}\nobject: {json_rule(schema)}\n"


class HermesParser:
    """Text, calls between their marks, and white space around calls, which belongs to nobody."""

    def __init__(self, index: int, opening: str = _OPEN, closing: str = _CLOSE) -> None:
        self._index, self._opening, self._closing = index, opening, closing
        self._pending = ""  # what may be the start of a mark, and white space that may lead to one
        self._call: JsonCall | None = None
        self._blank = ""  # white space in front of the call
        self._follows_call = False
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        pieces: list[Piece] = []
        self._pending += text
        while self._pending:
            before = (self._pending, self._call)
            pieces += self._read_text() if self._call is None else self._read_call(self._call)
            if (self._pending, self._call) == before:
                break
        return pieces

    def end(self) -> list[Piece]:
        """What was held back."""
        call = self._call
        if call is None:
            held, self._pending = self._pending, ""
            return text_pieces(self._index, held)
        if call.is_announced:  # cut off, or without its closing mark
            return call.rest() if not call.is_complete else []
        return [*self._give_back(call), *self.feed(""), *self.end()]

    def _read_text(self) -> list[Piece]:
        if self._follows_call:
            self._pending = self._pending.lstrip()
            if not self._pending:
                return []
            self._follows_call = False
        start = self._pending.find(self._opening)
        end = len(self._pending) - possible_start(self._pending, self._opening) if start < 0 else start
        # White space waits for what follows: in front of a call it is none of the answer.
        shown, behind = self._pending[:end].rstrip(), self._pending[end:]
        blank = self._pending[len(shown) : end]
        if start < 0:
            self._pending = blank + behind
        else:
            self._blank, self._pending = blank, behind[len(self._opening) :]
            self._call = JsonCall(self._index, self._num_calls)
        return text_pieces(self._index, shown)

    def _read_call(self, call: JsonCall) -> list[Piece]:
        if call.is_complete:
            return self._read_close(call)
        stop = self._pending.find(self._closing)
        end = len(self._pending) - possible_start(self._pending, self._closing) if stop < 0 else stop
        text, behind = self._pending[:end], self._pending[end:]
        pieces, rest = call.feed(text)
        if stop >= 0 and call.in_string:  # the mark is quoted
            more, rest = call.feed(self._closing)
            pieces, behind = [*pieces, *more], behind[len(self._closing) :]
        self._pending = rest + behind
        if not call.may_be_call or (stop >= 0 and not call.is_complete and not call.in_string):
            pieces += self._give_back(call)
        return pieces

    def _read_close(self, call: JsonCall) -> list[Piece]:
        if not call.is_call:
            return self._give_back(call)
        rest = self._pending.lstrip()
        if rest.startswith(self._closing):
            self._pending = rest[len(self._closing) :]
        elif not rest or self._closing.startswith(rest):
            return []  # the mark is on its way
        self._call, self._follows_call, self._num_calls = None, True, self._num_calls + 1
        return []

    def _give_back(self, call: JsonCall) -> list[Piece]:
        """What was no call is text; what has gone out as a call stays one."""
        self._call = None
        if call.is_announced:
            self._follows_call, self._num_calls = True, self._num_calls + 1
            return call.rest()
        self._pending = call.text + self._pending  # which may hold a call
        return text_pieces(self._index, self._blank + self._opening)
