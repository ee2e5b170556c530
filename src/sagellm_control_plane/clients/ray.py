"""An engine on a node of a Ray cluster (extra `ray`).

Ray chooses the node, starts the process and tells of its death; tokens never pass through it. The actor opens a socket
on its node, and the manager talks to that one as to a child's: encrypted (CurveZMQ), with a token that Ray carried.

Holds `RayEngineClient` and `RayPlacement`. The model must be found under the same name on the manager's node, which
reads its tokenizer.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clients.channel import ServerKey
from sagellm_control_plane.clients.connection import EngineConnection
from sagellm_control_plane.clients.ray_actor import EngineActor
from sagellm_control_plane.clients.socket_engine import SocketEngine
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import ResourceExhaustedError, UnavailableError, UnsupportedError

HEARTBEAT_S = 1.0
"""Between two signs of life on the socket; a node that is cut off is lost after three."""

_GREETING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RayPlacement:
    """What an engine reserves: a bundle for each pipeline stage, with what its tensor-parallel group needs on one node.

    `num_gpus` is for one device of the group; `resources` are Ray's own names, by stage. `strategy` spreads the stages
    (see Ray's placement groups). Without `resources` and GPUs an engine takes CPUs only.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    timeout_s: float = 60.0  # how long the cluster may take to find the place

    def bundles(self, config: LLMEngineConfig) -> list[dict[str, float]]:
        """The bundles for an engine of this configuration."""
        bundle = {"CPU": self.num_cpus, **self.resources}
        if self.num_gpus:
            bundle["GPU"] = self.num_gpus * config.tensor_parallel_size
        return [dict(bundle) for _ in range(config.pipeline_parallel_size)]


class RayEngineClient(SocketEngine):
    """An engine in a Ray actor of its own.

    `start` after a loss asks Ray for a place anew, so an engine whose node is gone comes up on another one.

    Args:
        config: of the engine.
        placement: what it reserves.
        address: of the cluster, as for `ray.init`; used where this process is not connected yet.
        runtime_env: for the actor, as Ray defines it; by default it is that of this process.
        stop_timeout_s: what the engine gets for an end in order before it is killed.
        orphan_timeout_s: how long it waits for a manager after its own has gone.
    """

    def __init__(
        self,
        config: LLMEngineConfig,
        *,
        placement: RayPlacement | None = None,
        address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        stop_timeout_s: float = 15.0,
        orphan_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(config)
        self._placement = placement or RayPlacement()
        self._address = address
        self._runtime_env = runtime_env
        self._stop_timeout_s = stop_timeout_s
        self._orphan_timeout_s = orphan_timeout_s
        self._group: Any = None  # Ray's placement group
        self._actor: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._pid: int | None = None
        self.node_id: str | None = None

    @property
    def pid(self) -> int | None:
        """The actor's process on its node; None while there is none."""
        return self._pid

    # ---- life -----------------------------------------------------------------------------------------

    async def _start(self) -> None:
        ray = _import_ray()
        await self._clear()
        try:
            if not ray.is_initialized():
                await asyncio.to_thread(ray.init, address=self._address, log_to_driver=False)
            await self._reserve()
            await self._connect()
        except BaseException:
            self._drop_line(self._loss("was given up"))
            await asyncio.shield(self._clear())
            raise

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and the actor with them; by force if it takes too long."""
        async with self._life:
            watching, self._watching = self._watching, None
            if self._line is not None and watching is not None and self.is_running:
                self._line.stop_engine()
                await asyncio.wait({watching}, timeout=self._stop_timeout_s)
            if watching is not None:
                watching.cancel()
            await self._clear()
            self._drop_line(UnavailableError("the engine was stopped; call start() first"))

    async def kill(self) -> None:
        """End the actor by force. What is in flight raises `EngineLostError`."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self._drop_line(self._loss("was killed by its manager"))
        async with self._life:
            await self._clear()

    # ---- steps of the above ---------------------------------------------------------------------------

    async def _reserve(self) -> None:
        from ray.util.placement_group import placement_group

        bundles = self._placement.bundles(self._given)
        self._group = await asyncio.to_thread(placement_group, bundles, strategy=self._placement.strategy)
        try:
            await asyncio.wait_for(self._group.ready(), self._placement.timeout_s)
        except asyncio.TimeoutError:
            raise ResourceExhaustedError(
                f"the cluster has no place for {self.engine_id} ({bundles}) within {self._placement.timeout_s:g} s; "
                "add nodes or ask for less",
                field="placement",
            ) from None

    async def _connect(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        first = self._placement.bundles(self._given)[0]
        actor_class = ray.remote(
            num_cpus=first["CPU"], num_gpus=first.get("GPU", 0), resources=dict(self._placement.resources)
        )(EngineActor)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
        token, epoch = secrets.token_hex(32), secrets.token_hex(8)
        config = self._given.model_dump_json(exclude_unset=True)
        self._actor = actor_class.options(
            scheduling_strategy=strategy, runtime_env=self._runtime_env, max_restarts=0, max_concurrency=8
        ).remote(config, token, epoch, self._orphan_timeout_s, HEARTBEAT_S)
        try:
            place = await asyncio.wait_for(self._actor.open.remote(), _GREETING_TIMEOUT_S)
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"the actor of {self.engine_id} did not start: {_first_line(error)}") from error
        self._pid, self.node_id = place.pid, place.node_id
        line = EngineConnection(
            self.engine_id,
            place.endpoint,
            on_break=self._on_break,
            on_report=self._on_report,
            token=token,
            heartbeat_s=HEARTBEAT_S,
            key=ServerKey(place.public_key),
        )
        self._line = line
        self._watching = asyncio.ensure_future(self._watch_actor(self._actor))
        await asyncio.wait_for(asyncio.shield(line.welcome), _GREETING_TIMEOUT_S)
        await self._use(line, await asyncio.shield(line.ready))

    async def _watch_actor(self, actor: Any) -> None:
        """Ray tells of the actor's death, and of its node's."""
        import ray

        try:
            await actor.ended.remote()
        except ray.exceptions.RayError as error:
            self._on_break(f"died ({_first_line(error)})")
        else:
            self._on_break("ended")

    def _on_break(self, reason: str) -> None:
        if self._watching is None or self._line is None:
            return  # our own doing
        error = self._loss(reason)
        if self._line.is_alive:
            self._pid = None
            self._lose(error)
        else:
            self._line.lose(error)

    def _loss(self, reason: str) -> EngineLostError:
        return EngineLostError(
            f"engine {self.engine_id} on node {self.node_id} {reason}", engine_id=self.engine_id, pid=self._pid
        )

    async def _clear(self) -> None:
        """Give back what Ray gave."""
        actor, self._actor = self._actor, None
        group, self._group = self._group, None
        self._pid = self.node_id = None
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if actor is None and group is None:
            return
        import ray
        from ray.util.placement_group import remove_placement_group

        with suppress(ray.exceptions.RayError):
            if actor is not None:
                await asyncio.to_thread(ray.kill, actor, no_restart=True)
            if group is not None:
                await asyncio.to_thread(remove_placement_group, group)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError("engines on Ray need the extra: pip install 'isagellm[ray]'") from error
    return ray


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
