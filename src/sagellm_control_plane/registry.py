"""Engines out of configurations: what each is made of, and what it is called."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.recovery import adopt_child, restore
from sagellm_control_plane.replacement import replace_model
from sagellm_control_plane.store import EngineStore
from sagellm_control_plane.types import ExecutionInstance
from sagellm_core.config import BackendConfig, EngineConfig, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, UnavailableError

logger = logging.getLogger(__name__)

MakeEngine = Callable[[LLMEngineConfig], EngineClient]


class EngineRegistry:
    """Adds engines to a pool. `allowed` are the first configurations of each model: more may be made of them.

    Until `is_running` is set, what is added stands in the configuration, which the next manager reads anew. `store`
    knows what an operator has put in the place of such a configuration, which stays so until it is changed there.
    """

    def __init__(
        self, pool: EnginePool, make_engine: MakeEngine, backend: BackendConfig, store: EngineStore | None = None
    ) -> None:
        self._pool = pool
        self._make_engine = make_engine
        self._backend = backend
        self.allowed: dict[str, EngineConfig] = {}
        self.is_running = False
        self._store = store
        self._replaced = {} if store is None else store.load_replaced()
        self._configured: dict[str, str] = {}  # the model of each configuration, by its key
        self._being_replaced: set[str] = set()

    def add_config(self, config: EngineConfig, **fields: Any) -> str:
        """An engine of a configuration, with further `fields` of its `ExecutionInstance`; returns its id."""
        name = config.engine_id or next(
            name for number in itertools.count() if (name := f"engine-{number}") not in self._pool
        )
        self._check_new(name)
        config = self._as_replaced(config)
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
        llm_config = self._as_replaced(config).to_llm_engine_config(self._backend)
        client = self._make_engine(llm_config)
        instance = instance.model_copy(update={"max_concurrent_requests": llm_config.max_batch_size})
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

    async def replace(self, model: str, config: EngineConfig) -> list[str]:
        """New engines of `config` in the place of all that serve `model`; returns their ids. See `replace_model`.

        From the first of them on further engines are made of it, too, and the next manager finds it. Raises
        `UnavailableError` while the model is being replaced.
        """
        if model in self._being_replaced:
            raise UnavailableError(f"the model {model!r} is being replaced; wait until that has ended", model=model)
        path = config.model_path or (None if config.model == model else config.model)
        config = EngineConfig(kind=config.kind, model=model, model_path=path, options=config.options)
        llm_config = config.to_llm_engine_config(self._backend)
        self._being_replaced.add(model)
        try:
            news = await replace_model(
                self._pool.supervisor,
                model,
                lambda _, engine_id: self._make_engine(llm_config.model_copy(update={"engine_id": engine_id})),
                on_first=lambda: self._accept(config),
            )
        finally:
            self._being_replaced.discard(model)
        return [new.engine_id for new in news]

    def _accept(self, config: EngineConfig) -> None:
        """This is the configuration of its model now."""
        self.allowed[config.model] = config
        keys = {key for key, model in self._configured.items() if model == config.model}
        others = {key: other for key, other in self._replaced.items() if key not in keys}
        self._keep({**others, **dict.fromkeys(keys - {_key(config)}, config)})

    def _as_replaced(self, config: EngineConfig) -> EngineConfig:
        """What has taken the place of a configuration while an earlier manager ran, or itself."""
        if self.is_running:
            return config
        key = _key(config)
        self._configured[key] = config.model
        if key not in self._replaced:
            return config
        logger.warning("%s runs as it was last replaced, not as it is configured", config.model)
        return self._replaced[key].model_copy(update={"engine_id": config.engine_id})

    def _keep(self, replaced: dict[str, EngineConfig]) -> None:
        if replaced == self._replaced:
            return
        self._replaced = replaced
        if self._store is not None:
            try:
                self._store.save_replaced(replaced)
            except UnavailableError as error:  # a full disk must not end the service
                logger.error("%s", error)

    async def restore(self, store: EngineStore) -> None:
        """Go on where the manager before this one ended; children that still run are taken over."""
        # What is configured otherwise by now stays so, even should it be changed back.
        self._keep({key: config for key, config in self._replaced.items() if key in self._configured})
        await restore(self._pool.supervisor, store, lambda stored: self._make_engine(stored.config), adopt_child)

    def _check_new(self, engine_id: str) -> None:
        """Before a client is made, which may cost something."""
        if engine_id in self._pool:
            raise InvalidArgumentError(
                f"an engine {engine_id!r} is registered already; choose another id", field="engine_id"
            )


def _key(config: EngineConfig) -> str:
    """A configuration as JSON, without the engine's name."""
    bare = EngineConfig(kind=config.kind, model=config.model, model_path=config.model_path, options=config.options)
    return bare.model_dump_json(exclude_unset=True)
