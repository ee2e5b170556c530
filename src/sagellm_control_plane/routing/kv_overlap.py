"""`kv_overlap`: the cost of NVIDIA Dynamo's KV router, written anew from its description, to compare with.

In blocks: prefill work (queued + prompt - cached) plus the blocks of all requests in flight, this one's included.
"""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import CachePolicy, Choice, RoutedRequest, Rows, lowest


class KVOverlap(CachePolicy):
    """Fewest blocks to prefill and to decode over, the two added one to one."""

    name = "kv_overlap"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        cached = self.cached_tokens(request, rows, fleet)
        prefill = fleet.queued_tokens[rows] + (request.num_prompt_tokens - cached)
        cost = (prefill + fleet.held_tokens[rows] + request.num_prompt_tokens) / request.block_size
        best = lowest(rows, cost, fleet)
        return Choice(
            int(rows[best]),
            num_cached_tokens=int(cached[best]),
            rule="fewest blocks to prefill and decode over",
            scores={"cost_blocks": cost, "cached_tokens": cached},
        )
