"""Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or newer `[TOOL_CALLS]name[ARGS]{...}` a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sagellm_gateway.pieces import Piece
from sagellm_gateway.tool_formats.base import (
    ToolFormat,
    ToolParser,
    call_schema,
    json_rule,
    new_call_id,
    one_of,
    possible_start,
    text_pieces,
)
from sagellm_gateway.tool_formats.json_call import JsonCall, is_name
from sagellm_protocol import Tool

_MARK, _ARGS = "[TOOL_CALLS]", "[ARGS]"
# Mistral's templates refuse ids of any other form.
_new_id = partial(new_call_id, "", 9)


class MistralFormat(ToolFormat):
    """See the module."""

    name = "mistral"
    marks_are_special = True

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return _MARK in chat_template

    @property
    def mark(self) -> None:
        """Its mark is a special token, which free text cannot hold."""

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return MistralParser(index)

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Rules of a grammar: the list, which both generations' parsers read."""
        schema = one_of([call_schema(tool, arguments_key="arguments") for tool in tools])
        several = (
            'calls: "[TOOL_CALLS] [" object (", " object)* "]"' if parallel else 'calls: "[TOOL_CALLS] [" object "]"'
        )
        return f"{several}\nobject: {json_rule(schema)}\n"


class MistralParser:
    """Text, then calls to the end."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pending = ""
        self._is_in_calls = False
        self._call: JsonCall | None = None
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        pieces: list[Piece] = []
        self._pending += text
        while self._pending:
            before = (self._pending, self._call, self._is_in_calls)
            pieces += self._read_calls() if self._is_in_calls else self._read_text()
            if (self._pending, self._call, self._is_in_calls) == before:
                break
        return pieces

    def end(self) -> list[Piece]:
        """What was held back."""
        call, self._call = self._call, None
        held, self._pending = self._pending, ""
        if call is not None:
            return call.rest() if call.is_announced else text_pieces(self._index, call.text + held)
        if not self._is_in_calls:
            return text_pieces(self._index, held)
        return text_pieces(self._index, "" if held.strip("[], \t\r\n") == "" and self._num_calls else _MARK + held)

    def _read_text(self) -> list[Piece]:
        start = self._pending.find(_MARK)
        if start < 0:
            end = len(self._pending) - possible_start(self._pending, _MARK)
            text, self._pending = self._pending[:end], self._pending[end:]
            return text_pieces(self._index, text)
        text, self._pending = self._pending[:start], self._pending[start + len(_MARK) :]
        self._is_in_calls = True
        return text_pieces(self._index, text)

    def _read_calls(self) -> list[Piece]:
        if self._call is not None:
            return self._read_call(self._call)
        start = self._pending.lstrip()
        if start.startswith(_MARK):
            self._pending = start[len(_MARK) :]
            return []
        if _MARK.startswith(start.rstrip()):  # what comes shows whether it is a mark or the list's bracket
            return []
        start = start.lstrip("[], \t\r\n")
        brace = start.find("{")
        if brace < 0:
            return []
        name = start[:brace].strip().removesuffix(_ARGS).strip()
        if name and not is_name(name):
            end = self._pending.index("{") + 1
            text, self._pending = self._pending[:end], self._pending[end:]
            self._is_in_calls = False
            return text_pieces(self._index, text if self._num_calls else _MARK + text)
        self._pending = start[brace:]
        self._call = JsonCall(self._index, self._num_calls, _new_id, name=name or None)
        return []

    def _read_call(self, call: JsonCall) -> list[Piece]:
        pieces, self._pending = call.feed(self._pending)
        if not call.is_complete:
            return pieces
        self._call = None
        if call.is_call:
            self._num_calls += 1
            return pieces
        return [*pieces, *text_pieces(self._index, call.text)]
