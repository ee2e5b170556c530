"""`session`: the requests of one session go to one engine, while it doesn't stand out by its load."""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingPolicy, Rows, lowest
from sagellm_control_plane.routing.hash import choose_by_hash


class SessionAffinity(RoutingPolicy):
    """By the session's id, with the bounded consistent hashing of `hash`; without a session to the least loaded."""

    name = "session"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        if request.session_id is not None:
            return choose_by_hash(request.session_id.encode("utf-8", "surrogatepass"), rows, fleet)
        best = lowest(rows, fleet.num_requests[rows], fleet)
        return Choice(int(rows[best]), rule="no session: fewest requests in flight")
