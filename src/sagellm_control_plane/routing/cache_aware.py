"""`cache_aware`: the default rule of the SGLang router, written anew from its description, to compare with.

Where loads are out of balance (the fullest engine has over 64 requests more than the emptiest, and over 1.5 times as
many) the least loaded; else the longest cached prefix if it covers over 30 % of the prompt, else the least loaded.
Unlike the original it reads the exact index where engines tell of their cache.
"""

from __future__ import annotations

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import CachePolicy, Choice, RoutedRequest, Rows, lowest

_BALANCE_ABSOLUTE = 64
_BALANCE_RELATIVE = 1.5
_CACHE_THRESHOLD = 0.3


class CacheAware(CachePolicy):
    """Affinity above a threshold of the match, balance above a threshold of the imbalance."""

    name = "cache_aware"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        cached, num_requests = self.cached_tokens(request, rows, fleet), fleet.num_requests[rows]
        most, least = int(num_requests.max()), int(num_requests.min())
        is_imbalanced = most - least > _BALANCE_ABSOLUTE and most > _BALANCE_RELATIVE * least
        if not is_imbalanced and cached.max() > _CACHE_THRESHOLD * request.num_prompt_tokens:
            best, rule = lowest(rows, -cached, fleet), "longest cached prefix"
        else:
            best = lowest(rows, num_requests, fleet)
            rule = "out of balance: fewest requests" if is_imbalanced else "short match: fewest requests"
        scores = {"cached_tokens": cached, "num_requests": num_requests}
        return Choice(int(rows[best]), num_cached_tokens=int(cached[best]), rule=rule, scores=scores)
