"""Llama 3.1 to 3.3: the answer is `{"name": ..., "parameters": {...}}`; some put `<|python_tag|>` in front.

One call an answer is what these models learned and what their templates can show them again, so a grammar asks for one.
Several, with `;` in between, are read all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagellm_gateway.lark import grammar_of, lark_mark
from sagellm_gateway.tool_formats.base import NO_TOKENS, ToolFormat, ToolParser
from sagellm_gateway.tool_formats.call_parser import ObjectsParser
from sagellm_gateway.tool_formats.hermes import object_rules
from sagellm_protocol import StructuredOutput, Tool

_TAG = "<|python_tag|>"


class Llama3Format(ToolFormat):
    """See the module."""

    name = "llama3"
    opening = None
    marks = (_TAG,)

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return "<|start_header_id|>" in chat_template and "tools" in chat_template and '"parameters"' in chat_template

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""
        return Llama3Parser(index, tools)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar."""
        return ["calls: object", *object_rules(tools, "parameters", strict_only=strict_only)]

    def lazy_grammar(
        self, tools: Sequence[Tool], *, parallel: bool, token_ids: Mapping[str, int] = NO_TOKENS
    ) -> StructuredOutput:
        """A form that leaves text free which does not begin as a call does, with a brace."""
        rules = self.calls(tools, parallel=parallel, strict_only=True, token_ids=token_ids)
        tagged = f" | {lark_mark(_TAG, token_ids)} calls" if _TAG in token_ids else ""
        return grammar_of([f"start: TEXT? | calls{tagged}", r"TEXT: /\s*[^\s{](?s:.*)/", *rules], field="tools")


class Llama3Parser(ObjectsParser):
    """Objects at the beginning of the answer, or behind the tag."""

    marks = (_TAG,)
    is_bare = True
