"""`/v1/responses`, with OpenAI's own client and with plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from pydantic import BaseModel

from asgi_client import LeavingClient, client_of, named_events_in
from fake_chat import FakeChat, answer_end, rich_answer, text_answer
from live_server import serving
from sagellm_gateway.app import Gateway
from sagellm_gateway.pieces import AnswerStart, ReasoningPiece, TextPiece
from sagellm_gateway.responses.store import ResponseStore, StoredResponse
from sagellm_protocol import InternalError, InvalidArgumentError, ResourceExhaustedError, TokenLogprob, TopLogprob
from sagellm_protocol import NotFoundError as SageNotFoundError
from sagellm_protocol.openai import ChatCompletionRequest
from waiting import until

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": None}


@pytest.fixture
async def openai(app: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with serving(app) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


async def events_of(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await client.post(PATH, json={"model": "m", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    events = named_events_in(answer.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


# ---- OpenAI's client ----------------------------------------------------------------------------------


async def test_create(openai: AsyncOpenAI, chat: FakeChat) -> None:
    response = await openai.responses.create(
        model="m",
        input="hi",
        instructions="Be kind.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=9,
        metadata={"a": "b"},
        reasoning={"effort": "low", "summary": "auto"},
    )
    assert response.output_text == "Hello there"
    assert response.status == "completed"
    assert response.instructions == "Be kind."
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 5, 12)
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert chat.sent == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    call = chat.calls[-1]
    assert (call.temperature, call.top_p, call.max_completion_tokens, call.reasoning_effort) == (0.5, 0.9, 9, "low")
    assert call.stream is False


async def test_stream(openai: AsyncOpenAI) -> None:
    kinds, text = [], ""
    async with openai.responses.stream(model="m", input="hi") as stream:
        async for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = await stream.get_final_response()
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert text == final.output_text == "Hello there"
    assert (await openai.responses.retrieve(final.id)).output_text == text


class City(BaseModel):
    name: str
    people: int


async def test_parse(openai: AsyncOpenAI, chat: FakeChat) -> None:
    chat.pieces = list(text_answer('{"name": "Paris", ', '"people": 2}'))
    response = await openai.responses.parse(model="m", input="hi", text_format=City)
    assert response.output_parsed == City(name="Paris", people=2)
    wanted = chat.calls[-1].response_format
    assert wanted is not None
    assert wanted.type == "json_schema"
    assert wanted.json_schema is not None
    assert (wanted.json_schema.name, wanted.json_schema.strict) == ("City", True)
    assert wanted.json_schema.json_schema["required"] == ["name", "people"]


async def test_tools_and_their_results(openai: AsyncOpenAI, chat: FakeChat) -> None:
    chat.pieces = rich_answer()
    response = await openai.responses.create(model="m", input="weather?", tools=[WEATHER, CLOCK])  # type: ignore[list-item]
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    call = response.output[2]
    assert call.type == "function_call"
    assert (call.call_id, call.name, json.loads(call.arguments)) == ("call_a", "weather", {"city": "Paris"})
    tools = chat.calls[-1].tools
    assert tools is not None
    assert [tool.function.name for tool in tools] == ["weather", "clock"]
    assert tools[0].function.strict is True
    chat.pieces = list(text_answer("Sunny."))
    # The whole answer goes back as it came, with the results behind it.
    items: list[Any] = [{"role": "user", "content": "weather?"}, *(item.model_dump() for item in response.output)]
    items += [
        {"type": "function_call_output", "call_id": "call_a", "output": "sun"},
        {"type": "function_call_output", "call_id": "call_b", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    await openai.responses.create(model="m", input=items, store=False)
    by_hand = chat.sent
    # As does it by reference.
    await openai.responses.create(model="m", input=items[-2:], previous_response_id=response.id)
    assert chat.sent == by_hand
    assert [message["role"] for message in by_hand] == ["user", "assistant", "tool", "tool"]
    assert by_hand[1]["content"] == "Looking."
    assert by_hand[1]["reasoning_content"] == "let me think"
    assert [call["id"] for call in by_hand[1]["tool_calls"]] == ["call_a", "call_b"]
    assert by_hand[3] == {"role": "tool", "content": "noon", "tool_call_id": "call_b"}


async def test_a_conversation_by_previous_response_id(openai: AsyncOpenAI, chat: FakeChat) -> None:
    first = await openai.responses.create(model="m", input="one", instructions="first")
    second = await openai.responses.create(model="m", input="two", previous_response_id=first.id)
    await openai.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        await openai.responses.retrieve(first.id)
    with pytest.raises(BadRequestError, match="previous_response_id"):
        await openai.responses.create(model="m", input="two", previous_response_id=first.id)
    third = await openai.responses.create(model="m", input="three", previous_response_id=second.id, instructions="x")
    assert third.previous_response_id == second.id
    contents = [message["content"] for message in chat.sent]
    # Instructions are not carried over.
    assert contents == ["x", "one", "Hello there", "two", "Hello there", "three"]


async def test_input_items(openai: AsyncOpenAI) -> None:
    texts = [f"t{number}" for number in range(5)]
    response = await openai.responses.create(model="m", input=[{"role": "user", "content": text} for text in texts])
    page = await openai.responses.input_items.list(response.id, limit=2, order="asc")
    assert page.has_more is True  # type: ignore[attr-defined]
    assert [item.content[0].text async for item in page] == texts  # type: ignore[union-attr]
    latest = await openai.responses.input_items.list(response.id)
    assert latest.data[0].content[0].text == "t4"  # type: ignore[union-attr]
    with pytest.raises(BadRequestError, match="after"):
        await openai.responses.input_items.list(response.id, after="msg_nobody")


async def test_a_failed_stream_ends_with_its_error(openai: AsyncOpenAI, chat: FakeChat) -> None:
    chat.pieces = [AnswerStart(7), TextPiece(0, "Hal"), InternalError("the engine broke")]
    events = [event async for event in await openai.responses.create(model="m", input="hi", stream=True)]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "the engine broke")
    assert last.response.output[0].status == "incomplete"  # type: ignore[union-attr]


# ---- events -------------------------------------------------------------------------------------------


async def test_the_events_of_reasoning_text_and_calls(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = rich_answer()
    events = await events_of(client, {"input": "hi"})
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == [0] * 7 + [1] * 7 + [2] * 5 + [3] * 4
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "let me think"}]
    assert events[19]["arguments"] == '{"city":"Paris"}'
    whole = (await client.post(PATH, json={"model": "m", "input": "hi"})).json()
    assert [without_ids(item) for item in whole["output"]] == [without_ids(item) for item in done]


@pytest.mark.parametrize("asked", [{"summary": "auto"}, {"summary": "detailed"}, {"generate_summary": "detailed"}])
async def test_who_asks_for_a_summary_gets_the_reasoning_as_one(
    client: httpx.AsyncClient, chat: FakeChat, asked: dict[str, str]
) -> None:
    chat.pieces = rich_answer()
    events = await events_of(client, {"input": "hi", "reasoning": asked})
    of_reasoning = [event for event in events if event.get("output_index") == 0]
    assert [event["type"].removeprefix("response.") for event in of_reasoning] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert all(event["summary_index"] == 0 and "content_index" not in event for event in of_reasoning[1:-1])
    assert of_reasoning[4]["text"] == "let me think"
    item = of_reasoning[-1]["item"]
    part = {"type": "summary_text", "text": "let me think"}
    assert (item["summary"], item["content"], of_reasoning[5]["part"]) == ([part], [], part)
    whole = (await client.post(PATH, json={"model": "m", "input": "hi", "reasoning": asked})).json()
    assert without_ids(whole["output"][0]) == without_ids(item)
    assert whole["reasoning"]["summary"] == "detailed"
    # It goes back to the model as the reasoning that it is.
    await client.post(PATH, json={"model": "m", "input": "on", "previous_response_id": whole["id"]})
    assert chat.sent[1]["reasoning_content"] == "let me think"


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "id"}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_short_says_so(client: httpx.AsyncClient, chat: FakeChat, stream: bool) -> None:
    chat.pieces = list(text_answer("Hal", finish_reason="length"))
    if stream:
        last = (await events_of(client, {"input": "hi"}))[-1]
        assert last["type"] == "response.incomplete"
        response = last["response"]
    else:
        response = (await client.post(PATH, json={"model": "m", "input": "hi"})).json()
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None


async def test_only_the_last_item_was_cut_short(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = rich_answer("length")
    streamed = (await events_of(client, {"input": "hi"}))[-1]["response"]["output"]
    whole = (await client.post(PATH, json={"model": "m", "input": "hi"})).json()["output"]
    assert [item["status"] for item in whole] == ["completed"] * 3 + ["incomplete"]
    assert [without_ids(item) for item in streamed] == [without_ids(item) for item in whole]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_off_is_an_error(client: httpx.AsyncClient, chat: FakeChat, stream: bool) -> None:
    chat.pieces = list(text_answer("Hal", finish_reason="abort"))
    if stream:
        last = (await events_of(client, {"input": "hi"}))[-1]
        assert last["type"] == "response.failed"
        assert "cut off" in last["response"]["error"]["message"]
    else:
        answer = await client.post(PATH, json={"model": "m", "input": "hi"})
        assert answer.status_code == 503
        assert "cut off" in answer.json()["error"]["message"]


@pytest.mark.parametrize("error", [InvalidArgumentError("no", field="messages"), ResourceExhaustedError("full")])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_early_error_is_a_status(
    client: httpx.AsyncClient, chat: FakeChat, stream: bool, error: InvalidArgumentError | ResourceExhaustedError
) -> None:
    chat.pieces = [error]
    answer = await client.post(PATH, json={"model": "m", "input": "hi", "stream": stream})
    assert answer.status_code == error.http_status
    assert answer.json()["error"]["message"] == error.message


async def test_logprobs(client: httpx.AsyncClient, chat: FakeChat) -> None:
    row = TokenLogprob(token_id=1, logprob=-0.5, token="é", top=[TopLogprob(token_id=1, logprob=-0.5, token="é")])
    chat.pieces = [AnswerStart(7), TextPiece(0, "", [row]), TextPiece(0, "é", [row]), *answer_end()]
    expected = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    expected = {**expected, "top_logprobs": [expected]}
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    events = await events_of(client, body)
    assert chat.calls[-1].logprobs is True
    assert chat.calls[-1].top_logprobs == 3
    assert events[4]["logprobs"] == [expected]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [expected] * 2
    whole = (await client.post(PATH, json={"model": "m", **body})).json()
    assert whole["output"][0]["content"][0]["logprobs"] == [expected] * 2


async def test_a_client_that_leaves_closes_the_answer(app: Gateway, chat: FakeChat) -> None:
    class Endless(FakeChat):
        async def stream(self, call: Any, caller: Any) -> Any:
            try:
                yield AnswerStart(7)
                while True:
                    await asyncio.sleep(0)
                    yield ReasoningPiece(0, "hm ")
            finally:
                self.num_closed += 1

    app.chat = endless = Endless()  # type: ignore[assignment]
    async with client_of(app):
        leaving = LeavingClient(app, PATH, {"model": "m", "input": "hi", "stream": True})
        await until(lambda: len(leaving.sent) > 3)
        leaving.leave()
        await leaving.done
        assert endless.num_closed == 1


# ---- requests -----------------------------------------------------------------------------------------


async def test_turns_become_messages(client: httpx.AsyncClient, chat: FakeChat) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "xyz"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": "Well."},
        {"role": "system", "content": "late"},
    ]
    answer = await client.post(PATH, json={"model": "m", "input": items, "instructions": "Be kind."})
    assert answer.status_code == 200, answer.text
    assert chat.sent[0] == {"role": "system", "content": "Be kind.\n\nBe brief."}
    assert chat.sent[1] == {"role": "user", "content": "ab"}
    assert chat.sent[2]["reasoning_content"] == "hm"
    assert [message["role"] for message in chat.sent[2:]] == ["assistant", "tool", "assistant", "assistant", "system"]
    assert chat.sent[4]["tool_calls"][0]["id"] == "c2"
    assert chat.sent[5] == {"role": "assistant", "content": "Well."}


async def test_sampling_beyond_openais_reaches_the_model(client: httpx.AsyncClient, chat: FakeChat) -> None:
    fields: dict[str, Any] = {
        "top_k": 20,
        "min_p": 0.1,
        "seed": 3,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop": ["x"],
        "stop_token_ids": [5],
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": 1},
        "priority": 0,
        "cache_salt": "s",
        "chat_template_kwargs": {"a": 1},
    }
    answer = await client.post(PATH, json={"model": "m", "input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    (call,) = chat.calls
    plain = ChatCompletionRequest(model="m", messages=call.messages, **fields)
    assert {name: getattr(call, name) for name in fields} == {name: getattr(plain, name) for name in fields}
    # Those that load generators send without asking for anything.
    answer = await client.post(PATH, json={"model": "m", "input": "hi", "stop": None, "ignore_eos": None})
    assert answer.status_code == 200, answer.text


async def test_items_may_be_referred_to(client: httpx.AsyncClient, chat: FakeChat) -> None:
    first = (await client.post(PATH, json={"model": "m", "input": "one"})).json()
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    items = [{"role": "user", "content": "one"}, reference, {"role": "user", "content": "two"}]
    await client.post(PATH, json={"model": "m", "input": items})
    assert [message["content"] for message in chat.sent] == ["one", "Hello there", "two"]
    answer = await client.post(PATH, json={"model": "m", "input": [{"type": "item_reference", "id": "msg_x"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input[0].id"


@pytest.mark.parametrize(
    ("choice", "names", "expected"),
    [
        ("none", ["weather", "clock"], "none"),
        ("required", ["weather", "clock"], "required"),
        ({"type": "function", "name": "clock"}, ["weather", "clock"], "clock"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]},
            ["clock"],
            "required",
        ),
    ],
)
async def test_tool_choice(
    client: httpx.AsyncClient, chat: FakeChat, choice: Any, names: list[str], expected: str
) -> None:
    body = {"model": "m", "input": "hi", "tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": False}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    call = chat.calls[-1]
    assert [tool.function.name for tool in call.tools or ()] == names
    assert expected == (call.tool_choice if isinstance(call.tool_choice, str) else call.tool_choice.function.name)  # type: ignore[union-attr]
    assert call.parallel_tool_calls is False
    assert answer.json()["tool_choice"] == choice
    assert answer.json()["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0].type"),
        ({"input": [{"type": "computer_call"}]}, 400, "input[0].type"),
        ({"input": [{"role": "nobody", "content": "x"}]}, 400, "input[0].role"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, 400, "text.format.name"),
        ({"text": {"verbosity": "low"}}, 400, "text.verbosity"),
        ({"reasoning": {"summary": "concise"}}, 400, "reasoning.summary"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"prompt": {"id": "p"}}, 400, "prompt"),
        ({"include": ["everything"]}, 400, "include[0]"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata[a]"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"max_tokens": 3}, 400, "max_tokens"),
    ],
)
async def test_what_is_wrong_or_not_done_is_refused_by_name(
    client: httpx.AsyncClient, chat: FakeChat, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = await client.post(PATH, json={"model": "m", "input": "hi", **fields})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert not chat.calls


async def test_what_is_not_stored_cannot_be_read(client: httpx.AsyncClient) -> None:
    first = (await client.post(PATH, json={"model": "m", "input": "hi", "store": False})).json()
    assert first["store"] is False
    for call in (client.get, client.delete):
        answer = await call(f"{PATH}/{first['id']}")
        assert answer.status_code == 404
        assert "store=false" in answer.json()["error"]["message"]
    stored = (await client.post(PATH, json={"model": "m", "input": "hi"})).json()
    assert (await client.get(f"{PATH}/{stored['id']}")).json() == stored
    assert (await client.get(f"{PATH}/{stored['id']}?stream=true")).status_code == 400
    assert (await client.get(f"{PATH}/{stored['id']}/input_items?limit=101")).status_code == 400


# ---- the store ----------------------------------------------------------------------------------------


def stored(name: str, *, size: int = 10, at: float = 0.0) -> StoredResponse:
    return StoredResponse(name, b"x" * size, b"", b"", b"", frozenset({f"item-{name}"}), at)


def test_the_store_is_bounded_by_number_bytes_and_age() -> None:
    time = 0.0
    store = ResponseStore(max_count=3, max_bytes=100, max_age_s=60, clock=lambda: time)
    for name in "abcd":
        store.put("key", stored(name))
    assert known(store, "key", "abcd") == "bcd"
    store.put("key", stored("e", size=85))
    assert known(store, "key", "bcde") == "de"
    store.put("key", stored("f", size=101))
    assert known(store, "key", "def") == "de"
    time = 61.0
    assert known(store, "key", "de") == ""


def test_a_key_sees_and_pushes_out_only_its_own_responses() -> None:
    store = ResponseStore(max_count=2)
    store.put("ada", stored("a", at=store.now()))
    for name in "bcd":
        store.put("bob", stored(name, at=store.now()))
    assert known(store, "ada", "abcd") == "a"
    assert known(store, "bob", "abcd") == "cd"
    assert store.find_item("bob", "item-a") is None
    assert store.find_item("ada", "item-a") is not None
    with pytest.raises(SageNotFoundError):
        store.delete("bob", "a")
    store.delete("ada", "a")
    assert known(store, "ada", "a") == ""


def known(store: ResponseStore, owner: str, names: str) -> str:
    found = ""
    for name in names:
        try:
            found += store.get(owner, name).id
        except SageNotFoundError:
            continue
    return found
