"""`cost_optimized`: the cheapest engine that still meets the objectives, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.policies.base import WaitingRequest
from sagellm_control_plane.policies.slo_aware import SloAwarePolicy

if TYPE_CHECKING:
    from sagellm_control_plane.fleet import Fleet

_ALIKE = 1.05  # costs within 5 % leave the choice to the router


class CostOptimizedPolicy(SloAwarePolicy):
    """Requests in the order of `slo_aware`; of the engines that will keep a request's objectives, the cheapest.

    A request costs its engine's price for the time that it takes there when the engine is full: that of its prefill,
    and of its share in the steps of decoding. Price alone would choose a cheap engine that takes ten times as long.
    Where no engine will keep the objectives, the router chooses among all.

    `budget_per_hour` is what the engines that are busy shall cost together: once they have reached it, an idle one is
    chosen only where none of them has a place, and then the cheapest. So what is not needed stays idle, for an
    autoscaler to take away.
    """

    name = "cost_optimized"

    def narrow(self, waiting: WaitingRequest, rows: NDArray[np.intp], fleet: Fleet, now: float) -> NDArray[np.intp]:
        rows = self._affordable(rows, fleet)
        good = rows[self._keeps_objectives(waiting, rows, now)]
        if not len(good):
            return rows
        costs = self._costs(waiting, good, fleet)
        cheapest: NDArray[np.intp] = good[costs <= _ALIKE * costs.min()]
        return cheapest

    def _affordable(self, rows: NDArray[np.intp], fleet: Fleet) -> NDArray[np.intp]:
        budget = self.context.options.budget_per_hour
        if budget is None:
            return rows
        prices, is_busy, known = fleet.price[rows], fleet.num_requests[rows] > 0, fleet.rows()
        spent = float(fleet.price[known[fleet.num_requests[known] > 0]].sum())
        within = rows[is_busy | (prices <= budget - spent)]
        return within if len(within) else rows[prices <= prices.min()]

    def _keeps_objectives(self, waiting: WaitingRequest, rows: NDArray[np.intp], now: float) -> NDArray[np.bool_]:
        predictor, slo = self.context.predictor, waiting.request.slo
        first_token = now + predictor.ttft_s(rows, waiting.num_prompt_tokens)
        tpot_s = predictor.tpot_s(rows, waiting.num_prompt_tokens + waiting.num_output_tokens)
        limit_s = float("inf") if slo is None or slo.tpot_ms is None else slo.tpot_ms / 1e3
        end = first_token + tpot_s * waiting.num_output_tokens
        kept: NDArray[np.bool_] = (
            (first_token <= waiting.first_token_due) & (tpot_s <= limit_s) & (end <= waiting.deadline)
        )
        return kept

    def _costs(self, waiting: WaitingRequest, rows: NDArray[np.intp], fleet: Fleet) -> NDArray[np.float64]:
        """Of the request, in the currency of prices."""
        num_prompt, num_output = waiting.num_prompt_tokens, waiting.num_output_tokens
        places = np.maximum(1, fleet.capacity[rows])
        prefill_s = fleet.a[rows] * num_prompt + fleet.q[rows] * num_prompt**2 / 2
        token_s = fleet.c0[rows] / places + fleet.k[rows] * (num_prompt + num_output / 2) + fleet.b[rows]
        costs: NDArray[np.float64] = fleet.price[rows] / 3600 * (prefill_s + num_output * token_s)
        return costs
