"""`/api/...`, with Ollama's own client and with plain HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ollama import AsyncClient, ResponseError
from pydantic import BaseModel

from fake_chat import METRICS, FakeChat, answer_end, rich_answer, text_answer
from fake_engine import FakeEngine
from live_server import serving
from sagellm_gateway.app import Gateway
from sagellm_gateway.pieces import AnswerEnd, AnswerStart, ChoiceEnd, TextPiece
from sagellm_protocol import (
    InternalError,
    ResourceExhaustedError,
    Timestamps,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from sagellm_protocol.fields import MAX_INT32

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def chat_template() -> str | None:
    return None


@pytest.fixture
def engine(chat_template: str | None) -> FakeEngine:
    engine = FakeEngine(max_model_len=64)
    engine.chat_template = chat_template
    return engine


@pytest.fixture
async def ollama(app: Gateway) -> AsyncIterator[AsyncClient]:
    async with serving(app) as url, AsyncClient(host=url, trust_env=False) as ollama:
        yield ollama


async def lines_of(client: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    answer = await client.post(path, json={"model": "m", **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


# ---- Ollama's client ----------------------------------------------------------------------------------


async def test_chat(ollama: AsyncClient, chat: FakeChat) -> None:
    answer = await ollama.chat(
        model="m:latest",
        messages=[{"role": "system", "content": "Be kind."}, *HI],
        options={
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.9,
            "num_predict": 9,
            "seed": 3,
            "stop": ["END"],
            "num_gpu": 1,
        },
        keep_alive="5m",
    )
    assert answer.message.content == "Hello there"
    assert answer.message.role == "assistant"
    assert (answer.model, answer.done, answer.done_reason) == ("m:latest", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (7, 5)
    assert (answer.prompt_eval_duration, answer.eval_duration) == (20_000_000, 40_000_000)
    assert answer.total_duration == 70_000_000
    assert chat.sent == [{"role": "system", "content": "Be kind."}, *HI]
    call = chat.calls[-1]
    assert call.model == "m"
    assert (call.temperature, call.top_k, call.top_p, call.max_completion_tokens) == (0.5, 4, 0.9, 9)
    assert (call.seed, call.stop, call.stream) == (3, ("END",), False)


async def test_a_chat_stream(ollama: AsyncClient) -> None:
    parts = [part async for part in await ollama.chat(model="m", messages=HI, stream=True)]
    assert [part.message.content for part in parts] == ["Hello", " there", ""]
    assert [part.done for part in parts] == [False, False, True]
    assert parts[-1].done_reason == "stop"
    assert parts[-1].eval_count == 5


async def test_generate(ollama: AsyncClient, chat: FakeChat) -> None:
    answer = await ollama.generate(model="m", prompt="hi", system="Be kind.")
    assert answer.response == "Hello there"
    assert answer.eval_count == 5
    assert chat.sent == [{"role": "system", "content": "Be kind."}, *HI]
    parts = [part.response async for part in await ollama.generate(model="m", prompt="hi", stream=True)]
    assert parts == ["Hello", " there", ""]


def weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: Its name.
    """
    return f"sun in {city}"


@pytest.mark.parametrize("chat_template", ["{{ enable_thinking }}"])
@pytest.mark.parametrize("stream", [False, True])
async def test_tools_and_thinking(ollama: AsyncClient, chat: FakeChat, stream: bool) -> None:
    chat.pieces = rich_answer()
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    ask: dict[str, Any] = {"model": "m", "messages": messages, "tools": [weather], "think": True}
    if stream:
        parts = [part async for part in await ollama.chat(**ask, stream=True)]
        assert [part.message.thinking for part in parts[:2]] == ["let me ", "think"]
        assert "".join(part.message.content or "" for part in parts) == "Looking."
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        assert parts[-1].done_reason == "stop"
        messages.append({"role": "assistant", "content": "Looking.", "tool_calls": calls})
    else:
        answer = await ollama.chat(**ask)
        assert answer.message.thinking == "let me think"
        calls = list(answer.message.tool_calls or ())
        messages.append(answer.message)
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert chat.calls[-1].chat_template_kwargs == {"enable_thinking": True}
    tools = chat.calls[-1].tools
    assert tools is not None
    assert tools[0].function.parameters is not None
    assert tools[0].function.parameters["required"] == ["city"]
    # The answer goes back as it came, with results that know only names.
    messages += [
        {"role": "tool", "tool_name": "clock", "content": "noon"},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "more"},
    ]
    await ollama.chat(model="m", messages=messages)
    back = chat.sent
    ids = [call["id"] for call in back[1]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [message["tool_call_id"] for message in back[2:]] == [ids[1], ids[0], "call_unknown"]
    assert back[2]["name"] == "clock"


class City(BaseModel):
    name: str


async def test_format(ollama: AsyncClient, chat: FakeChat) -> None:
    chat.pieces = list(text_answer('{"name": "Paris"}'))
    answer = await ollama.chat(model="m", messages=HI, format=City.model_json_schema())
    assert City.model_validate_json(answer.message.content or "") == City(name="Paris")
    wanted = chat.calls[-1].response_format
    assert wanted is not None
    assert wanted.json_schema is not None
    assert wanted.json_schema.json_schema["required"] == ["name"]
    await ollama.generate(model="m", prompt="hi", format="json")
    assert chat.calls[-1].response_format is not None
    assert chat.calls[-1].response_format.type == "json_object"
    await ollama.generate(model="m", prompt="hi", format="")
    assert chat.calls[-1].response_format is None


async def test_pull_tells_of_served_models_only(ollama: AsyncClient) -> None:
    assert (await ollama.pull("m")).status == "success"
    assert [part.status async for part in await ollama.pull("m:latest", stream=True)] == ["success"]
    with pytest.raises(ResponseError, match="sage-llm serve --model llama3") as caught:
        await ollama.pull("llama3")
    assert caught.value.status_code == 404


async def test_what_is_served(ollama: AsyncClient) -> None:
    (listed,) = (await ollama.list()).models
    (running,) = (await ollama.ps()).models
    assert (listed.model, running.model, running.name) == ("m:latest", "m:latest", "m:latest")
    assert listed.digest == running.digest
    assert len(listed.digest or "") == 64
    assert (running.context_length, running.size_vram) == (64, 0)
    assert running.expires_at is not None
    assert listed.modified_at is not None
    shown = await ollama.show("m:latest")
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.parameter_count"] == 0
    assert shown.details == listed.details
    with pytest.raises(ResponseError, match="not found"):
        await ollama.show("llama3")


async def test_embed(ollama: AsyncClient) -> None:
    made = await ollama.embed(model="m:latest", input=["one", "two words"])
    assert made.embeddings == [[1.0, 0.5, 0.25, 0.125], [2.0, 0.5, 0.25, 0.125]]
    assert (made.model, made.prompt_eval_count) == ("m:latest", 3)
    assert made.total_duration is not None
    assert made.total_duration > 0
    short = await ollama.embed(model="m", input="one", dimensions=2, truncate=False)
    assert short.embeddings == [[1.0, 0.5]]
    assert (await ollama.embeddings(model="m", prompt="one")).embedding == [1.0, 0.5, 0.25, 0.125]
    with pytest.raises(ResponseError, match=r"input\[1\] is refused"):
        await ollama.embed(model="m", input=["one", "refuse"])


async def test_an_unknown_model(ollama: AsyncClient) -> None:
    with pytest.raises(ResponseError, match="not found") as caught:
        await ollama.chat(model="llama3", messages=HI)
    assert caught.value.status_code == 404


async def test_an_error_in_a_stream(ollama: AsyncClient, chat: FakeChat) -> None:
    chat.pieces = [AnswerStart(7), TextPiece(0, "Hal"), InternalError("the engine broke")]
    with pytest.raises(ResponseError, match="the engine broke"):
        [part async for part in await ollama.chat(model="m", messages=HI, stream=True)]


# ---- answers ------------------------------------------------------------------------------------------


async def test_answers_are_streamed_unless_told_otherwise(client: httpx.AsyncClient) -> None:
    lines = await lines_of(client, "/api/chat", messages=HI)
    assert list(lines[0]) == ["model", "created_at", "message", "done"]
    assert lines[0]["message"] == {"role": "assistant", "content": "Hello"}
    assert lines[0]["created_at"].endswith("Z")
    assert list(lines[-1]) == [
        "model",
        "created_at",
        "message",
        "done",
        "done_reason",
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
    ]
    assert (await lines_of(client, "/api/generate", prompt="hi"))[0]["response"] == "Hello"
    whole = await client.post("/api/chat", json={"model": "m", "messages": HI, "stream": False})
    assert whole.headers["content-type"] == "application/json"


async def test_the_whole_time_is_the_requests_own(client: httpx.AsyncClient, chat: FakeChat) -> None:
    metrics = METRICS.model_copy(update={"timestamps": Timestamps(queued_at=1.0, completed_at=1.5)})
    chat.pieces = [AnswerStart(7), ChoiceEnd(0, "length"), AnswerEnd(Usage(), metrics)]
    (last,) = await lines_of(client, "/api/chat", messages=HI)
    assert (last["total_duration"], last["done_reason"]) == (500_000_000, "length")


async def test_thinking_is_hidden_from_who_declines_it(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = rich_answer()
    lines = await lines_of(client, "/api/chat", messages=HI, think=False)
    assert all("thinking" not in line["message"] for line in lines)
    assert chat.calls[-1].chat_template_kwargs == {"enable_thinking": False}
    whole = await client.post("/api/generate", json={"model": "m", "prompt": "hi", "stream": False, "think": "high"})
    assert whole.json()["thinking"] == "let me think"
    assert chat.calls[-1].reasoning_effort == "high"


async def test_logprobs(client: httpx.AsyncClient, chat: FakeChat) -> None:
    row = TokenLogprob(token_id=1, logprob=-0.5, token="é", top=[TopLogprob(token_id=1, logprob=-0.5, token="é")])
    chat.pieces = [AnswerStart(7), TextPiece(0, "é", [row]), *answer_end()]
    expected = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    lines = await lines_of(client, "/api/chat", messages=HI, logprobs=True, top_logprobs=2)
    assert lines[0]["logprobs"] == [{**expected, "top_logprobs": [expected]}]
    assert chat.calls[-1].top_logprobs == 2
    whole = await client.post("/api/chat", json={"model": "m", "messages": HI, "logprobs": True, "stream": False})
    assert whole.json()["logprobs"] == lines[0]["logprobs"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_a_call_without_a_prompt_asks_whether_the_model_is_there(client: httpx.AsyncClient, path: str) -> None:
    (line,) = await lines_of(client, path)
    assert (line["done"], line["done_reason"]) == (True, "load")
    gone = await client.post(path, json={"model": "m", "keep_alive": 0})
    assert gone.status_code == 400
    assert "unload" in gone.json()["error"]


async def test_the_last_message_may_begin_the_answer(client: httpx.AsyncClient, chat: FakeChat) -> None:
    await lines_of(client, "/api/chat", messages=[*HI, {"role": "assistant", "content": "I say"}])
    assert chat.calls[-1].chat_template_kwargs == {"continue_final_message": True, "add_generation_prompt": False}


# ---- requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"num_predict": -1}, "max_completion_tokens", MAX_INT32),
        ({"num_predict": -2}, "max_completion_tokens", MAX_INT32),
        ({"seed": -1}, "seed", None),
        ({"repeat_penalty": 1.1, "repeat_last_n": -1}, "repetition_penalty", 1.1),
        ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
        ({"min_p": 0.1, "mirostat": 0, "tfs_z": 1.0, "typical_p": 1, "repeat_last_n": 64}, "min_p", 0.1),
        ({"num_ctx": 64, "stop": "END"}, "stop", ("END",)),
        ({"num_ctx": 131_072, "num_predict": 9}, "max_completion_tokens", 9),  # more than is served
    ],
)
async def test_options(
    client: httpx.AsyncClient, chat: FakeChat, options: dict[str, Any], name: str, value: Any
) -> None:
    await lines_of(client, "/api/chat", messages=HI, options=options)
    assert getattr(chat.calls[-1], name) == value


async def test_an_answer_comes_back_with_what_clients_keep_beside_it(client: httpx.AsyncClient, chat: FakeChat) -> None:
    """Open WebUI's form of a call, LangChain's of a result."""
    function = {"name": "clock", "arguments": {}, "description": "?"}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [{"index": 0, "id": None, "function": function}]},
        {"role": "tool", "content": "noon", "name": "clock"},
    ]
    await lines_of(client, "/api/chat", messages=messages)
    call = chat.sent[1]["tool_calls"][0]
    assert (call["id"], call["function"]) == ("call_1_0", {"name": "clock", "arguments": "{}"})
    assert chat.sent[2]["tool_call_id"] == "call_1_0"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_a_name_of_the_list_is_known_to_every_api(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    name = (await client.get("/api/tags")).json()["models"][0]["name"]
    assert name == "m:latest"
    answer = await client.post(path, json={"model": name, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "m"


async def test_the_tag_of_an_unknown_name_stays(client: httpx.AsyncClient) -> None:
    unknown = await client.post("/v1/embeddings", json={"model": "nobody:latest", "input": "hi"})
    assert unknown.status_code == 404
    assert "'nobody:latest'" in unknown.json()["error"]["message"]


async def test_what_asks_for_no_vector_has_none(client: httpx.AsyncClient) -> None:
    for fields in ({}, {"input": ""}, {"input": []}):
        answer = await client.post("/api/embed", json={"model": "m", **fields})
        assert (answer.json()["embeddings"], answer.json()["prompt_eval_count"]) == ([], 0)
    assert (await client.post("/api/embeddings", json={"model": "m", "prompt": ""})).json() == {"embedding": []}
    assert (await client.post("/api/embed", json={"model": "nobody"})).status_code == 404


@pytest.mark.parametrize("chat_template", ["{{ enable_thinking }}", "{{ reasoning_effort }}", "</think>"])
async def test_who_can_think_says_so(client: httpx.AsyncClient) -> None:
    assert (await client.post("/api/show", json={"model": "m"})).json()["capabilities"] == ["completion", "thinking"]
    answer = await client.post("/api/chat", json={"model": "m", "messages": HI, "think": True, "stream": False})
    assert answer.status_code == 200


async def test_what_clients_ask_for_by_openais_names_is_done(client: httpx.AsyncClient, chat: FakeChat) -> None:
    clock = {"type": "function", "function": {"name": "clock"}}
    asked = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "tools": [clock]}
    await lines_of(client, "/api/chat", messages=HI, **asked, tool_choice="required", options={"top_p": 0.3})
    call = chat.calls[-1]
    assert (call.temperature, call.top_p, call.max_completion_tokens) == (0.5, 0.3, 9)
    assert call.tool_choice == "required"
    await lines_of(client, "/api/chat", messages=HI, **asked, tool_choice={"type": "function", "name": "clock"})
    assert chat.calls[-1].tool_choice.function.name == "clock"  # type: ignore[union-attr]
    await lines_of(client, "/api/generate", prompt="hi", temperature=0.5)
    assert chat.calls[-1].temperature == 0.5


@pytest.mark.parametrize(
    ("path", "fields", "status", "named"),
    [
        ("chat", {"tool_choice": "required"}, 400, "tool_choice"),
        ("chat", {"options": {"num_ctx": 0}}, 400, "options.num_ctx"),
        ("chat", {"options": {"num_predict": -3}}, 400, "options.num_predict"),
        ("chat", {"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ("chat", {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, 400, "options.repeat_last_n"),
        ("chat", {"options": {"temprature": 1}}, 400, "did you mean 'temperature'"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
        ("chat", {"format": "yaml"}, 400, "format"),
        ("chat", {"think": "very"}, 400, "think"),
        ("chat", {"think": True}, 400, "m does not support thinking; leave think out"),
        ("generate", {"think": True}, 400, "m does not support thinking"),
        ("generate", {"raw": True}, 400, "raw"),
        ("generate", {"template": "{{ .Prompt }}"}, 400, "template"),
        ("generate", {"suffix": "x"}, 400, "suffix"),
        ("generate", {"context": [1, 2]}, 400, "context"),
        ("generate", {"images": ["aGk="]}, 400, "images"),
    ],
)
async def test_what_is_wrong_or_not_done_is_refused_by_name(
    client: httpx.AsyncClient, chat: FakeChat, path: str, fields: dict[str, Any], status: int, named: str
) -> None:
    body = {"model": "m", "prompt": "hi"} if path == "generate" else {"model": "m", "messages": HI}
    answer = await client.post(f"/api/{path}", json={**body, **fields})
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert named in answer.json()["error"]
    assert not chat.calls


async def test_empty_extras_of_generate_are_none(client: httpx.AsyncClient) -> None:
    extras = {"suffix": "", "template": "", "context": [], "raw": False, "images": [], "system": ""}
    await lines_of(client, "/api/generate", prompt="hi", **extras)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_early_error_is_a_status(client: httpx.AsyncClient, chat: FakeChat, stream: bool) -> None:
    chat.pieces = [AnswerStart(7), ResourceExhaustedError("full")]
    answer = await client.post("/api/chat", json={"model": "m", "messages": HI, "stream": stream})
    assert answer.status_code == 429
    assert answer.json() == {"error": "full"}


async def test_an_answer_that_was_cut_off_is_an_error(client: httpx.AsyncClient, chat: FakeChat) -> None:
    chat.pieces = list(text_answer("Hal", finish_reason="abort"))
    lines = await lines_of(client, "/api/chat", messages=HI)
    assert "cut off" in lines[-1]["error"]
    whole = await client.post("/api/chat", json={"model": "m", "messages": HI, "stream": False})
    assert whole.status_code == 503


async def test_what_clients_ask_first(client: httpx.AsyncClient) -> None:
    assert (await client.head("/")).status_code == 200  # what its command asks before it asks anything else
    version = (await client.get("/api/version")).json()["version"]
    assert [part.isdigit() for part in version.split(".")] == [True] * 3
    unknown = await client.post("/api/push", json={"model": "m"})
    assert unknown.status_code == 404
    assert list(unknown.json()) == ["error"]
