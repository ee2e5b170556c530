"""Rolling replacement: new engines in the place of a model's old ones, without a gap and without a broken answer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Container

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_protocol import NotFoundError, ResourceExhaustedError, UnavailableError

MakeClient = Callable[[ManagedEngine, str], EngineClient]


async def replace_model(
    supervisor: Supervisor, model: str, make_client: MakeClient, *, on_first: Callable[[], None] = lambda: None
) -> list[ManagedEngine]:
    """Replace all engines of `model`, one after the other; returns the new ones.

    `make_client(old, engine_id)` makes the client that comes for `old`. Each new engine is ready before its old one
    takes no more requests, and that one's requests end undisturbed. One that is held or stopped gets a new one that is
    so, too. Where a new one does not start its error is raised: it has been taken away again, and the old engines that
    are left stay in service. An old one that somebody else takes away meanwhile (an operator, the autoscaler, another
    replacement) gets none in its place. `on_first` is called when the first new one is there; engines that came before
    that are replaced, later ones are not.
    """
    olds = deque(_staying(supervisor, model))
    if not olds:
        raise NotFoundError(f"no engine serves the model {model!r}; register one instead", field="model")
    news: list[ManagedEngine] = []
    while olds:
        old = olds.popleft()
        new = await _start_for(supervisor, old, make_client)
        if new is None:
            continue
        if not news:
            on_first()
            olds.extend(engine for engine in _staying(supervisor, model) if engine not in (old, new, *olds))
        news.append(new)
        await supervisor.hand_over(old, new)
    return news


def _staying(supervisor: Supervisor, model: str) -> list[ManagedEngine]:
    engines = supervisor.engines.values()
    return [engine for engine in engines if engine.instance.model_name == model and not _leaves(engine)]


async def _start_for(supervisor: Supervisor, old: ManagedEngine, make_client: MakeClient) -> ManagedEngine | None:
    """The one that can take the place of `old`; None where that one leaves by itself."""
    if _leaves(old):
        return None
    engine_id = _next_name(old.engine_id, supervisor.engines)
    client = make_client(old, engine_id)
    instance = old.instance.model_copy(update={"instance_id": engine_id})
    if instance.max_concurrent_requests == old.given.max_batch_size:  # unless it was said otherwise
        instance = instance.model_copy(update={"max_concurrent_requests": client.config.max_batch_size})
    new = supervisor.add(instance, client, is_configured=old.is_configured)
    if old.wanted in (Wanted.HELD, Wanted.STOPPED):
        supervisor.want(new, old.wanted)
        return new
    try:
        if old.is_loaded and not supervisor.has_room(new):
            raise ResourceExhaustedError(
                f"memory_budget_bytes has no room for {engine_id} beside {old.engine_id}; raise it for as long as the "
                "replacement takes",
                retryable=False,
                field="memory_budget_bytes",
            )
        await supervisor.start(engine_id)
        if not new.is_open:
            raise UnavailableError(f"{engine_id} was lost when it had just started: {new.error}", engine_id=engine_id)
    except BaseException:
        _take_away(supervisor, new)
        raise
    if _leaves(old):
        _take_away(supervisor, new)
        return None
    return new


def _take_away(supervisor: Supervisor, engine: ManagedEngine) -> None:
    if not _leaves(engine):
        supervisor.remove(engine.engine_id)


def _leaves(engine: ManagedEngine) -> bool:
    """Whether it is to go for good, or has gone."""
    return engine.wanted is Wanted.REMOVED


def _next_name(engine_id: str, taken: Container[str]) -> str:
    """`engine-0`, then `engine-0.2`, `engine-0.3` ..."""
    base, dot, number = engine_id.rpartition(".")
    if not (dot and number.isdigit()):
        base, number = engine_id, "1"
    return next(name for n in itertools.count(int(number) + 1) if (name := f"{base}.{n}") not in taken)
