"""One choice of an answer: the model's text in, reasoning, text and tool calls out."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from sagellm_gateway.pieces import AnswerChoice, ChoiceEnd, Piece, ReasoningPiece, TextPiece, ToolCallPiece
from sagellm_gateway.reasoning import ReasoningParser
from sagellm_gateway.tool_formats import ToolParser
from sagellm_protocol import FinishReason, TokenLogprob
from sagellm_protocol.openai.chat import ChatFinishReason
from sagellm_protocol.response import CompletionOutput

_FINISH_REASONS: dict[FinishReason, ChatFinishReason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ERROR: "error",
    FinishReason.ABORT: "abort",
}


def plain_choice(output: CompletionOutput) -> AnswerChoice:
    """The choice of a text that holds neither thoughts nor calls."""
    fields = output.__dict__  # every attribute of a pydantic value costs about as much as this
    return AnswerChoice(
        fields["text"],
        finish_reason=_FINISH_REASONS[fields["finish_reason"]],
        stop_reason=fields["stop_reason"],
        logprobs=fields["logprobs"],
    )


class ChoiceReader:
    """Reads the text of one choice as it comes; without parsers it is handed on as it is.

    With `one_call` calls after the first are dropped. The log-probabilities of a chunk go with its first piece.
    """

    def __init__(
        self,
        index: int,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        one_call: bool = False,
        reports_calls: bool = True,
    ) -> None:
        self._index = index
        self._reasoning = reasoning
        self._tools = tools
        self._one_call = one_call
        self._reports_calls = reports_calls
        self._has_calls = False

    def feed(self, text: str, logprobs: list[TokenLogprob] | None) -> list[Piece]:
        """The pieces that the next text completes."""
        if self._reasoning is None and self._tools is None:
            return [TextPiece(self._index, text, logprobs)]
        pieces: list[Piece] = [TextPiece(self._index, text)]
        if self._reasoning is not None:
            pieces = self._reasoning.feed(text)
        return self._finished(pieces, logprobs)

    def read(self, output: CompletionOutput) -> AnswerChoice:
        """The choice of a whole output, in place of `feed` and `end`."""
        choice = AnswerChoice()
        for piece in (*self.feed(output.text, output.logprobs), *self.end(output)):
            choice.add(piece)
        return choice

    def end(self, output: CompletionOutput) -> list[Piece]:
        """What was held back, and the end of the choice."""
        pieces: list[Piece] = self._finished(self._reasoning.end(), None) if self._reasoning is not None else []
        if self._tools is not None:
            pieces += self._noted(self._tools.end())
        reason = _FINISH_REASONS[output.finish_reason]
        if self._has_calls and self._reports_calls and reason == "stop":
            reason = "tool_calls"
        return [*pieces, ChoiceEnd(self._index, reason, output.stop_reason)]

    def _finished(self, pieces: Iterable[Piece], logprobs: list[TokenLogprob] | None) -> list[Piece]:
        """The pieces of a chunk, their texts searched for calls."""
        found: list[Piece] = []
        for piece in pieces:
            if self._tools is not None and isinstance(piece, TextPiece):
                found += self._noted(self._tools.feed(piece.text))
            else:
                found.append(piece)
        if logprobs is not None:
            found[:1] = [_with_logprobs(found[0] if found else TextPiece(self._index, ""), logprobs)]
        return found

    def _noted(self, pieces: Iterable[Piece]) -> list[Piece]:
        kept: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, ToolCallPiece):
                self._has_calls = True
                if self._one_call and piece.call > 0:
                    continue
            kept.append(piece)
        return kept


def _with_logprobs(piece: Piece, logprobs: list[TokenLogprob]) -> Piece:
    assert isinstance(piece, (TextPiece, ReasoningPiece, ToolCallPiece)), "parsers give no other pieces"
    return replace(piece, logprobs=logprobs)
