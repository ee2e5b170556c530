"""Engines without a model in child processes: clients, and streams that have begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fake_engine_process import FAKE_COMMAND
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import Request, StreamEvent
from waiting import PATIENCE_S, until


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


async def silence(items: list[Any]) -> None:
    """Wait until nothing is added any more for 0.3 s; what was on its way may still come."""
    seen_at = time.monotonic()
    while True:
        number = len(items)
        await asyncio.sleep(0.3)
        if len(items) == number:
            return
        assert time.monotonic() - seen_at < PATIENCE_S, "there is no end of them"


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
