"""Into memory and out of it: the steps of an engine's life that take time, and what follows when one fails.

Holds `Loading`. The `Supervisor` says which step is next; one task an engine does it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sagellm_control_plane.clients.base import EngineClient, EngineLostError, Killable
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.lives import Lives
from sagellm_control_plane.monitor import Monitor, OutOfTime, within
from sagellm_control_plane.residency import measured_bytes
from sagellm_control_plane.types import EngineState
from sagellm_protocol import SageLLMError, UnavailableError

if TYPE_CHECKING:
    from sagellm_protocol import ModelDescription

logger = logging.getLogger(__name__)


class Loading:
    """Loads engines and ends them. Whatever happens on the way is written into their lives.

    `on_lost` is told, with the generation, of a child that dies while it is loaded, `on_pause_over` of an engine that
    may be tried again.
    """

    def __init__(
        self,
        config: LifecycleConfig,
        clock: Clock,
        lives: Lives,
        monitor: Monitor,
        on_lost: Callable[[ManagedEngine, int, SageLLMError], None],
        on_pause_over: Callable[[ManagedEngine], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._lives = lives
        self._monitor = monitor
        self._on_lost = on_lost
        self._on_pause_over = on_pause_over

    async def load(self, engine: ManagedEngine) -> None:
        """Start it. It is ready then, or held, or in error; or stopped where that is not wanted any more."""
        life = self._lives[engine]
        engine.error, engine.generation = None, engine.generation + 1
        starting = life.starting = asyncio.ensure_future(_start(engine.client))
        life.is_unwanted = False
        try:
            description = await within(self._clock, self._config.start_timeout_s, starting)
            engine.description = description.model_copy(update={"model": engine.instance.model_name})
            self._monitor.begin(engine)
        except asyncio.CancelledError:
            await self.end_client(engine)
            if not life.is_unwanted:
                raise  # it is this task that was cancelled
            self._lives.set_state(engine, EngineState.STOPPED, "unwanted before it was ready")
        except OutOfTime:
            await self.end_client(engine)
            limit = f"start_timeout_s ({self._config.start_timeout_s:g} s)"
            self.fail(engine, UnavailableError(f"{engine.engine_id} was not ready within {limit}; raise it"))
        except Exception as error:
            await self.end_client(engine)
            self.fail(engine, error)
        else:
            self._begin_service(engine)
        finally:
            life.starting = None
            self._lives.settle_loads(engine)

    async def unload(self, engine: ManagedEngine) -> None:
        """End it; it is stopped then."""
        self._monitor.end(engine)
        await self.end_client(engine)
        engine.is_stuck, engine.loss = False, None
        self._lives.set_state(engine, EngineState.STOPPED, "it has stopped")
        self._lives.save(engine)

    async def put_away(self, engine: ManagedEngine) -> None:
        """Free what a lost engine has left; it is in error then, until its next start."""
        error, engine.loss = engine.loss, None
        assert error is not None
        await self.end_client(engine, is_lost=True)
        self.fail(engine, error)
        self._lives.save(engine)

    def fail(self, engine: ManagedEngine, error: Exception) -> None:
        """It does not run. It is tried again later if it has ever run and may run again."""
        life, engine.error = self._lives[engine], str(error) or type(error).__name__
        delay = engine.restarts.next_delay() if engine.is_proven and _is_passing(error) else None
        if delay is None:
            engine.is_given_up = True
            if engine.restarts.num_failures > self._config.max_restarts:
                engine.error = f"given up after {self._config.max_restarts} restarts in a row: {engine.error}"
        else:
            life.pause = self._clock.call_later(delay, self.end_pause, engine)
        self._lives.set_state(engine, EngineState.ERROR, engine.error)
        # A loss is an event that was told already; what is new is the plan.
        level = logging.INFO if delay is not None and isinstance(error, EngineLostError) else logging.WARNING
        plan = "" if delay is None else f"; next try in {delay:.1f} s"
        logger.log(level, "%s is down: %s%s", engine.engine_id, engine.error, plan)
        self._lives.miss(engine, error)

    def end_pause(self, engine: ManagedEngine, *, is_over: bool = True) -> None:
        """Restart now; not `is_over`: never."""
        life = self._lives.get(engine)
        if life is None or life.pause is None:
            return
        life.pause.cancel()
        life.pause = None
        if is_over:
            self._on_pause_over(engine)

    async def end_client(self, engine: ManagedEngine, *, is_lost: bool = False) -> None:
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

    def _begin_service(self, engine: ManagedEngine) -> None:
        engine.is_proven, engine.is_stuck, engine.loss = True, False, None
        engine.last_used = self._clock.now()
        engine.breaker.reset()
        if isinstance(engine.client, Killable):
            engine.client.on_lost = partial(self._on_lost, engine, engine.generation)
        if self._config.memory_budget_bytes is not None and engine.instance.memory_bytes is None:
            engine.memory_bytes = measured_bytes(engine)
        is_open = engine.wanted is Wanted.READY
        self._lives.set_state(engine, EngineState.READY if is_open else EngineState.DRAINING, "it has started")
        self._lives.save(engine)


async def _start(client: EngineClient) -> ModelDescription:
    await client.start()
    return await client.describe_model()


def _is_passing(error: Exception) -> bool:
    """Whether the same start may succeed later: wrong options and missing files do not pass."""
    return not isinstance(error, SageLLMError) or error.retryable
