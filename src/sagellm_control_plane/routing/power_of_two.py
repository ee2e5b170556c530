"""`power_of_two`: of two engines taken at random, the one with fewer requests in flight.

Mitzenmacher, "The power of two choices in randomized load balancing" (IEEE TPDS 2001): nearly the balance of looking at
all, and robust where several control planes share the engines and none sees the others' requests.
"""

from __future__ import annotations

from random import Random

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingContext, RoutingPolicy, Rows


class PowerOfTwo(RoutingPolicy):
    """The less loaded of two different engines; the same seed and calls give the same choices."""

    name = "power_of_two"

    def __init__(self, context: RoutingContext) -> None:
        super().__init__(context)
        self._random = Random(context.seed)

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        if len(rows) == 1:
            return Choice(int(rows[0]), rule="the only engine")
        one, other = rows[self._random.sample(range(len(rows)), 2)].tolist()
        row = one if fleet.num_requests[one] <= fleet.num_requests[other] else other
        return Choice(row, rule=f"fewer requests than {fleet.engine_id(other if row == one else one)}")
