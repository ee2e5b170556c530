"""Hermes' notation, that of Qwen 2.5 and 3, too: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagellm_gateway.lark import lark_json, lark_mark, lark_string
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser
from sagellm_gateway.tool_formats.call_parser import CallParser
from sagellm_gateway.tool_formats.schemas import arguments_schema, is_lenient
from sagellm_protocol import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesFormat(ToolFormat):
    """See the module."""

    name = "hermes"
    opening = _OPEN
    marks = (_OPEN, _CLOSE)

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family; other families use the marks with other things in between."""
        unescaped = chat_template.replace("\\", "").replace("'", '"')
        return _OPEN in unescaped and '"arguments"' in unescaped and "<function=" not in unescaped

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return HermesParser(index, tools)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar."""
        opening, closing = lark_mark(_OPEN, token_ids), lark_mark(_CLOSE, token_ids)
        return [
            f'calls: call ("\\n" {opening} call)*' if parallel else "calls: call",
            f'call: "\\n" object "\\n" {closing}',
            *object_rules(tools, "arguments", strict_only=strict_only),
        ]


class HermesParser(CallParser):
    """Objects between marks."""

    marks = (_OPEN,)
    # No string of JSON holds a line break as it is, so this one stands in no argument.
    closing = f"\n{_CLOSE}"

    def _begin(self, is_end: bool) -> bool:
        return self._begin_object(self._read_close)

    def _read_close(self, is_end: bool) -> bool:
        return self._read_closing(is_end, _CLOSE)


def object_rules(tools: Sequence[Tool], key: str, *, strict_only: bool) -> list[str]:
    """Rules for `object`, a call as a JSON object with its arguments under `key`; of several families."""
    rules = [f"object: {' | '.join(f'object_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        # In the pieces that JSON's own grammar has: beside a form a call may begin as another object does.
        pieces = ("{", '"name"', ": ", f'"{tool.function.name}"', ", ", f'"{key}"', ": ")
        head = " ".join(lark_string(piece) for piece in pieces)
        schema = arguments_schema(tool, strict_only=strict_only)
        rules.append(f'object_{i}: {head} {lark_json(schema, lenient=is_lenient(tool))} "}}"')
    return rules
