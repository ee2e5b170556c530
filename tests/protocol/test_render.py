"""From responses to OpenAI bodies."""

from __future__ import annotations

from typing import Any

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
from sagellm_protocol.openai.render import (
    AnswerHead,
    completion,
    completion_chunk,
    completion_echo,
    completion_end,
    completion_usage,
    to_body,
    to_json,
)

HEAD = AnswerHead("id-1", 1_700_000_000, "m")


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


def test_completions_number_the_choices_of_all_prompts() -> None:
    body = to_body(completion(HEAD, [response("a", "b"), response("c", "d")], prompts=["P1 ", "P2 "]))
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
    logprobs = to_body(completion(HEAD, [answer], prompts=["How are"]))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["How", " are", " you"]
    assert logprobs["text_offset"] == [0, 3, 7]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    single = to_body(completion(HEAD, [response(" you", logprobs=[logprob(" you")])], prompts=["How"]))
    assert single["choices"][0]["logprobs"]["tokens"] == ["How", " you"]
    plain = to_body(completion(HEAD, [answer]))
    assert plain["choices"][0]["logprobs"]["tokens"] == [" you"]


def test_a_completion_stream() -> None:
    end = StreamEventEnd.of(response("ab"))
    echo = to_body(completion_echo(HEAD, "P ", indices=[2, 3]))
    assert [(choice["index"], choice["text"]) for choice in echo["choices"]] == [(2, "P "), (3, "P ")]
    chunk = to_body(completion_chunk(HEAD, delta("b", logprobs=[logprob("b")]), index=2, offset=1))
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [1]
    assert chunk["choices"][0]["finish_reason"] is None
    last = to_body(completion_end(HEAD, end, first_index=2))
    assert last["choices"] == [{"index": 2, "text": "", "finish_reason": "stop"}]
    assert to_body(completion_usage(HEAD, [end, end]))["usage"]["total_tokens"] == 10


def test_json_is_one_line_of_readable_text() -> None:
    text = to_json(completion_chunk(HEAD, delta("推理\n"), index=0, offset=0)).decode()
    assert "推理" in text
    assert "\n" not in text
