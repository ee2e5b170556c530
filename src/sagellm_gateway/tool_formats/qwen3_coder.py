"""Qwen3-Coder: `<tool_call>`, `<function=name>` and a `<parameter=key>` with a plain value for each argument.

Strings stand there as they are, so the schema of a parameter tells whether `5` is a number or a text. The arguments are
made into JSON here; text streams as it comes, other values at their end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sagellm_gateway.lark import lark_json, lark_mark, lark_regex, lark_string
from sagellm_gateway.marks import num_undecided
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser
from sagellm_gateway.tool_formats.call_parser import CallParser
from sagellm_gateway.tool_formats.parameter_values import is_text, json_text, property_schema, values_of
from sagellm_gateway.tool_formats.schemas import arguments_schema, is_lenient
from sagellm_protocol import InvalidArgumentError, Tool
from sagellm_protocol.messages import MAX_TOOL_NAME

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_VALUE_END = re.compile(rf"\n?{_PARAMETER_END}")


class Qwen3CoderFormat(ToolFormat):
    """See the module."""

    name = "qwen3_coder"
    opening = _OPEN
    marks = (_OPEN, _CLOSE)

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return _FUNCTION in chat_template and _PARAMETER in chat_template

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return Qwen3CoderParser(index, tools)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar: required parameters in the schema's order, others there or not."""
        opening, closing = lark_mark(_OPEN, token_ids), lark_mark(_CLOSE, token_ids)
        rules = [
            f'calls: call ("\\n" {opening} call)*' if parallel else "calls: call",
            f'call: "\\n" ({" | ".join(f"call_{i}" for i in range(len(tools)))}) {closing}',
            # Up to the first mark, where the parser sees the end, too.
            f"any_text[lazy]: /(?s:.*){lark_regex(_PARAMETER_END)}/",
        ]
        for i, tool in enumerate(tools):
            rules += _call_rules(f"call_{i}", tool, strict_only=strict_only)
        return rules


def _call_rules(rule: str, tool: Tool, *, strict_only: bool) -> list[str]:
    is_free = strict_only and not tool.function.strict
    schema = arguments_schema(tool)
    required, properties = schema.get("required"), schema.get("properties")
    parts, rules = [], []
    for number, name in enumerate(properties if isinstance(properties, dict) else ()):
        head, value = lark_string(f"{_PARAMETER}{name}>\n"), f"{rule}_{number}"
        parts.append(
            f"{head} {value}"
            if not is_free and isinstance(required, list) and name in required
            else f"({head} {value})?"
        )
        rules.append(_value_rule(value, schema, name, is_free=is_free, is_lenient=is_lenient(tool)))
    start, end = lark_string(f"{_FUNCTION}{tool.function.name}>\n"), lark_string(f"{_FUNCTION_END}\n")
    return [f"{rule}: {' '.join([start, *parts, end])}", *rules]


def _value_rule(rule: str, schema: Mapping[str, Any], name: str, *, is_free: bool, is_lenient: bool) -> str:
    """A value with the mark behind it."""
    wanted = property_schema(schema, name)
    end = lark_string(f"\n{_PARAMETER_END}\n")
    if is_free:
        return f'{rule}: any_text "\\n"'
    if not is_text(schema, name):
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return f"{rule}: {lark_json({**shared, **wanted}, lenient=is_lenient)} {end}"
    if texts := [text for text in values_of(wanted) if isinstance(text, str)]:
        return f"{rule}: ({' | '.join(lark_string(text) for text in texts)}) {end}"
    unheld = sorted({"pattern", "format"} & wanted.keys())
    if unheld and not is_lenient:
        raise InvalidArgumentError(
            f"tools: {unheld[0]} of parameter {name!r} cannot be held to, because this model writes strings without "
            "quotes; use an enum, or set strict to false",
            field="tools",
        )
    shortest, longest = wanted.get("minLength", 0), wanted.get("maxLength", "")
    if (shortest, longest) == (0, ""):
        return f'{rule}: any_text "\\n"'
    return f"{rule}[lazy]: /(?s:.{{{shortest},{longest}}})\\n{lark_regex(_PARAMETER_END)}\\n/"


class Qwen3CoderParser(CallParser):
    """Calls between marks, of which some models forget the outer ones."""

    marks = (_OPEN, _FUNCTION)

    def __init__(self, index: int, tools: Sequence[Tool]) -> None:
        super().__init__(index, tools)
        self._schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}
        self._schema: Mapping[str, Any] = {}
        self._key = ""
        self._is_text = self._is_first = self._is_begun = False

    def _begin(self, is_end: bool) -> bool:
        rest = self._unread
        if self._opening.endswith(_OPEN):
            rest = rest.lstrip()
            if not rest.startswith(_FUNCTION):
                is_undecided = _FUNCTION.startswith(rest) and not is_end
                return not is_undecided and self._give_back()
            rest = rest[len(_FUNCTION) :]
        name, found, behind = rest.partition(">")
        if not found and not is_end and len(name) <= MAX_TOOL_NAME:
            return False
        if not found or name not in self._names:
            return self._give_back()
        self._announce(name)
        self._argue("{")
        self._unread, self._schema, self._is_first = behind, self._schemas[name], True
        self._state = self._read_parameter
        return True

    def _read_parameter(self, is_end: bool) -> bool:
        """A parameter's key, or the end."""
        rest = self._unread.lstrip()
        key, found, behind = rest.removeprefix(_PARAMETER).partition(">")
        if rest.startswith(_PARAMETER) and found:
            self._argue(f"{'' if self._is_first else ', '}{json.dumps(key, ensure_ascii=False)}: ")
            self._key, self._unread, self._is_first, self._is_begun = key, behind, False, False
            self._is_text = is_text(self._schema, key)
            self._state = self._read_value
            return True
        is_end_mark = rest.startswith(_FUNCTION_END)
        if not is_end_mark and (_PARAMETER.startswith(rest[: len(_PARAMETER)]) or _FUNCTION_END.startswith(rest)):
            if not is_end:
                return False
            self._unread = ""  # cut off
            return self._finish_call(self._read_text)
        self._unread = rest.removeprefix(_FUNCTION_END)
        self._argue("}")
        return self._finish_call(self._read_close)

    def _read_value(self, is_end: bool) -> bool:
        """One line break behind the key and one before the end are not of the value."""
        if not self._is_begun:
            if not self._unread:
                return is_end and self._finish_call(self._read_text)
            self._unread, self._is_begun = self._unread.removeprefix("\n"), True
            if self._is_text:
                self._argue('"')
        end = _VALUE_END.search(self._unread)
        if end is not None:
            value, self._unread = self._unread[: end.start()], self._unread[end.end() :]
            self._argue(_escaped(value) + '"' if self._is_text else json_text(value, self._schema, self._key))
            self._state = self._read_parameter
            return True
        if self._is_text:
            ends = (_PARAMETER_END, f"\n{_PARAMETER_END}")
            limit = len(self._unread) - (0 if is_end else num_undecided(self._unread, ends))
            self._argue(_escaped(self._unread[:limit]))
            self._unread = self._unread[limit:]
        elif is_end:
            self._argue(self._unread)
            self._unread = ""
        return is_end and self._finish_call(self._read_text)

    def _read_close(self, is_end: bool) -> bool:
        return self._read_closing(is_end, _CLOSE)


def _escaped(text: str) -> str:
    """Text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
