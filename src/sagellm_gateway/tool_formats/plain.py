"""For models whose template knows no tools: a list of calls in JSON, `[{"name": ..., "arguments": {...}}, ...]`.

Such a model does not learn of its tools, because no instruction is slipped into the prompt. With `required` or a named
tool a grammar makes it write the list; otherwise it does so where the caller's own messages ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser
from sagellm_gateway.tool_formats.call_parser import ObjectsParser
from sagellm_gateway.tool_formats.hermes import object_rules
from sagellm_protocol import Tool


class PlainFormat(ToolFormat):
    """See the module."""

    name = "plain"
    opening = None
    marks_are_special = False

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family: that of all which no other family claims."""
        return True

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return PlainParser(index, tools)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar."""
        calls = 'calls: "[" object (", " object)* "]"' if parallel else 'calls: "[" object "]"'
        return [calls, *object_rules(tools, "arguments", strict_only=strict_only)]


class PlainParser(ObjectsParser):
    """Objects at the beginning of the answer."""

    is_bare = True
