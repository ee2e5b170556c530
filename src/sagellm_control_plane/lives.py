"""The lives of engines as they are written down: states, goals and pauses; and who is told of what.

Holds `Lives`, which the `Supervisor` and its `Loading` share. It decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.clock import TimerHandle
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.store import EngineStore, StoredEngine
from sagellm_control_plane.types import EngineState
from sagellm_protocol import SageLLMError, UnavailableError

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineReport
    from sagellm_protocol import ModelDescription

logger = logging.getLogger(__name__)


def _nothing(*_: Any) -> None:
    """A hook that nobody set."""


@dataclass(frozen=True, slots=True)
class LifecycleHooks:
    """Whom the supervisor tells what. All are called on the event loop and must not raise."""

    on_added: Callable[[ManagedEngine], None] = _nothing
    on_state: Callable[[ManagedEngine, EngineState, EngineState, str], None] = _nothing  # old, new, why
    on_change: Callable[[ManagedEngine], None] = _nothing  # `takes_requests` or `may_take_requests` may have changed
    on_lost: Callable[[ManagedEngine, SageLLMError], None] = _nothing  # its requests have to move, now
    on_report: Callable[[ManagedEngine, EngineReport], None] = _nothing
    on_removed: Callable[[ManagedEngine], None] = _nothing


@dataclass(slots=True, eq=False)
class Life:
    """What moves an engine."""

    goal: asyncio.Future[None] | None = None  # done when what is wanted is reached
    owner: asyncio.Task[None] | None = None  # what is done for that just now
    starting: asyncio.Future[ModelDescription] | None = None
    is_unwanted: bool = False  # what is starting was cancelled by us
    loaded: list[asyncio.Future[None]] = field(default_factory=list)  # goals that are reached when it is loaded
    pause: TimerHandle | None = None  # before the next restart
    is_hurried: bool = False  # all stops: nobody waits for requests any more


class Lives:
    """The life of each engine, what is stored of it, and those who are told. `on_freed`: one has left memory."""

    def __init__(self, hooks: LifecycleHooks, store: EngineStore | None, on_freed: Callable[[], None]) -> None:
        self._hooks = hooks
        self._store = store
        self._on_freed = on_freed
        self._lives: dict[ManagedEngine, Life] = {}

    def __getitem__(self, engine: ManagedEngine) -> Life:
        return self._lives[engine]

    def get(self, engine: ManagedEngine) -> Life | None:
        """None for one that was removed."""
        return self._lives.get(engine)

    def add(self, engine: ManagedEngine) -> None:
        """An engine has come."""
        self._lives[engine] = Life()
        self._hooks.on_added(engine)

    def forget(self, engine: ManagedEngine) -> None:
        """It has left for good."""
        del self._lives[engine]
        if self._store is not None:
            _try_to_write(lambda store: store.delete(engine.engine_id), self._store)
        self._hooks.on_removed(engine)

    def set_state(self, engine: ManagedEngine, state: EngineState, reason: str) -> None:
        """Its state is this from now on; nothing where it was so before."""
        if engine.state is state:
            return
        old, engine.state = engine.state, state
        logger.debug("%s: %s -> %s (%s)", engine.engine_id, old, state, reason)
        self._hooks.on_state(engine, old, state, reason)
        self._hooks.on_change(engine)
        if state in (EngineState.STOPPED, EngineState.ERROR):
            self._on_freed()

    def aim(self, engine: ManagedEngine, wanted: Wanted) -> asyncio.Future[None]:
        """What is wanted of it from now on, and its goal: the one it has where nothing else was wanted."""
        life = self._lives[engine]
        goal = life.goal
        if engine.wanted is wanted and goal is not None and not goal.done():
            return goal
        if goal is not None and not goal.done():
            if wanted is Wanted.HELD and engine.state is EngineState.STARTING:
                life.loaded.append(goal)  # it loads all the same
            else:
                reason = f"{engine.engine_id} was to be {wanted} before it was {engine.wanted}"
                goal.set_exception(UnavailableError(reason))
        engine.wanted = wanted
        goal = life.goal = asyncio.get_running_loop().create_future()
        goal.add_done_callback(_read)
        return goal

    def reach(self, engine: ManagedEngine) -> None:
        """It is where it was wanted."""
        goal = self._lives[engine].goal
        if goal is not None and not goal.done():
            goal.set_result(None)

    def miss(self, engine: ManagedEngine, error: Exception) -> None:
        """It is not ready, and whether requests may wait for it can have changed."""
        goal = self._lives[engine].goal
        if goal is not None and not goal.done() and engine.wanted is Wanted.READY:
            goal.set_exception(error)
        self._hooks.on_change(engine)

    def settle_loads(self, engine: ManagedEngine) -> None:
        """A start has ended, well or not: whoever waits for no more than that is told."""
        goals = self._lives[engine].loaded
        while goals:
            if engine.is_loaded:
                goals.pop().set_result(None)
            else:
                goals.pop().set_exception(UnavailableError(engine.error or f"{engine.engine_id} was stopped"))

    def seal(self) -> None:
        """Store nothing from now on: the next manager is to find what was."""
        self._store = None

    def save(self, engine: ManagedEngine) -> None:
        """Keep it as it is now for the next manager."""
        if self._store is not None:
            _try_to_write(lambda store: store.save(StoredEngine.of(engine)), self._store)


def _read(goal: asyncio.Future[None]) -> None:
    if not goal.cancelled():
        goal.exception()  # often nobody waits for it; the engine's state tells the same


def _try_to_write(write: Callable[[EngineStore], None], store: EngineStore) -> None:
    """A full disk, or a child that dies while it is asked, must not end the service; the store keeps an older state."""
    try:
        write(store)
    except UnavailableError as error:
        logger.error("%s", error)
