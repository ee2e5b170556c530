"""Calls as JSON objects, `{"name": ..., "arguments": {...}}`, read while they are written.

Libraries that read incomplete JSON (jiter's partial mode is one) give values, but not where in the text they lie, and
read all of it again for each chunk. What is needed here is the place where the arguments begin and end, found once.
"""

from __future__ import annotations

import re
from collections.abc import Container
from enum import Enum, auto

from pydantic_core import from_json

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_OBJECT = re.compile(r"\s*\{")
_SPACE = re.compile(r"\s*")
_KEY = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*', re.DOTALL)
_KEY_BEGUN = re.compile(r'\s*(?:"(?:[^"\\]|\\.)*(?:\\|"\s*)?)?', re.DOTALL)
_SCALAR = re.compile(r'[^\s,{}\[\]":]+')
_ARGUMENTS = ("arguments", "parameters")
# What may stand in front of the name; anything else there, and it is an object of another kind.
_LEADING = (*_ARGUMENTS, "name", "type", "id")


class ValueScan:
    """Finds the end of a JSON object, array or string in chunks of text; `depth` counts brackets open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._is_escaped = False

    def feed(self, text: str) -> int | None:
        """The place behind the value's end in this chunk; None if it is not in it."""
        place = 0
        if self._is_escaped and text:
            self._is_escaped, place = False, 1
        while (found := (_INSIDE if self._in_string else _OUTSIDE).search(text, place)) is not None:
            place = found.end()
            match found[0]:
                case "\\":
                    self._is_escaped = place == len(text)
                    place += 1
                case '"':
                    self._in_string = not self._in_string
                    if not self._in_string and self._depth == 0:
                        return place
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return place
        return None


class Head(Enum):
    """What the beginning of a text is."""

    UNDECIDED = auto()
    ARGUMENTS = auto()  # a call up to its arguments, which begin at `position`
    WHOLE = auto()  # a call that ends at `position`, its `arguments` known
    NO_CALL = auto()


class CallHead:
    """Reads an object up to its arguments, or to its end where they come before the name or are no object."""

    def __init__(self, names: Container[str]) -> None:
        self.name: str | None = None
        self.arguments: str | None = None
        self.position = 0
        self._names = names
        self._key: str | None = None  # whose value is next
        self._scan: ValueScan | None = None  # of the value, which begins at `position`
        self._scanned = 0
        self._is_first = True

    def read(self, text: str) -> Head:
        """What `text` is, which begins as the last one did and may be longer. Not to be asked again once decided."""
        while (head := self._read_key(text) if self._key is None else self._read_value(text)) is None:
            pass
        return head

    def _read_key(self, text: str) -> Head | None:
        """On to the next member; None where there is one."""
        if self._is_first:
            begin = _OBJECT.match(text)
            if begin is None:
                return Head.NO_CALL if text.strip() else Head.UNDECIDED
            place = begin.end()
        else:
            place = self.position
        space = _SPACE.match(text, place)
        assert space is not None, "it matches anything"
        place = space.end()
        if place == len(text):
            return Head.UNDECIDED
        if text[place] == "}":
            return self._end(place + 1)
        if not self._is_first:
            if text[place] != ",":
                return Head.NO_CALL
            place += 1
        key = _KEY.match(text, place)
        if key is None or key.end() == len(text):
            return self._undecided_key(text[place:])
        self._key, self.position, self._is_first = key[1], key.end(), False
        if self.name is None and self._key not in _LEADING:
            return Head.NO_CALL
        return None

    def _undecided_key(self, text: str) -> Head:
        if _KEY_BEGUN.fullmatch(text) is None and _KEY.fullmatch(text) is None:
            return Head.NO_CALL
        begun = text.lstrip()[1:].partition('"')[0]
        is_known = self.name is not None or any(key.startswith(begun) for key in _LEADING)
        return Head.UNDECIDED if is_known else Head.NO_CALL

    def _read_value(self, text: str) -> Head | None:
        """On behind the value; None if it is complete."""
        begin = text[self.position]
        if begin == "{" and self._key in _ARGUMENTS and self.name is not None:
            return Head.ARGUMENTS
        end = self._value_end(text, begin)
        if end is None:
            return Head.UNDECIDED
        raw, key = text[self.position : end], self._key
        self.position, self._key, self._scan = end, None, None
        if key == "name":
            self.name = _string_in(raw)
            return None if self.name in self._names else Head.NO_CALL
        if key in _ARGUMENTS:
            self.arguments = _object_text(raw)
            return None if self.arguments is not None else Head.NO_CALL
        return None if raw else Head.NO_CALL

    def _value_end(self, text: str, begin: str) -> int | None:
        if begin not in '"{[':
            scalar = _SCALAR.match(text, self.position)
            end = self.position if scalar is None else scalar.end()
            return end if end < len(text) else None
        if self._scan is None:
            self._scan, self._scanned = ValueScan(), self.position
        found = self._scan.feed(text[self._scanned :])
        if found is None:
            self._scanned = len(text)
            return None
        return self._scanned + found

    def _end(self, position: int) -> Head:
        self.position = position
        if self.name is None:
            return Head.NO_CALL
        if self.arguments is None:
            self.arguments = "{}"  # a function without parameters
        return Head.WHOLE


def _string_in(raw: str) -> str | None:
    try:
        value = from_json(raw)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _object_text(raw: str) -> str | None:
    """The arguments as the text of an object: some models quote it, or write null for none."""
    try:
        value = from_json(raw)
        if value is None:
            return "{}"
        if isinstance(value, str):
            raw, value = value, from_json(value)
    except ValueError:
        return None
    return raw if isinstance(value, dict) else None
