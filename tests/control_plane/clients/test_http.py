"""Engines behind HTTP: a real server around an engine without a model, and servers that break off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from fake_engine import FakeEngine
from live_server import serving
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clients.http import HTTPEngineClient
from sagellm_core.engine_core.report import EngineReport
from sagellm_core.engine_server import create_engine_app
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Request,
    StreamEvent,
    StreamEventEnd,
    TokenizeRequest,
    UnavailableError,
)
from waiting import until


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[HTTPEngineClient]:
    app = create_engine_app(lambda: engine)  # type: ignore[arg-type, return-value]
    async with serving(app) as url:
        client = HTTPEngineClient(url, engine_id="e0")
        await client.start()
        yield client
        await client.stop()


async def events_of(client: HTTPEngineClient, **fields: Any) -> list[StreamEvent]:
    return [event async for event in client.stream(Request(**{"max_tokens": 3, "stream": True, **fields}))]


async def test_a_stream_and_a_whole_answer(client: HTTPEngineClient, engine: FakeEngine) -> None:
    events = await events_of(client, prompt="hi", model="public-name", session_id="s", tenant="t", request_id="r-1")
    assert [event.event for event in events] == ["start", "delta", "delta", "delta", "end"]
    assert {(event.request_id, event.engine_id) for event in events} == {("r-1", "e0")}
    response = await client.execute(Request(prompt="hi", max_tokens=2, model="public-name", phase="prefill"))
    assert (response.output_text, response.model, response.engine_id) == ("w0 w1 ", "public-name", "e0")
    vector = await client.execute(Request.model_validate({"prompt": "a b", "embed": {}}))
    assert vector.embedding == [2.0, 0.5, 0.25, 0.125]
    assert len(engine.requests) == 3


async def test_errors_keep_their_class(client: HTTPEngineClient) -> None:
    for call in (events_of(client, prompt="refuse"), client.execute(Request(prompt="refuse"))):
        with pytest.raises(InvalidArgumentError, match="refused") as refused:
            await call
        assert refused.value.context["field"] == "prompt"
    response = await client.execute(Request(prompt="fail"))
    assert response.finish_reason is FinishReason.ERROR
    assert response.error is not None


async def test_leaving_a_stream_frees_the_request(client: HTTPEngineClient, engine: FakeEngine) -> None:
    async with aclosing(client.stream(Request(prompt="wait", stream=True, request_id="r-1"))) as events:
        async for _ in events:
            break
    await until(lambda: engine.cancelled == ["r-1"])


async def test_abort(client: HTTPEngineClient, engine: FakeEngine) -> None:
    task = asyncio.ensure_future(events_of(client, prompt="wait", request_id="r-1"))
    await until(lambda: engine.running)
    client.abort("r-1")
    end = (await task)[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT
    with pytest.raises(NotFoundError):
        client.abort("r-1")


async def test_what_the_engine_tells(client: HTTPEngineClient, engine: FakeEngine) -> None:
    reports: list[EngineReport] = []
    end = client.watch(reports.append, interval_s=0.02)
    await until(lambda: len(reports) > 3)
    assert [report.sequence for report in reports] == list(range(len(reports)))
    end()
    assert await client.stats() == await engine.stats()
    assert (await client.cache_snapshot()).events == (await engine.cache_snapshot()).events
    assert await client.health_check()
    assert await client.reset_prefix_cache()
    assert (await client.describe_model()).vocab_size > 0
    assert client.config.model_path == engine.config.model_path
    assert client.get_info()["url"] == client.url


async def test_texts(client: HTTPEngineClient, engine: FakeEngine) -> None:
    wanted = TokenizeRequest(prompt="a b c")
    ids = await client.tokenize(wanted)
    assert ids == await engine.tokenize(wanted)
    assert await client.detokenize(ids) == await engine.detokenize(ids)
    assert await client.token_texts(ids) == await engine.token_texts(ids)


async def test_drain_refuses_until_resumed(client: HTTPEngineClient) -> None:
    await client.drain()
    with pytest.raises(UnavailableError, match="draining"):
        await events_of(client, prompt="hi")
    client.resume()
    await until(lambda: not client._tasks)
    assert len(await events_of(client, prompt="hi")) == 5


async def test_before_and_after_contact(engine: FakeEngine) -> None:
    client = HTTPEngineClient("http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="call start"):
        await events_of(client, prompt="hi")
    with pytest.raises(UnavailableError, match="nobody answers at"):
        await client.start()
    assert not await client.health_check()
    await client.stop()


@asynccontextmanager
async def breaking_server(answer: bytes) -> AsyncIterator[HTTPEngineClient]:
    """Answers every call for an answer with these bytes and closes; contact is made with all else."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/v1/completions" in head:
            writer.write(answer)
        else:
            body = b'{"model": "m", "vocab_size": 1, "hidden_size": 1, "max_model_len": 8}'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    client = HTTPEngineClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await client.start()
    try:
        yield client
    finally:
        await client.stop()
        server.close()


START = b'data: {"event": "start", "request_id": "r", "prompt_tokens": 1}\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        CHUNKED + b"%x\r\n%s\r\n" % (len(START), START),
        CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(START), START),  # an end of the body, but none of the stream
    ],
)
async def test_a_connection_that_breaks_is_a_loss(answer: bytes) -> None:
    async with breaking_server(answer) as client:
        with pytest.raises(EngineLostError):
            await events_of(client, prompt="hi")


async def test_the_end_of_contact_ends_requests(client: HTTPEngineClient, engine: FakeEngine) -> None:
    task = asyncio.ensure_future(events_of(client, prompt="wait"))
    await until(lambda: engine.running)
    await client.stop()
    with pytest.raises(UnavailableError):
        await task
    await until(lambda: engine.cancelled)
