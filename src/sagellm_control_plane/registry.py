"""Engines out of configurations: what each is made of, and what it is called."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.recovery import adopt_child, restore
from sagellm_control_plane.store import EngineStore
from sagellm_control_plane.types import ExecutionInstance
from sagellm_core.config import BackendConfig, EngineConfig, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError

logger = logging.getLogger(__name__)

MakeEngine = Callable[[LLMEngineConfig], EngineClient]


class EngineRegistry:
    """Adds engines to a pool. `allowed` are the first configurations of each model: more may be made of them.

    Until `is_running` is set, what is added stands in the configuration, which the next manager reads anew.
    """

    def __init__(self, pool: EnginePool, make_engine: MakeEngine, backend: BackendConfig) -> None:
        self._pool = pool
        self._make_engine = make_engine
        self._backend = backend
        self.allowed: dict[str, EngineConfig] = {}
        self.is_running = False

    def add_config(self, config: EngineConfig, **fields: Any) -> str:
        """An engine of a configuration, with further `fields` of its `ExecutionInstance`; returns its id."""
        name = config.engine_id or next(
            name for number in itertools.count() if (name := f"engine-{number}") not in self._pool
        )
        self._check_new(name)
        self.allowed.setdefault(config.model, config)
        instance, client = self.make(config, name, **fields)
        self._pool.add(instance, client, is_configured=not self.is_running)
        return name

    def add_instance(self, instance: ExecutionInstance) -> None:
        """An engine of a description."""
        if instance.tensor_parallel_size * instance.pipeline_parallel_size > 1:
            logger.warning("%s runs on one device, not on %d", instance.instance_id, instance.gpu_count)
        config = EngineConfig(
            model=instance.model_name,
            engine_id=instance.instance_id,
            options={"max_batch_size": instance.max_concurrent_requests},
        )
        self._check_new(instance.instance_id)
        client = self._make_engine(config.to_llm_engine_config(self._backend))
        self._pool.add(instance, client, is_configured=not self.is_running)

    def add_client(self, client: EngineClient, engine_id: str | None, model: str | None) -> str:
        """An engine that is there already; returns its id."""
        name = engine_id or client.engine_id
        self._check_new(name)
        instance = ExecutionInstance(
            instance_id=name,
            model_name=model or client.config.model_path,
            max_concurrent_requests=client.config.max_batch_size,
        )
        self._pool.add(instance, client)
        return name

    def make(self, config: EngineConfig, engine_id: str, **fields: Any) -> tuple[ExecutionInstance, EngineClient]:
        """An engine of a configuration that nobody has added yet."""
        llm_config = config.to_llm_engine_config(self._backend).model_copy(update={"engine_id": engine_id})
        given = {"max_concurrent_requests": llm_config.max_batch_size, **fields}
        instance = ExecutionInstance(instance_id=engine_id, model_name=config.model, **given)
        return instance, self._make_engine(llm_config)

    async def restore(self, store: EngineStore) -> None:
        """Go on where the manager before this one ended; children that still run are taken over."""
        await restore(self._pool.supervisor, store, lambda stored: self._make_engine(stored.config), adopt_child)

    def _check_new(self, engine_id: str) -> None:
        """Before a client is made, which may cost something."""
        if engine_id in self._pool:
            raise InvalidArgumentError(
                f"an engine {engine_id!r} is registered already; choose another id", field="engine_id"
            )
