"""`/v1/messages`, with Anthropic's own client and with plain HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic as api
import httpx
import pytest
from anthropic import AsyncAnthropic
from pydantic import BaseModel

from asgi_client import LeavingClient, named_events_in
from fake_chat import FakeChat, answer_end, rich_answer, text_answer
from live_server import serving
from sagellm_gateway.app import Gateway
from sagellm_gateway.pieces import AnswerStart, TextPiece, ToolCallPiece
from sagellm_gateway.streams import PingedEvents
from sagellm_protocol import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    SageLLMError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from waiting import until

PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi"}]
THINK = {"type": "enabled", "budget_tokens": 1024}
WEATHER = {
    "name": "weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
CLOCK = {"type": "custom", "name": "clock", "input_schema": {"type": "object"}}


@pytest.fixture
async def anthropic(app: Gateway) -> AsyncIterator[AsyncAnthropic]:
    async with serving(app) as url, AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as anthropic:
        yield anthropic


async def events_of(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return named_events_in(answer.text)


# ---- Anthropic's client -------------------------------------------------------------------------------


async def test_create(anthropic: AsyncAnthropic, chat: FakeChat) -> None:
    message = await anthropic.messages.create(
        model="m",
        max_tokens=5,
        system=[{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."}],
        messages=[{"role": "user", "content": "hi"}],
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 4},
    )
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello there"}]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (4, 3)
    assert message.usage.output_tokens == 5
    assert message._request_id == chat.callers[-1].request_id
    assert chat.sent == [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        {"role": "user", "content": "hi"},
    ]
    call = chat.calls[-1]
    assert (call.max_completion_tokens, call.temperature, call.top_p, call.top_k) == (5, 0.5, 0.9, 4)
    assert (call.stop, call.user, call.stream) == (("END",), "u", False)
    assert call.chat_template_kwargs == {"enable_thinking": False}


async def test_stream(anthropic: AsyncAnthropic) -> None:
    async with anthropic.messages.stream(
        model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert texts == ["Hello", " there"]
    assert final.content[0].to_dict() == {"type": "text", "text": "Hello there"}
    assert final.stop_reason == "end_turn"
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens, final.usage.output_tokens) == (4, 3, 5)


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_text_and_tools(anthropic: AsyncAnthropic, chat: FakeChat, stream: bool) -> None:
    chat.pieces = rich_answer()
    ask: dict[str, Any] = {"model": "m", "max_tokens": 2000, "tools": [WEATHER, CLOCK], "thinking": THINK}
    ask["messages"] = [{"role": "user", "content": "weather?"}]
    if stream:
        async with anthropic.messages.stream(**ask) as events:
            message = await events.get_final_message()
    else:
        message = await anthropic.messages.create(**ask)
    assert message.stop_reason == "tool_use"
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "let me think", "signature": ""},
        {"type": "text", "text": "Looking."},
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "id": "call_b", "name": "clock", "input": {}},
    ]
    assert chat.calls[-1].chat_template_kwargs == {"enable_thinking": True}
    # The whole answer goes back as it came, with the results behind it.
    ask["messages"] += [
        {"role": "assistant", "content": message.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "call_b", "content": "broken", "is_error": True},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    chat.pieces = list(text_answer("Sunny."))
    await anthropic.messages.create(**ask)
    assert chat.sent[1:] == [
        {
            "role": "assistant",
            "content": "Looking.",
            "reasoning_content": "let me think",
            "tool_calls": [
                {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
                {"id": "call_b", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "call_a"},
        {"role": "tool", "content": "Error: broken", "tool_call_id": "call_b"},
        {"role": "user", "content": "Well?"},
    ]
    assert [tool.function.name for tool in chat.calls[-1].tools or ()] == ["weather", "clock"]


class City(BaseModel):
    name: str


async def test_parse(anthropic: AsyncAnthropic, chat: FakeChat) -> None:
    chat.pieces = list(text_answer('{"name": "Paris"}'))
    message = await anthropic.messages.parse(
        model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}], output_format=City
    )
    assert message.parsed_output == City(name="Paris")
    wanted = chat.calls[-1].response_format
    assert wanted is not None
    assert wanted.json_schema is not None
    assert wanted.json_schema.json_schema["required"] == ["name"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidArgumentError("no"), api.BadRequestError),
        (UnauthenticatedError("no"), api.AuthenticationError),
        (PermissionDeniedError("no"), api.PermissionDeniedError),
        (NotFoundError("no"), api.NotFoundError),
        (ResourceExhaustedError("no"), api.RateLimitError),
        (InternalError("no"), api.InternalServerError),
        (UnavailableError("no"), api.InternalServerError),
        (DeadlineExceededError("no"), api.InternalServerError),
    ],
)
async def test_errors(
    anthropic: AsyncAnthropic, chat: FakeChat, error: SageLLMError, kind: type[api.APIStatusError]
) -> None:
    chat.pieces = [error]
    with pytest.raises(kind) as caught:
        await anthropic.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.status_code == error.http_status
    assert caught.value.body["type"] == "error"  # type: ignore[index,call-overload]
    assert caught.value.body["error"]["message"] == "no"  # type: ignore[index,call-overload]
    assert caught.value.request_id == chat.callers[-1].request_id


async def test_count_tokens(anthropic: AsyncAnthropic) -> None:
    count = await anthropic.messages.count_tokens(
        model="m",
        system="Be kind.",
        messages=[{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert count.input_tokens == 6  # the fake counts words
    with pytest.raises(api.BadRequestError, match="max_tokens"):
        await anthropic.messages.count_tokens(model="m", messages=HI, extra_body={"max_tokens": 1})  # type: ignore[arg-type]
    with pytest.raises(api.NotFoundError):
        await anthropic.messages.count_tokens(model="nobody", messages=HI)  # type: ignore[arg-type]


async def test_models(anthropic: AsyncAnthropic, client: httpx.AsyncClient) -> None:
    (model,) = [model async for model in anthropic.models.list()]
    assert (model.type, model.id, model.display_name, model.max_input_tokens) == ("model", "m", "m", 64)
    assert (await anthropic.models.retrieve("m")) == model
    assert model.created_at.tzinfo is not None
    assert (await client.get("/v1/models")).json()["object"] == "list"


@pytest.mark.parametrize("path", ["/v1/models/nobody", "/v1/files"])
async def test_on_shared_paths_errors_have_the_form_of_the_client(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path, headers={"anthropic-version": "2023-06-01", "x-request-id": "mine"})
    assert answer.status_code == 404
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", "not_found_error")
    assert answer.headers["request-id"] == "mine"
    plain = await client.get(path)
    assert plain.json()["error"]["code"] == "not_found"
    assert "request-id" not in plain.headers


async def test_a_conversation_that_the_server_should_keep_is_refused_by_its_code(
    client: httpx.AsyncClient, chat: FakeChat
) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": HI, "thread": {"type": "create"}}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert (await client.post(PATH, json={**body, "thread": None})).status_code == 200
    assert len(chat.calls) == 1


async def test_an_error_in_a_stream(anthropic: AsyncAnthropic, chat: FakeChat) -> None:
    chat.pieces = [AnswerStart(7), TextPiece(0, "Hal"), InternalError("the engine broke")]
    stream = await anthropic.messages.create(model="m", max_tokens=5, messages=HI, stream=True)  # type: ignore[arg-type]
    with pytest.raises(api.APIStatusError, match="the engine broke"):
        [event async for event in stream]


# ---- events and answers -------------------------------------------------------------------------------


async def test_the_events_of_a_stream(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = rich_answer()
    events = await events_of(client, thinking=THINK, max_tokens=2000)
    assert [(event["type"], event.get("index")) for event in events] == [
        ("message_start", None),
        ("ping", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3),
        ("content_block_delta", 3),
        ("content_block_stop", 3),
        ("message_delta", None),
        ("message_stop", None),
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 7)
    assert events[3]["delta"] == {"type": "thinking_delta", "thinking": "let me "}
    assert events[6]["content_block"] == {"type": "text", "text": ""}
    assert events[7]["delta"] == {"type": "text_delta", "text": "Look"}
    assert events[10]["content_block"] == {"type": "tool_use", "id": "call_a", "name": "weather", "input": {}}
    assert events[11]["delta"] == {"type": "input_json_delta", "partial_json": '{"city":'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 5


async def test_a_long_wait_is_bridged_by_pings(
    app: Gateway, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = asyncio.Event()

    class Slow(FakeChat):
        async def stream(self, call: Any, caller: Any) -> Any:
            yield AnswerStart(7)
            await goes_on.wait()
            for piece in text_answer("Hello")[1:]:
                yield piece

    monkeypatch.setattr(PingedEvents, "interval_s", 0.02)
    app.chat = Slow()  # type: ignore[assignment]
    caller = LeavingClient(app, PATH, {"model": "m", "max_tokens": 5, "messages": HI, "stream": True})
    await until(lambda: sum(b"event: ping" in message.get("body", b"") for message in caller.sent) >= 3)
    goes_on.set()
    await caller.done
    text = b"".join(message.get("body", b"") for message in caller.sent).decode()
    kinds = [event["type"] for event in named_events_in(text)]
    assert kinds[0] == "message_start"
    assert kinds.count("ping") >= 3
    assert kinds[-5:] == [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, {"type": "adaptive", "display": "omitted"}])
async def test_thinking_is_shown_only_to_who_asked(client: httpx.AsyncClient, chat: FakeChat, thinking: Any) -> None:
    chat.pieces = rich_answer()
    events = await events_of(client, thinking=thinking)
    blocks = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert blocks == ["text", "tool_use", "tool_use"]
    whole = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI, "thinking": thinking})
    assert [block["type"] for block in whole.json()["content"]] == blocks


@pytest.mark.parametrize(
    ("finish", "stop", "max_tokens", "expected"),
    [
        ("stop", None, 5, ("end_turn", None)),
        ("stop", "END", 5, ("stop_sequence", "END")),
        ("stop", "\nUser:", 5, ("end_turn", None)),  # the plain chat form's own
        ("length", None, 5, ("max_tokens", None)),
        ("length", None, 6, ("model_context_window_exceeded", None)),
        ("tool_calls", None, 5, ("tool_use", None)),
        ("content_filter", None, 5, ("refusal", None)),
    ],
)
async def test_stop_reasons(
    client: httpx.AsyncClient, chat: FakeChat, finish: str, stop: str | None, max_tokens: int, expected: Any
) -> None:
    chat.pieces = list(text_answer("x", finish_reason=finish, stop_reason=stop))
    fields = {"max_tokens": max_tokens, "stop_sequences": ["END"]}
    whole = (await client.post(PATH, json={"model": "m", "messages": HI, **fields})).json()
    delta = (await events_of(client, **fields))[-2]["delta"]
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert (delta["stop_reason"], delta["stop_sequence"]) == expected


@pytest.mark.parametrize("finish", ["stop", "tool_calls"])  # a chat's answer to a named function says `stop`
async def test_whoever_calls_stops_for_it(client: httpx.AsyncClient, chat: FakeChat, finish: str) -> None:
    chat.pieces = rich_answer(finish)
    fields = {"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "clock"}}
    whole = (await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI, **fields})).json()
    delta = (await events_of(client, **fields))[-2]["delta"]
    assert (whole["stop_reason"], delta["stop_reason"]) == ("tool_use", "tool_use")


async def test_arguments_that_were_cut_off(client: httpx.AsyncClient, chat: FakeChat) -> None:
    for text, expected in (('{"city": "Par', {"city": "Par"}), ("Paris", {"INVALID_JSON": "Paris"}), ("", {})):
        call = ToolCallPiece(0, 0, text, id="c", name="weather")
        chat.pieces = [AnswerStart(7), call, *answer_end("length")]
        whole = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI})
        assert whole.json()["content"][0]["input"] == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_off_is_an_error(client: httpx.AsyncClient, chat: FakeChat, stream: bool) -> None:
    chat.pieces = list(text_answer("Hal", finish_reason="abort"))
    if stream:
        error = (await events_of(client))[-1]
    else:
        answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI})
        assert answer.status_code == 503
        error = answer.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "overloaded_error"
    assert "cut off" in error["error"]["message"]


# ---- requests -----------------------------------------------------------------------------------------


async def test_the_last_message_may_begin_the_answer(client: httpx.AsyncClient, chat: FakeChat) -> None:
    messages = [*HI, {"role": "assistant", "content": "I say"}]
    answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": messages})
    assert answer.status_code == 200
    assert chat.calls[-1].chat_template_kwargs == {
        "enable_thinking": False,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


async def test_what_claude_code_sends(client: httpx.AsyncClient, chat: FakeChat) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    client_mark = "x-anthropic-billing-header: cc_version=2.1.197.1c7; cc_entrypoint=sdk-cli;"
    body = {
        "model": "m",
        "max_tokens": 32_000,
        "system": [{"type": "text", "text": client_mark}, {"type": "text", "text": "You are an agent.", **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **cached}]}],
        "tools": [{**WEATHER, "eager_input_streaming": True}],
        "metadata": {"user_id": '{"session_id":"1"}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }
    answer = await client.post(PATH, params={"beta": "true"}, json=body, headers={"anthropic-beta": "none-1,none-2"})
    assert answer.status_code == 200, answer.text
    # The mark differs from conversation to conversation; the rest is the prefix that they share.
    assert chat.sent == [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": "hi"}]
    call = chat.calls[-1]
    # The effort is a hint to templates that know one: no model is refused because of it.
    assert call.reasoning_effort is None
    assert call.chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "high"}
    del body["max_tokens"], body["metadata"]
    count = await client.post(f"{PATH}/count_tokens", params={"beta": "true"}, json=body)
    assert count.json() == {"input_tokens": 5}


async def test_messages_of_one_role_are_one(client: httpx.AsyncClient, chat: FakeChat) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "I"},
        {"role": "assistant", "content": "say"},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "noon"}]},
        {"role": "user", "content": "three"},
        {"role": "user", "content": ""},
    ]
    answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert [(message["role"], message["content"]) for message in chat.sent] == [
        ("user", "one\n\ntwo"),
        ("assistant", "I\n\nsay"),
        ("assistant", "so"),
        ("tool", "noon"),
        ("user", "three"),
    ]


async def test_instructions_amid_a_conversation_reach_any_template(client: httpx.AsyncClient, chat: FakeChat) -> None:
    """gpt-oss's and SmolLM3's forget them, Mistral's refuses them."""
    later = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for first, asked in (({"system": "Be kind."}, [later, *HI, later]), ({}, [{**later, "content": "Be kind."}, *HI])):
        answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": asked, **first})
        assert answer.status_code == 200, answer.text
    assert chat.sent == [{"role": "system", "content": "Be kind."}, *HI]
    assert [message.to_template() for message in chat.calls[0].messages] == [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        {"role": "user", "content": "hi\n\n<system-reminder>\nBe brief.\n</system-reminder>"},
    ]


async def test_the_older_name_of_a_format(client: httpx.AsyncClient, chat: FakeChat) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_format": form}, {"output_format": form, "output_config": {"effort": "low"}}):
        answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI, **fields})
        assert answer.status_code == 200, answer.text
        wanted = chat.calls[-1].response_format
        assert wanted is not None
        assert wanted.json_schema is not None
        assert wanted.json_schema.json_schema == {"type": "object"}


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", True),
        ({"type": "tool", "name": "clock"}, "clock", None),
    ],
)
async def test_tool_choice(
    client: httpx.AsyncClient, chat: FakeChat, choice: Any, expected: str, parallel: bool | None
) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": HI, "tools": [WEATHER, CLOCK], "tool_choice": choice}
    assert (await client.post(PATH, json=body)).status_code == 200
    call = chat.calls[-1]
    assert expected == (call.tool_choice if isinstance(call.tool_choice, str) else call.tool_choice.function.name)  # type: ignore[union-attr]
    assert call.parallel_tool_calls is parallel


async def test_no_tool_may_be_called(client: httpx.AsyncClient, chat: FakeChat) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": HI, "tools": [CLOCK], "tool_choice": {"type": "none"}}
    assert (await client.post(PATH, json=body)).status_code == 200
    assert chat.calls[-1].tools is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "content[0]"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]}
                ]
            },
            "last message",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"container": "c"}, "container"),
    ],
)
async def test_what_is_wrong_or_not_done_is_refused_by_name(
    client: httpx.AsyncClient, chat: FakeChat, fields: dict[str, Any], named: str
) -> None:
    answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI, **fields})
    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    assert not chat.calls


async def test_what_fails_before_a_route_is_told_in_this_form_too(client: httpx.AsyncClient) -> None:
    for answer in (await client.get(PATH), await client.post(f"{PATH}/no/such"), await client.post(PATH, content=b"{")):
        assert answer.json()["type"] == "error"
    bad_header = await client.post(PATH, json={}, headers={"x-priority": "now"})
    assert bad_header.json()["error"]["type"] == "invalid_request_error"


async def test_what_is_not_built_is_no_reason_to_try_again(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = [UnsupportedError("not here")]
    answer = await client.post(PATH, json={"model": "m", "max_tokens": 5, "messages": HI})
    assert answer.status_code == 400
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "invalid_request_error"
