"""`fifo`: in the order of arrival."""

from __future__ import annotations

from sagellm_control_plane.policies.base import Key, SchedulingPolicy, WaitingRequest


class FifoPolicy(SchedulingPolicy):
    """Who came first goes first."""

    name = "fifo"

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return (waiting.arrival_time,)

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        return True
