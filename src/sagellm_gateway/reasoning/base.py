"""Thoughts between two marks in front of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sagellm_gateway.lark import grammar_of, lark_form, lark_mark, text_until
from sagellm_gateway.marks import num_undecided
from sagellm_gateway.pieces import Piece, ReasoningPiece, TextPiece
from sagellm_protocol import StructuredOutput

_NO_TOKENS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A notation of thoughts; `marks_are_special` where its marks are special tokens, which texts leave out."""

    name: str
    opening: str
    closing: str
    marks_are_special: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that may be tokens of the model."""
        return (self.opening, self.closing)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends with a thought just opened, as some templates make it."""
        return prompt.rstrip().endswith(self.opening)

    def parser(self, index: int, prompt_opens: bool) -> ReasoningParser:
        """A parser for the text of the choice number `index`."""
        return ReasoningParser(self, index, is_thinking=prompt_opens)

    def after_thought(
        self, form: StructuredOutput, *, is_open: bool = True, token_ids: Mapping[str, int] = _NO_TOKENS
    ) -> StructuredOutput:
        """`form` for what follows a thought, which the prompt has opened, or which may stand there if not `is_open`.

        Raises:
            InvalidArgumentError: the form is too large for a grammar, or no grammar.
        """
        thought = "thought" if is_open else f"({lark_mark(self.opening, token_ids)} thought)?"
        rules = [
            f"start: {thought} BLANKS? answer",
            text_until("thought", self.closing, token_ids),
            "BLANKS: /\\s+/",
            f"answer: {lark_form(form)}",
        ]
        return grammar_of(rules, field="structured_output")


class ReasoningParser:
    """Reads the text of one choice as it comes: a thought, if one begins it, and then the answer.

    White space around the thought belongs to nobody. How the text is cut into chunks makes no difference.
    """

    def __init__(self, form: ReasoningFormat, index: int, *, is_thinking: bool) -> None:
        self._form, self._index, self._is_open = form, index, is_thinking
        self._unread = ""
        self._state: Callable[[bool], bool] = self._read_beginning
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        self._unread += text
        return self._run(is_end=False)

    def end(self) -> list[Piece]:
        """What was held back: of a thought that was cut off it is thought, else text."""
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[Piece]:
        while self._unread and self._state(is_end):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read_beginning(self, is_end: bool) -> bool:
        """A model may open the thought itself, even one that the prompt has opened."""
        rest = self._unread.lstrip()
        if rest.startswith(self._form.opening):
            self._unread, self._state = rest[len(self._form.opening) :], self._skip_blanks_of_thought
        elif self._form.opening.startswith(rest) and not is_end:
            return False
        else:
            self._state = self._skip_blanks_of_thought if self._is_open else self._read_answer
        return True

    def _skip_blanks_of_thought(self, is_end: bool) -> bool:
        self._unread = self._unread.lstrip()
        self._state = self._read_thought if self._unread else self._state
        return bool(self._unread)

    def _read_thought(self, is_end: bool) -> bool:
        place = self._unread.find(self._form.closing)
        if place >= 0:
            self._think(self._unread[:place].rstrip())
            self._unread = self._unread[place + len(self._form.closing) :]
            self._state = self._skip_blanks_of_answer
            return True
        # White space before the mark, and what may be its beginning, are perhaps none of the thought.
        end = len(self._unread) - (0 if is_end else num_undecided(self._unread, (self._form.closing,)))
        thought = self._unread[:end].rstrip()
        self._think(thought)
        self._unread = "" if is_end else self._unread[len(thought) :]
        return False

    def _think(self, text: str) -> None:
        if text:
            self._pieces.append(ReasoningPiece(self._index, text))

    def _skip_blanks_of_answer(self, is_end: bool) -> bool:
        self._unread = self._unread.lstrip()
        self._state = self._read_answer if self._unread else self._state
        return bool(self._unread)

    def _read_answer(self, is_end: bool) -> bool:
        self._pieces.append(TextPiece(self._index, self._unread))
        self._unread = ""
        return False
