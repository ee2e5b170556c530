"""The life of engines: `Supervisor` brings each to the state that is wanted of it, and back when it dies.

::

    STOPPED -> STARTING -> READY <-> DRAINING -> STOPPED
                  |          |          |
                  +----> ERROR <--------+        after a pause -> STARTING, until it is given up

A call only notes what is wanted. `_next` then says what has to be done, from what is wanted and what is; one task an
engine does it, one thing after the other, so that nothing has to be locked. Whatever may change the answer (a request
ends, a pause is over, memory gets free, an engine is lost) calls `_poke`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.breaker import BreakerState
from sagellm_control_plane.clients.base import Detachable, EngineClient, EngineLostError, Killable
from sagellm_control_plane.clock import Clock, LoopClock, TimerHandle
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.monitor import Findings, Monitor, OutOfTime, within
from sagellm_control_plane.residency import Residency, expected_bytes, measured_bytes
from sagellm_control_plane.store import EngineStore, StoredEngine
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SageLLMError,
    UnavailableError,
)

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineReport
    from sagellm_protocol import ModelDescription

logger = logging.getLogger(__name__)
_Action = Callable[[ManagedEngine], Awaitable[None]]


def _nothing(*_: Any) -> None:
    """A hook that nobody set."""


@dataclass(slots=True, eq=False)
class _Life:
    """What moves an engine."""

    goal: asyncio.Future[None] | None = None  # done when what is wanted is reached
    owner: asyncio.Task[None] | None = None  # what is done for that just now
    starting: asyncio.Future[ModelDescription] | None = None
    is_unwanted: bool = False  # what is starting was cancelled by us
    loaded: list[asyncio.Future[None]] = field(default_factory=list)  # goals that are reached when it is loaded
    pause: TimerHandle | None = None  # before the next restart
    is_hurried: bool = False  # all stops: nobody waits for requests any more


@dataclass(frozen=True, slots=True)
class LifecycleHooks:
    """Whom the supervisor tells what. All are called on the event loop and must not raise."""

    on_added: Callable[[ManagedEngine], None] = _nothing
    on_state: Callable[[ManagedEngine, EngineState, EngineState, str], None] = _nothing  # old, new, why
    on_change: Callable[[ManagedEngine], None] = _nothing  # `takes_requests` or `may_take_requests` may have changed
    on_lost: Callable[[ManagedEngine, SageLLMError], None] = _nothing  # its requests have to move, now
    on_report: Callable[[ManagedEngine, EngineReport], None] = _nothing
    on_removed: Callable[[ManagedEngine], None] = _nothing


class Supervisor:
    """Owns the engines of a control plane. Belongs to one event loop; `engines` is read by others at every decision.

    Each wish returns a future: done when the engine is where it was wanted, failed with what was in the way, or with
    `UnavailableError` when something else was wanted before it got there.
    """

    def __init__(
        self,
        config: LifecycleConfig | None = None,
        *,
        clock: Clock | None = None,
        hooks: LifecycleHooks | None = None,
        store: EngineStore | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.engines: dict[str, ManagedEngine] = {}
        self._config = config or LifecycleConfig()
        self._clock = clock or LoopClock()
        self._hooks = hooks or LifecycleHooks()
        self._store = store
        self._rng = rng or random.Random()
        self._lives: dict[ManagedEngine, _Life] = {}
        self._residency = Residency(self._config.memory_budget_bytes, self._config.swap_patience_s, self._clock)
        findings = Findings(
            on_report=self._hooks.on_report,
            on_hang=self._hung,
            on_sign=self._alive,
            on_idle=self._idle,
            on_change=self._hooks.on_change,
            on_tick=self._make_room,
        )
        self._monitor = Monitor(self.engines, self._config, self._clock, findings)

    # ---- wishes ---------------------------------------------------------------------------------------

    def add(self, instance: ExecutionInstance, client: EngineClient, *, is_configured: bool = False) -> ManagedEngine:
        """Take an engine into care; it loads with `start` or `wake`.

        `is_configured`: every manager adds it anew. What the store knows of it stands until something is wanted of it.
        """
        if instance.instance_id in self.engines:
            raise InvalidArgumentError(
                f"an engine {instance.instance_id!r} is registered already; choose another id", field="engine_id"
            )
        engine = ManagedEngine(instance, client, self._clock, self._config, self._rng)
        engine.is_configured, engine.on_left = is_configured, self._left
        if self._config.memory_budget_bytes is not None:
            engine.memory_bytes = instance.memory_bytes or expected_bytes(client.config)
        self.engines[engine.engine_id] = engine
        self._lives[engine] = _Life()
        self._hooks.on_added(engine)
        if not is_configured:
            self._save(engine)
        return engine

    def start(self, engine_id: str) -> asyncio.Future[None]:
        """Load an engine, or let one that was held take requests again; done when it is ready.

        Former failures are forgotten. Raises `UnavailableError` for one that is being removed.
        """
        engine = self._staying(engine_id)
        if engine.state is not EngineState.READY:
            engine.restarts.forget()
            engine.is_given_up = False
            self._end_pause(engine)
        return self.want(engine, Wanted.READY)

    def wake(self, engine: ManagedEngine) -> None:
        """A request could use this engine: load it if it is unloaded, and only then."""
        if engine.wanted is Wanted.UNLOADED and not engine.is_given_up:
            self.want(engine, Wanted.READY, is_kept=False)

    def hold(self, engine_id: str) -> asyncio.Future[None]:
        """Send an engine no more requests until `start`; done when those in flight have ended. It stays loaded."""
        return self.want(self._staying(engine_id), Wanted.HELD)

    def stop(self, engine_id: str) -> asyncio.Future[None]:
        """End an engine's requests with `abort` and free its model; done then. It stays out until `start`."""
        return self.want(self._staying(engine_id), Wanted.STOPPED)

    def remove(self, engine_id: str) -> asyncio.Future[None]:
        """Let an engine's requests end, then stop and forget it; done then."""
        return self.want(self.get(engine_id), Wanted.REMOVED)

    async def start_all(self, *, except_held: bool = False) -> list[BaseException | None]:
        """Load all engines, as far as the memory budget allows; what went wrong with each, in their order.

        Those that have no room load when they are asked for. `except_held` leaves out what is held or stopped.
        """
        waiting = []
        for engine in list(self.engines.values()):
            if except_held and engine.wanted in (Wanted.HELD, Wanted.STOPPED):
                continue
            if engine.wanted is not Wanted.REMOVED and self.has_room(engine):
                waiting.append(self.start(engine.engine_id))
            elif engine.wanted in (Wanted.HELD, Wanted.STOPPED):
                self.want(engine, Wanted.UNLOADED)
        return await asyncio.gather(*waiting, return_exceptions=True)

    async def stop_all(self) -> None:
        """Stop all engines, now. What was wanted of them stays in the store."""
        wishes = []
        for engine in list(self.engines.values()):
            self._lives[engine].is_hurried = True
            wanted = Wanted.REMOVED if engine.wanted is Wanted.REMOVED else Wanted.STOPPED
            wishes.append(self.want(engine, wanted, is_kept=False))
        await asyncio.gather(*wishes, return_exceptions=True)
        for life in self._lives.values():
            life.is_hurried = False
        self._monitor.stop()

    async def leave_running(self) -> None:
        """End this manager and leave the child engines to the next one; engines of this process stop."""
        self._monitor.stop()
        for engine, life in self._lives.items():
            self._end_pause(engine, is_over=False)
            if life.owner is not None:
                life.owner.cancel()
                await asyncio.wait({life.owner})
            if engine.is_loaded and isinstance(engine.client, Detachable):
                await engine.client.detach()
            else:
                await engine.client.stop()
            engine.state = EngineState.STOPPED

    def get(self, engine_id: str) -> ManagedEngine:
        """An engine; `NotFoundError` for an unknown id."""
        if engine_id not in self.engines:
            known = ", ".join(self.engines) or "none"
            raise NotFoundError(f"no engine {engine_id!r}; registered: {known}", engine_id=engine_id)
        return self.engines[engine_id]

    # ---- what others find out -------------------------------------------------------------------------

    def lost(self, engine: ManagedEngine, generation: int, error: SageLLMError) -> None:
        """The engine of this generation is dead: its state is ERROR from now on. Told again, nothing happens."""
        if generation == engine.generation and engine.is_loaded:
            self._lose(engine, error)

    def _hung(self, engine: ManagedEngine, reason: str) -> None:
        if engine.is_loaded:
            engine.is_stuck = not isinstance(engine.client, Killable)
            self._lose(engine, EngineLostError(f"{engine.engine_id} hangs: {reason}", engine_id=engine.engine_id))

    def _lose(self, engine: ManagedEngine, error: SageLLMError) -> None:
        engine.error = str(error)
        if not engine.is_stuck:
            engine.loss = error
            self._monitor.end(engine)
        self._set_state(engine, EngineState.ERROR, engine.error)
        self._hooks.on_lost(engine, error)
        self._poke(engine)

    def _alive(self, engine: ManagedEngine) -> None:
        """A stuck engine goes on after all: it is welcome, though its requests have moved."""
        if engine.is_stuck and not engine.health.is_doubted:
            engine.is_stuck = False
            self._set_state(engine, EngineState.DRAINING, "it goes on")
            self._poke(engine)

    def _idle(self, engine: ManagedEngine) -> None:
        if engine.wanted is Wanted.READY and engine.state is EngineState.READY:
            self.want(engine, Wanted.UNLOADED)

    def _left(self, engine: ManagedEngine) -> None:
        """A request has ended there."""
        is_out = engine.state is EngineState.READY and engine.breaker.state is BreakerState.OPEN
        if is_out and not any(map(_takes_requests, self._siblings(engine))):
            logger.warning("%s fails, but it is the last engine of its model: it stays in service", engine.engine_id)
            engine.breaker.reset()
        if not engine.num_requests:
            self._poke(engine)
        self._monitor.notice(engine)

    def _siblings(self, engine: ManagedEngine) -> Iterable[ManagedEngine]:
        model = engine.instance.model_name
        return (other for other in self.engines.values() if other is not engine and other.instance.model_name == model)

    # ---- the machine ----------------------------------------------------------------------------------

    def want(self, engine: ManagedEngine, wanted: Wanted, *, is_kept: bool = True) -> asyncio.Future[None]:
        """Want something of an engine; `is_kept`: the next manager is to want it, too."""
        life = self._lives[engine]
        goal = life.goal
        if engine.wanted is not wanted or goal is None or goal.done():
            if goal is not None and not goal.done():
                if wanted is Wanted.HELD and engine.state is EngineState.STARTING:
                    life.loaded.append(goal)  # it loads all the same
                else:
                    reason = f"{engine.engine_id} was to be {wanted} before it was {engine.wanted}"
                    goal.set_exception(UnavailableError(reason))
            goal = life.goal = asyncio.get_running_loop().create_future()
            goal.add_done_callback(_read)
            engine.wanted = wanted
        if is_kept:
            engine.kept = wanted
            self._save(engine)
        self._poke(engine)
        self._hooks.on_change(engine)
        return goal

    def _poke(self, engine: ManagedEngine) -> None:
        """Do what is to be done next, after what is being done."""
        life = self._lives.get(engine)
        if life is None:
            return  # removed
        if life.owner is None or life.owner.done():
            action = self._next(engine)
            if action is not None:
                life.owner = asyncio.ensure_future(self._own(engine, action))
                life.owner.add_done_callback(_log_failure)
        elif life.starting is not None and engine.is_leaving:
            life.is_unwanted = True
            life.starting.cancel()

    async def _own(self, engine: ManagedEngine, action: _Action | None) -> None:
        while action is not None:
            await action(engine)
            action = self._next(engine)

    def _next(self, engine: ManagedEngine) -> _Action | None:
        """What is to be done for what is wanted; None where it is reached or has to be waited for."""
        if engine.loss is not None:
            return self._put_away
        if engine.is_loaded or engine.is_stuck:
            return self._next_of_loaded(engine)
        engine.is_yielding = False
        if engine.wanted is Wanted.READY:
            return self._next_of_unloaded(engine)
        self._residency.leave_line(engine)
        self._call_line()
        if engine.wanted in (Wanted.STOPPED, Wanted.REMOVED):
            engine.error = None
            self._set_state(engine, EngineState.STOPPED, "wanted")
        self._reach(engine)
        if engine.wanted is Wanted.REMOVED:
            self._forget(engine)
        return None

    def _next_of_loaded(self, engine: ManagedEngine) -> _Action | None:
        is_hurried = engine.wanted is Wanted.STOPPED or self._lives[engine].is_hurried
        if engine.is_leaving and (is_hurried or not engine.num_requests):
            self._set_state(engine, EngineState.DRAINING, f"wanted: {engine.wanted}")
            return self._unload
        if engine.is_stuck:
            return None
        is_open = engine.wanted is Wanted.READY and not engine.is_yielding
        self._set_state(engine, EngineState.READY if is_open else EngineState.DRAINING, "wanted")
        if is_open or (engine.wanted is Wanted.HELD and not engine.num_requests):
            engine.error = None
            self._reach(engine)
        return None

    def _next_of_unloaded(self, engine: ManagedEngine) -> _Action | None:
        if engine.is_given_up or self._lives[engine].pause is not None:
            return None
        try:
            if self._residency.may_load(engine, self.engines.values()):
                self._set_state(engine, EngineState.STARTING, "wanted")
                self._call_line()
                return self._load
        except ResourceExhaustedError as error:
            self._fail(engine, error)
            self._call_line()
            return None
        self._make_room()
        self._monitor.tick_soon()  # patience ends by time
        return None

    async def _load(self, engine: ManagedEngine) -> None:
        life = self._lives[engine]
        engine.error, engine.generation = None, engine.generation + 1
        starting = life.starting = asyncio.ensure_future(_start(engine.client))
        life.is_unwanted = False
        try:
            description = await within(self._clock, self._config.start_timeout_s, starting)
            engine.description = description.model_copy(update={"model": engine.instance.model_name})
            self._monitor.begin(engine)
        except asyncio.CancelledError:
            await self._end_client(engine)
            if not life.is_unwanted:
                raise  # it is this task that was cancelled
            self._set_state(engine, EngineState.STOPPED, "unwanted before it was ready")
        except OutOfTime:
            await self._end_client(engine)
            limit = f"start_timeout_s ({self._config.start_timeout_s:g} s)"
            self._fail(engine, UnavailableError(f"{engine.engine_id} was not ready within {limit}; raise it"))
        except Exception as error:
            await self._end_client(engine)
            self._fail(engine, error)
        else:
            self._begin_service(engine)
        finally:
            life.starting = None
            self._settle_loads(engine)

    def _begin_service(self, engine: ManagedEngine) -> None:
        engine.is_proven, engine.is_stuck, engine.loss = True, False, None
        engine.last_used = self._clock.now()
        engine.breaker.reset()
        if isinstance(engine.client, Killable):
            engine.client.on_lost = partial(self.lost, engine, engine.generation)
        if self._config.memory_budget_bytes is not None and engine.instance.memory_bytes is None:
            engine.memory_bytes = measured_bytes(engine)
        is_open = engine.wanted is Wanted.READY
        self._set_state(engine, EngineState.READY if is_open else EngineState.DRAINING, "it has started")
        self._save(engine)

    async def _unload(self, engine: ManagedEngine) -> None:
        self._monitor.end(engine)
        await self._end_client(engine)
        engine.is_stuck, engine.loss = False, None
        self._set_state(engine, EngineState.STOPPED, "it has stopped")
        self._save(engine)

    async def _put_away(self, engine: ManagedEngine) -> None:
        error, engine.loss = engine.loss, None
        assert error is not None
        await self._end_client(engine, is_lost=True)
        self._fail(engine, error)
        self._save(engine)

    def _fail(self, engine: ManagedEngine, error: Exception) -> None:
        """It does not run. It is tried again later if it has ever run and may run again."""
        life, engine.error = self._lives[engine], str(error) or type(error).__name__
        delay = engine.restarts.next_delay() if engine.is_proven and _is_passing(error) else None
        if delay is None:
            engine.is_given_up = True
            if engine.restarts.num_failures > self._config.max_restarts:
                engine.error = f"given up after {self._config.max_restarts} restarts in a row: {engine.error}"
        else:
            life.pause = self._clock.call_later(delay, self._end_pause, engine)
        self._set_state(engine, EngineState.ERROR, engine.error)
        # A loss is an event that was told already; what is new is the plan.
        level = logging.INFO if delay is not None and isinstance(error, EngineLostError) else logging.WARNING
        plan = "" if delay is None else f"; next try in {delay:.1f} s"
        logger.log(level, "%s is down: %s%s", engine.engine_id, engine.error, plan)
        if life.goal is not None and not life.goal.done() and engine.wanted is Wanted.READY:
            life.goal.set_exception(error)
        self._hooks.on_change(engine)

    def _end_pause(self, engine: ManagedEngine, *, is_over: bool = True) -> None:
        """Restart now; not `is_over`: never."""
        life = self._lives.get(engine)
        if life is None or life.pause is None:
            return
        life.pause.cancel()
        life.pause = None
        if is_over:
            self._poke(engine)

    async def _end_client(self, engine: ManagedEngine, *, is_lost: bool = False) -> None:
        """Nothing of the engine runs after this, as far as that is in our power."""
        client = engine.client
        if not (is_lost and isinstance(client, Killable)):
            try:
                await within(self._clock, self._config.stop_timeout_s, client.stop())
                return
            except Exception as error:
                logger.error("%s did not stop: %s", engine.engine_id, error)
        if isinstance(client, Killable):
            try:
                await client.kill()
            except Exception:
                logger.exception("%s could not be killed", engine.engine_id)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _set_state(self, engine: ManagedEngine, state: EngineState, reason: str) -> None:
        if engine.state is state:
            return
        old, engine.state = engine.state, state
        logger.debug("%s: %s -> %s (%s)", engine.engine_id, old, state, reason)
        self._hooks.on_state(engine, old, state, reason)
        self._hooks.on_change(engine)
        if state in (EngineState.STOPPED, EngineState.ERROR):
            self._call_line()

    def _reach(self, engine: ManagedEngine) -> None:
        goal = self._lives[engine].goal
        if goal is not None and not goal.done():
            goal.set_result(None)

    def _settle_loads(self, engine: ManagedEngine) -> None:
        goals = self._lives[engine].loaded
        while goals:
            if engine.is_loaded:
                goals.pop().set_result(None)
            else:
                goals.pop().set_exception(UnavailableError(engine.error or f"{engine.engine_id} was stopped"))

    def _forget(self, engine: ManagedEngine) -> None:
        del self.engines[engine.engine_id]
        del self._lives[engine]
        self._residency.leave_line(engine)
        if self._store is not None:
            _try_to_write(lambda store: store.delete(engine.engine_id), self._store)
        self._hooks.on_removed(engine)
        self._call_line()

    def _make_room(self) -> None:
        for engine in self._residency.who_yields(self.engines.values()):
            engine.is_yielding = True
            self.want(engine, Wanted.UNLOADED, is_kept=False)
        if self._residency.num_waiting:
            self._monitor.tick_soon()

    def _call_line(self) -> None:
        """Memory got free, or another one is first in line: it may load."""
        first = self._residency.first
        if first is not None:
            asyncio.get_running_loop().call_soon(self._poke, first)

    def has_room(self, engine: ManagedEngine) -> bool:
        """Whether it is in memory, or fits there beside all that are."""
        return engine.state is not EngineState.STOPPED or self._residency.fits(engine, self.engines.values())

    def _staying(self, engine_id: str) -> ManagedEngine:
        engine = self.get(engine_id)
        if engine.wanted is Wanted.REMOVED:
            raise UnavailableError(f"{engine_id} is being taken away; register a new engine", engine_id=engine_id)
        return engine

    def _save(self, engine: ManagedEngine) -> None:
        if self._store is not None:
            _try_to_write(lambda store: store.save(StoredEngine.of(engine)), self._store)


async def _start(client: EngineClient) -> ModelDescription:
    await client.start()
    return await client.describe_model()


def _takes_requests(engine: ManagedEngine) -> bool:
    return engine.takes_requests


def _is_passing(error: Exception) -> bool:
    """Whether the same start may succeed later: wrong options and missing files do not pass."""
    return not isinstance(error, SageLLMError) or error.retryable


def _read(goal: asyncio.Future[None]) -> None:
    if not goal.cancelled():
        goal.exception()  # often nobody waits for it; the engine's state tells the same


def _log_failure(owner: asyncio.Task[None]) -> None:
    if not owner.cancelled() and owner.exception() is not None:
        logger.error("an engine is not cared for any more", exc_info=owner.exception())


def _try_to_write(write: Callable[[EngineStore], None], store: EngineStore) -> None:
    """A full disk, or a child that dies while it is asked, must not end the service; the store keeps an older state."""
    try:
        write(store)
    except UnavailableError as error:
        logger.error("%s", error)
