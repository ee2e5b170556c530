"""`least_loaded`: the engine with the fewest requests in flight."""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingPolicy, Rows, lowest


class LeastLoaded(RoutingPolicy):
    """Fewest requests in flight; equals take turns."""

    name = "least_loaded"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        num_requests = fleet.num_requests[rows]
        best = lowest(rows, num_requests, fleet)
        return Choice(int(rows[best]), rule="fewest requests in flight", scores={"num_requests": num_requests})
