"""`priority`: urgent requests first, with ageing so that none starves."""

from __future__ import annotations

from sagellm_control_plane.policies.base import Key, SchedulingPolicy, WaitingRequest


class PriorityPolicy(SchedulingPolicy):
    """A request of the next lower priority goes as if it had come `ageing_s` seconds later.

    Which is what ageing does, without a key that changes: of two requests, the one that leads once leads always. A
    request of priority p is overtaken only by those of a higher priority p - d that come within d * `ageing_s` seconds
    after it; what comes later waits behind it.
    """

    name = "priority"

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return (waiting.arrival_time + int(waiting.request.priority) * self.context.options.ageing_s,)

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        return first.request.priority == other.request.priority
