"""What the forms of all APIs share: JSON, log-probabilities, and how the pieces of a stream become messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from sagellm_gateway.pieces import (
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    OutputCount,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_protocol import TokenLogprob

encode = msgspec.json.Encoder().encode


class PieceWriter(ABC):
    """Writes one streamed answer in the form of an API, each piece as it comes; empty where there is nothing to say."""

    def write(self, piece: Piece) -> bytes:
        """The messages for a piece."""
        if isinstance(piece, TextPiece):
            return self.text(piece)
        if isinstance(piece, ReasoningPiece):
            return self.reasoning(piece)
        if isinstance(piece, ToolCallPiece):
            return self.tool_call(piece)
        if isinstance(piece, AnswerStart):
            return self.start(piece)
        if isinstance(piece, OutputCount):
            return self.count(piece)
        return self.choice_end(piece) if isinstance(piece, ChoiceEnd) else self.end(piece)

    @abstractmethod
    def start(self, piece: AnswerStart) -> bytes:
        """The messages that begin the answer."""

    def count(self, piece: OutputCount) -> bytes:
        """The messages for a count of tokens; most APIs have none."""
        return b""

    @abstractmethod
    def text(self, piece: TextPiece) -> bytes:
        """The messages for text."""

    @abstractmethod
    def reasoning(self, piece: ReasoningPiece) -> bytes:
        """The messages for text that was thought."""

    @abstractmethod
    def tool_call(self, piece: ToolCallPiece) -> bytes:
        """The messages for a part of a call."""

    @abstractmethod
    def choice_end(self, piece: ChoiceEnd) -> bytes:
        """The messages that say why a choice ended."""

    @abstractmethod
    def end(self, piece: AnswerEnd) -> bytes:
        """The messages that end the answer."""


def logprob_entries(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and those of others at their place, as OpenAI's API writes them."""
    return [
        {**_candidate(entry.token, entry.logprob), "top_logprobs": [_candidate(t.token, t.logprob) for t in entry.top]}
        for entry in entries
    ]


def _candidate(token: str | None, logprob: float) -> dict[str, Any]:
    text = token or ""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
