"""What runs on a Ray node: an engine behind a socket of its own, and Ray's view of it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from sagellm_control_plane.clients.channel import ServerKey
from sagellm_control_plane.clients.server import EngineServer
from sagellm_control_plane.engine_process import our_engine
from sagellm_core.config import LLMEngineConfig


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where an actor's engine is reached."""

    endpoint: str
    public_key: bytes
    pid: int
    node_id: str


class EngineActor:
    """The actor: `open` begins to serve, `ended` returns when that is over. Neither sees a token."""

    def __init__(self, config: str, token: str, epoch: str, orphan_timeout_s: float, heartbeat_s: float) -> None:
        self._config = LLMEngineConfig.model_validate_json(config)
        self._token = token
        self._epoch = epoch
        self._orphan_timeout_s = orphan_timeout_s
        self._heartbeat_s = heartbeat_s
        self._serving: asyncio.Task[bool] | None = None

    async def open(self) -> ActorPlace:
        """Open the socket; the model loads while the manager greets."""
        import ray

        key = ServerKey.new()
        host = ray.util.get_node_ip_address()
        server = EngineServer(
            our_engine(self._config),
            f"tcp://{host}:*",
            epoch=self._epoch,
            token=self._token,
            orphan_timeout_s=self._orphan_timeout_s,
            heartbeat_s=self._heartbeat_s,
            key=key,
        )
        bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.ensure_future(server.run(bound.set_result))
        waited: set[asyncio.Future[Any]] = {self._serving, bound}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not bound.done():
            self._serving.result()  # raises why there is no socket
        return ActorPlace(bound.result(), key.public, os.getpid(), ray.get_runtime_context().get_node_id())

    async def ended(self) -> bool:
        """Wait for the end; whether the engine could start."""
        assert self._serving is not None, "open comes first"
        return await asyncio.shield(self._serving)
