"""The forms of `/v1/chat/completions`: a whole answer as a body, pieces as server-sent messages.

Bytes are made without a model object a token: a stream's chunks differ in little, so what they share is encoded once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sagellm_core.completion_render import tail_with_usage
from sagellm_core.version import __version__
from sagellm_gateway.pieces import (
    Answer,
    AnswerChoice,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    OutputCount,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_gateway.writing import PieceWriter, encode, logprob_entries
from sagellm_protocol import TokenLogprob, Usage
from sagellm_protocol.ids import random_hex

_FINGERPRINT = f"sagellm-{__version__}"
# id, created, model, choices, usage
_BODY = (
    b'{"id":"%b","object":"chat.completion","created":%d,"model":%b,"choices":[%b],"usage":%b,'
    b'"system_fingerprint":' + encode(_FINGERPRINT) + b"}"
)
# of a text and nothing else: index, content, finish_reason
_PLAIN_CHOICE = (
    b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":"%b"}'
)
_USAGE = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'


def answer_body(model: str, answer: Answer) -> bytes:
    """The body of a whole answer."""
    return _BODY % (
        _new_id().encode(),
        time.time(),
        encode(model),
        b",".join([_choice(index, choice) for index, choice in enumerate(answer.choices)]),
        _usage(answer.usage),
    )


class ChunkWriter(PieceWriter):
    """The `chat.completion.chunk` messages of one streamed answer.

    With `include_usage` every chunk has a `usage`, and one without choices at the end has the figures. The others' is
    null, or the usage so far with `counts_usage`.
    """

    def __init__(self, model: str, *, num_choices: int, include_usage: bool, counts_usage: bool = False) -> None:
        head = {
            "id": _new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _FINGERPRINT,
        }
        self._head = encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._counts_usage = counts_usage
        self._num_prompt_tokens = 0

    def start(self, piece: AnswerStart) -> bytes:
        """The chunk that says who speaks."""
        if self._counts_usage:
            self._num_prompt_tokens = piece.num_prompt_tokens
            self._tail = tail_with_usage(self._num_prompt_tokens, 0)
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": index, "delta": delta, "finish_reason": None} for index in range(self._num_choices)]
        return self._head + encode(choices)[1:-1] + self._tail

    def count(self, piece: OutputCount) -> bytes:
        """Nothing by itself; the next chunks tell the count."""
        self._tail = tail_with_usage(self._num_prompt_tokens, piece.num_output_tokens)
        return b""

    def text(self, piece: TextPiece) -> bytes:
        """The chunk of a text."""
        if piece.logprobs is not None:
            return self._chunk(piece.index, {"content": piece.text}, piece.logprobs)
        text = encode(piece.text)
        return b'%s{"index":%d,"delta":{"content":%s},"finish_reason":null}%s' % (
            self._head,
            piece.index,
            text,
            self._tail,
        )

    def reasoning(self, piece: ReasoningPiece) -> bytes:
        """The chunk of a thought."""
        return self._chunk(piece.index, {"reasoning_content": piece.text}, piece.logprobs)

    def tool_call(self, piece: ToolCallPiece) -> bytes:
        """The chunk of a part of a call."""
        return self._chunk(piece.index, {"tool_calls": [_call_delta(piece)]}, piece.logprobs)

    def choice_end(self, piece: ChoiceEnd) -> bytes:
        """The chunk that says why a choice ended."""
        return self._chunk(piece.index, {}, None, piece)

    def end(self, piece: AnswerEnd) -> bytes:
        """The chunk with the figures, where it is asked for."""
        if not self._include_usage:
            return b""
        return self._head + b'],"usage":' + _usage(piece.usage) + b"}"

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
        return self._head + encode(choice) + self._tail


def _new_id() -> str:
    return f"chatcmpl-{random_hex()}"


def _choice(index: int, choice: AnswerChoice) -> bytes:
    is_said = choice.logprobs is None and choice.stop_reason is None
    if is_said and not choice.tool_calls and not choice.reasoning:
        return _PLAIN_CHOICE % (index, encode(choice.text), choice.finish_reason.encode())
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
    return encode(body)


def _call_delta(piece: ToolCallPiece) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.call, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.call, "id": piece.id, "type": "function", "function": function}


def _usage(usage: Usage) -> bytes:
    fields = usage.__dict__
    num_prompt, num_output = fields["prompt_tokens"], fields["completion_tokens"]
    return _USAGE % (num_prompt, num_output, num_prompt + num_output, fields["cached_tokens"])


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": logprob_entries(entries), "refusal": None}
