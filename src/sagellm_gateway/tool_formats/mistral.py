"""Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or newer `[TOOL_CALLS]name[ARGS]{...}` a call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

from sagellm_gateway.lark import lark_json, lark_mark, lark_string
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser, random_letters
from sagellm_gateway.tool_formats.call_parser import ObjectsParser
from sagellm_gateway.tool_formats.hermes import object_rules
from sagellm_gateway.tool_formats.schemas import arguments_schema, is_lenient
from sagellm_protocol import Tool
from sagellm_protocol.messages import MAX_TOOL_NAME

_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
# Some versions put an id between name and arguments.
_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s{0,4}\w{0,32}\s{0,4})?(?:\[ARGS\]\s{0,4})?(?=\{)")
_NAME_BEGUN = re.compile(rf"\s*[\w.-]{{1,{MAX_TOOL_NAME}}}\s*(?:\[[\w\[\]\s]{{0,64}})?")
# Mistral's templates refuse ids of any other form.
_new_id = partial(random_letters, 9)


class MistralFormat(ToolFormat):
    """See the module; `is_named` for the newer notation."""

    name = "mistral"
    opening = _CALLS
    marks = (_CALLS, _ARGS)

    def __init__(self, *, is_named: bool = False) -> None:
        self._is_named = is_named

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return _CALLS in chat_template

    @classmethod
    def for_template(cls, chat_template: str) -> MistralFormat:
        """The format of a template that matches."""
        return cls(is_named=_ARGS in chat_template)

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`; it reads both notations."""
        return MistralParser(index, tools, _new_id)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar."""
        if not self._is_named:
            calls = 'calls: /\\s?/ "[" object (", " object)* "]"' if parallel else 'calls: /\\s?/ "[" object "]"'
            return [calls, *object_rules(tools, "arguments", strict_only=strict_only)]
        opening, args = lark_mark(_CALLS, token_ids), lark_mark(_ARGS, token_ids)
        rules = [
            f"calls: call ({opening} call)*" if parallel else "calls: call",
            f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
        ]
        for i, tool in enumerate(tools):
            schema = arguments_schema(tool, strict_only=strict_only)
            arguments = lark_json(schema, lenient=is_lenient(tool))
            rules.append(f"call_{i}: {lark_string(tool.function.name)} {args} {arguments}")
        return rules


class MistralParser(ObjectsParser):
    """Objects behind the mark, or a name and its arguments."""

    marks = (_CALLS,)

    def _begin(self, is_end: bool) -> bool:
        rest = self._unread.lstrip()
        if not rest:
            return is_end and self._give_back()
        if rest[0] in "[{":
            return super()._begin(is_end)
        name = _NAME.match(self._unread)
        if name is None or name[1] not in self._names:
            is_undecided = name is None and _NAME_BEGUN.fullmatch(self._unread) is not None and not is_end
            return not is_undecided and self._give_back()
        self._announce(name[1])
        self._unread = self._unread[name.end() :]
        self._begin_arguments(self._end_call)
        return True

    def _end_call(self, is_end: bool) -> bool:
        return self._finish_call(self._read_text)
