"""`round_robin`: one engine after the other."""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingPolicy, Rows


class RoundRobin(RoutingPolicy):
    """The engine whose last request lies furthest back."""

    name = "round_robin"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        return Choice(int(rows[fleet.last_grant[rows].argmin()]), rule="longest without a request")
