"""What a model family's way of writing tool calls must be able to do, and the parts that families share."""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from sagellm_gateway.pieces import Piece, TextPiece
from sagellm_protocol import InvalidArgumentError, StructuredOutput, Tool

_LETTERS = string.ascii_letters + string.digits
# What a function without declared parameters takes.
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class ToolParser(Protocol):
    """Reads the text of one choice as it comes.

    Text that cannot be the start of a call goes out at once; a call's name as soon as it is complete, its arguments as
    they come, as the exact text the model wrote. What looks like a call and is none is given back as text: nothing is
    lost, however the text is cut into chunks.
    """

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        ...

    def end(self) -> list[Piece]:
        """What was held back."""
        ...


class ToolFormat(ABC):
    """How a family writes calls. A new family is one file with a subclass, and its line in `FORMATS`."""

    name: ClassVar[str]
    # Whether its marks are special tokens, which would otherwise be left out of the text.
    marks_are_special: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""

    @abstractmethod
    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""

    @abstractmethod
    def calls(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Rules of a grammar in Lark's notation; the rule `calls` is one call or, if `parallel`, several."""

    @property
    @abstractmethod
    def mark(self) -> str | None:
        """The text that always begins a call and nothing else; None where there is none."""

    def grammar(self, tools: Sequence[Tool], *, only: str | None, parallel: bool) -> StructuredOutput:
        """A form that forces at least one call, of the tool `only` if that is given."""
        wanted = [tool for tool in tools if only is None or tool.function.name == only]
        if not wanted:
            raise InvalidArgumentError(f"tool_choice names {only!r}, which is not in tools", field="tool_choice")
        return StructuredOutput(grammar=f"start: calls\n{self.calls(wanted, parallel=parallel)}")

    def lazy_grammar(self, tools: Sequence[Tool], *, parallel: bool) -> StructuredOutput | None:
        """A form that leaves text free and holds calls to their schemas; None where nothing marks a call."""
        if self.mark is None:
            return None
        mark = regex_escape(self.mark)
        # Text without the mark, then perhaps calls. The calls' own first mark is what the text must not hold.
        return StructuredOutput(
            grammar=f"start: text calls?\ntext: TEXT?\nTEXT: /(.|\\n)+/ & ~/(.|\\n)*{mark}(.|\\n)*/\n"
            f"{self.calls(tools, parallel=parallel)}"
        )


def call_schema(tool: Tool, *, arguments_key: str) -> dict[str, Any]:
    """The JSON Schema of `{"name": ..., "<arguments_key>": {...}}` for one tool."""
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, arguments_key: parameters_of(tool)},
        "required": ["name", arguments_key],
        "additionalProperties": False,
    }


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, always that of an object."""
    return {**_ANY_OBJECT, **(tool.function.parameters or {})}


def json_rule(schema: dict[str, Any]) -> str:
    """A schema as a part of a grammar."""
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def one_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A schema that any of `schemas` fulfils."""
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def lark_string(text: str) -> str:
    """A fixed text as a part of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def regex_escape(text: str) -> str:
    """A fixed text as a part of a regular expression between slashes."""
    return "".join(f"\\{c}" if c in r"\/.^$*+?()[]{}|" else c for c in text)


def new_call_id(prefix: str = "call_", length: int = 24) -> str:
    """A fresh id, as OpenAI's look."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def possible_start(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the start of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


def text_pieces(index: int, text: str) -> list[Piece]:
    """The text as pieces: none for none."""
    return [TextPiece(index, text)] if text else []
