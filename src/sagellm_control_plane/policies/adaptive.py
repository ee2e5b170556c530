"""`adaptive`: another policy as load and objectives ask for it, without flitting between them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

from sagellm_control_plane.policies.base import Key, PolicyContext, SchedulingPolicy, WaitingRequest
from sagellm_control_plane.policies.fair import FairPolicy
from sagellm_control_plane.policies.fifo import FifoPolicy
from sagellm_control_plane.policies.priority import PriorityPolicy
from sagellm_control_plane.policies.slo_aware import SloAwarePolicy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sagellm_control_plane.fleet import Fleet

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_EVERY_S = 0.5
_CONVINCED_AFTER_S = 2.0  # a policy must be the better one for so long without a break,
_CALM_AFTER_S = 60.0  # `fifo` for so long: near saturation queues come and go
_STAY_S = 10.0  # between two switches
_BUSY, _CALM = 0.25, 0.05  # waiting requests a place, above and below which a queue counts as such
_MET, _MISSED = 0.98, 0.90  # share of objectives kept, above and below which it counts as such
_MEMORY = 0.95  # what each first token leaves of the weight of those before it
_HOG = 2 / 3  # share of the queue that one tenant fills, from which on the others need protection


class AdaptivePolicy(SchedulingPolicy):
    """`fifo` while places suffice; under load the policy for what is at stake.

    Objectives, if waiting requests have some or they were missed of late: `slo_aware`. Else tenants, if one fills the
    queue before others: `fair`. Else priorities, if they differ: `priority`. Between calm and busy, kept and missed lie
    gaps in which nothing changes; a change of mind must last 2 seconds, calm 60, and a policy stays at least 10. Each
    switch is logged with its reason and told to `on_switch`. All four hear of every request, so that each has its books
    in order when its turn comes.
    """

    name = "adaptive"
    is_static = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._policies: dict[str, SchedulingPolicy] = {
            policy.name: policy(context) for policy in (FifoPolicy, SloAwarePolicy, FairPolicy, PriorityPolicy)
        }
        self._on_arrival = self._who_hears("on_arrival")
        self._on_left = self._who_hears("on_left")
        self._on_granted = self._who_hears("on_granted")
        self._on_tokens = self._who_hears("on_tokens")
        self._on_ended = self._who_hears("on_ended")
        self._now = self._policies["fifo"]
        self._is_busy = False
        self._misses = False
        self._kept = 1.0  # share of objectives, of late
        self._due: dict[WaitingRequest, float] = {}  # of requests on engines without a first token
        self._tenants: Counter[str] = Counter()  # of waiting requests
        self._priorities: Counter[int] = Counter()
        self._num_with_objective = 0
        self._num_waiting = 0
        self._looked_at = self._switched_at = float("-inf")
        self._wish: tuple[str, float] | None = None  # a better policy, and since when

    @property
    def current(self) -> str:
        """The name of the policy in force."""
        return self._now.name

    # ---- the order: that of the policy in force --------------------------------------------------------

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return self._now.key(waiting, now)

    def lane(self, waiting: WaitingRequest, now: float) -> Hashable:
        return self._now.lane(waiting, now)

    def order(self, waiting: WaitingRequest, now: float) -> Key:
        return self._now.order(waiting, now)

    def changes_at(self, waiting: WaitingRequest, now: float) -> float:
        return self._now.changes_at(waiting, now)

    def lowered(self) -> set[Hashable] | None:
        return self._now.lowered()

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        return self._now.is_alike(first, other)

    def narrow(self, waiting: WaitingRequest, rows: NDArray[np.intp], fleet: Fleet, now: float) -> NDArray[np.intp]:
        return self._now.narrow(waiting, rows, fleet, now)

    # ---- what becomes of requests ---------------------------------------------------------------------

    def on_arrival(self, waiting: WaitingRequest, now: float) -> None:
        for hear in self._on_arrival:
            hear(waiting, now)
        self._count(waiting, 1)
        self._look(now)

    def on_left(self, waiting: WaitingRequest, now: float) -> None:
        for hear in self._on_left:
            hear(waiting, now)
        self._count(waiting, -1)
        self._look(now)

    def on_granted(self, waiting: WaitingRequest, num_cached_tokens: int, now: float) -> None:
        for hear in self._on_granted:
            hear(waiting, num_cached_tokens, now)
        if waiting.first_token_due < float("inf"):
            self._due[waiting] = waiting.first_token_due

    def on_tokens(self, waiting: WaitingRequest, num_tokens: int, now: float) -> None:
        for hear in self._on_tokens:
            hear(waiting, num_tokens, now)
        due = self._due.pop(waiting, None)
        if due is not None:
            self._kept = _MEMORY * self._kept + (1 - _MEMORY) * (now <= due)
            self._look(now)

    def on_ended(self, waiting: WaitingRequest, now: float, *, num_unserved_tokens: int = 0) -> None:
        for hear in self._on_ended:
            hear(waiting, now, num_unserved_tokens=num_unserved_tokens)
        self._due.pop(waiting, None)
        self._look(now)

    def _who_hears(self, hook: str) -> list[Callable[..., None]]:
        """The hooks of those policies that do something there."""
        silent, policies = getattr(SchedulingPolicy, hook), self._policies.values()
        return [getattr(policy, hook) for policy in policies if getattr(type(policy), hook) is not silent]

    # ---- the choice -----------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        if now < self._looked_at + _LOOK_EVERY_S:
            return
        self._looked_at = now
        self._measure()
        name, reason = self._best()
        if name == self._now.name:
            self._wish = None
            return
        if self._wish is None or self._wish[0] != name:
            self._wish = name, now
        convinced_after_s = _CALM_AFTER_S if name == "fifo" else _CONVINCED_AFTER_S
        if now - self._wish[1] >= convinced_after_s and now - self._switched_at >= _STAY_S:
            self._switch(name, reason, now)

    def _measure(self) -> None:
        fleet = self.context.fleet
        num_places = max(1, int(fleet.capacity[fleet.rows()].sum()))
        load = self._num_waiting / num_places
        self._is_busy = load > (_CALM if self._is_busy else _BUSY)
        self._misses = self._kept < (_MET if self._misses else _MISSED)

    def _best(self) -> tuple[str, str]:
        """The policy for this moment, and why."""
        if self._misses:
            return "slo_aware", f"{self._kept:.0%} of the first tokens came in time of late"
        if not self._is_busy:
            return "fifo", f"{self._num_waiting} requests wait: places suffice"
        if self._num_with_objective:
            return "slo_aware", f"{self._num_with_objective} of {self._num_waiting} waiting requests have objectives"
        tenant, most = self._tenants.most_common(1)[0]
        if len(self._tenants) > 1 and most > _HOG * self._num_waiting:
            return "fair", f"{most} of {self._num_waiting} waiting requests are of the tenant {tenant!r}"
        if len(self._priorities) > 1:
            return "priority", f"{self._num_waiting} waiting requests have {len(self._priorities)} priorities"
        return "fifo", f"{self._num_waiting} waiting requests are alike"

    def _switch(self, name: str, reason: str, now: float) -> None:
        old, self._now = self._now.name, self._policies[name]
        self._switched_at, self._wish = now, None
        self.generation += 1
        logger.info("scheduling policy %s -> %s: %s", old, name, reason)
        self.context.on_switch(old, name, reason)

    def _count(self, waiting: WaitingRequest, change: int) -> None:
        self._num_waiting += change
        self._num_with_objective += change * waiting.has_objective
        _add(self._tenants, waiting.tenant, change)
        _add(self._priorities, int(waiting.request.priority), change)


def _add(counter: Counter[T], value: T, change: int) -> None:
    """Without keeping what nobody counts for."""
    counter[value] += change
    if not counter[value]:
        del counter[value]
