"""`slo_aware`: least slack first, short ones before long ones; what is out of reach makes way for what can be met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm_control_plane.policies.base import Key, PolicyContext, SchedulingPolicy, WaitingRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sagellm_control_plane.fleet import Fleet

_REACHABLE, _BEST_EFFORT = 0, 1
_DELAY_SHARE = 0.1  # of the newest request in the mean delay behind others on its engine
_INFINITY = float("inf")


@dataclass(slots=True)
class _Place:
    """Where a waiting request stands: the latest moment to start it, its turn among the others, and its lane."""

    latest: float
    turn: float = _INFINITY
    lane: int | None = None


class SloAwarePolicy(SchedulingPolicy):
    """By the latest moment at which a request must start to keep its objectives, and by how long it will be served.

    Slack is the time to that moment, which is predicted at arrival: the due time less the request's own prefill and the
    delay that others had on their engines of late, and less the whole answer where there is a deadline for it. Once it
    has passed, even a free engine would be too late: the request joins those without an objective. They are served in
    the order of arrival, when nothing else waits, and get `best_effort_share` of the places while something does. So
    overload costs those that could not be helped (earliest deadline first serves just them, and everyone is late), and
    still none starves.

    A request goes as if it had its own time of service more slack than it has, at most twice as much: where not all can
    be in time, the fewest are late if the longest are (Moore, An n job, one machine sequencing algorithm for minimizing
    the number of late jobs, 1968).
    """

    name = "slo_aware"
    is_static = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._places: dict[WaitingRequest, _Place] = {}
        self._num_waiting = [0, 0]  # by lane
        self._last_left: tuple[WaitingRequest, int | None] | None = None
        self._credit = 0.0  # places that best effort has saved up
        self._granted: dict[WaitingRequest, float] = {}  # when the first token should come, until it does
        self._delay_s = 0.0

    # ---- the order ------------------------------------------------------------------------------------

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        lane = self._places[waiting].lane or _REACHABLE
        return (-lane if self._credit >= 1 else lane, *self.order(waiting, now))

    def lane(self, waiting: WaitingRequest, now: float) -> int:
        place = self._places[waiting]
        self._leave_lane(place)
        is_reachable = now <= place.latest < _INFINITY
        place.lane = _REACHABLE if is_reachable else _BEST_EFFORT
        self._num_waiting[place.lane] += 1
        return place.lane

    def order(self, waiting: WaitingRequest, now: float) -> Key:
        place = self._places[waiting]
        return (place.turn if place.lane == _REACHABLE else waiting.arrival_time,)

    def changes_at(self, waiting: WaitingRequest, now: float) -> float:
        place = self._places[waiting]
        return place.latest + 1e-9 if place.lane == _REACHABLE else _INFINITY

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        return self._places[first].lane == _BEST_EFFORT

    def narrow(self, waiting: WaitingRequest, rows: NDArray[np.intp], fleet: Fleet, now: float) -> NDArray[np.intp]:
        slo = waiting.request.slo
        if slo is None or slo.tpot_ms is None:
            return rows
        tpot_s = self.context.predictor.tpot_s(rows, waiting.num_prompt_tokens + waiting.num_output_tokens)
        fast = rows[tpot_s <= slo.tpot_ms / 1e3]
        return fast if len(fast) else rows

    # ---- what becomes of requests ---------------------------------------------------------------------

    def on_arrival(self, waiting: WaitingRequest, now: float) -> None:
        self._places[waiting] = self._place(waiting)

    def on_left(self, waiting: WaitingRequest, now: float) -> None:
        place = self._places.pop(waiting)
        self._last_left = waiting, place.lane
        self._leave_lane(place)

    def on_granted(self, waiting: WaitingRequest, num_cached_tokens: int, now: float) -> None:
        uncached = max(1, waiting.num_prompt_tokens - num_cached_tokens)
        self._granted[waiting] = now + self.context.predictor.prefill_s(uncached)
        if self._last_left is None or self._last_left[0] is not waiting:
            return
        lane = self._last_left[1]
        if lane == _REACHABLE and self._num_waiting[_BEST_EFFORT]:
            self._credit = min(1.0, self._credit + self._share)
        elif lane == _BEST_EFFORT and self._num_waiting[_REACHABLE]:
            self._credit = max(0.0, self._credit - 1.0)

    def on_tokens(self, waiting: WaitingRequest, num_tokens: int, now: float) -> None:
        expected = self._granted.pop(waiting, None)
        if expected is not None:
            self._delay_s += _DELAY_SHARE * (max(0.0, now - expected) - self._delay_s)

    def on_ended(self, waiting: WaitingRequest, now: float, *, num_unserved_tokens: int = 0) -> None:
        self._granted.pop(waiting, None)

    # ---- steps of the above ---------------------------------------------------------------------------

    @property
    def _share(self) -> float:
        """What best effort saves up with each place that goes to others, so that it gets its share of all."""
        share = self.context.options.best_effort_share
        return share / (1 - share)

    def _place(self, waiting: WaitingRequest) -> _Place:
        if not waiting.has_objective:
            return _Place(_INFINITY)
        predictor = self.context.predictor
        prefill_s = predictor.prefill_s(waiting.num_prompt_tokens)
        decode_s = predictor.decode_s(waiting.num_output_tokens)
        start_s = prefill_s + self._delay_s
        latest = min(waiting.first_token_due, waiting.deadline - decode_s) - start_s
        slack_s = max(0.0, latest - waiting.arrival_time)
        return _Place(latest, latest + min(prefill_s + decode_s, slack_s))

    def _leave_lane(self, place: _Place) -> None:
        if place.lane is not None:
            self._num_waiting[place.lane] -= 1
            place.lane = None
