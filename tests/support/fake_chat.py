"""A chat service that answers with pieces it was given, for tests of the APIs that render them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import (
    Answer,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
    collect,
)
from sagellm_protocol import Metrics, SageLLMError, Usage
from sagellm_protocol.openai import ChatCompletionRequest

METRICS = Metrics(ttft_ms=30.0, prefill_ms=20.0, decode_ms=40.0)


class FakeChat:
    """Answers every call with `pieces`; an error among them is raised in its place. Keeps calls and callers."""

    def __init__(self, pieces: Sequence[Piece | SageLLMError] = ()) -> None:
        self.pieces = list(pieces)
        self.calls: list[ChatCompletionRequest] = []
        self.callers: list[Caller] = []
        self.num_closed = 0

    @property
    def sent(self) -> list[dict[str, Any]]:
        """The messages of the last call, as a template gets them."""
        return [message.to_template() for message in self.calls[-1].messages]

    async def answer(self, call: ChatCompletionRequest, caller: Caller) -> Answer:
        return collect([piece async for piece in self.stream(call, caller)])

    async def stream(self, call: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[Piece, None]:
        self.calls.append(call)
        self.callers.append(caller)
        try:
            for piece in self.pieces:
                if isinstance(piece, SageLLMError):
                    raise piece
                yield piece
        finally:
            self.num_closed += 1


def text_answer(*texts: str, finish_reason: str = "stop", stop_reason: str | None = None) -> list[Piece]:
    """The pieces of an answer of plain text."""
    return [AnswerStart(7), *(TextPiece(0, text) for text in texts), *answer_end(finish_reason, stop_reason)]


def answer_end(finish_reason: str = "stop", stop_reason: str | None = None) -> list[Piece]:
    usage = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=3)
    return [ChoiceEnd(0, finish_reason, stop_reason), AnswerEnd(usage, METRICS)]  # type: ignore[arg-type]


def rich_answer(finish_reason: str = "tool_calls") -> list[Piece]:
    """Reasoning, text and two calls."""
    return [
        AnswerStart(7),
        ReasoningPiece(0, "let me "),
        ReasoningPiece(0, "think"),
        TextPiece(0, ""),
        TextPiece(0, "Look"),
        TextPiece(0, "ing."),
        ToolCallPiece(0, 0, id="call_a", name="weather"),
        ToolCallPiece(0, 0, '{"city":'),
        ToolCallPiece(0, 0, '"Paris"}'),
        ToolCallPiece(0, 1, "{}", id="call_b", name="clock"),
        *answer_end(finish_reason),
    ]
