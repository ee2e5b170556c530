"""The forms of Ollama's answers: one JSON object, or lines of them, the last with the figures.

Durations are in nanoseconds, as the engine measured them. A text's lines are made without encoding anything but it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from sagellm_gateway.dates import utc_now
from sagellm_gateway.embeddings import Embeddings
from sagellm_gateway.ollama.types import ChatCall, GenerateCall
from sagellm_gateway.pieces import (
    Answer,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_gateway.streams import FramingWriter
from sagellm_gateway.tool_arguments import arguments_object
from sagellm_gateway.writing import encode, logprob_entries
from sagellm_protocol import Metrics, SageLLMError, Usage
from sagellm_protocol.openai.chat import ChatFinishReason

_NS_PER_MS = 1_000_000


def now() -> str:
    """This moment, as the API writes dates."""
    return f"{utc_now(6)}Z"


def answer_body(call: ChatCall | GenerateCall, answer: Answer) -> bytes:
    """The body of a whole answer."""
    choice = answer.choices[0]
    calls = [
        _tool_call(number, made.id, made.function.name, made.function.arguments)
        for number, made in enumerate(choice.tool_calls)
    ]
    thinking = choice.reasoning if call.shows_thinking else ""
    body = {**_head(call), **_content(call, choice.text, thinking, calls)}
    if choice.logprobs is not None:
        body["logprobs"] = logprob_entries(choice.logprobs)
    return encode({**body, **_ending(choice.finish_reason, answer.usage, answer.metrics)})


def loaded_body(call: ChatCall | GenerateCall) -> bytes:
    """The answer to a call that generates nothing and only wants the model to be there."""
    return encode({**_head(call), **_content(call, ""), "done": True, "done_reason": "load"})


async def embed_body(model: str, made: Embeddings, started_at_ns: int) -> bytes:
    """The body of an answer with vectors; others get a turn between them. `started_at_ns` is of the monotonic clock."""
    vectors = []
    for vector in made.vectors:
        vectors.append(encode(vector))
        await asyncio.sleep(0)
    rest = {
        "total_duration": time.monotonic_ns() - started_at_ns,
        "load_duration": 0,
        "prompt_eval_count": made.usage.prompt_tokens,
    }
    return b'{"model":%b,"embeddings":[%b],%b' % (encode(model), b",".join(vectors), encode(rest)[1:])


class LineWriter(FramingWriter):
    """The lines of one streamed answer."""

    def __init__(self, call: ChatCall | GenerateCall) -> None:
        self._call = call
        self._calls: list[ToolCallPiece] = []  # the parts of the call that is being made
        self._finish_reason: ChatFinishReason = "stop"
        self._head = b'{"model":%s,"created_at":"' % encode(call.model)
        is_chat = isinstance(call, ChatCall)
        self._open = b'","message":{"role":"assistant","content":' if is_chat else b'","response":'
        self._close = b'},"done":false}\n' if is_chat else b',"done":false}\n'

    def start(self, piece: AnswerStart) -> bytes:
        """Nothing: the figures come at the end."""
        return b""

    def text(self, piece: TextPiece) -> bytes:
        """The line of a text."""
        if piece.logprobs is not None:
            return self._line({**_content(self._call, piece.text), "logprobs": logprob_entries(piece.logprobs)})
        if not piece.text:
            return b""
        return b"%s%s%s%s%s" % (self._head, now().encode(), self._open, encode(piece.text), self._close)

    def reasoning(self, piece: ReasoningPiece) -> bytes:
        """The line of a thought, to who asked for it."""
        is_shown = self._call.shows_thinking and piece.text
        return self._line(_content(self._call, "", piece.text)) if is_shown else b""

    def tool_call(self, piece: ToolCallPiece) -> bytes:
        """The line of the call before, which is complete."""
        line = self._end_call() if piece.name is not None else b""
        self._calls.append(piece)
        return line

    def choice_end(self, piece: ChoiceEnd) -> bytes:
        """The line of the last call."""
        self._finish_reason = piece.finish_reason
        return self._end_call()

    def end(self, piece: AnswerEnd) -> bytes:
        """The line with the figures."""
        ending = _ending(self._finish_reason, piece.usage, piece.metrics)
        return encode({**_head(self._call), **_content(self._call, ""), **ending}) + b"\n"

    def fail(self, error: SageLLMError) -> bytes:
        """The line that says what went wrong."""
        return encode({"error": error.message}) + b"\n"

    def _end_call(self) -> bytes:
        """The call that is complete: its arguments go out as an object, so not before."""
        if not self._calls:
            return b""
        first, arguments = self._calls[0], "".join(part.arguments for part in self._calls)
        self._calls = []
        call = _tool_call(first.call, first.id or "", first.name or "", arguments)
        return self._line(_content(self._call, "", "", [call]))

    def _line(self, fields: dict[str, Any]) -> bytes:
        return encode({**_head(self._call), **fields, "done": False}) + b"\n"


def _head(call: ChatCall | GenerateCall) -> dict[str, Any]:
    return {"model": call.model, "created_at": now()}


def _content(
    call: ChatCall | GenerateCall, text: str, thinking: str = "", tool_calls: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if thinking:
        fields["thinking"] = thinking
    if tool_calls:
        fields["tool_calls"] = tool_calls
    if isinstance(call, ChatCall):
        return {"message": {"role": "assistant", "content": text, **fields}}
    return {"response": text, **fields}


def _tool_call(number: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"index": number, "name": name, "arguments": arguments_object(arguments)}
    return {"id": call_id, "function": function}


def _ending(finish_reason: ChatFinishReason, usage: Usage, metrics: Metrics) -> dict[str, Any]:
    stamps = metrics.timestamps
    duration_s = None if stamps is None else stamps.duration_s
    total_ms = metrics.ttft_ms + metrics.decode_ms if duration_s is None else duration_s * 1000
    return {
        "done": True,
        "done_reason": "length" if finish_reason == "length" else "stop",
        "total_duration": round(total_ms * _NS_PER_MS),
        "load_duration": 0,  # it was loaded before
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": round(metrics.prefill_ms * _NS_PER_MS),
        "eval_count": usage.completion_tokens,
        "eval_duration": round(metrics.decode_ms * _NS_PER_MS),
    }
