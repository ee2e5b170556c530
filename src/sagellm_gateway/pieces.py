"""What an answer to a conversation is made of, before any API gives it a form.

`ChatService` yields these pieces in order: one `AnswerStart`; for every choice its `ReasoningPiece`s, `TextPiece`s and
`ToolCallPiece`s and one `ChoiceEnd`; one `AnswerEnd`; an `OutputCount` before those of every token where a request
asks for it. Every API (OpenAI's chat and responses, Anthropic's, Ollama's) renders them, and none of them looks into a
model's own text again. There is at least one piece a token, so they are the cheapest objects to make.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from sagellm_protocol import Metrics, TokenLogprob, Usage
from sagellm_protocol.openai import FunctionCall, ToolCall
from sagellm_protocol.openai.chat import ChatFinishReason


class AnswerStart(msgspec.Struct, frozen=True):
    """The request is accepted; the prompt has so many tokens."""

    num_prompt_tokens: int


class OutputCount(msgspec.Struct, frozen=True):
    """So many tokens of all choices are there with the pieces that follow; only for a caller that counts along."""

    num_output_tokens: int


class TextPiece(msgspec.Struct, frozen=True):
    """Text of the answer proper. `logprobs` has one entry a token; the text may be empty."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class ReasoningPiece(msgspec.Struct, frozen=True):
    """Text that the model thought before it answered."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class ToolCallPiece(msgspec.Struct, frozen=True):
    """A part of the choice's call number `call`: the first part brings `id` and `name`, all parts `arguments`."""

    index: int
    call: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
    logprobs: list[TokenLogprob] | None = None


class ChoiceEnd(msgspec.Struct, frozen=True):
    """A choice is complete."""

    index: int
    finish_reason: ChatFinishReason
    stop_reason: int | str | None = None


class AnswerEnd(msgspec.Struct, frozen=True):
    """All choices are complete."""

    usage: Usage
    metrics: Metrics


Piece = AnswerStart | OutputCount | ReasoningPiece | TextPiece | ToolCallPiece | ChoiceEnd | AnswerEnd


@dataclass(slots=True)
class AnswerChoice:
    """One choice of a whole answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: ChatFinishReason = "stop"
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None

    def add(self, piece: Piece) -> None:
        """Put the next piece of this choice to it; those of the whole answer say nothing of a choice."""
        if isinstance(piece, (AnswerStart, OutputCount, AnswerEnd)):
            return
        if isinstance(piece, ChoiceEnd):
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
            return
        if piece.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *piece.logprobs]
        if isinstance(piece, TextPiece):
            self.text += piece.text
        elif isinstance(piece, ReasoningPiece):
            self.reasoning += piece.text
        elif piece.name is not None:
            function = FunctionCall(name=piece.name, arguments=piece.arguments)
            self.tool_calls.append(ToolCall(id=piece.id or "", function=function))
        else:
            call = self.tool_calls[piece.call]
            function = FunctionCall(name=call.function.name, arguments=call.function.arguments + piece.arguments)
            self.tool_calls[piece.call] = ToolCall(id=call.id, function=function)


@dataclass(slots=True)
class Answer:
    """A whole answer: what its pieces say together."""

    choices: list[AnswerChoice]
    usage: Usage
    metrics: Metrics


def collect(pieces: Iterable[Piece]) -> Answer:
    """The whole answer that `pieces` tell."""
    choices: dict[int, AnswerChoice] = {}
    end: AnswerEnd | None = None  # there is none of an answer that was cut short
    for piece in pieces:
        if isinstance(piece, AnswerEnd):
            end = piece
        elif not isinstance(piece, (AnswerStart, OutputCount)):
            choice = choices.get(piece.index) or choices.setdefault(piece.index, AnswerChoice())
            choice.add(piece)
    end = end or AnswerEnd(Usage(), Metrics())
    return Answer([choices[index] for index in sorted(choices)], end.usage, end.metrics)
