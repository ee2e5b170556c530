"""Rolling replacement: new engines in the place of a model's old ones, without a gap and without a broken answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_protocol import NotFoundError, ResourceExhaustedError

MakeClient = Callable[[ManagedEngine, str], EngineClient]


async def replace_model(supervisor: Supervisor, model: str, make_client: MakeClient) -> list[ManagedEngine]:
    """Replace all engines of `model`, one after the other; returns the new ones.

    `make_client(old, engine_id)` makes the client that comes for `old`. Each new engine is ready before its old one
    takes no more requests, and that one's requests end undisturbed. Where a new one does not start its error is raised:
    it has been taken away again, and the old engines that are left stay in service.
    """
    olds = [engine for engine in supervisor.engines.values() if engine.instance.model_name == model]
    olds = [engine for engine in olds if engine.wanted is not Wanted.REMOVED]
    if not olds:
        raise NotFoundError(f"no engine serves the model {model!r}; register one instead", field="model")
    return [await _replace(supervisor, old, make_client) for old in olds]


async def _replace(supervisor: Supervisor, old: ManagedEngine, make_client: MakeClient) -> ManagedEngine:
    engine_id = _next_name(old.engine_id, supervisor.engines)
    instance = old.instance.model_copy(update={"instance_id": engine_id})
    new = supervisor.add(instance, make_client(old, engine_id), is_configured=old.is_configured)
    try:
        if old.is_loaded and not supervisor.has_room(new):
            raise ResourceExhaustedError(
                f"memory_budget_bytes has no room for {engine_id} beside {old.engine_id}; raise it for as long as the "
                "replacement takes",
                retryable=False,
                field="memory_budget_bytes",
            )
        await supervisor.start(engine_id)
    except BaseException:
        if new.wanted is not Wanted.REMOVED:
            supervisor.remove(engine_id)
        raise
    await supervisor.remove(old.engine_id)
    return new


def _next_name(engine_id: str, taken: Container[str]) -> str:
    """`engine-0`, then `engine-0.2`, `engine-0.3` ..."""
    base, dot, number = engine_id.rpartition(".")
    if not (dot and number.isdigit()):
        base, number = engine_id, "1"
    return next(name for n in itertools.count(int(number) + 1) if (name := f"{base}.{n}") not in taken)
