"""Watching the engines that are loaded: their reports, their silence, their idleness.

One task looks at all engines every `tick_s`. What it finds it says to the `Supervisor`, which acts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sagellm_control_plane.clients.base import Killable, Pingable
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_protocol import SageLLMError

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineReport

logger = logging.getLogger(__name__)
T = TypeVar("T")


class OutOfTime(Exception):
    """Something took longer than it may; never to be taken for a timeout inside of it."""


@dataclass(slots=True)
class Findings:
    """Whom the monitor tells what."""

    on_report: Callable[[ManagedEngine, EngineReport], None]
    on_hang: Callable[[ManagedEngine, str], None]
    on_sign: Callable[[ManagedEngine], None]  # a report, or a health check that succeeded
    on_idle: Callable[[ManagedEngine], None]  # for `idle_unload_s`
    on_change: Callable[[ManagedEngine], None]  # `takes_requests` is not what it was
    on_tick: Callable[[], None]


@dataclass(slots=True, eq=False)
class _Watched:
    """What belongs to one stay of an engine in memory."""

    ready_at: float
    unwatch: Callable[[], None] | None = None
    probe: asyncio.Task[None] | None = None
    took_requests: bool = False


@dataclass(slots=True, eq=False)
class Monitor:
    """Watches engines from `begin` to `end`; its task lives as long as there is something to watch."""

    engines: Mapping[str, ManagedEngine]
    config: LifecycleConfig
    clock: Clock
    findings: Findings
    _watched: dict[ManagedEngine, _Watched] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    def begin(self, engine: ManagedEngine) -> None:
        """Watch an engine that has just become ready. Raises what its `watch` raises."""
        now = self.clock.now()
        # A thread is stopped by nothing but a step that does not end.
        is_thread = not isinstance(engine.client, Killable)
        engine.health.begin(now, self.config.stall_timeout_s if is_thread else 0.0)
        watched = self._watched[engine] = _Watched(ready_at=now)
        # Foreign engines have no reports: they are asked instead.
        watch = getattr(engine.client, "watch", None)
        if watch is not None:
            try:
                watched.unwatch = watch(partial(self._report, engine, watched))
            except BaseException:
                del self._watched[engine]
                raise
        self.tick_soon()

    def end(self, engine: ManagedEngine) -> None:
        """Watch it no more; one that is not watched is no error."""
        watched = self._watched.pop(engine, None)
        if watched is None:
            return
        if watched.unwatch is not None:
            watched.unwatch()
        if watched.probe is not None:
            watched.probe.cancel()

    def tick_soon(self) -> None:
        """See to it that there are ticks, at least one."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._tick_on())

    def stop(self) -> None:
        """Watch nothing any more."""
        for engine in list(self._watched):
            self.end(engine)
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def notice(self, engine: ManagedEngine) -> None:
        """Tell where `takes_requests` has changed."""
        watched = self._watched.get(engine)
        if watched is not None and watched.took_requests != engine.takes_requests:
            watched.took_requests = not watched.took_requests
            self.findings.on_change(engine)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _report(self, engine: ManagedEngine, watched: _Watched, report: EngineReport) -> None:
        if self._watched.get(engine) is not watched:
            return  # of its former life
        stats = report.stats
        if stats.num_output_tokens:
            engine.restarts.forget()  # it has worked
        engine.num_kv_tokens = stats.num_blocks * stats.block_size
        has_work = stats.num_running + stats.num_waiting > 0
        engine.health.report(self.clock.now(), num_steps=stats.num_steps, has_work=has_work)
        self.findings.on_report(engine, report)
        self.findings.on_sign(engine)
        self.notice(engine)

    async def _tick_on(self) -> None:
        while True:
            planned = self.clock.now() + self.config.tick_s
            await self.clock.sleep(self.config.tick_s)
            # If this process itself was stopped or busy, the reports lie in its sockets: no engine is to blame.
            late = self.clock.now() - planned
            for engine in list(self._watched):
                if late > self.config.tick_s:
                    engine.health.excuse(late)
                self._look_at(engine)
            self.findings.on_tick()
            if not self._watched:
                return

    def _look_at(self, engine: ManagedEngine) -> None:
        watched = self._watched.get(engine)
        if watched is None:
            return
        now = self.clock.now()
        reason = engine.health.look(now, has_work=engine.num_requests > 0)
        if reason is not None:
            self.findings.on_hang(engine, reason)
        # One that is stuck and makes no reports comes back by what it answers, so it is asked on.
        is_asked = reason is None or (engine.is_stuck and not engine.health.makes_reports)
        if is_asked and watched.probe is None and engine.health.is_probe_due(now):
            watched.probe = asyncio.ensure_future(self._probe(engine, watched))
        if now - watched.ready_at >= self.config.stable_after_s:
            engine.restarts.forget()
        idle_s = self.config.idle_unload_s
        if idle_s is not None and not engine.num_requests and now - engine.last_used >= idle_s:
            self.findings.on_idle(engine)
        self.notice(engine)

    async def _probe(self, engine: ManagedEngine, watched: _Watched) -> None:
        is_ok: bool | None = None
        client, limit_s = engine.client, self.config.probe_timeout_s
        try:
            if isinstance(client, Pingable):
                await within(self.clock, limit_s, client.ping())
                engine.health.answered(self.clock.now())
                is_ok = True  # unless it says otherwise; it may be in the midst of a long step
            is_ok = await within(self.clock, limit_s, client.health_check())
        except OutOfTime:
            if not is_ok:
                logger.info("%s did not answer a health check", engine.engine_id)
        except SageLLMError as error:
            logger.warning("the health check of %s failed: %s", engine.engine_id, error)
            is_ok = False
        watched.probe = None
        engine.health.probed(self.clock.now(), is_ok)
        if is_ok:
            self.findings.on_sign(engine)
        else:
            engine.breaker.record(False)
        self.notice(engine)


async def within(clock: Clock, limit_s: float, awaitable: Awaitable[T]) -> T:
    """The result of `awaitable`; `OutOfTime` where it takes longer. It has ended when this ends, however that is."""
    task: asyncio.Future[Any] = asyncio.ensure_future(awaitable)
    task.add_done_callback(_read)
    is_late = False

    def expire() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = clock.call_later(limit_s, expire)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    finally:
        timer.cancel()
    if task.cancelled() and is_late:
        raise OutOfTime(f"it took more than {limit_s:g} s")
    result: T = task.result()
    return result


def _read(task: asyncio.Future[Any]) -> None:
    """Who is cancelled in the moment of an error asks for no result, and asyncio would report that as a fault."""
    if not task.cancelled():
        task.exception()
