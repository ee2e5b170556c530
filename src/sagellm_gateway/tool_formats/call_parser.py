"""The parser that families share: text, marks, and calls whose arguments stream.

A parser is a small machine: `self._state` is the method that reads what comes next. It takes what it understands off
`self._unread`, names the next state and returns True; or it returns False, because more text must come. With `is_end`
nothing more comes. Until a call's name has gone out nothing of the call is taken off, so giving it back is easy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from sagellm_gateway.marks import find_mark, num_undecided
from sagellm_gateway.pieces import Piece, TextPiece, ToolCallPiece
from sagellm_gateway.tool_formats.base import new_call_id
from sagellm_gateway.tool_formats.json_scan import CallHead, Head, ValueScan
from sagellm_protocol import Tool

_SEPARATOR = re.compile(r"\s*[,;]?\s*")


class CallParser:
    """Text up to one of `marks`, which `_begin` then goes on from; `new_id` makes the ids of calls.

    `closing` is a text that ends a call's arguments even where they are broken.
    """

    marks: tuple[str, ...] = ()
    closing: str | None = None

    def __init__(self, index: int, tools: Sequence[Tool], new_id: Callable[[], str] = new_call_id) -> None:
        self._index, self._new_id = index, new_id
        self._names = frozenset(tool.function.name for tool in tools)
        self._state: Callable[[bool], bool] = self._read_text
        self._unread = ""
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._has_text = self._is_behind_call = False
        self._opening = ""  # taken off before the call that is being read, to be given back with it
        self._scan = ValueScan()

    def feed(self, text: str) -> list[Piece]:
        """The pieces that the next text completes."""
        self._unread += text
        return self._run(is_end=False)

    def end(self) -> list[Piece]:
        """What was held back."""
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[Piece]:
        while self._state(is_end):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _begin(self, is_end: bool) -> bool:
        """Behind a mark."""
        raise NotImplementedError

    # ---- text -----------------------------------------------------------------------------------------

    def _read_text(self, is_end: bool) -> bool:
        found = find_mark(self._unread, self.marks)
        if found is not None:
            place, mark = found
            text = self._unread[:place].rstrip()
            self._say(text)
            self._opening = self._unread[len(text) : place + len(mark)]
            self._unread = self._unread[place + len(mark) :]
            self._state = self._begin
            return True
        if is_end:
            is_void = self._is_behind_call and not self._unread.strip()
            self._say("" if is_void else self._unread)
            self._unread = ""
        else:
            # White space before a call is none of the text, so it waits for what follows.
            decided = self._unread[: len(self._unread) - num_undecided(self._unread, self.marks)].rstrip()
            self._say(decided)
            self._unread = self._unread[len(decided) :]
        return False

    def _say(self, text: str) -> None:
        if self._num_calls and not self._has_text:
            text = text.lstrip()
        if not text:
            return
        self._has_text = self._has_text or not text.isspace()
        self._is_behind_call = self._is_behind_call and text.isspace()
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, TextPiece):
            self._pieces[-1] = replace(last, text=last.text + text)
        else:
            self._pieces.append(TextPiece(self._index, text))

    def _give_back(self) -> bool:
        """It was no call: what was taken for its beginning is text, and so is what follows up to the next mark."""
        self._say(self._opening)
        self._state = self._read_text
        return True

    # ---- calls ----------------------------------------------------------------------------------------

    def _announce(self, name: str) -> None:
        self._pieces.append(ToolCallPiece(self._index, self._num_calls, id=self._new_id(), name=name))

    def _argue(self, text: str) -> None:
        """More of the arguments."""
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, ToolCallPiece) and last.call == self._num_calls and last.name is None:
            self._pieces[-1] = replace(last, arguments=last.arguments + text)
        elif text:
            self._pieces.append(ToolCallPiece(self._index, self._num_calls, text))

    def _finish_call(self, state: Callable[[bool], bool]) -> bool:
        self._num_calls += 1
        self._is_behind_call = True
        self._opening = ""
        self._state = state
        return True

    def _begin_arguments(self, behind: Callable[[bool], bool]) -> None:
        """What is unread begins with the arguments' brace; `behind` reads on behind their end."""
        self._scan, self._behind_arguments = ValueScan(), behind
        self._state = self._read_arguments

    def _read_arguments(self, is_end: bool) -> bool:
        text, is_over = self._scanned(is_end)
        self._argue(text)
        if is_over:
            self._state = self._behind_arguments
        return is_over

    def _scanned(self, is_end: bool) -> tuple[str, bool]:
        """Takes off what belongs to the value that is scanned, and says whether it is over."""
        limit, is_closed = len(self._unread), is_end
        if self.closing is not None:
            place = self._unread.find(self.closing)
            if place >= 0:
                limit, is_closed = place, True
            elif not is_end:
                limit -= num_undecided(self._unread, (self.closing,))
        text = self._unread[:limit]
        end = self._scan.feed(text)
        text = text[:end]
        self._unread = self._unread[len(text) :]
        return text, end is not None or is_closed

    # ---- calls that are JSON objects ------------------------------------------------------------------

    def _begin_object(self, behind: Callable[[bool], bool]) -> bool:
        """What is unread should begin with `{"name": ...`; `behind` reads on behind the object of a call."""
        self._head, self._behind_object = CallHead(self._names), behind
        self._state = self._read_head
        return True

    def _read_head(self, is_end: bool) -> bool:
        head = self._head.read(self._unread)
        if head is Head.UNDECIDED and not is_end:
            return False
        if head is Head.UNDECIDED or head is Head.NO_CALL:
            return self._give_back()
        assert self._head.name is not None, "a call has a name"
        self._announce(self._head.name)
        self._unread = self._unread[self._head.position :]
        if head is Head.ARGUMENTS:
            self._begin_arguments(self._read_tail)
            return True
        self._argue(self._head.arguments or "")
        return self._finish_call(self._behind_object)

    def _read_tail(self, is_end: bool) -> bool:
        """From the arguments' end to the object's; a brace that is missing is not missed."""
        rest = self._unread.lstrip()
        if not rest and not is_end:
            return False
        if rest.startswith(","):  # an id, for example
            self._scan = ValueScan(depth=1)
            self._state = self._skip_tail
            return True
        self._unread = rest[1:] if rest.startswith("}") else rest
        return self._finish_call(self._behind_object)

    def _skip_tail(self, is_end: bool) -> bool:
        _, is_over = self._scanned(is_end)
        return is_over and self._finish_call(self._behind_object)

    def _read_closing(self, is_end: bool, closing: str) -> bool:
        """Takes off the closing mark behind a call, which some models forget."""
        rest = self._unread.lstrip()
        if closing.startswith(rest) and rest != closing and not is_end:
            return False
        if rest.startswith(closing):
            self._unread = rest[len(closing) :]
        elif closing.startswith(rest):  # cut off
            self._unread = ""
        self._state = self._read_text
        return True


class ObjectsParser(CallParser):
    """Objects in a row, with `,`, `;` or white space in between, in brackets or without.

    They stand behind a mark, or where `is_bare`, at the beginning of an answer too.
    """

    is_bare = False

    def __init__(self, index: int, tools: Sequence[Tool], new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(index, tools, new_id)
        self._in_list = False
        if self.is_bare:
            self._state = self._read_start

    def _read_start(self, is_end: bool) -> bool:
        rest = self._unread.lstrip()
        if not rest and not is_end:
            return False
        self._state = self._begin if rest[:1] in ("{", "[") else self._read_text
        return True

    def _begin(self, is_end: bool) -> bool:
        rest = self._unread.lstrip()
        if not rest and not is_end:
            return False
        self._in_list = rest.startswith("[")
        if self._in_list:
            self._opening += self._unread[: self._unread.index("[") + 1]
            self._unread = rest[1:]
        return self._begin_object(self._read_separator)

    def _read_separator(self, is_end: bool) -> bool:
        separator = _SEPARATOR.match(self._unread)
        assert separator is not None, "it matches anything"
        rest = self._unread[separator.end() :]
        if not rest and not is_end:
            return False
        if rest.startswith("{"):
            self._opening, self._unread = separator[0], rest
            return self._begin_object(self._read_separator)
        if not rest:
            self._unread = ""
        elif self._in_list and rest.startswith("]"):
            self._unread = rest[1:]
        self._state = self._read_text
        return True
