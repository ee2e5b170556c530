"""The life of engines: `Supervisor` brings each to the state that is wanted of it, and back when it dies.

::

    STOPPED -> STARTING -> READY <-> DRAINING -> STOPPED
                  |          |          |
                  +----> ERROR <--------+        after a pause -> STARTING, until it is given up

A call only notes what is wanted. `_next` then says what has to be done, from what is wanted and what is; one task an
engine does it, one thing after the other, so that nothing has to be locked. Whatever may change the answer (a request
ends, a pause is over, memory gets free, an engine is lost) calls `_poke`. `loading.py` holds what is done, `lives.py`
what is written down of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from sagellm_control_plane.clients.base import Detachable, EngineClient, EngineLostError, Killable
from sagellm_control_plane.clock import Clock, LoopClock
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.lives import LifecycleHooks, Lives
from sagellm_control_plane.loading import Loading
from sagellm_control_plane.monitor import Findings, Monitor
from sagellm_control_plane.residency import Residency, expected_bytes
from sagellm_control_plane.store import EngineStore
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SageLLMError,
    UnavailableError,
)

logger = logging.getLogger(__name__)
_Action = Callable[[ManagedEngine], Awaitable[None]]


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
        self._rng = rng or random.Random()
        self._lives = Lives(self._hooks, store, on_freed=self._call_line)
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
        self._loading = Loading(self._config, self._clock, self._lives, self._monitor, self.lost, self._poke)

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
        self._lives.add(engine)
        if not is_configured:
            self._lives.save(engine)
        return engine

    def start(self, engine_id: str) -> asyncio.Future[None]:
        """Load an engine, or let one that was held take requests again; done when it is ready.

        Former failures are forgotten. Raises `UnavailableError` for one that is being removed.
        """
        engine = self._staying(engine_id)
        if engine.state is not EngineState.READY:
            engine.restarts.forget()
            engine.is_given_up = False
            self._loading.end_pause(engine)
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

    def hand_over(self, old: ManagedEngine, new: ManagedEngine) -> asyncio.Future[None]:
        """Remove an engine whose place another one has taken, in the eyes of the next manager, too."""
        if old.is_configured:
            new.stands_for = old.stands_for or old.engine_id
        self._lives.save(new)
        return self.remove(old.engine_id)

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
        for engine in self.engines.values():
            self._lives[engine].is_hurried = False
        self._monitor.stop()

    async def leave_running(self) -> None:
        """End this manager and leave the child engines to the next one; engines of this process stop.

        What was wanted of them and the children stay in the store. Requests that still run there end with an error.
        """
        self._monitor.stop()
        self._lives.seal()
        engines = list(self.engines.values())
        children = {engine for engine in engines if engine.is_loaded and isinstance(engine.client, Detachable)}
        # First of all nothing is wanted of any: no request waits for one or wakes it, and what ends makes no room.
        for engine in engines:
            self._loading.end_pause(engine, is_over=False)
            self._residency.leave_line(engine)
            self._lives.aim(engine, Wanted.STOPPED)
            self._hooks.on_change(engine)
            if engine in children:
                self._lives.set_state(engine, EngineState.STOPPED, "left to the next manager")
        for engine in engines:
            owner = self._lives[engine].owner
            if owner is not None:
                owner.cancel()
                await asyncio.wait({owner})
            if engine in children:
                await cast(Detachable, engine.client).detach()
            else:
                await self._loading.end_client(engine)
                self._lives.set_state(engine, EngineState.STOPPED, "its manager ends")

    def get(self, engine_id: str) -> ManagedEngine:
        """An engine; `NotFoundError` for an unknown id."""
        if engine_id not in self.engines:
            known = ", ".join(self.engines) or "none"
            raise NotFoundError(f"no engine {engine_id!r}; registered: {known}", engine_id=engine_id)
        return self.engines[engine_id]

    def has_room(self, engine: ManagedEngine) -> bool:
        """Whether it is in memory, or fits there beside all that are."""
        return engine.state is not EngineState.STOPPED or self._residency.fits(engine, self.engines.values())

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
        self._lives.set_state(engine, EngineState.ERROR, engine.error)
        self._hooks.on_lost(engine, error)
        self._poke(engine)

    def _alive(self, engine: ManagedEngine) -> None:
        """A stuck engine goes on after all: it is welcome, though its requests have moved."""
        if engine.is_stuck and not engine.health.is_doubted:
            engine.is_stuck = False
            self._lives.set_state(engine, EngineState.DRAINING, "it goes on")
            self._poke(engine)

    def _idle(self, engine: ManagedEngine) -> None:
        if engine.wanted is Wanted.READY and engine.state is EngineState.READY:
            self.want(engine, Wanted.UNLOADED)

    def _left(self, engine: ManagedEngine) -> None:
        """A request has ended there."""
        is_out = engine.breaker.is_open and engine.state is EngineState.READY
        if is_out and not any(map(_takes_requests, self._siblings(engine))):
            logger.warning("%s fails, but it is the last engine of its model: it stays in service", engine.engine_id)
            engine.breaker.reset()
        if not engine.num_requests and not engine.is_staying:
            self._poke(engine)
        self._monitor.notice(engine)

    def _siblings(self, engine: ManagedEngine) -> Iterable[ManagedEngine]:
        model = engine.instance.model_name
        return (other for other in self.engines.values() if other is not engine and other.instance.model_name == model)

    # ---- the machine ----------------------------------------------------------------------------------

    def want(self, engine: ManagedEngine, wanted: Wanted, *, is_kept: bool = True) -> asyncio.Future[None]:
        """Want something of an engine; `is_kept`: the next manager is to want it, too."""
        goal = self._lives.aim(engine, wanted)
        if is_kept:
            engine.kept = wanted
            self._lives.save(engine)
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
            return self._loading.put_away
        if engine.is_loaded or engine.is_stuck:
            return self._next_of_loaded(engine)
        engine.is_yielding = False
        if engine.wanted is Wanted.READY:
            return self._next_of_unloaded(engine)
        self._residency.leave_line(engine)
        self._call_line()
        if engine.wanted in (Wanted.STOPPED, Wanted.REMOVED):
            engine.error = None
            self._lives.set_state(engine, EngineState.STOPPED, "wanted")
        self._lives.reach(engine)
        if engine.wanted is Wanted.REMOVED:
            del self.engines[engine.engine_id]
            self._lives.forget(engine)
            self._call_line()
        return None

    def _next_of_loaded(self, engine: ManagedEngine) -> _Action | None:
        is_hurried = engine.wanted is Wanted.STOPPED or self._lives[engine].is_hurried
        if engine.is_leaving and (is_hurried or not engine.num_requests):
            self._lives.set_state(engine, EngineState.DRAINING, f"wanted: {engine.wanted}")
            return self._loading.unload
        if engine.is_stuck:
            return None
        is_open = engine.wanted is Wanted.READY and not engine.is_yielding
        self._lives.set_state(engine, EngineState.READY if is_open else EngineState.DRAINING, "wanted")
        if is_open or (engine.wanted is Wanted.HELD and not engine.num_requests):
            engine.error = None
            self._lives.reach(engine)
        return None

    def _next_of_unloaded(self, engine: ManagedEngine) -> _Action | None:
        if engine.is_given_up or self._lives[engine].pause is not None:
            return None
        try:
            if self._residency.may_load(engine, self.engines.values()):
                self._lives.set_state(engine, EngineState.STARTING, "wanted")
                self._call_line()
                return self._loading.load
        except ResourceExhaustedError as error:
            self._loading.fail(engine, error)
            self._call_line()
            return None
        self._make_room()
        self._monitor.tick_soon()  # patience ends by time
        return None

    # ---- steps of the above ---------------------------------------------------------------------------

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

    def _staying(self, engine_id: str) -> ManagedEngine:
        engine = self.get(engine_id)
        if engine.wanted is Wanted.REMOVED:
            raise UnavailableError(f"{engine_id} is being taken away; register a new engine", engine_id=engine_id)
        return engine


def _takes_requests(engine: ManagedEngine) -> bool:
    return engine.takes_requests


def _log_failure(owner: asyncio.Task[None]) -> None:
    if not owner.cancelled() and owner.exception() is not None:
        logger.error("an engine is not cared for any more", exc_info=owner.exception())
