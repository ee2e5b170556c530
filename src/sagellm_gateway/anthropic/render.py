"""The forms of Anthropic's Messages API: a whole message, and the events of a streamed one.

Thinking is shown only to who asked for it: clients that didn't read the first block as the answer. A text's deltas are
made without encoding anything but the text.
"""

from __future__ import annotations

from typing import Any

from sagellm_gateway.anthropic.types import MessagesRequest
from sagellm_gateway.errors import anthropic_error_body
from sagellm_gateway.pieces import (
    Answer,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_gateway.streams import FramingWriter, PingedEvents
from sagellm_gateway.tool_arguments import arguments_object
from sagellm_gateway.writing import encode
from sagellm_protocol import SageLLMError, Usage
from sagellm_protocol.ids import random_hex
from sagellm_protocol.openai.chat import ChatFinishReason

_STOP_REASONS: dict[ChatFinishReason, str] = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def message_body(call: MessagesRequest, answer: Answer) -> bytes:
    """The body of a whole message."""
    choice = answer.choices[0]
    content: list[dict[str, Any]] = []
    if choice.reasoning and _shows_thinking(call):
        content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.text:
        content.append({"type": "text", "text": choice.text})
    for tool_call in choice.tool_calls:
        function = tool_call.function
        arguments = arguments_object(function.arguments)
        content.append({"type": "tool_use", "id": tool_call.id, "name": function.name, "input": arguments})
    reason = _reason(choice.finish_reason, has_calls=bool(choice.tool_calls))
    ending = _ending(call, reason, choice.stop_reason, answer.usage)
    return encode({**_head(call.model), "content": content, **ending, "usage": _usage(answer.usage)})


class EventWriter(FramingWriter):
    """The events of one streamed message."""

    def __init__(self, call: MessagesRequest) -> None:
        self._call = call
        self._shows_thinking = _shows_thinking(call)
        self._index = -1
        self._kind: str | None = None  # of the block that is open
        self._has_calls = False
        self._delta_head = b""
        self._end: ChoiceEnd | None = None

    def start(self, piece: AnswerStart) -> bytes:
        """The message without content, and a ping, as the original sends one."""
        usage = _usage(Usage(prompt_tokens=piece.num_prompt_tokens))
        message = {**_head(self._call.model), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event("message_start", {"message": message}) + PingedEvents.ping

    def text(self, piece: TextPiece) -> bytes:
        """A delta of a block of text."""
        return self._delta("text", piece.text)

    def reasoning(self, piece: ReasoningPiece) -> bytes:
        """A delta of a block of thoughts, to who asked for them."""
        return self._delta("thinking", piece.text) if self._shows_thinking else b""

    def tool_call(self, piece: ToolCallPiece) -> bytes:
        """A block for each call, its arguments as deltas."""
        opened = b""
        if piece.name is not None:
            self._has_calls = True
            opened = self._open("tool_use", {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
        if not piece.arguments:
            return opened
        return b"%s%s%s}}\n\n" % (opened, self._delta_head, encode(piece.arguments))

    def choice_end(self, piece: ChoiceEnd) -> bytes:
        """The end of the block that is open; the reason is told at the end of the message."""
        self._end = piece
        return self._close()

    def end(self, piece: AnswerEnd) -> bytes:
        """Why the message ended, and its figures."""
        assert self._end is not None, "the choice ends before the answer"
        reason = _reason(self._end.finish_reason, has_calls=self._has_calls)
        delta = _ending(self._call, reason, self._end.stop_reason, piece.usage)
        return _event("message_delta", {"delta": delta, "usage": _usage(piece.usage)}) + _event("message_stop", {})

    def fail(self, error: SageLLMError) -> bytes:
        """The event that says what went wrong."""
        return b"event: error\ndata: %s\n\n" % encode(anthropic_error_body(error))

    def _delta(self, kind: str, text: str) -> bytes:
        if not text:
            return b""
        opened = b""
        if self._kind != kind:
            block = {"type": kind, kind: ""}
            opened = self._open(kind, {**block, "signature": ""} if kind == "thinking" else block)
        return b"%s%s%s}}\n\n" % (opened, self._delta_head, encode(text))

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        closed = self._close()
        self._index += 1
        self._kind = kind
        self._delta_head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%s' % (
            self._index,
            _DELTAS[kind],
        )
        return closed + _event("content_block_start", {"index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        self._kind = None
        return _event("content_block_stop", {"index": self._index})


_DELTAS = {
    "text": b'{"type":"text_delta","text":',
    "thinking": b'{"type":"thinking_delta","thinking":',
    "tool_use": b'{"type":"input_json_delta","partial_json":',
}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **fields}))


def _shows_thinking(call: MessagesRequest) -> bool:
    return call.thinking is not None and call.thinking.is_shown


def _head(model: str) -> dict[str, Any]:
    return {"id": f"msg_{random_hex()}", "type": "message", "role": "assistant", "model": model}


def _reason(finish_reason: ChatFinishReason, *, has_calls: bool) -> ChatFinishReason:
    """Why the answer ended: of a call that the request named, the chat request's own form says `stop`."""
    return "tool_calls" if has_calls and finish_reason == "stop" else finish_reason


def _ending(
    call: MessagesRequest, finish_reason: ChatFinishReason, stop_reason: int | str | None, usage: Usage
) -> dict[str, Any]:
    reason = _STOP_REASONS.get(finish_reason, "end_turn")
    if reason == "max_tokens" and usage.completion_tokens < call.max_tokens:
        reason = "model_context_window_exceeded"
    sequence = stop_reason if finish_reason == "stop" and stop_reason in call.stop_sequences else None
    return {"stop_reason": reason if sequence is None else "stop_sequence", "stop_sequence": sequence}


def _usage(usage: Usage) -> dict[str, Any]:
    # This API counts what came from the cache apart.
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
