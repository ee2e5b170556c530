"""DeepSeek: a block of calls in marks of its own, `…begin｜>name<…sep｜>{...}<…end｜>` each.

V3.1 writes just that. V3 and R1, and the models distilled from R1, write `function` in the name's place, and then the
name and the arguments as a block of code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sagellm_gateway.lark import lark_json, lark_mark, lark_string
from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser
from sagellm_gateway.tool_formats.call_parser import CallParser
from sagellm_gateway.tool_formats.schemas import arguments_schema, is_lenient
from sagellm_protocol import Tool
from sagellm_protocol.messages import MAX_TOOL_NAME

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_HEAD = re.compile(
    rf"\s*{_CALL}\s{{0,8}}(?:function\s{{0,8}}{_SEP}\s{{0,8}}(?P<coded>[\w.-]{{1,{MAX_TOOL_NAME}}})\s{{0,8}}```json"
    rf"|(?P<name>[\w.-]{{1,{MAX_TOOL_NAME}}})\s{{0,8}}{_SEP})\s{{0,8}}(?=\{{)"
)
_MAX_HEAD = 256  # more than any that matches
_BEHIND = re.compile(rf"\s*(?:```)?\s*(?:{_CALL_END})?")
_BEHIND_BEGUN = re.compile(r"\s*`{0,3}\s*")


class DeepSeekFormat(ToolFormat):
    """See the module; `is_coded` for V3 and R1."""

    name = "deepseek"
    opening = _CALLS
    marks = (_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END)

    def __init__(self, *, is_coded: bool = False) -> None:
        self._is_coded = is_coded

    @classmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""
        return _CALLS in chat_template

    @classmethod
    def for_template(cls, chat_template: str) -> DeepSeekFormat:
        """The format of a template that matches."""
        return cls(is_coded="```json" in chat_template)

    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`; it reads both notations."""
        return DeepSeekParser(index, tools)

    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar."""
        call, sep, end, calls_end = (lark_mark(mark, token_ids) for mark in (_CALL, _SEP, _CALL_END, _CALLS_END))
        between = '"\\n" ' if self._is_coded else ""
        rules = [
            f"calls: call ({between}call)* {calls_end}" if parallel else f"calls: call {calls_end}",
            f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
        ]
        for i, tool in enumerate(tools):
            name = tool.function.name
            arguments = lark_json(arguments_schema(tool, strict_only=strict_only), lenient=is_lenient(tool))
            if self._is_coded:
                coded = lark_string(f"{name}\n```json\n")
                rules.append(f'call_{i}: {call} "function" {sep} {coded} {arguments} "\\n```" {end}')
            else:
                rules.append(f"call_{i}: {call} {lark_string(name)} {sep} {arguments} {end}")
        return rules


class DeepSeekParser(CallParser):
    """Calls in a block."""

    marks = (_CALLS,)
    closing = _CALL_END

    def _begin(self, is_end: bool) -> bool:
        head = _HEAD.match(self._unread)
        name = None if head is None else head["coded"] or head["name"]
        if head is None or name not in self._names:
            is_undecided = head is None and not is_end and self._may_begin()
            return not is_undecided and self._give_back()
        self._announce(name)
        self._unread = self._unread[head.end() :]
        self._begin_arguments(self._read_end)
        return True

    def _may_begin(self) -> bool:
        """Whether what is unread may still become a call."""
        rest = self._unread.lstrip()
        return _CALL.startswith(rest[: len(_CALL)]) and "{" not in rest and len(rest) <= _MAX_HEAD

    def _read_end(self, is_end: bool) -> bool:
        """Behind the arguments: the call's end, and then perhaps the next call."""
        behind = _BEHIND.match(self._unread)
        assert behind is not None, "it matches anything"
        if not is_end and not behind[0].endswith(_CALL_END) and self._is_cut(_CALL_END):
            return False
        self._unread = self._unread[behind.end() :]
        return self._finish_call(self._read_next)

    def _is_cut(self, mark: str) -> bool:
        begun = _BEHIND_BEGUN.match(self._unread)
        assert begun is not None, "it matches anything"
        return mark.startswith(self._unread[begun.end() :])

    def _read_next(self, is_end: bool) -> bool:
        rest = self._unread.lstrip()
        if rest.startswith(_CALLS_END):
            self._unread = rest[len(_CALLS_END) :]
        elif rest.startswith(_CALL):
            self._opening, self._state = "", self._begin
            return True
        elif _CALLS_END.startswith(rest) or _CALL.startswith(rest):
            if not is_end:
                return False
            self._unread = ""
        self._state = self._read_text
        return True
