"""The socket between manager and engine over TCP, both ends in this process: keys, tokens, loss, silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fake_engine import FakeEngine
from sagellm_control_plane.clients.channel import ServerKey
from sagellm_control_plane.clients.connection import Call, EngineConnection
from sagellm_control_plane.clients.server import EngineServer
from sagellm_protocol import Request, UnauthenticatedError, UnavailableError
from waiting import until

KEY = ServerKey.new()


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[tuple[str, FakeEngine]]:
    engine = FakeEngine(engine_id="e0")
    options = {"epoch": "1", "token": "secret", "key": KEY, "orphan_timeout_s": 30, **options}
    server = EngineServer(engine, "tcp://127.0.0.1:*", **options)
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.ensure_future(server.run(bound.set_result))
    try:
        yield await bound, engine
    finally:
        server.stop()
        assert await running


@asynccontextmanager
async def connected(endpoint: str, **options: Any) -> AsyncIterator[EngineConnection]:
    reasons: list[str] = []
    options = {"token": "secret", "key": ServerKey(KEY.public), "on_break": reasons.append, **options}
    line = EngineConnection("e0", endpoint, on_report=lambda _: None, **options)
    try:
        yield line
    finally:
        line.lose(UnavailableError("the test is over"))


async def read_all(call: Call) -> list[Any]:
    items = []
    while not call.is_at_end:
        items.append(await call.get())
    return items


async def test_with_key_and_token_all_is_open() -> None:
    async with served() as (endpoint, _), connected(endpoint) as line:
        assert (await line.welcome).epoch == "1"
        await line.ready
        call = line.submit(Request(prompt="hi", max_tokens=2, stream=True), is_streamed=True)
        assert len(await read_all(call)) == 4


async def test_another_token_is_refused() -> None:
    async with served() as (endpoint, _), connected(endpoint, token="guess") as line:
        with pytest.raises(UnauthenticatedError):
            await line.welcome
        with pytest.raises(UnauthenticatedError):
            await line.ask("stats")


@pytest.mark.parametrize("key", [None, ServerKey(ServerKey.new().public)])
async def test_without_the_servers_key_nothing_is_heard(key: ServerKey | None) -> None:
    async with served() as (endpoint, engine), connected(endpoint, key=key) as line:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(line.welcome), 0.3)
        assert not engine.requests


async def test_a_lost_line_ends_all_that_waits() -> None:
    async with served() as (endpoint, engine), connected(endpoint) as line:
        await line.ready
        calls = [line.submit(Request(prompt="wait", stream=True), is_streamed=True) for _ in range(3)]
        await until(lambda: len(engine.running) == 3)
        line.lose(UnavailableError("gone"))
        for call in calls:
            with pytest.raises(UnavailableError, match="gone"):
                await read_all(call)
        await until(lambda: not engine.running)  # the engine noticed, too
        assert len(engine.cancelled) == 3


async def test_the_end_of_the_server_is_told() -> None:
    reasons: list[str] = []
    async with served() as (endpoint, _):
        line = EngineConnection(
            "e0",
            endpoint,
            on_break=reasons.append,
            on_report=lambda _: None,
            token="secret",
            key=ServerKey(KEY.public),
        )
        await line.ready
    await until(lambda: reasons)
    assert reasons == ["the connection broke"]
    line.lose(UnavailableError("gone"))


async def test_an_engine_whose_reader_sleeps_forgets_no_token() -> None:
    async with served() as (endpoint, _), connected(endpoint) as line:
        await line.ready
        call = line.submit(Request(prompt="hi", max_tokens=3000, stream=True), is_streamed=True)
        line._channel._loop.remove_reader(line._channel._socket.fileno())  # reads nothing for a while
        await asyncio.sleep(0.3)
        line._channel._loop.add_reader(line._channel._socket.fileno(), line._channel._read)
        line._channel._read()
        deltas = [event for event in await read_all(call) if event.event == "delta"]
        assert [token for delta in deltas for token in delta.chunk_tokens] == list(range(3000))
