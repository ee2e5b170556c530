"""`marginal_cost`: the engine where the request costs least time, its own and that of others. The default.

All in seconds, by each engine's own step times (`StepCoefficients`):

    work  = a * uncached + q * pairs                          its prefill, without what is cached there
    own   = prefills ahead of it + work + steps * step_s      its time to the first token; a step carries what decodes
    harm  = n * (work + output * (k * context + b))           what the n sequences that decode there lose to it
    cost  = own + Q * (work + harm / 10)

Q is the mean number of requests per engine that wait for their first token. By Little's law as many come behind this
one while it waits, and each of them is delayed by its work. So an idle pool gives the shortest time to the first token,
and the busier it is the more it saves work: a cached prefix draws more, a loaded engine less. Nothing is to be tuned;
the tenth says what is minimised: a second that a stream loses in all is felt less than one before its first token.

The idea is that of dispatching by marginal cost, with known job sizes that differ by server (Hyytiä, Penttinen and
Aalto, European Journal of Operational Research 217, 2012).
"""

from __future__ import annotations

import numpy as np

from sagellm_control_plane.first_token import first_token_s
from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import CachePolicy, Choice, RoutedRequest, Rows, lowest

_STREAM_SHARE = 0.1  # of a second before the first token, that a second lost by a stream counts


class MarginalCost(CachePolicy):
    """Lowest own time to the first token plus harm; see the module."""

    name = "marginal_cost"

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        prompt, output = float(request.num_prompt_tokens), request.num_output_tokens
        # All rows of the fleet, as whole columns need no copies; those that are no candidates are left out at the end.
        cached = self.cached_by_row(request, fleet)
        work, own = first_token_s(fleet, prompt, prompt - cached)
        harm = fleet.k * (output * (prompt + output / 2))
        harm += fleet.b * output
        harm += work
        harm *= fleet.num_decoding
        num_queued = fleet.num_queued if len(rows) == len(fleet) else fleet.num_queued.take(rows)
        num_behind = int(np.add.reduce(num_queued)) / len(rows)
        harm *= num_behind * _STREAM_SHARE
        work *= num_behind
        harm += work
        harm += own
        cost = harm.take(rows)

        row = rows.item(lowest(rows, cost, fleet))
        return Choice(
            row,
            num_cached_tokens=cached.item(row),
            predicted_ttft_s=own.item(row),
            rule="lowest own time and harm",
            scores={"cost_s": cost, "ttft_s": own.take(rows), "cached_tokens": cached.take(rows)},
        )

    def would_wait(self, request: RoutedRequest, free: Rows, rows: Rows, fleet: Fleet) -> bool:
        """Where an engine without a place has more of the prompt cached."""
        if len(free) == len(rows):
            return False
        cached = self.cached_by_row(request, fleet)
        return bool(cached.take(free).max() < cached.take(rows).max())
