"""Request: sources, shorthands, priorities, bounds, round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_protocol import (
    SLO,
    ChatMessage,
    DecodingStrategy,
    DType,
    InvalidArgumentError,
    KVTransferMetadata,
    Request,
    RequestPriority,
    ResumePoint,
    SamplingParams,
    StructuredOutput,
)
from sagellm_protocol.structured import MAX_GRAMMAR_CHARS


def test_the_documented_request() -> None:
    request = Request(
        request_id="r1",
        trace_id="t1",
        model="m",
        prompt="Hello",
        max_tokens=8,
        stream=False,
        temperature=0.7,
        top_p=0.9,
        kv_budget_tokens=100,
        metadata={"team": "a"},
        phase="prefill",
    )
    params = request.resolved_sampling()
    assert (params.max_tokens, params.temperature, params.top_p) == (8, 0.7, 0.9)
    assert params.strategy is DecodingStrategy.SAMPLING


def test_ids_are_fresh_by_default() -> None:
    first, second = Request(prompt="x"), Request(prompt="x")
    assert first.request_id != second.request_id
    assert first.request_id.startswith("req-")
    assert len(first.trace_id) == 32


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": []}),
        ("prompt[1]", {"prompt": [1, -1]}),
        ("prompt[0]", {"prompt": [2**31]}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "bob", "content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
        ("max_tokens", {"prompt": "x", "max_tokens": 0}),
        ("temperature", {"prompt": "x", "temperature": -1}),
        ("top_p", {"prompt": "x", "top_p": 0}),
        ("kv_budget_tokens", {"prompt": "x", "kv_budget_tokens": 0}),
        ("phase", {"prompt": "x", "phase": "both"}),
        ("priority", {"prompt": "x", "priority": "urgent"}),
        ("priority", {"prompt": "x", "priority": 9}),
        ("slo.ttft_ms", {"prompt": "x", "slo": {"ttft_ms": 0}}),
        ("request_id", {"prompt": "x", "request_id": ""}),
        ("request_id", {"prompt": "x", "request_id": "a\nb"}),
        ("cache_salt", {"prompt": "x", "cache_salt": "y" * 257}),
        ("sampling_params.top_k", {"prompt": "x", "sampling_params": {"top_k": -5}}),
        ("sampling_params.temperature", {"prompt": "x", "sampling_params": {"num_beams": 2, "temperature": 1}}),
        ("max_tokenz", {"prompt": "x", "max_tokenz": 3}),
    ],
)
def test_what_is_wrong_is_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Request(**fields)
    assert raised.value.context["field"] == field
    assert field in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p"])
def test_a_shorthand_may_not_contradict_the_sampling_params(name: str) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.5)
    value = getattr(params, name)
    Request(prompt="x", sampling_params=params, **{name: value})
    with pytest.raises(InvalidArgumentError, match=rf"^{name} is 1.* but sampling_params\.{name} is .*give only one"):
        Request(prompt="x", sampling_params=params, **{name: 1})


def test_a_shorthand_wins_over_what_was_not_given() -> None:
    request = Request(prompt="x", max_tokens=5, sampling_params=SamplingParams(temperature=0.5))
    assert request.resolved_sampling() == SamplingParams(max_tokens=5, temperature=0.5)
    resolved = request.resolved_sampling(SamplingParams(temperature=0.9, max_tokens=99, top_k=3))
    assert resolved == SamplingParams(max_tokens=5, temperature=0.5, top_k=3)


def test_a_shorthand_that_contradicts_the_strategy_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="temperature must be 0 with strategy beam_search"):
        Request(prompt="x", temperature=0.5, sampling_params=SamplingParams(num_beams=2))


def test_priorities() -> None:
    assert [int(priority) for priority in RequestPriority] == [-2, -1, 0, 1, 2]
    assert Request(prompt="x").priority == 0
    for value in ("critical", "CRITICAL", -2, RequestPriority.CRITICAL):
        assert Request(prompt="x", priority=value).priority is RequestPriority.CRITICAL
    assert json.loads(Request(prompt="x", priority="low").model_dump_json())["priority"] == "low"


def test_sampling_params_keep_on_the_wire_what_was_given() -> None:
    request = Request(prompt="x", max_tokens=5, sampling_params=SamplingParams(temperature=0.5))
    document = json.loads(request.model_dump_json())
    assert document["sampling_params"] == {"temperature": 0.5}
    again = Request.model_validate(document)
    assert again.resolved_sampling() == request.resolved_sampling()


def test_messages_become_what_templates_expect() -> None:
    call = {"id": "c1", "function": {"name": "add", "arguments": "{}"}}
    request = Request(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b", "annotations": []}]},
            {"role": "assistant", "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
        ]
    )
    assert request.messages is not None
    assert [message.to_template() for message in request.messages] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]


def test_structured_output_has_exactly_one_form() -> None:
    request = Request(prompt="x", structured_output={"choice": ["yes", "no"]})
    assert request.structured_output == StructuredOutput(choice=["yes", "no"])
    for wrong in ({}, {"json_object": False}, {"regex": "a", "choice": ["b"]}, {"json_object": True, "grammar": ""}):
        with pytest.raises(InvalidArgumentError, match="exactly one of"):
            Request(prompt="x", structured_output=wrong)
    for empty in ({"regex": ""}, {"json_schema": {}}):
        assert Request(prompt="x", structured_output=empty).structured_output is not None
    for wrong in ({"choice": []}, {"choice": [""]}, {"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, {"json": {}}):
        with pytest.raises(InvalidArgumentError):
            Request(prompt="x", structured_output=wrong)


texts = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | texts, lambda children: st.lists(children, max_size=3)
)
identifiers = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
chat_messages = st.builds(ChatMessage, role=st.sampled_from(["system", "user", "assistant"]), content=texts)
sources = st.one_of(
    st.fixed_dictionaries({"prompt": texts | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)}),
    st.fixed_dictionaries({"messages": st.lists(chat_messages, min_size=1, max_size=3)}),
)
transfers = st.builds(
    KVTransferMetadata,
    request_id=identifiers,
    block_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    dtype=st.sampled_from(DType),
)
structured_outputs = st.one_of(
    st.builds(StructuredOutput, json_object=st.just(True)),
    st.builds(StructuredOutput, json_schema=st.dictionaries(texts, json_values, max_size=3)),
    st.builds(StructuredOutput, regex=texts),
    st.builds(StructuredOutput, choice=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3)),
    st.builds(StructuredOutput, grammar=texts),
)
request_fields = st.fixed_dictionaries(
    {},
    optional={
        "request_id": identifiers,
        "trace_id": identifiers,
        "model": identifiers,
        "max_tokens": st.none() | st.integers(1, 1000),
        "stream": st.booleans(),
        "temperature": st.none() | st.floats(0, 5),
        "top_p": st.none() | st.floats(0.01, 1),
        "sampling_params": st.none() | st.builds(SamplingParams, top_k=st.integers(0, 9), seed=st.integers(0, 99)),
        "structured_output": st.none() | structured_outputs,
        "kv_budget_tokens": st.none() | st.integers(1, 9),
        "metadata": st.none() | st.dictionaries(texts, json_values, max_size=3),
        "phase": st.sampled_from([None, "prefill", "decode"]),
        "priority": st.sampled_from(RequestPriority),
        "slo": st.none() | st.builds(SLO, ttft_ms=st.floats(0.1, 1e6), deadline_ms=st.none() | st.floats(1, 1e6)),
        "session_id": st.none() | identifiers,
        "cache_salt": st.none() | identifiers,
        "lora": st.none() | identifiers,
        "kv_transfer": st.none() | transfers,
    },
)


@settings(max_examples=30)
@given(sources, request_fields)
def test_round_trip_through_json(source: dict[str, Any], fields: dict[str, Any]) -> None:
    request = Request(**source, **fields)
    text = request.model_dump_json()
    again = Request.model_validate_json(text)
    assert again == request
    assert json.loads(again.model_dump_json()) == json.loads(text)
    assert again.resolved_sampling() == request.resolved_sampling()


def test_a_resumed_request_survives_the_wire() -> None:
    request = Request(
        prompt="Hello",
        prompt_token_ids=[5, 6],
        tenant="team a",
        resume_from=ResumePoint(output_token_ids=[[1, 2], []], seed=2**63 - 1),
        sampling_params=SamplingParams(n=2, temperature=1.0),
    )
    assert Request.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": [1], "prompt_token_ids": [1]}, "prompt_token_ids", "leave them out"),
        ({"prompt": "x", "prompt_token_ids": []}, "prompt_token_ids", "must not be empty"),
        ({"prompt": "x", "prompt_token_ids": [-1]}, "prompt_token_ids[0]", ">= 0"),
        ({"prompt": "x", "resume_from": {}}, "resume_from.seed", "required"),
        ({"prompt": "x", "resume_from": {"seed": -1}}, "resume_from.seed", ">= 0"),
        ({"prompt": "x", "resume_from": {"seed": 1, "output_token_ids": [[-5]]}}, None, ">= 0"),
        ({"prompt": "x", "resume_from": {"seed": 1}, "embed": {}}, "resume_from", "does not go with embed"),
        (
            {"prompt": "x", "resume_from": {"seed": 1}, "sampling_params": {"seed": 2, "temperature": 1.0}},
            "resume_from.seed",
            "seed is 2 but resume_from.seed is 1",
        ),
        ({"prompt": "x", "tenant": "a\nb"}, "tenant", "control characters"),
    ],
)
def test_what_does_not_fit_together(fields: dict[str, Any], field: str | None, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        Request.model_validate(fields)
    if field is not None:
        assert caught.value.context["field"] == field
