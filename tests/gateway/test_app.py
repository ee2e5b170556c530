"""The OpenAI API over a control plane with engines without models."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from asgi_client import LeavingClient, client_of, read_events
from fake_engine import FakeEngine
from live_server import serving
from sagellm_control_plane import ControlPlaneManager, EngineConfig
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from waiting import until

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def app(engine: FakeEngine) -> Gateway:
    manager = ControlPlaneManager(max_num_waiting=1)
    manager.register_engine(engine, engine_id="fake", model="m")
    return create_app(manager, default_model="m")


async def test_a_chat_answer(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 1}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200
    data = answer.json()
    assert data["object"] == "chat.completion"
    assert data["id"].startswith("chatcmpl-")
    assert [choice["message"]["content"] for choice in data["choices"]] == ["w0 w1 w2 "] * 2
    assert data["choices"][1]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -0.5
    assert data["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 6,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_chat_stream(client: httpx.AsyncClient, include_usage: bool) -> None:
    body: dict[str, Any] = {"model": "m", "messages": HELLO, "max_completion_tokens": 3, "stream": True}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    events = await read_events(client, CHAT, body)
    assert events.pop() == "[DONE]"
    if include_usage:
        usage = events.pop()
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 4
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "w0 w1 w2 "
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["length"]
    assert all(("usage" in event) == include_usage and event.get("usage") is None for event in events)


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [
        (CHAT, {"messages": HELLO, "max_tokens": 3}, [(1, 0), (1, 1), (1, 2), (1, 3), (1, 3)]),
        (
            "/v1/completions",
            {"prompt": ["a b", "c"], "max_tokens": 2},
            [(2, 1), (2, 2), (2, 2), (3, 3), (3, 4), (3, 4)],
        ),
    ],
)
async def test_chunks_tell_the_usage_so_far_to_who_asks(
    client: httpx.AsyncClient, path: str, asked: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await read_events(client, path, {"model": "m", "stream": True, "stream_options": options, **asked})
    *chunks, last, done = events
    assert done == "[DONE]"
    usages = [chunk["usage"] for chunk in chunks]
    assert [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages] == expected
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == expected[-1]
    # Alone it changes nothing: usage is not asked for.
    alone = {"continuous_usage_stats": True}
    events = await read_events(client, path, {"model": "m", "stream": True, "stream_options": alone, **asked})
    assert not any("usage" in event for event in events[:-1])


async def test_completions_take_several_prompts(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/completions", json={"model": "m", "prompt": ["a", "b"], "max_tokens": 1, "echo": True}
    )
    assert [choice["text"] for choice in answer.json()["choices"]] == ["aw0 ", "bw0 "]
    ids = await client.post("/v1/completions", json={"model": "m", "prompt": [1, 2], "max_tokens": 1, "echo": True})
    assert ids.json()["choices"][0]["text"] == "w1 w2 w0 "
    events = await read_events(
        client, "/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 2, "stream": True}
    )
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "w0 w1 "


async def test_a_body_without_a_model_gets_the_default_one(client: httpx.AsyncClient) -> None:
    for body in ({"messages": HELLO}, {"messages": HELLO, "model": "default"}, {"messages": HELLO, "model": None}):
        answer = await client.post(CHAT, json={**body, "max_tokens": 1})
        assert answer.json()["model"] == "m"


TOOL = {"type": "function", "function": {"name": "add"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": [TOOL]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": SCHEMA, "guided_regex": "x"}, 400, "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
        ({"session_id": "s"}, 404, "session_id"),
        ({"lora": "a"}, 400, "lora"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"model": "nobody"}, 404, "model"),
        ({"max_token": 3}, 400, "max_token"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_or_not_built_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    body = {"model": "m", "messages": HELLO, "stream": stream, **fields}
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"


async def test_what_changes_nothing_is_accepted(client: httpx.AsyncClient) -> None:
    fields = {"response_format": {"type": "text"}, "tool_choice": "auto", "parallel_tool_calls": False, "user": "u"}
    answer = await client.post(CHAT, json={"model": "m", "messages": HELLO, "max_tokens": 1, **fields})
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "status"), [("fail", 500), ("refuse", 400)])
async def test_failures_reach_the_client(client: httpx.AsyncClient, prompt: str, status: int, stream: bool) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "stream": stream}
    answer = await client.post(CHAT, json=body)
    if stream and prompt == "fail":  # it had begun
        assert answer.status_code == 200
        assert answer.text.endswith("\n\n")
        assert '"code":"internal"' in answer.text.replace(" ", "")
        assert "[DONE]" not in answer.text
    else:
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_aborts_its_request(app: Gateway, engine: FakeEngine, stream: bool) -> None:
    async with client_of(app):
        body = {"model": "m", "messages": [{"role": "user", "content": "wait"}], "stream": stream}
        client = LeavingClient(app, CHAT, body)
        await until(lambda: engine.running)
        client.leave()
        await client.done
        assert not engine.running
        assert app.manager.get_engine("fake").num_requests == 0


async def test_a_full_queue_says_to_come_back() -> None:
    engine = FakeEngine(max_batch_size=1)
    manager = ControlPlaneManager(max_num_waiting=0)
    manager.register_engine(engine, model="m")
    app = create_app(manager)
    async with client_of(app) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "wait"}]}
        first = LeavingClient(app, CHAT, body)
        await until(lambda: engine.running)
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        engine.gate.set()
        await first.done


async def test_models(client: httpx.AsyncClient) -> None:
    data = (await client.get("/v1/models")).json()
    assert data["object"] == "list"
    assert [(card["id"], card["object"], card["max_model_len"]) for card in data["data"]] == [("m", "model", 64)]
    assert (await client.get("/v1/models/m")).json() == data["data"][0]
    assert (await client.get("/v1/models/no/such")).status_code == 404


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/v1/models", "/v1/models/m", "/docs", "/page/icon.svg"])
async def test_what_can_be_got_can_be_asked_for_its_head(app: Gateway, path: str) -> None:
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        head, got = await client.head(path), await client.get(path)  # over one connection: nothing stays in it
        assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
        for name in ("content-type", "content-length"):
            assert head.headers[name] == got.headers[name]


async def test_what_cannot_be_got_has_no_head(client: httpx.AsyncClient) -> None:
    missing, refused = await client.head("/no/such"), await client.head(CHAT)
    assert (missing.status_code, missing.content) == (404, b"")
    assert (refused.status_code, refused.content, refused.headers["allow"]) == (405, b"", "POST")
    assert (await client.post("/health")).headers["allow"] == "GET, HEAD"
    page = (await client.get("/metrics")).text
    assert f'http_requests_total{{code="405",handler="{CHAT}",method="HEAD",status="4xx"}}' not in page
    assert 'http_requests_total{code="404",handler="other",method="HEAD",status="4xx"} 1' in page


async def test_a_model_name_may_hold_slashes() -> None:
    manager = ControlPlaneManager(
        engine_configs=[EngineConfig(model="owner/name")], make_engine=lambda config: FakeEngine(config)
    )
    async with client_of(create_app(manager)) as client:
        assert (await client.get("/v1/models/owner/name")).json()["id"] == "owner/name"


async def test_health_metrics_and_welcome(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    health = (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["engines"]["fake"]["state"] == "ready"
    await client.post(CHAT, json={"messages": HELLO, "max_tokens": 2})
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'vllm:generation_tokens_total{engine="fake",model_name="m"} 2.0' in metrics.text
    assert 'vllm:num_requests_running{engine="fake",model_name="m"} 0.0' in metrics.text
    welcome = (await client.get("/")).json()
    assert welcome["models"] == ["m"]
    answer = await client.post(welcome["example"]["url"], json={**welcome["example"]["body"], "max_tokens": 1})
    assert answer.status_code == 200
    assert (await client.post("/v1/nothing", json={})).json()["error"]["code"] == "not_found"
    await engine.stop()
    assert (await client.get("/health")).status_code == 503


async def test_the_built_in_model_answers_the_same_streamed_and_whole() -> None:
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 2**22}
    manager = ControlPlaneManager(engine_configs=[EngineConfig(kind="cpu", model="builtin", options=options)])
    body = {"model": "builtin", "messages": [{"role": "user", "content": "What is LLM inference?"}], "max_tokens": 12}
    async with client_of(create_app(manager)) as client:
        whole = (await client.post(CHAT, json=body)).json()
        assert whole["choices"][0]["message"]["content"].strip()
        events = await read_events(client, CHAT, {**body, "stream": True})
        streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
        assert streamed == whole["choices"][0]["message"]["content"]
        cards = (await client.get("/v1/models")).json()["data"]
        assert cards[0]["max_model_len"] == 256
