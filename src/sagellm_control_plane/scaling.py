"""The autoscalers of a control plane: one for each model that is configured so, over the engines of its supervisor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from math import isfinite

from sagellm_control_plane.autoscaler import Autoscaler, ScalingDecision
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clock import Clock
from sagellm_control_plane.events import EventHub, EventKind
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.replicas import SupervisedReplicas
from sagellm_control_plane.types import ExecutionInstance

logger = logging.getLogger(__name__)

MakeReplicaOf = Callable[[str, str], tuple[ExecutionInstance, EngineClient]]
"""A new replica of a model, by the model's name and the replica's id."""


class Scaling:
    """Runs the autoscalers from `start` to `stop`; their decisions are events."""

    def __init__(
        self,
        configs: Mapping[str, AutoscalerConfig],
        pool: EnginePool,
        make: MakeReplicaOf,
        num_waiting: Callable[[str], int],
        events: EventHub,
        clock: Clock,
    ) -> None:
        self._configs = configs
        self._pool = pool
        self._make = make
        self._num_waiting = num_waiting
        self._events = events
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to decide; a second call changes nothing."""
        if self._tasks:
            return
        for model, config in self._configs.items():
            replicas = SupervisedReplicas(
                model,
                self._pool.supervisor,
                self._pool.fleet,
                partial(self._make, model),
                self._clock,
                num_waiting=partial(self._num_waiting, model),
            )
            meter = self._pool.loads.open(model, self._clock.now(), config.quantile)
            autoscaler = Autoscaler(config, replicas, meter, self._clock, partial(self._decided, model))
            task = asyncio.ensure_future(autoscaler.run())
            task.add_done_callback(_log_failure)
            self._tasks.append(task)

    def stop(self) -> None:
        """Decide no more; the replicas stay as they are."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def _decided(self, model: str, decision: ScalingDecision) -> None:
        number, target = decision.num_replicas, decision.target
        # What cannot keep up is predicted to take for ever, which JSON does not know.
        details = {name: value if _is_finite(value) else None for name, value in asdict(decision).items()}
        self._events.publish(
            EventKind.SCALE, f"{model}: {number} -> {target} replicas: {decision.reason}", model=model, **details
        )


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or isfinite(value)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("an autoscaler has ended; the number of replicas stays as it is", exc_info=task.exception())
