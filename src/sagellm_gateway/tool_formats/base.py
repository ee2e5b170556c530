"""What a model family's way of writing tool calls must be able to do."""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from sagellm_gateway.lark import grammar_of, lark_form, lark_mark, text_until
from sagellm_gateway.pieces import Piece
from sagellm_protocol import InvalidArgumentError, StructuredOutput, Tool

_LETTERS = string.ascii_letters + string.digits
NO_TOKENS: Mapping[str, int] = {}


class ToolParser(Protocol):
    """Reads the text of one choice as it comes.

    Text that cannot be the start of a call goes out at once; a call's name as soon as it is complete, its arguments as
    they come, as the exact text that the model wrote. A call names a tool that the request declares; what looks like a
    call and is none is given back as text. White space around calls belongs to nobody. How the text is cut into chunks
    makes no difference.
    """

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        ...

    def end(self) -> list[Piece]:
        """What was held back."""
        ...


class ToolFormat(ABC):
    """How a family writes calls. A new family is one file with a subclass, and its line in `FORMATS`.

    `opening` begins an answer's calls, and nothing else; None where nothing does. `marks` are the texts that may be
    tokens of the model; `token_ids` says which of them are. A text that is to be parsed must show them: where
    `marks_are_special`, which they are in some models of a family, special tokens must not be left out of it.
    """

    name: ClassVar[str]
    opening: ClassVar[str | None]
    marks: ClassVar[tuple[str, ...]] = ()
    marks_are_special: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def matches(cls, chat_template: str) -> bool:
        """Whether a template is of this family."""

    @classmethod
    def for_template(cls, chat_template: str) -> ToolFormat:
        """The format of a template that matches."""
        return cls()

    @abstractmethod
    def parser(self, index: int, tools: Sequence[Tool]) -> ToolParser:
        """A parser for the text of the choice number `index`."""

    @abstractmethod
    def calls(
        self, tools: Sequence[Tool], *, parallel: bool, strict_only: bool, token_ids: Mapping[str, int]
    ) -> list[str]:
        """Rules of a grammar: `calls` is what follows `opening`, one call or, if `parallel`, several.

        With `strict_only` the arguments of tools that are not strict are any object.
        """

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        only: str | None,
        parallel: bool,
        token_ids: Mapping[str, int] = NO_TOKENS,
    ) -> StructuredOutput:
        """A form that forces at least one call, of the tool `only` if that is given.

        Raises:
            InvalidArgumentError: no such tool, or schemas too large for a grammar.
        """
        wanted = [tool for tool in tools if only is None or tool.function.name == only]
        if not wanted:
            raise InvalidArgumentError(
                f"tool_choice names {only!r}, which is not in tools; use one that is", field="tool_choice"
            )
        rules = self.calls(wanted, parallel=parallel, strict_only=False, token_ids=token_ids)
        return grammar_of([f"start: {self._mark(token_ids)}calls", *rules], field="tools")

    def grammar_beside(
        self,
        form: StructuredOutput,
        tools: Sequence[Tool],
        *,
        parallel: bool,
        token_ids: Mapping[str, int] = NO_TOKENS,
    ) -> StructuredOutput:
        """A form for an answer that is either calls or of the form `form`, as the model likes.

        Raises:
            InvalidArgumentError: schemas too large for a grammar, or a form that is no grammar.
        """
        rules = self.calls(tools, parallel=parallel, strict_only=False, token_ids=token_ids)
        head = [f"start: {self._mark(token_ids)}calls | answer", f"answer: {lark_form(form)}"]
        return grammar_of([*head, *rules], field="tools")

    def lazy_grammar(
        self, tools: Sequence[Tool], *, parallel: bool, token_ids: Mapping[str, int] = NO_TOKENS
    ) -> StructuredOutput | None:
        """A form that leaves text free and holds strict tools' calls to their schemas; None where nothing marks a call.

        Raises:
            InvalidArgumentError: schemas too large for a grammar.
        """
        if self.opening is None:
            return None
        rules = self.calls(tools, parallel=parallel, strict_only=True, token_ids=token_ids)
        until = text_until("beginning", self.opening, token_ids)
        return grammar_of(["start: TEXT? | beginning calls", "TEXT: /(?s:.+)/", until, *rules], field="tools")

    def _mark(self, token_ids: Mapping[str, int]) -> str:
        """What stands before calls in a rule."""
        return f"{lark_mark(self.opening, token_ids)} " if self.opening is not None else ""


def new_call_id() -> str:
    """A fresh id that looks like OpenAI's."""
    return f"call_{random_letters(24)}"


def random_letters(count: int) -> str:
    """Letters and digits that nobody can guess."""
    return "".join(secrets.choice(_LETTERS) for _ in range(count))
