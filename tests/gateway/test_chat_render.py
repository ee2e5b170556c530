"""From pieces to the bodies and messages of `/v1/chat/completions`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagellm_gateway.chat_render import ChunkWriter, answer_body
from sagellm_gateway.pieces import (
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    OutputCount,
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
    collect,
)
from sagellm_protocol import Metrics, TokenLogprob, TopLogprob, Usage
from sagellm_protocol.openai import ChatCompletion, ChatCompletionChunk

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
LOGPROB = TokenLogprob(
    token_id=1, logprob=-0.5, rank=1, token="é", top=[TopLogprob(token_id=1, logprob=-0.5, token="é")]
)
PIECES: list[Piece] = [
    AnswerStart(3),
    ReasoningPiece(0, "hm"),
    TextPiece(0, "推理\n", [LOGPROB]),
    TextPiece(1, "no"),
    ToolCallPiece(1, 0, id="call_1", name="f"),
    ToolCallPiece(1, 0, '{"a":'),
    ToolCallPiece(1, 0, "1}"),
    ChoiceEnd(0, "stop", "END"),
    ChoiceEnd(1, "tool_calls"),
    AnswerEnd(USAGE, Metrics()),
]
USAGE_BODY = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def test_the_usage_so_far_is_told_in_every_chunk() -> None:
    writer = ChunkWriter("m", num_choices=1, include_usage=True, counts_usage=True)
    pieces = [AnswerStart(3), OutputCount(2), ReasoningPiece(0, "hm"), OutputCount(5), TextPiece(0, "a", [])]
    written = [writer.write(piece) for piece in (*pieces, ChoiceEnd(0, "stop"))]
    assert [json.loads(message)["usage"]["completion_tokens"] for message in written if message] == [0, 2, 5, 5]


def messages(include_usage: bool) -> list[dict[str, Any]]:
    writer = ChunkWriter("m", num_choices=2, include_usage=include_usage)
    written = [writer.write(piece) for piece in PIECES]
    assert all(b"\n" not in message for message in written)
    return [json.loads(message) for message in written if message]


def test_a_whole_answer() -> None:
    body = json.loads(answer_body("m", collect(PIECES)))
    answer = ChatCompletion.model_validate(body)
    assert body["usage"] == USAGE_BODY
    first, second = answer.choices
    assert (first.message.content, first.message.reasoning_content, first.stop_reason) == ("推理\n", "hm", "END")
    assert "tool_calls" not in body["choices"][0]["message"]
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert entry["bytes"] == [0xC3, 0xA9]
    assert entry["top_logprobs"][0]["token"] == "é"
    assert second.finish_reason == "tool_calls"
    assert second.message.tool_calls is not None
    assert second.message.tool_calls[0].function.arguments == '{"a":1}'


def test_an_answer_of_calls_alone_has_no_content() -> None:
    body = json.loads(answer_body("m", collect([ToolCallPiece(0, 0, "{}", "call_1", "f"), ChoiceEnd(0, "tool_calls")])))
    assert body["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_tells_the_same_as_the_whole(include_usage: bool) -> None:
    bodies = messages(include_usage)
    for body in bodies:
        ChatCompletionChunk.model_validate(body)
    assert bodies[0]["choices"][1] == {"index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    told = [{"content": "", "reasoning_content": "", "arguments": ""} for _ in range(2)]
    reasons: dict[int, str] = {}
    for body in bodies:
        assert ("usage" in body) == include_usage
        for choice in body["choices"]:
            delta, mine = choice["delta"], told[choice["index"]]
            mine["content"] += delta.get("content", "")
            mine["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                mine["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"] is not None:
                reasons[choice["index"]] = choice["finish_reason"]
    assert told[0] == {"content": "推理\n", "reasoning_content": "hm", "arguments": ""}
    assert told[1] == {"content": "no", "reasoning_content": "", "arguments": '{"a":1}'}
    assert reasons == {0: "stop", 1: "tool_calls"}
    if include_usage:
        assert bodies[-1]["choices"] == []
        assert bodies[-1]["usage"] == USAGE_BODY
        assert all(body["usage"] is None for body in bodies[:-1])
