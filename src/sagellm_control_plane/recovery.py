"""After a manager's end, planned or not: the next one takes over the children that run and starts those that died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from sagellm_control_plane.clients.base import EngineClient, EngineRecord
from sagellm_control_plane.clients.process import ProcessEngineClient, kill_recorded
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.store import EngineStore, StoredEngine
from sagellm_protocol import SageLLMError

logger = logging.getLogger(__name__)

Adopt = Callable[[EngineRecord], Awaitable[EngineClient]]


async def restore(
    supervisor: Supervisor, store: EngineStore, make_client: Callable[[StoredEngine], EngineClient], adopt: Adopt
) -> None:
    """Go on where the manager before this one ended, however it did.

    Call it when the engines of the configuration have been added and before any is started; it starts those that are
    wanted. `adopt` takes over a running child (`adopt_child` does); where it raises, nothing of that child is left, and
    the engine is made anew and started.
    Children of engines that are configured otherwise now, or no more, are stopped; so are those that were leaving.
    """
    # First those that took the place of a configured engine: what is left of that one ends.
    engines = sorted(store.load(), key=lambda stored: stored.stands_for is None)
    # All at once: one that hangs keeps nobody else waiting.
    children = await asyncio.gather(*(_adopt(stored.child, adopt) for stored in engines))
    for stored, child in zip(engines, children, strict=True):
        engine = supervisor.engines.get(stored.engine_id)
        if stored.wanted is Wanted.REMOVED:
            await _retire(stored, child, "was being taken away")
            store.delete(stored.engine_id)
            continue
        if engine is None and stored.stands_for is not None:
            engine = _take_place(supervisor, stored, make_client)
        if (engine is None and stored.is_configured) or (engine is not None and engine.given != stored.config):
            await _retire(stored, child, "is not configured as it was")
            if engine is None:
                store.delete(stored.engine_id)
            continue
        if engine is None:
            engine = supervisor.add(stored.instance, child or make_client(stored))
            engine.given = stored.config
        elif child is not None:
            engine.client = child
        _resume(supervisor, engine, stored, is_running=child is not None)


async def adopt_child(record: EngineRecord) -> EngineClient:
    """Take over a child process; one that does not answer any more is killed before the error is raised."""
    try:
        return await ProcessEngineClient.adopt(record)
    except SageLLMError:
        kill_recorded(record)
        raise


async def _adopt(record: EngineRecord | None, adopt: Adopt) -> EngineClient | None:
    if record is None:
        return None
    try:
        return await adopt(record)
    except SageLLMError as error:
        logger.warning("%s (pid %d) did not survive: %s", record.engine_id, record.pid, error)
        return None


def _take_place(
    supervisor: Supervisor, stored: StoredEngine, make_client: Callable[[StoredEngine], EngineClient]
) -> ManagedEngine | None:
    """Put an engine in the place of the configured one for which it stands; None where that one is another now."""
    configured = supervisor.engines.get(stored.stands_for or "")
    if configured is None or configured.given.model_copy(update={"engine_id": stored.engine_id}) != stored.config:
        return None
    instance = configured.instance.model_copy(update={"instance_id": stored.engine_id})
    supervisor.remove(configured.engine_id)  # it has not started
    engine = supervisor.add(instance, make_client(stored), is_configured=True)
    engine.given, engine.stands_for = stored.config, stored.stands_for
    return engine


async def _retire(stored: StoredEngine, child: EngineClient | None, reason: str) -> None:
    logger.info("%s %s: what the last manager left of it ends", stored.engine_id, reason)
    if child is not None:
        await child.stop()


def _resume(supervisor: Supervisor, engine: ManagedEngine, stored: StoredEngine, *, is_running: bool) -> None:
    engine.is_proven = stored.child is not None  # it was ready once: it is worth further tries
    if stored.wanted is Wanted.UNLOADED and is_running:
        supervisor.want(engine, Wanted.READY, is_kept=False)
    else:
        supervisor.want(engine, stored.wanted)
