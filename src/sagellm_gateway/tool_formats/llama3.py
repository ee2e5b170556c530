"""Llama 3.1 to 3.3: the answer is `{"name": ..., "parameters": {...}}`, several of them with `;` in between."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_gateway.tool_formats.bare_json import BareJsonParser
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser, call_schema, json_rule, one_of
from sagellm_protocol import Tool

_PYTHON_TAG = "<|python_tag|>"


class Llama3Format(ToolFormat):
    """See the module."""

    name = "llama3"
    marks_are_special = True

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return "<|start_header_id|>" in chat_template and "tools" in chat_template and '"parameters"' in chat_template

    @property
    def mark(self) -> None:
        """Nothing marks a call."""

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return BareJsonParser(index, _PYTHON_TAG)

    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Rules of a grammar."""
        schema = one_of([call_schema(tool, arguments_key="parameters") for tool in tools])
        several = 'calls: object ("; " object)*' if parallel else "calls: object"
        return f"{several}\nobject: {json_rule(schema)}\n"
