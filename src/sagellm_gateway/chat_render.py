"""The forms of `/v1/chat/completions`: a whole answer as a body, pieces as server-sent messages.

Bytes are made without a model object a token: a stream's chunks differ in little, so what they share is encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sagellm_core.version import __version__
from sagellm_gateway.pieces import (
    Answer,
    AnswerChoice,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_protocol import TokenLogprob, Usage, new_request_id

_encode = msgspec.json.Encoder().encode
_FINGERPRINT = f"sagellm-{__version__}"


def answer_body(model: str, answer: Answer) -> bytes:
    """The body of a whole answer."""
    return _encode(
        {
            "id": _new_id(),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [_choice(index, choice) for index, choice in enumerate(answer.choices)],
            "usage": _usage(answer.usage),
            "system_fingerprint": _FINGERPRINT,
        }
    )


class ChunkWriter:
    """The `chat.completion.chunk` messages of one streamed answer.

    With `include_usage` every chunk has a `usage` that is null, and one without choices at the end has the figures.
    """

    def __init__(self, model: str, *, num_choices: int, include_usage: bool) -> None:
        head = {
            "id": _new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _FINGERPRINT,
        }
        self._head = _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self._num_choices = num_choices
        self._include_usage = include_usage

    def write(self, piece: Piece) -> bytes | None:
        """The message for a piece; None where there is nothing to say."""
        if isinstance(piece, TextPiece):
            if piece.logprobs is None:
                return self._text(piece)
            return self._chunk(piece.index, {"content": piece.text}, piece.logprobs)
        if isinstance(piece, ReasoningPiece):
            return self._chunk(piece.index, {"reasoning_content": piece.text}, piece.logprobs)
        if isinstance(piece, ToolCallPiece):
            return self._chunk(piece.index, {"tool_calls": [_call_delta(piece)]}, piece.logprobs)
        if isinstance(piece, ChoiceEnd):
            return self._chunk(piece.index, {}, None, piece)
        if isinstance(piece, AnswerStart):
            return self._start()
        return self._end(piece)

    def _start(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": index, "delta": delta, "finish_reason": None} for index in range(self._num_choices)]
        return self._head + _encode(choices)[1:-1] + self._tail

    def _text(self, piece: TextPiece) -> bytes:
        text = _encode(piece.text)
        return b'%s{"index":%d,"delta":{"content":%s},"finish_reason":null}%s' % (
            self._head,
            piece.index,
            text,
            self._tail,
        )

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] | None,
        end: ChoiceEnd | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta}
        if logprobs is not None:
            choice["logprobs"] = _logprobs(logprobs)
        choice["finish_reason"] = None if end is None else end.finish_reason
        if end is not None and end.stop_reason is not None:
            choice["stop_reason"] = end.stop_reason
        return self._head + _encode(choice) + self._tail

    def _end(self, piece: AnswerEnd) -> bytes | None:
        if not self._include_usage:
            return None
        return self._head + b'],"usage":' + _encode(_usage(piece.usage)) + b"}"


def _new_id() -> str:
    return f"chatcmpl-{new_request_id().removeprefix('req-')}"


def _choice(index: int, choice: AnswerChoice) -> dict[str, Any]:
    # A message without text says null where something else is there instead.
    has_else = bool(choice.tool_calls)
    message: dict[str, Any] = {"role": "assistant", "content": None if has_else and not choice.text else choice.text}
    message["refusal"] = None
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [call.model_dump() for call in choice.tool_calls]
    body: dict[str, Any] = {"index": index, "message": message}
    body["logprobs"] = None if choice.logprobs is None else _logprobs(choice.logprobs)
    body["finish_reason"] = choice.finish_reason
    if choice.stop_reason is not None:
        body["stop_reason"] = choice.stop_reason
    return body


def _call_delta(piece: ToolCallPiece) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.call, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.call, "id": piece.id, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_candidate(entry.token, entry.logprob),
                "top_logprobs": [_candidate(t.token, t.logprob) for t in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _candidate(token: str | None, logprob: float) -> dict[str, Any]:
    text = token or ""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
