"""The replicas of one model under a `Supervisor`: what the autoscaler sees of them, and how they come and go.

`make` decides where a replica runs: a child process here, or an actor of a Ray cluster; see `clients`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import numpy as np

from sagellm_control_plane.autoscaler import ReplicaFigures
from sagellm_control_plane.capacity import Limits
from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.restarts import Restarts
from sagellm_control_plane.step_time import DEFAULT_PRIOR, StepCoefficients
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import SageLLMError

logger = logging.getLogger(__name__)

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")  # of engines, which stand in paths and URLs

MakeReplica = Callable[[str], tuple[ExecutionInstance, EngineClient]]
"""The description and the client of a new replica, by its id."""


class SupervisedReplicas:
    """Implements `autoscaler.Replicas`. Replicas that don't start are taken away, and the next try waits longer."""

    def __init__(
        self,
        model: str,
        supervisor: Supervisor,
        fleet: Fleet,
        make: MakeReplica,
        clock: Clock,
        *,
        num_waiting: Callable[[], int] = lambda: 0,
        config: LifecycleConfig | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._model = model
        self._name = _NOT_IN_NAMES.sub("-", model)[-48:].strip("-.") or "replica"
        self._supervisor = supervisor
        self._fleet = fleet
        self._make = make
        self._clock = clock
        self._num_waiting = num_waiting
        self._config = config or LifecycleConfig()
        self._failures = Restarts(self._config, rng or random.Random())
        self._may_grow_at = -inf
        self._start_s: float | None = None

    def figures(self) -> ReplicaFigures:
        """As of now. Held, stopped and leaving engines count for nothing."""
        engines = self._engines()
        ready = [engine for engine in engines if engine.state is EngineState.READY]
        rows = [engine.row for engine in ready if engine.row is not None]
        kv_tokens = [engine.num_kv_tokens for engine in ready if engine.num_kv_tokens]
        places = [engine.instance.max_concurrent_requests for engine in engines]
        batched = [engine.client.config.max_num_batched_tokens for engine in engines]
        return ReplicaFigures(
            num_ready=len(ready),
            num_starting=len(engines) - len(ready),
            num_waiting=self._num_waiting(),
            num_context_tokens=int(self._fleet.held_tokens[rows].sum()) if rows else 0,
            coefficients=self._coefficients(rows),
            limits=Limits(
                max_num_running=min(places, default=1),
                max_num_batched_tokens=min(batched, default=2048),
                num_kv_tokens=min(kv_tokens, default=inf),
            ),
            start_s=self._start_s,
        )

    def grow(self, count: int) -> int:
        """Begin to start so many; none while those before them keep failing."""
        if self._clock.now() < self._may_grow_at:
            return 0
        for _ in range(count):
            taken = self._supervisor.engines
            engine_id = next(name for n in itertools.count() if (name := f"{self._name}-{n}") not in taken)
            instance, client = self._make(engine_id)
            engine = self._supervisor.add(instance, client)
            told = partial(self._started, engine, self._clock.now())
            self._supervisor.start(engine_id).add_done_callback(told)
        return count

    def shrink(self, count: int) -> None:
        """Let those go that have the fewest requests, of equals the last that came: its cache is the coldest."""
        candidates = [(engine.num_requests, -number, engine) for number, engine in enumerate(self._engines())]
        for _, _, engine in sorted(candidates, key=lambda candidate: candidate[:2])[:count]:
            self._supervisor.remove(engine.engine_id)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _engines(self) -> list[ManagedEngine]:
        engines = self._supervisor.engines.values()
        return [
            engine
            for engine in engines
            if engine.instance.model_name == self._model and engine.wanted is Wanted.READY and not engine.is_given_up
        ]

    def _coefficients(self, rows: Sequence[int]) -> StepCoefficients:
        fleet = self._fleet
        if not rows:
            return DEFAULT_PRIOR
        columns = (fleet.c0, fleet.a, fleet.q, fleet.k, fleet.b)
        return StepCoefficients(*(float(np.mean(column[list(rows)])) for column in columns))

    def _started(self, engine: ManagedEngine, began_at: float, started: asyncio.Future[None]) -> None:
        if started.cancelled():
            return
        now, error = self._clock.now(), started.exception()
        if error is None:
            self._start_s = now - began_at
            self._failures.forget()
        elif engine.is_given_up:
            delay = self._failures.next_delay() or self._config.max_restart_backoff_s
            self._may_grow_at = now + delay
            reason = error.message if isinstance(error, SageLLMError) else repr(error)
            logger.error("the new replica %s did not start: %s; next try in %.0f s", engine.engine_id, reason, delay)
            if engine.engine_id in self._supervisor.engines:
                self._supervisor.remove(engine.engine_id)
