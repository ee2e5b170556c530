"""The queue in front of the engines: heaps, lanes and husks against a plain list."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.lazy_heap import LazyHeap
from sagellm_control_plane.policies import (
    Key,
    PolicyContext,
    PolicyOptions,
    SchedulingPolicy,
    WaitingRequest,
    get_policy,
)
from sagellm_control_plane.policies.fair import FairPolicy
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.queue import WaitQueue
from sagellm_protocol import SLO, Request, RequestPriority, ResourceExhaustedError

numbers = itertools.count()


def context() -> PolicyContext:
    fleet = Fleet()
    return PolicyContext(Predictor(fleet), fleet)


class OldestTenth(SchedulingPolicy):
    """A policy without lanes whose order changes all the time, as a plugin may write one."""

    name = "oldest_tenth"
    is_static = False

    def key(self, waiting: WaitingRequest, now: float) -> Key:
        return ((now - waiting.arrival_time) % 10,)


def make(name: str) -> SchedulingPolicy:
    return OldestTenth(context()) if name == "oldest_tenth" else get_policy(name)(context())


def waiting(arrival_time: float, model: str = "m", tenant: str = "", **fields: Any) -> WaitingRequest:
    return WaitingRequest(Request(prompt="x", model=model, **fields), arrival_time, 10, 10, next(numbers), tenant)


class ScannedFair(FairPolicy):
    """`fair`, with all tenants compared at every pop and at every return."""

    def lowered(self) -> None:  # type: ignore[override]
        return None

    def _floor(self) -> float:
        return min((self._service[tenant] for tenant in self._num_waiting), default=self._last_service)


class FairMachine(RuleBasedStateMachine):
    """Tenants come, go, are charged and get their charges back: heaps give the order that comparing all gives."""

    def __init__(self) -> None:
        super().__init__()
        options = PolicyOptions(tenant_weights={"0": 3.0, "1": 0.3})
        self.fair, self.scanned = (
            policy(PolicyContext(Predictor(Fleet()), Fleet(), options)) for policy in (FairPolicy, ScannedFair)
        )
        self.queues = [WaitQueue(policy, 100) for policy in (self.fair, self.scanned)]
        self.inside: list[WaitingRequest] = []
        self.running: list[WaitingRequest] = []
        self.now = 0.0

    @rule(tenant=st.integers(0, 30).map(str), model=st.sampled_from("ab"), num_tokens=st.sampled_from([1, 10, 10, 300]))
    def push(self, tenant: str, model: str, num_tokens: int) -> None:
        self.now += 1
        request = Request(prompt="x", model=model)
        new = WaitingRequest(request, self.now, num_tokens, 10, next(numbers), tenant)
        if len(self.inside) < 100:
            self.inside.append(new)
            for queue in self.queues:
                queue.push(new, self.now)

    @rule(count=st.integers(1, 4), models=st.sampled_from(["a", "b", "ab"]))
    def pop(self, count: int, models: str) -> None:
        for _ in range(count):
            one, other = [queue.pop(self.now, lambda destination: destination[0] in models) for queue in self.queues]
            assert one is other
            if one is not None:
                self.inside.remove(one)
                self.running.append(one)
                for policy in (self.fair, self.scanned):
                    policy.on_granted(one, 0, self.now)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.inside))
        self.inside.remove(gone)
        assert all(queue.remove(gone, self.now) for queue in self.queues)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(0, 40), num_unserved_tokens=st.sampled_from([0, 5, 300]))
    def end(self, data: st.DataObject, num_tokens: int, num_unserved_tokens: int) -> None:
        ended = data.draw(st.sampled_from(self.running))
        self.running.remove(ended)
        for policy in (self.fair, self.scanned):
            policy.on_tokens(ended, num_tokens, self.now)
            policy.on_ended(ended, self.now, num_unserved_tokens=num_unserved_tokens)

    @invariant()
    def books_are_bounded(self) -> None:
        assert self.fair._service == self.scanned._service
        waiting_tenants = {item.tenant for item in self.inside}
        assert len(self.fair._least) == len(waiting_tenants)
        assert self.fair.lowered() <= waiting_tenants

    def teardown(self) -> None:
        while self.inside:
            self.pop(1, "ab")
        assert not self.queues[0]._firsts


TestFair = FairMachine.TestCase
TestFair.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_a_lazy_heap_keeps_no_more_than_it_holds_and_as_much_again() -> None:
    keys = {"stays": 0}
    heap: LazyHeap[str, tuple[int]] = LazyHeap(lambda item: (keys[item],))
    heap.put("stays")
    for number in range(1000):
        keys[f"gone {number}"] = number + 1
        heap.put(f"gone {number}")
        heap.discard(f"gone {number}")
    assert len(heap) == 1
    assert len(heap._heap) < 100
    assert heap.first() == "stays"


class QueueMachine(RuleBasedStateMachine):
    """Random pushes, pops and removals: at every pop none of the open requests goes before the one that was popped."""

    @initialize(
        name=st.sampled_from(["fifo", "priority", "slo_aware", "fair", "cost_optimized", "adaptive", "oldest_tenth"])
    )
    def begin(self, name: str) -> None:
        self.now = 0.0
        self.policy = make(name)
        self.queue = WaitQueue(self.policy, 20)
        self.inside: list[WaitingRequest] = []
        self.running: list[WaitingRequest] = []

    @rule(
        model=st.sampled_from("ab"),
        tenant=st.sampled_from("xyz"),
        priority=st.sampled_from(RequestPriority),
        ttft_ms=st.none() | st.integers(100, 5000),
        deadline_ms=st.none() | st.integers(100, 5000),
    )
    def push(
        self, model: str, tenant: str, priority: RequestPriority, ttft_ms: int | None, deadline_ms: int | None
    ) -> None:
        slo = SLO(ttft_ms=ttft_ms, deadline_ms=deadline_ms)
        new = waiting(self.now, model, tenant, priority=priority, slo=slo)
        if len(self.inside) > 20:
            with pytest.raises(ResourceExhaustedError, match="20 requests are waiting already"):
                self.queue.push(new, self.now)
        else:
            self.queue.push(new, self.now)
            self.inside.append(new)

    @rule(seconds=st.floats(0.01, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(models=st.sampled_from(["a", "b", "ab", ""]), waits=st.none() | st.sets(st.integers(0, 4)))
    def pop(self, models: str, waits: set[int] | None) -> None:
        would_wait = None if waits is None else (lambda item: item.sequence_number % 5 in waits)
        chosen = self.queue.pop(self.now, lambda destination: destination[0] in models, would_wait)
        candidates = [item for item in self.inside if item.request.model in models]
        if chosen is None:
            assert not candidates
            return
        assert chosen in candidates
        self.inside.remove(chosen)
        self.policy.on_granted(chosen, 0, self.now)
        self.running.append(chosen)

    @precondition(lambda self: self.inside)
    @rule(models=st.sampled_from(["a", "ab"]))
    def look(self, models: str) -> None:
        chosen = self.queue.first(self.now, lambda destination: destination[0] in models)
        candidates = [item for item in self.inside if item.request.model in models]
        if chosen is not None:
            best = min(candidates, key=lambda item: (self.policy.key(item, self.now), item.sequence_number))
            assert self.policy.key(chosen, self.now) == self.policy.key(best, self.now)
            assert chosen is best or self.policy.name in ("fair", "adaptive")  # whose equals may be two tenants

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.inside))
        assert self.queue.remove(gone, self.now)
        assert not self.queue.remove(gone, self.now)
        self.inside.remove(gone)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 50))
    def end(self, data: st.DataObject, num_tokens: int) -> None:
        ended = data.draw(st.sampled_from(self.running))
        self.running.remove(ended)
        self.policy.on_tokens(ended, num_tokens, self.now)
        self.policy.on_ended(ended, self.now)

    @rule()
    def expire(self) -> None:
        late = self.queue.expire(self.now)
        assert {id(item) for item in late} == {id(item) for item in self.inside if item.deadline <= self.now}
        self.inside = [item for item in self.inside if item.deadline > self.now]

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.inside) == sum(self.queue.num_by_destination.values())
        assert all(item in self.queue for item in self.inside)
        assert self.queue.next_deadline == min((item.deadline for item in self.inside), default=float("inf"))

    def teardown(self) -> None:
        for item in self.running:
            self.policy.on_ended(item, self.now)
        while (item := self.queue.pop(self.now)) is not None:
            self.inside.remove(item)
        assert not self.inside


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_queue_of_no_place_lets_one_request_try() -> None:
    queue = WaitQueue(make("fifo"), 0)
    first = waiting(0.0)
    queue.push(first, 0.0)
    assert queue.is_overfull
    with pytest.raises(ResourceExhaustedError, match="0 requests are waiting already; try again later"):
        queue.push(waiting(0.0), 0.0)
    assert queue.full_error(4.2).context == {"retry_after_s": 4.2}
    assert "in 4 s" in queue.full_error(4.2).message


def test_requests_of_a_closed_destination_hold_up_no_other() -> None:
    queue = WaitQueue(make("fifo"), 10)
    a, b = waiting(0.0, "a"), waiting(1.0, "b")
    queue.push(a, 0.0)
    queue.push(b, 1.0)
    assert queue.pop(2.0, lambda destination: destination[0] == "b") is b
    assert queue.pop(2.0) is a


def test_who_would_rather_wait_is_overtaken_a_bounded_number_of_times() -> None:
    queue = WaitQueue(make("fifo"), 100)
    cold = [waiting(float(number)) for number in range(60)]
    for item in cold:
        queue.push(item, item.arrival_time)
    warm = {cold[0], cold[1], cold[3]}
    order = [queue.pop(60.0, would_wait=warm.__contains__) for _ in range(60)]
    assert order[:2] == [cold[2], cold[4]]
    assert order[16:18] == cold[:2], "16 others went before it"
    assert order[18:20] == [cold[19], cold[3]], "15 went before it and the first two, and one after these"
    assert [item for item in order if item not in warm] == [item for item in cold if item not in warm]
    assert not queue._num_overtaken


def test_where_all_would_wait_the_first_one_goes() -> None:
    queue, items = WaitQueue(make("fifo"), 100), [waiting(float(number)) for number in range(40)]
    for item in items:
        queue.push(item, item.arrival_time)
    assert [queue.pop(60.0, would_wait=lambda _: True) for _ in range(30)] == items[:30]
    behind = WaitQueue(make("fifo"), 100)
    for item in items:
        behind.push(item, item.arrival_time)
    assert behind.pop(60.0, would_wait=lambda item: item is not items[20]) is items[0], "only a few are asked"


@pytest.mark.parametrize("name", ["priority", "slo_aware", "oldest_tenth"])
def test_nobody_goes_before_one_that_matters_more(name: str) -> None:
    queue = WaitQueue(make(name), 100)
    first = waiting(0.0, priority=RequestPriority.HIGH, slo=SLO(ttft_ms=60_000))
    second = waiting(1.0, priority=RequestPriority.NORMAL, slo=SLO(ttft_ms=90_000))
    for item in (first, second):
        queue.push(item, 1.0)
    assert queue.pop(10.5, would_wait=lambda item: item is first) is first


def test_those_that_leave_do_not_pile_up_in_the_heaps() -> None:
    queue = WaitQueue(make("slo_aware"), 100)
    first = waiting(0.0, slo=SLO(ttft_ms=1e9, deadline_ms=1e9))
    queue.push(first, 0.0)
    for _ in range(2000):
        gone = waiting(0.0, slo=SLO(ttft_ms=2e9, deadline_ms=2e9))
        queue.push(gone, 0.0)
        queue.remove(gone, 0.0)
    heaps = [queue._changes, queue._deadlines, *(heap for lanes in queue._lanes.values() for heap in lanes.values())]
    assert sum(len(heap) for heap in heaps) < 500
