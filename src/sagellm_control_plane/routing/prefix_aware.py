"""`prefix_aware`: the engine that has most of the prompt cached, while it doesn't stand out by its load."""

from __future__ import annotations

import numpy as np

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import CachePolicy, Choice, RoutedRequest, Rows, below_load_bound, lowest


class PrefixAware(CachePolicy):
    """Longest cached prefix among the engines below the load bound; equals by fewest requests in flight."""

    name = "prefix_aware"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        cached, num_requests = self.cached_tokens(request, rows, fleet), fleet.num_requests[rows]
        may = below_load_bound(rows, fleet)
        longest = int(cached[may].max())
        scores = np.where(may & (cached == longest), num_requests, np.iinfo(np.int64).max)
        best = lowest(rows, scores, fleet)
        return Choice(
            int(rows[best]),
            num_cached_tokens=longest,
            rule="longest cached prefix" if longest else "nothing cached: fewest requests in flight",
            scores={"cached_tokens": cached, "num_requests": num_requests},
        )
