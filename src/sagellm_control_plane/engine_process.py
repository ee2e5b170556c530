"""The program of an engine in a process of its own: `python -m sagellm_control_plane.engine_process`.

It reads `ProcessOptions` as JSON from its standard input, opens its socket, loads the model and serves one manager
after the other (see `EngineServer`). It ends by itself when it is told to, on SIGTERM, or when no manager comes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable

from pydantic import Field

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clients.server import EngineServer
from sagellm_core.command import kept_from_collector
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import parse
from sagellm_protocol.model import EdgeModel


class ProcessOptions(EdgeModel):
    """What an engine process is told at its birth."""

    config: LLMEngineConfig
    endpoint: str = Field(min_length=1, description="Of its socket, as ZMQ writes it.")
    epoch: str = Field(min_length=1, description="Its manager's mark: only this process has it.")
    orphan_timeout_s: float = Field(gt=0, description="How long it waits for a manager.")


def our_engine(config: LLMEngineConfig) -> EngineClient:
    """The engine that the process serves if nobody says otherwise."""
    with kept_from_collector():
        from sagellm_core.llm_engine import LLMEngine

    return LLMEngine(config)


async def serve(engine: EngineClient, options: ProcessOptions) -> bool:
    """Serve until the end; whether the engine could start."""
    server = EngineServer(
        engine,
        options.endpoint,
        epoch=options.epoch,
        orphan_timeout_s=options.orphan_timeout_s,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    return await server.run()


def main(make_engine: Callable[[LLMEngineConfig], EngineClient] = our_engine) -> None:
    """The process's whole life."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = parse(ProcessOptions, sys.stdin.buffer.read(), what="options of an engine process")
    serving = serve(make_engine(options.config), options)
    try:
        import uvloop
    except ImportError:  # not made for every platform
        has_started = asyncio.run(serving)
    else:
        has_started = uvloop.run(serving)
    sys.exit(0 if has_started else 1)


if __name__ == "__main__":
    main()
