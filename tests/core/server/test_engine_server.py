"""The HTTP face of one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from asgi_client import LeavingClient, client_of, read_events
from fake_engine import FakeEngine
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.engine_server import create_engine_app
from sagellm_protocol import Response, StreamEventDelta, StreamEventEnd, StreamEventStart, parse_stream_event
from waiting import until


class Words:
    """Enough of a tokenizer to give a prompt of ids back."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)


class ServedEngine(FakeEngine):
    tokenizer = Words()


@pytest.fixture
def engine() -> ServedEngine:
    return ServedEngine()


@pytest.fixture
def app(engine: ServedEngine) -> FastAPI:
    return create_engine_app(lambda: engine)  # type: ignore[arg-type, return-value]


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


async def test_an_openai_body_gets_a_completion(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "fake", "prompt": "hi", "max_tokens": 3})
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "w0 w1 w2 ", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["completion_tokens"] == 3


async def test_a_protocol_request_gets_a_response(client: httpx.AsyncClient) -> None:
    body = {"request_id": "r-1", "trace_id": "t-1", "model": "fake", "prompt": "hi", "max_tokens": 2, "stream": False}
    answer = await client.post("/v1/completions", json=body)
    response = Response.model_validate(answer.json())
    assert (response.request_id, response.trace_id, response.output_text) == ("r-1", "t-1", "w0 w1 ")
    failed = await client.post("/v1/completions", json={**body, "prompt": "fail"})
    assert failed.status_code == 500
    assert Response.model_validate(failed.json()).error is not None


async def test_several_prompts_run_together_and_keep_their_order(client: httpx.AsyncClient) -> None:
    body = {"model": "default", "prompt": [[1, 2], [3]], "max_tokens": 1, "n": 2, "echo": True, "logprobs": 1}
    choices = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert [choice["text"] for choice in choices] == ["w1 w2 w0 ", "w1 w2 w0 ", "w3 w0 ", "w3 w0 "]
    assert choices[2]["logprobs"]["tokens"] == ["w3 ", "w0 "]


async def test_an_error_of_one_prompt_is_the_answers_error(client: httpx.AsyncClient, engine: ServedEngine) -> None:
    answer = await client.post("/v1/completions", json={"model": "fake", "prompt": ["wait", "refuse"]})
    assert answer.status_code == 400
    assert not engine.running, "the other prompt is not left running"


async def test_a_streamed_completion(client: httpx.AsyncClient) -> None:
    body = {
        "model": "fake",
        "prompt": ["hi", "ho"],
        "max_tokens": 2,
        "n": 2,
        "stream": True,
        "echo": True,
        "stream_options": {"include_usage": True},
    }
    events = await read_events(client, "/v1/completions", body)
    assert events.pop() == "[DONE]"
    assert events[-1]["usage"]["completion_tokens"] == 8
    texts = [""] * 4
    reasons: list[Any] = [None] * 4
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["hiw0 w1 ", "hiw0 w1 ", "how0 w1 ", "how0 w1 "]
    assert reasons == ["length"] * 4


async def test_the_stream_path_sends_protocol_events(client: httpx.AsyncClient) -> None:
    for body in (
        {"model": "fake", "prompt": "hi", "max_tokens": 2},
        {"request_id": "r", "prompt": "hi", "max_tokens": 2},
    ):
        events = [parse_stream_event(event) for event in await read_events(client, "/v1/completions/stream", body)]
        assert isinstance(events[0], StreamEventStart)
        assert isinstance(events[-1], StreamEventEnd)
        chunks = [event.chunk for event in events if isinstance(event, StreamEventDelta)]
        assert "".join(chunks) == events[-1].output_text == "w0 w1 "
    several = await client.post("/v1/completions/stream", json={"model": "fake", "prompt": ["a", "b"]})
    assert several.status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "fake"}, 400, "prompt is required"),
        ({"model": "fake", "prompt": "hi", "temperature": -1}, 400, "temperature must be >= 0"),
        ({"model": "fake", "prompt": "hi", "tempratur": 1}, 400, "did you mean 'temperature'"),
        ({"model": "other", "prompt": "hi"}, 404, "this engine serves 'fake', not 'other'"),
        ({"model": "fake", "prompt": "refuse"}, 400, "prompt is refused"),
        ({"model": "fake", "prompt": "fail"}, 500, "the fake broke"),
        ({"model": "fake", "prompt": "hi", "lora": "x"}, 400, "LoRA adapters are not supported"),
        ({"model": "fake", "prompt": "hi", "session_id": "x"}, 400, "sessions are not supported"),
        ({"request_id": "r", "prompt": "hi", "phase": "prefill"}, 400, "hand-over is not supported"),
        ({"model": "fake", "prompt": "hi", "stream": True, "echo": True, "logprobs": 1}, 400, "cannot be streamed"),
    ],
)
async def test_errors_are_openai_bodies(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


async def test_a_failed_stream_ends_with_the_error(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "fake", "prompt": "fail", "stream": True})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the fake broke"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_its_request(app: FastAPI, engine: ServedEngine, stream: bool) -> None:
    async with client_of(app):
        body = {"model": "fake", "prompt": "wait", "stream": stream}
        client = LeavingClient(app, "/v1/completions", body)
        await until(lambda: engine.running)
        client.leave()
        await client.done
        assert not engine.running
        assert len(engine.cancelled) == 1


async def test_health_info_and_metrics(client: httpx.AsyncClient, engine: ServedEngine) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    info = (await client.get("/info")).json()
    assert info["model"] == "fake"
    assert info["load"]["num_free_blocks"] == 8
    await client.post("/v1/completions", json={"model": "fake", "prompt": "hi there", "max_tokens": 3})
    await client.post("/v1/completions", json={"request_id": "r", "prompt": "fail"})
    text = (await client.get("/metrics")).text
    labels = 'engine="fake",model_name="fake"'
    for reason in ("length", "error"):
        assert f'vllm:request_success_total{{engine="fake",finished_reason="{reason}",model_name="fake"}} 1.0' in text
    assert f"vllm:prompt_tokens_total{{{labels}}} 3.0" in text
    assert f"vllm:kv_cache_usage_perc{{{labels}}} 0.0" in text
    await engine.stop()
    assert (await client.get("/health")).status_code == 503


async def test_the_built_in_model_behind_the_documented_application() -> None:
    engine = LLMEngine(LLMEngineConfig(model_path="builtin", max_model_len=128, kv_cache_memory_bytes=2**22))
    async with client_of(create_engine_app(lambda: engine)) as client:
        body = {"model": "builtin", "prompt": "Once upon a time", "max_tokens": 8, "logprobs": 2}
        whole = (await client.post("/v1/completions", json={**body, "echo": True})).json()
        choice = whole["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        offsets = choice["logprobs"]["text_offset"]
        assert [choice["text"][a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == choice["logprobs"][
            "tokens"
        ]
        events = await read_events(client, "/v1/completions", {**body, "stream": True})
        streamed = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert "Once upon a time" + streamed == choice["text"]
        too_long = await client.post("/v1/completions", json={"model": "builtin", "prompt": [5] * 200})
        assert too_long.status_code == 400
        assert "128" in too_long.json()["error"]["message"]
        assert (await client.get("/info")).json()["architecture"] == "LlamaForCausalLM"
