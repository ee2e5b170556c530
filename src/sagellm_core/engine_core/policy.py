"""Scheduling policies of one engine: who is admitted first, and who gives way when memory runs out.

A policy is one class and one line in `POLICIES`. It only orders; budgets, blocks and fairness of the step
stay in the scheduler. Smaller keys are served first; the running request with the largest key is preempted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from sagellm_core.engine_core.request import EngineRequest
from sagellm_protocol import InvalidArgumentError


class SchedulingPolicy(ABC):
    """An order over requests; keys are compared, so all keys of a policy have one shape."""

    @abstractmethod
    def key(self, request: EngineRequest, now: float) -> tuple[float, ...]:
        """The request's place at time `now` (seconds of the engine's clock); unique per request."""


class FcfsPolicy(SchedulingPolicy):
    """First come, first served. A preempted request keeps its arrival, hence returns to the front."""

    def key(self, request: EngineRequest, now: float) -> tuple[float, ...]:
        return (request.core.arrival_time, request.sequence_number)


class PriorityPolicy(SchedulingPolicy):
    """Lower `priority` first; equals in order of arrival."""

    def key(self, request: EngineRequest, now: float) -> tuple[float, ...]:
        return (request.core.priority, request.core.arrival_time, request.sequence_number)


POLICIES: dict[str, type[SchedulingPolicy]] = {"fcfs": FcfsPolicy, "priority": PriorityPolicy}


def get_policy(name: str) -> SchedulingPolicy:
    """The policy registered as `name`."""
    if name not in POLICIES:
        raise InvalidArgumentError(
            f"unknown scheduling_policy {name!r}; choose one of {', '.join(sorted(POLICIES))}",
            field="scheduling_policy",
        )
    return POLICIES[name]()
