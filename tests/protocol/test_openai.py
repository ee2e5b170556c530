"""The OpenAI types: bounds, mapping to the protocol, error bodies."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sagellm_protocol import (
    SLO,
    DecodingStrategy,
    ErrorCode,
    InvalidArgumentError,
    NotFoundError,
    Request,
    RequestPriority,
    ResourceExhaustedError,
    SamplingParams,
    UnavailableError,
    Usage,
    parse,
)
from sagellm_protocol.openai import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatMessage,
    Completion,
    CompletionRequest,
    CompletionUsage,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(ChatCompletionRequest, body, what="chat completion request")


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "hi", **fields}, what="completion request")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 4097}),
        ("model", {"model": ""}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 2}),
        ("n", {"n": 65}),
        ("stop", {"stop": ["x"] * 17}),
        ("logit_bias[5]", {"logit_bias": {"5": 200}}),
        ("seed", {"seed": -1}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("tools[0].function.name", {"tools": [{"function": {"name": "no spaces"}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"function": {"name": "other"}}}),
        ("tool_choice", {"tool_choice": 5}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        ("min_p", {"min_p": 2}),
        ("num_beams", {"strategy": "sampling", "num_beams": 3}),
        ("temprature", {"temprature": 1}),
    ],
)
def test_wrong_chat_bodies_are_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid chat completion request: ") as raised:
        chat(**fields)
    assert raised.value.context["field"] == field
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["x"] * 1025}),
        ("prompt[0][1]", {"prompt": [[1, "x"]]}),
        ("logprobs", {"logprobs": 21}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 3}),
        ("stream_options", {"stream_options": {}}),
    ],
)
def test_wrong_completion_bodies_are_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid completion request: ") as raised:
        completion(**fields)
    assert raised.value.context["field"] == field


@pytest.mark.parametrize("body", ["{bad", b"\xff", "[]", None, 3])
def test_what_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^invalid chat completion request: "):
        parse(ChatCompletionRequest, body, what="chat completion request")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["x"] * 100_000},
        {"prompt": ["x", *[1] * 100_000]},
        {"stop": [""] * 100_000},
        {"stop_token_ids": ["x"] * 100_000},
        {"logit_bias": {str(token): 500 for token in range(100_000)}},
        {f"z{number}": 1 for number in range(20_000)},
        {"z" * 1_000_000: 1},
        {"logit_bias": {"1" * 1_000_000: 1}},
    ],
    ids=["prompts", "mixed", "stop", "stop_token_ids", "logit_bias", "unknown", "long name", "long key"],
)
def test_a_hostile_body_is_refused_quickly(fields: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(InvalidArgumentError) as raised:
        completion(**fields)
    assert time.process_time() - start < 0.5
    assert len(str(raised.value)) < 500
    assert len(raised.value.context["field"]) < 100


def test_parse_returns_instances_as_they_are() -> None:
    body = chat()
    assert parse(ChatCompletionRequest, body, what="x") is body


def test_nulls_and_absent_fields_are_not_given() -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "logprobs"])
    assert chat(**nulls).to_sampling_params().given() == {}
    assert completion(**nulls).to_sampling_params().given() == {}


def test_every_sampling_field_of_a_body_arrives() -> None:
    params = chat(
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop="x",
        seed=7,
        logit_bias={"5": 1},
        max_completion_tokens=9,
        presence_penalty=1,
        frequency_penalty=-1,
        logprobs=True,
        top_logprobs=3,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        stop_token_ids=[4],
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    ).to_sampling_params()
    assert params == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop=("x",),
        seed=7,
        logit_bias={5: 1},
        max_tokens=9,
        presence_penalty=1,
        frequency_penalty=-1,
        logprobs=3,
        top_k=0,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        stop_token_ids=(4,),
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    assert chat(logprobs=True).to_sampling_params().logprobs == 0
    assert chat(num_beams=3).to_sampling_params().strategy is DecodingStrategy.BEAM_SEARCH
    assert completion(logprobs=2, echo=True).to_sampling_params().given() == {"logprobs": 2, "prompt_logprobs": 2}


def test_a_chat_body_becomes_a_request() -> None:
    body = chat(request_id="r", priority="high", stream=True, tools=[TOOL], cache_salt="s", metadata={"a": "b"})
    request = body.to_request()
    assert (request.request_id, request.priority, request.stream) == ("r", RequestPriority.HIGH, True)
    assert request.messages == [ChatMessage(role="user", content="hi")]
    assert request.tools is not None
    assert (request.cache_salt, request.metadata) == ("s", {"a": "b"})
    assert chat(tools=[TOOL], tool_choice="none").to_request().tools is None
    assert chat().to_request().request_id.startswith("req-")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_come_one_by_one(prompt: Any, prompts: Any) -> None:
    body = completion(prompt=prompt, request_id="r")
    assert body.prompts == prompts
    requests = body.to_requests()
    assert [request.prompt for request in requests] == prompts
    assert len({request.request_id for request in requests}) == len(prompts)
    assert parse(EmbeddingRequest, {"model": "m", "input": prompt}, what="embedding request").inputs == prompts


def test_what_an_assistant_answered_can_be_sent_back() -> None:
    answer = ChatAnswer(content="hello").model_dump()
    assert chat(messages=[{"role": "user", "content": "hi"}, answer]).messages[1].text == "hello"


def test_answers_ignore_fields_they_do_not_know() -> None:
    usage = CompletionUsage.of(Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1))
    assert (usage.total_tokens, usage.prompt_tokens_details) == (
        5,
        CompletionUsage.of(Usage(cached_tokens=1)).prompt_tokens_details,
    )
    choice = ChatChoice(message=ChatAnswer(content="x"), finish_reason="stop")
    answer = ChatCompletion(id="c", created=1, model="m", choices=[choice], usage=usage)
    assert ChatCompletion.model_validate({**answer.model_dump(), "service_tier": "x"}) == answer
    for kind, fields in (
        (ChatCompletionChunk, {"choices": [{"delta": {"content": "x"}}]}),
        (Completion, {"choices": [{"text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": [None]}}]}),
    ):
        item = kind.model_validate({"id": "c", "created": 1, "model": "m", **fields})
        assert kind.model_validate_json(item.model_dump_json()) == item
    models = ModelList(data=[ModelCard(id="m", max_model_len=9)])
    assert ModelList.model_validate_json(models.model_dump_json()) == models
    vectors = EmbeddingResponse.model_validate({"data": [{"embedding": [0.5]}], "model": "m"})
    assert vectors.data[0].embedding == [0.5]


def test_error_bodies_go_both_ways() -> None:
    body = ErrorResponse.of(InvalidArgumentError("top_p must be > 0", field="top_p"))
    assert body.model_dump() == {
        "error": {
            "message": "top_p must be > 0",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_argument",
        }
    }
    error = body.to_exception(400)
    assert isinstance(error, InvalidArgumentError)
    assert error.context == {"field": "top_p"}
    for kind in (NotFoundError, ResourceExhaustedError, UnavailableError):
        assert type(ErrorResponse.of(kind("x")).to_exception()) is kind


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, ErrorCode.RESOURCE_EXHAUSTED),
        (404, ErrorCode.NOT_FOUND),
        (418, ErrorCode.INVALID_ARGUMENT),
        (500, ErrorCode.INTERNAL),
        (502, ErrorCode.INTERNAL),
        (503, ErrorCode.UNAVAILABLE),
    ],
)
def test_foreign_error_bodies_are_read_by_their_status(status: int, code: ErrorCode) -> None:
    body = ErrorResponse.model_validate({"error": {"message": "m", "type": "t", "code": "their_own"}})
    assert body.to_exception(status).code is code


_IDS = st.text("abc-", min_size=1, max_size=9)
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXTS}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _TEXTS}))}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": _TEXTS, "tool_call_id": _IDS}),
)
_CHAT_BODIES = st.fixed_dictionaries(
    {"model": _IDS, "messages": st.lists(_MESSAGES, min_size=1, max_size=4)},
    optional={
        "max_tokens": st.integers(1, 2**31 - 1),
        "temperature": st.floats(0, 2) | st.integers(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 9),
        "n": st.none() | st.integers(1, 3),
        "stop": st.none() | _IDS | st.lists(_IDS, max_size=3),
        "seed": st.integers(0, 2**63 - 1),
        "logit_bias": st.dictionaries(st.integers(0, 9).map(str), st.floats(-100, 100), max_size=3),
        "logprobs": st.booleans(),
        "stream": st.none() | st.booleans(),
        "metadata": st.dictionaries(_IDS, _TEXTS, max_size=3),
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        "tools": st.just([TOOL]),
        "tool_choice": st.sampled_from([None, "none", "auto"]),
        "chat_template_kwargs": st.dictionaries(_IDS, st.booleans() | st.none() | st.integers(), max_size=2),
        "priority": st.sampled_from(["critical", "NORMAL", 1, -1]),
        "session_id": _IDS,
        "request_id": _IDS,
        "cache_salt": _IDS,
        "lora": _IDS,
        "kv_budget_tokens": st.integers(1, 99),
        "ignore_eos": st.none() | st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 99), max_size=3),
    },
)


@given(body=_CHAT_BODIES, priority=st.sampled_from(RequestPriority), ttft_ms=st.none() | st.floats(1, 1e6))
def test_the_request_of_a_body_is_what_validation_would_have_made(
    body: dict[str, Any], priority: RequestPriority, ttft_ms: float | None
) -> None:
    otherwise = {"request_id": "r", "trace_id": "t", "tenant": "ada", "slo": SLO(ttft_ms=ttft_ms), "priority": priority}
    made = parse(ChatCompletionRequest, body, what="body").to_request(**otherwise)
    assert made == Request(**made.given())
    assert made == Request.model_validate_json(made.model_dump_json(exclude_unset=True))
    assert list(made.model_dump()) == list(Request.model_fields)
    assert made.request_id == body.get("request_id", "r")
    assert made.messages == [ChatMessage(**message) for message in body["messages"]]
    assert made.resolved_sampling() == made.sampling_params


def test_requests_without_ids_get_fresh_ones() -> None:
    call = chat()
    first, second = call.to_request(), call.to_request()
    assert first.request_id != second.request_id
    assert first.trace_id != second.trace_id
    assert parse(Request, first.model_dump(), what="request").trace_id == first.trace_id


def test_a_copy_differs_in_what_is_changed_alone() -> None:
    request = chat(max_tokens=3).to_request()
    copied = request.model_copy(update={"tenant": "ada"})
    assert (copied.tenant, request.tenant) == ("ada", None)
    assert copied.model_fields_set == request.model_fields_set | {"tenant"}
    assert copied == BaseModel.model_copy(request, update={"tenant": "ada"})
    assert copied.model_copy(update={"tenant": None}) != copied
    deep = request.model_copy(deep=True)
    assert deep == request
    assert deep.messages is not request.messages
    assert request.model_copy().messages is request.messages
