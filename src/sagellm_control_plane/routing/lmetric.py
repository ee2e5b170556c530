"""`lmetric`: uncached tokens of the prompt times load, the rule of Alibaba's LMetric, written anew, to compare with."""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import CachePolicy, Choice, RoutedRequest, Rows, lowest


class LMetric(CachePolicy):
    """Lowest product of what the engine would have to compute and of the requests that it has in flight, plus one."""

    name = "lmetric"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        cached = self.cached_tokens(request, rows, fleet)
        product = (request.num_prompt_tokens - cached) * (fleet.num_requests[rows] + 1)
        best = lowest(rows, product, fleet)
        return Choice(
            int(rows[best]),
            num_cached_tokens=int(cached[best]),
            rule="lowest uncached tokens times load",
            scores={"product": product, "cached_tokens": cached},
        )
