"""From responses to the bodies and messages of `/v1/completions`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagellm_core.completion_render import CompletionWriter, completion_body
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from sagellm_protocol.openai import Completion


def logprob(token: str, value: float = -0.5) -> TokenLogprob:
    return TokenLogprob(
        token_id=1, logprob=value, rank=1, token=token, top=[TopLogprob(token_id=1, logprob=value, token=token)]
    )


def response(*texts: str, logprobs: list[TokenLogprob] | None = None, **fields: Any) -> Response:
    outputs = [
        CompletionOutput(index=i, text=text, token_ids=[1], finish_reason=FinishReason.STOP, logprobs=logprobs)
        for i, text in enumerate(texts)
    ]
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    return Response.of(outputs, request_id="r", usage=usage, **fields)


def delta(chunk: str, **fields: Any) -> StreamEventDelta:
    return StreamEventDelta(request_id="r", chunk=chunk, chunk_tokens=[1], **fields)


def whole(responses: list[Response], prompts: list[str] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(completion_body("m", responses, prompts))
    return body


def test_completions_number_the_choices_of_all_prompts() -> None:
    body = whole([response("a", "b"), response("c", "d")], prompts=["P1 ", "P2 "])
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "P1 a"),
        (1, "P1 b"),
        (2, "P2 c"),
        (3, "P2 d"),
    ]
    assert body["usage"]["total_tokens"] == 10
    assert Completion.model_validate(body).object == "text_completion"


def test_echoed_logprobs_begin_with_the_prompts_first_token() -> None:
    answer = response(" you", logprobs=[logprob(" you")], prompt_logprobs=[None, logprob(" are")])
    logprobs = whole([answer], prompts=["How are"])["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["How", " are", " you"]
    assert logprobs["text_offset"] == [0, 3, 7]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    single = whole([response(" you", logprobs=[logprob(" you")])], prompts=["How"])
    assert single["choices"][0]["logprobs"]["tokens"] == ["How", " you"]
    plain = whole([answer])
    assert plain["choices"][0]["logprobs"]["tokens"] == [" you"]


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream(include_usage: bool) -> None:
    writer = CompletionWriter("m", include_usage=include_usage)
    end = StreamEventEnd.of(response("ab"))
    messages = [
        writer.echo("P ", indices=[2, 3]),
        writer.delta(delta("a"), index=2, offset=0),
        writer.delta(delta("推理\n", logprobs=[logprob("b")]), index=2, offset=1),
        writer.end(end, first_index=2),
    ]
    assert all(b"\n" not in message for message in messages)
    echo, first, second, last = (json.loads(message) for message in messages)
    for body in (echo, first, second, last):
        Completion.model_validate(body)
        assert ("usage" in body) == include_usage
    assert [(choice["index"], choice["text"]) for choice in echo["choices"]] == [(2, "P "), (3, "P ")]
    assert first["choices"][0] == {"index": 2, "text": "a", "logprobs": None, "finish_reason": None}
    assert second["choices"][0]["logprobs"]["text_offset"] == [1]
    assert last["choices"] == [{"index": 2, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert json.loads(writer.usage([end, end]))["usage"]["total_tokens"] == 10
