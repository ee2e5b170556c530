"""`fair`: tenants get equal service while they wait, by the virtual token counter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from sagellm_control_plane.lazy_heap import LazyHeap
from sagellm_control_plane.policies.base import Key, PolicyContext, SchedulingPolicy, WaitingRequest

PROMPT_PRICE = 1.0  # of a prompt token that no cache held
OUTPUT_PRICE = 2.0  # of a token that was made

_MAX_TENANTS = 16_384  # counters kept; tenants with requests in the queue or on an engine are kept besides


class FairPolicy(SchedulingPolicy):
    """The tenant with the least service so far goes first, its own requests in the order of arrival.

    Algorithm 2 of Sheng et al., Fairness in Serving Large Language Models (arXiv 2401.00588), with one counter a tenant
    over all engines: a place costs the uncached prompt tokens, each token made costs as it streams, both divided by the
    tenant's weight. A tenant that comes back to the queue is lifted to the least counter there: what it did not ask
    for is not saved up. Between two tenants that both wait all the time, service differs by at most
    2 max(w_p L, w_q M), with L tokens in the longest prompt and M tokens, prompts and answers, on all engines at most
    (Theorem 4.4 there).
    """

    name = "fair"
    is_static = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._service: dict[str, float] = {}
        self._num_waiting: Counter[str] = Counter()
        self._least: LazyHeap[str, tuple[float]] = LazyHeap(lambda tenant: (self._service[tenant],))  # of those waiting
        self._lowered: set[Hashable] = set()  # waiting tenants
        self._num_running: Counter[str] = Counter()
        self._charged: dict[WaitingRequest, float] = {}  # for prompts, of requests on engines
        self._last_service = 0.0  # of the tenant that left the queue last

    def service(self, tenant: str) -> float:
        """What a tenant was charged so far, with lifts, by its weight."""
        return self._service.get(tenant, 0.0)

    # ---- the order ------------------------------------------------------------------------------------

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return (self._service[waiting.tenant],)

    def lane(self, waiting: WaitingRequest, now: float) -> str:
        return waiting.tenant

    def order(self, waiting: WaitingRequest, now: float) -> Key:
        return (waiting.arrival_time,)

    def lowered(self) -> set[Hashable]:
        return self._lowered

    def is_alike(self, first: WaitingRequest, other: WaitingRequest) -> bool:
        return True

    # ---- what becomes of requests ---------------------------------------------------------------------

    def on_arrival(self, waiting: WaitingRequest, now: float) -> None:
        tenant = waiting.tenant
        if not self._num_waiting[tenant]:
            floor = self._floor()
            if len(self._service) >= _MAX_TENANTS and tenant not in self._service:
                self._forget_some()
            self._service[tenant] = max(self.service(tenant), floor)
            self._least.put(tenant)
        self._num_waiting[tenant] += 1

    def on_left(self, waiting: WaitingRequest, now: float) -> None:
        self._last_service = self._service[waiting.tenant]
        _count_down(self._num_waiting, waiting.tenant)
        if not self._num_waiting[waiting.tenant]:
            self._least.discard(waiting.tenant)
            self._lowered.discard(waiting.tenant)

    def on_granted(self, waiting: WaitingRequest, num_cached_tokens: int, now: float) -> None:
        self._num_running[waiting.tenant] += 1
        num_tokens = waiting.num_prompt_tokens - num_cached_tokens
        self._charged[waiting] = self._charge(waiting.tenant, PROMPT_PRICE * num_tokens)

    def on_tokens(self, waiting: WaitingRequest, num_tokens: int, now: float) -> None:
        self._charge(waiting.tenant, OUTPUT_PRICE * num_tokens)

    def on_ended(self, waiting: WaitingRequest, now: float, *, num_unserved_tokens: int = 0) -> None:
        _count_down(self._num_running, waiting.tenant)
        charged = self._charged.pop(waiting)
        self._charge(waiting.tenant, -min(charged, PROMPT_PRICE * num_unserved_tokens))

    # ---- steps of the above ---------------------------------------------------------------------------

    def _charge(self, tenant: str, amount: float) -> float:
        self._service[tenant] += amount / self.context.weight(tenant)
        if amount < 0 and self._num_waiting[tenant]:
            self._least.put(tenant)
            self._lowered.add(tenant)
        return amount

    def _floor(self) -> float:
        """What a tenant that joins is lifted to; as the last one left, where nobody waits."""
        least = self._least.first()
        return self._last_service if least is None else self._service[least]

    def _forget_some(self) -> None:
        """Make room: of those who ask for nothing, the ones with the least service, whom a return lifts most."""
        idle = [
            tenant for tenant in self._service if tenant not in self._num_waiting and tenant not in self._num_running
        ]
        for tenant in sorted(idle, key=self._service.__getitem__)[: _MAX_TENANTS // 4]:
            del self._service[tenant]


def _count_down(counter: Counter[str], tenant: str) -> None:
    counter[tenant] -= 1
    if not counter[tenant]:
        del counter[tenant]
