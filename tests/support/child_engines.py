"""Engines without a model in child processes: clients, streams that have begun, and waiting for what is to come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fake_engine_process import FAKE_COMMAND
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import Request, StreamEvent


def make_client(run_dir: Path, engine_id: str = "e0", **options: Any) -> ProcessEngineClient:
    options = {"command": FAKE_COMMAND, "stop_timeout_s": 5.0, **options}
    return ProcessEngineClient(LLMEngineConfig(model_path="builtin", engine_id=engine_id), run_dir=run_dir, **options)


@asynccontextmanager
async def running(client: ProcessEngineClient) -> AsyncIterator[ProcessEngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.kill()


async def events_of(client: ProcessEngineClient, **fields: Any) -> list[StreamEvent]:
    return [event async for event in client.stream(Request(**{"max_tokens": 3, "stream": True, **fields}))]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


async def begin(client: ProcessEngineClient, prompt: str = "wait", **fields: Any) -> asyncio.Task[list[StreamEvent]]:
    """A stream that has given its first event."""
    seen: list[StreamEvent] = []

    async def read() -> list[StreamEvent]:
        async for event in client.stream(Request(**{"prompt": prompt, "max_tokens": 3, "stream": True, **fields})):
            seen.append(event)
        return seen

    task = asyncio.ensure_future(read())
    await until(lambda: bool(seen) or task.done())
    return task
