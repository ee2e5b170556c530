"""Thoughts between two marks in front of the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sagellm_gateway.pieces import Piece, ReasoningPiece, TextPiece
from sagellm_gateway.tool_formats.base import lark_string, possible_start, regex_escape
from sagellm_protocol import StructuredOutput


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A notation of thoughts; `marks_are_special` where its marks are special tokens, which texts leave out."""

    name: str
    opening: str
    closing: str
    marks_are_special: bool = False

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends within a thought, as some templates make it."""
        return prompt.rfind(self.opening) > prompt.rfind(self.closing)

    def parser(self, index: int, prompt_opens: bool) -> ReasoningParser:
        """A parser for the text of the choice number `index`."""
        return ReasoningParser(self, index, is_thinking=prompt_opens)

    def after_thought(self, form: StructuredOutput) -> StructuredOutput | None:
        """`form` for what follows a thought that the prompt has opened; None where it cannot be joined so."""
        rule = _as_rule(form)
        if rule is None:
            return None
        mark = regex_escape(self.closing)
        thought = f"/(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/"
        start = f"start: THOUGHT? {lark_string(self.closing)} BLANK? answer\nTHOUGHT: {thought}\nBLANK: /\\s+/\n"
        return StructuredOutput(grammar=start + rule)


def _as_rule(form: StructuredOutput) -> str | None:
    """The form as the rule `answer` of a grammar."""
    if form.json_object:
        return 'answer: %json {"type": "object"}\n'
    if form.json_schema is not None:
        return f"answer: %json {json.dumps(form.json_schema, ensure_ascii=False)}\n"
    if form.choice is not None:
        return f"answer: {' | '.join(lark_string(text) for text in form.choice)}\n"
    if form.regex is not None:
        return f"answer: /{form.regex.replace('/', chr(92) + '/')}/\n"
    grammar = form.grammar or ""
    return f"answer: {grammar.removeprefix('start:').lstrip()}" if grammar.startswith("start:") else None


class ReasoningParser:
    """Reads the text of one choice as it comes: a thought, if one begins it, and then the answer."""

    def __init__(self, form: ReasoningFormat, index: int, *, is_thinking: bool) -> None:
        self._form, self._index = form, index
        self._read = self._read_thought if is_thinking else self._read_beginning
        self._pending = ""

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        self._pending += text
        pieces: list[Piece] = []
        while self._pending:
            before = (self._pending, self._read)
            pieces += self._read()
            if (self._pending, self._read) == before:
                break
        return pieces

    def end(self) -> list[Piece]:
        """What was held back: of a thought that was cut off it is thought, else text."""
        held, self._pending = self._pending, ""
        if not held.strip():
            return []
        is_thought = self._read == self._read_thought
        return [ReasoningPiece(self._index, held) if is_thought else TextPiece(self._index, held)]

    def _read_beginning(self) -> list[Piece]:
        start = self._pending.lstrip()
        if start.startswith(self._form.opening):
            self._pending, self._read = start[len(self._form.opening) :], self._read_thought
        elif start and not self._form.opening.startswith(start):
            self._read = self._read_answer
        return []

    def _read_thought(self) -> list[Piece]:
        end = self._pending.find(self._form.closing)
        if end >= 0:
            thought, self._pending = self._pending[:end].rstrip(), self._pending[end + len(self._form.closing) :]
            self._read = self._skip_blanks
        else:
            # White space before the mark, and what may be its beginning, are perhaps none of the thought.
            end = len(self._pending) - possible_start(self._pending, self._form.closing)
            end = len(self._pending[:end].rstrip())
            thought, self._pending = self._pending[:end], self._pending[end:]
        return [ReasoningPiece(self._index, thought)] if thought else []

    def _skip_blanks(self) -> list[Piece]:
        self._pending = self._pending.lstrip()
        if self._pending:
            self._read = self._read_answer
        return []

    def _read_answer(self) -> list[Piece]:
        text, self._pending = self._pending, ""
        return [TextPiece(self._index, text)]
