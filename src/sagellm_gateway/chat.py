"""Conversations: a chat request in, the pieces of its answer out, for whatever API asked.

Promises: what a request asks for is done or refused by name, never ignored; closing a stream aborts the request; pieces
come in the order that `sagellm_gateway.pieces` names, and an error is raised where it happened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import Answer, AnswerEnd, AnswerStart, ChoiceEnd, Piece, TextPiece, collect
from sagellm_protocol import (
    FinishReason,
    Request,
    StreamEventDelta,
    StreamEventEnd,
    UnsupportedError,
)
from sagellm_protocol.openai import ChatCompletionRequest
from sagellm_protocol.openai.chat import ChatFinishReason
from sagellm_protocol.response import CompletionOutput

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway


class ChatService:
    """Answers conversations through the gateway's control plane."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def answer(self, call: ChatCompletionRequest, caller: Caller) -> Answer:
        """The whole answer; the error of a request that failed is raised."""
        response = (await self._gateway.answers.execute(_to_request(call, caller))).raise_for_error()
        pieces: list[Piece] = []
        for output in response.outputs:
            pieces.append(TextPiece(output.index, output.text, output.logprobs))
            pieces.append(_choice_end(output))
        return collect([*pieces, AnswerEnd(response.usage, response.metrics)])

    async def stream(self, call: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer as they are made; an error is raised where it happens."""
        async with aclosing(self._gateway.answers.stream(_to_request(call, caller))) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    yield TextPiece(event.index, event.chunk, event.logprobs)
                elif isinstance(event, StreamEventEnd):
                    for piece in _ends(event):
                        yield piece
                else:
                    yield AnswerStart(event.prompt_tokens)


def _ends(event: StreamEventEnd) -> Iterable[Piece]:
    if event.error is not None:
        raise event.error.to_exception()
    for output in event.outputs:
        yield _choice_end(output)
    yield AnswerEnd(event.usage, event.metrics)


def _choice_end(output: CompletionOutput) -> ChoiceEnd:
    return ChoiceEnd(output.index, _FINISH_REASONS[output.finish_reason], output.stop_reason)


_FINISH_REASONS: dict[FinishReason, ChatFinishReason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ERROR: "error",
    FinishReason.ABORT: "abort",
}


def _to_request(call: ChatCompletionRequest, caller: Caller) -> Request:
    _refuse_unbuilt(call)
    request = call.to_request()
    changes: dict[str, Any] = {}
    if call.request_id is None:
        changes["request_id"] = caller.request_id
    if caller.priority is not None and "priority" not in call.model_fields_set:
        changes["priority"] = caller.priority
    if caller.slo is not None:
        changes["slo"] = caller.slo
    return request.model_copy(update={"trace_id": caller.trace_id, **changes})


def _refuse_unbuilt(call: ChatCompletionRequest) -> None:
    """Raise `UnsupportedError` for what would change the answer and is not built."""
    wanted = {
        "tools": call.tools,
        "tool_choice": call.tool_choice not in (None, "none", "auto"),
        "parallel_tool_calls": call.parallel_tool_calls,
        "response_format": call.response_format is not None and call.response_format.type != "text",
        "reasoning_effort": call.reasoning_effort,
    }
    for field, is_wanted in wanted.items():
        if is_wanted:
            raise UnsupportedError(f"{field} is not supported: answers are plain text; leave it out", field=field)
