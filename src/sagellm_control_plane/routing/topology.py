"""`topology`: the nearest engines first, further ones only where the near ones stand out by their load.

Places are paths, outermost first (`zone/rack/host`); two are the nearer, the more of their beginning they share. What
is near is counted from where the control plane runs: prompts and tokens travel that way for every request.
"""

from __future__ import annotations

import numpy as np

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingPolicy, Rows, below_load_bound, lowest


class TopologyAware(RoutingPolicy):
    """Fewest requests in flight among the nearest engines below the load bound."""

    name = "topology"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        here = self.context.location.split("/")
        levels = np.array([_num_shared(here, name.split("/")) for name in fleet.group_names])[fleet.group[rows]]
        may = below_load_bound(rows, fleet)
        nearest = levels[may].max()
        num_requests = fleet.num_requests[rows]
        best = lowest(rows, np.where(may & (levels == nearest), num_requests, np.iinfo(np.int64).max), fleet)
        return Choice(
            int(rows[best]),
            rule="nearest" if nearest == levels.max() else "nearer engines are busier",
            scores={"shared_levels": levels, "num_requests": num_requests},
        )


def _num_shared(one: list[str], other: list[str]) -> int:
    """Levels that two places have in common from the outermost inwards."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared
