"""Response and StreamEvent: consistency, conversion, round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_protocol import (
    CompletionOutput,
    Error,
    ErrorCode,
    FinishReason,
    InvalidArgumentError,
    Metrics,
    ResourceExhaustedError,
    Response,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenLogprob,
    TopLogprob,
    Usage,
    parse_stream_event,
)

FAILURE = Error(code=ErrorCode.RESOURCE_EXHAUSTED, message="no memory; wait", retryable=True)


def test_one_output_is_made_from_the_flat_fields() -> None:
    response = Response(request_id="r", output_text="hi", output_tokens=[1, 2], finish_reason="stop", stop_reason=2)
    assert response.outputs == [
        CompletionOutput(text="hi", token_ids=[1, 2], finish_reason=FinishReason.STOP, stop_reason=2)
    ]
    assert response.finish_reason == "stop"
    assert f"{response.finish_reason}" == "stop"


def test_several_outputs_give_the_flat_fields() -> None:
    outputs = [
        CompletionOutput(index=0, text="a", token_ids=[1], finish_reason=FinishReason.LENGTH),
        CompletionOutput(index=1, text="b", token_ids=[2], finish_reason=FinishReason.STOP),
    ]
    response = Response.of(outputs, request_id="r", usage=Usage(prompt_tokens=3, completion_tokens=2))
    assert (response.output_text, response.output_tokens, response.finish_reason) == ("a", [1], "length")
    assert response.usage.total_tokens == 5
    with pytest.raises(InvalidArgumentError, match=r"outputs\[0\] must equal output_text"):
        Response(request_id="r", output_text="other", finish_reason="stop", outputs=outputs)


def test_a_failed_response_says_why_and_can_be_raised() -> None:
    with pytest.raises(InvalidArgumentError, match="error is required"):
        Response(request_id="r", finish_reason="error")
    response = Response(request_id="r", finish_reason="error", error=FAILURE)
    with pytest.raises(ResourceExhaustedError, match="no memory; wait"):
        response.raise_for_error()
    fine = Response(request_id="r", finish_reason="stop")
    assert fine.raise_for_error() is fine


def test_the_logarithm_of_zero_stays_json() -> None:
    entry = TokenLogprob(token_id=1, logprob=float("-inf"), rank=3, top=[TopLogprob(token_id=2, logprob=-0.1, rank=1)])
    assert entry.logprob == -9999.0
    assert TokenLogprob.model_validate_json(entry.model_dump_json()) == entry


def test_the_end_event_and_the_response_hold_the_same() -> None:
    response = Response(
        request_id="r",
        trace_id="t",
        engine_id="e",
        output_text="hi",
        output_tokens=[1],
        finish_reason="length",
        metrics=Metrics(ttft_ms=3),
        usage=Usage(prompt_tokens=1, completion_tokens=1),
    )
    assert StreamEventEnd.of(response).to_response() == response


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ("{}", "event"),
        ('{"event": "middle", "request_id": "r"}', "event"),
        ('{"event": "delta"}', "request_id"),
        ('{"event": "end", "request_id": "r", "finish_reason": "tired"}', "finish_reason"),
        ('{"event": "delta", "request_id": "r", "chunk_tokens": [1, "x"]}', "chunk_tokens[1]"),
        ("[", None),
    ],
)
def test_a_wrong_event_is_named(document: str, field: str | None) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid stream event: ") as raised:
        parse_stream_event(document)
    assert raised.value.context["field"] == field


texts, token_ids = st.text(max_size=10), st.lists(st.integers(0, 2**31 - 1), max_size=4)
tops = st.builds(
    TopLogprob,
    token_id=st.integers(0, 99),
    logprob=st.floats(max_value=0),
    rank=st.none() | st.integers(1, 9),
    token=st.none() | texts,
)
logprobs = st.none() | st.lists(
    st.builds(
        TokenLogprob, token_id=st.integers(0, 99), logprob=st.floats(max_value=0), top=st.lists(tops, max_size=2)
    ),
    max_size=3,
)
errors = st.builds(Error, code=st.sampled_from(ErrorCode), message=texts, retryable=st.booleans())
metrics = st.builds(Metrics, ttft_ms=st.floats(0, 1e6), itl_list=st.lists(st.floats(0, 1e4), max_size=3))
outcomes = st.fixed_dictionaries(
    {"finish_reason": st.sampled_from(["stop", "length", "abort"])},
    optional={"stop_reason": st.none() | st.integers(0, 99) | texts},
) | st.fixed_dictionaries({"finish_reason": st.just("error"), "error": errors})
answers = st.fixed_dictionaries(
    {"request_id": texts, "trace_id": texts, "output_text": texts, "output_tokens": token_ids},
    optional={"metrics": metrics, "engine_id": texts, "usage": st.builds(Usage, prompt_tokens=st.integers(0, 9))},
)
events = st.one_of(
    st.builds(StreamEventStart, request_id=texts, trace_id=texts, engine_id=texts, prompt_tokens=st.integers(0, 99)),
    st.builds(StreamEventDelta, request_id=texts, chunk=texts, chunk_tokens=token_ids, logprobs=logprobs),
    st.builds(lambda answer, outcome: StreamEventEnd(**answer, **outcome), answers, outcomes),
)


@given(answers, outcomes, logprobs)
def test_responses_round_trip(answer: dict[str, Any], outcome: dict[str, Any], entries: Any) -> None:
    response = Response(**answer, **outcome, logprobs=entries)
    text = response.model_dump_json()
    again = Response.model_validate_json(text)
    assert again == response
    assert json.loads(again.model_dump_json()) == json.loads(text)


@given(events)
def test_events_round_trip(event: StreamEventStart | StreamEventDelta | StreamEventEnd) -> None:
    again = parse_stream_event(event.model_dump_json())
    assert type(again) is type(event)
    assert again == event
    assert parse_stream_event(event.model_dump(mode="json")) == event
