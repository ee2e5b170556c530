"""For models whose template knows no tools: they can be made to call one, never call of their own accord."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_gateway.tool_formats.bare_json import BareJsonParser
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser, call_schema, json_rule, one_of
from sagellm_protocol import Tool


class PlainFormat(ToolFormat):
    """`{"name": ..., "arguments": {...}}`, one a line."""

    name = "plain"

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family: that of all which no other family claims."""
        return True

    @property
    def mark(self) -> None:
        """Nothing marks a call."""

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return BareJsonParser(index)

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Rules of a grammar."""
        schema = one_of([call_schema(tool, arguments_key="arguments") for tool in tools])
        several = 'calls: object ("\\n" object)*' if parallel else "calls: object"
        return f"{several}\nobject: {json_rule(schema)}\n"
