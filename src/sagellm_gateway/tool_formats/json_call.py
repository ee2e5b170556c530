"""One call written as a JSON object, `{"name": ..., "arguments": {...}}`, read as it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from pydantic_core import from_json

from sagellm_gateway.pieces import Piece, ToolCallPiece
from sagellm_gateway.tool_formats.base import new_call_id

# The order that all families' templates ask for; a call in another order goes out as a whole at its end.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCall:
    """Reads one object, from its first brace to the one that closes it; `number` counts the choice's calls.

    Where the `name` is known already, the object is the arguments alone.

    `text` is what was read so far, `is_complete` whether the object has ended, `is_announced` whether its name has gone
    out, so that it cannot be taken back.
    """

    def __init__(
        self, index: int, number: int, new_id: Callable[[], str] = new_call_id, *, name: str | None = None
    ) -> None:
        self.text = ""
        self.is_complete = False
        self.is_announced = False
        self._index, self._number, self._new_id, self._name = index, number, new_id, name
        self._depth = 0
        self._in_string = self._escaped = False
        self._sent = 0  # where the arguments that have not gone out begin

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """The pieces that `text` completes, and what of it lies behind the object's end."""
        for place, character in enumerate(text):
            if self._closes(character):
                self.text += text[: place + 1]
                self.is_complete = True
                return self._finish(), text[place + 1 :]
        self.text += text
        return self._advance(), ""

    @property
    def may_be_call(self) -> bool:
        """False as soon as no object begins here."""
        start = self.text.lstrip()
        return not start or start[0] == "{"

    @property
    def in_string(self) -> bool:
        """Whether what comes next belongs to a string."""
        return self._in_string

    @property
    def is_call(self) -> bool:
        """Whether the complete object is a call."""
        return self.is_announced or self._whole() is not None

    def rest(self) -> list[Piece]:
        """What has not gone out of an announced call that will not go on."""
        return self._send_until(len(self.text))

    def _closes(self, character: str) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            return self._depth == 0
        return False

    def _advance(self) -> list[Piece]:
        if self.is_announced:
            return self._arguments()
        name = self._name
        if name is None:
            head = _HEAD.match(self.text)
            if head is None:
                return []
            name, self._sent = head[1], head.end()
        self.is_announced = True
        return [ToolCallPiece(self._index, self._number, id=self._new_id(), name=name), *self._arguments()]

    def _arguments(self) -> list[Piece]:
        # The last brace closes the call and not its arguments, so braces at the end wait.
        is_open = self._in_string or self._name is not None
        end = len(self.text) if is_open else len(self.text.rstrip("} \t\r\n"))
        return self._send_until(end)

    def _finish(self) -> list[Piece]:
        pieces = self._advance()
        if self.is_announced:
            end = len(self.text) if self._name is not None else len(self.text[:-1].rstrip())
            return [*pieces, *self._send_until(end)]
        whole = self._whole()
        if whole is None:
            return []
        self.is_announced = True
        name, arguments = whole
        return [ToolCallPiece(self._index, self._number, arguments, self._new_id(), name)]

    def _send_until(self, end: int) -> list[Piece]:
        new, self._sent = self.text[self._sent : end], max(self._sent, end)
        return [ToolCallPiece(self._index, self._number, new)] if new else []

    def _whole(self) -> tuple[str, str] | None:
        """Name and arguments of an object in any order; None where it is no call."""
        try:
            value = from_json(self.text)
        except ValueError:
            return None
        name = value.get("name")
        arguments: object = next((value[key] for key in _ARGUMENT_KEYS if key in value), {})
        if not isinstance(name, str) or not is_name(name):
            return None
        return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def is_name(text: str) -> bool:
    """Whether a function may have this name."""
    return _NAME.fullmatch(text) is not None
