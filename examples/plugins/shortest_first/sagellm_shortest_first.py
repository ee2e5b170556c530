"""Two policies of one's own, in one file: a scheduling policy and a routing policy.

`pip install ./examples/plugins/shortest_first`, and both are known by name everywhere:
`sage-llm serve --scheduling-policy shortest_first`, `ControlPlaneManager(routing_policy="most_room")`.
"""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.policies import Key, SchedulingPolicy, WaitingRequest
from sagellm_control_plane.routing import Choice, RoutedRequest, RoutingPolicy
from sagellm_control_plane.routing.base import Rows, lowest

_PATIENCE = 200.0  # tokens that a second of waiting is worth, so that long requests don't starve


class ShortestFirst(SchedulingPolicy):
    """The least expected work first, which keeps the mean wait lowest."""

    name = "shortest_first"

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        """Work, and the later it came the more: the order of two requests never changes, so the key is static."""
        return (waiting.num_prompt_tokens + waiting.num_output_tokens + _PATIENCE * waiting.arrival_time,)


class MostRoom(RoutingPolicy):
    """The engine with the most places free."""

    name = "most_room"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        num_free = fleet.capacity[rows] - fleet.num_requests[rows]
        return Choice(lowest(rows, -num_free, fleet), rule="most places free", scores={"num_free": num_free})
