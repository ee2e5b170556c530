"""Which waiting request goes first, by each policy."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.policies import (
    POLICIES,
    PolicyContext,
    PolicyOptions,
    SchedulingPolicy,
    WaitingRequest,
    get_policy,
    list_policies,
)
from sagellm_control_plane.policies.fair import OUTPUT_PRICE, PROMPT_PRICE, FairPolicy
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.queue import WaitQueue
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_protocol import SLO, InvalidArgumentError, Request, RequestPriority
from service_simulation import EarliestDeadline, Job, Service, goodput, job, mixed_jobs, saturation_rate

numbers = itertools.count()


def make(name: str, fleet: Fleet | None = None, **options: Any) -> SchedulingPolicy:
    fleet = fleet or Fleet()
    return get_policy(name)(PolicyContext(Predictor(fleet), fleet, PolicyOptions(**options)))


def waiting(
    arrival_time: float = 0.0, *, num_prompt: int = 10, num_output: int = 10, tenant: str = "", **fields: Any
) -> WaitingRequest:
    request = Request(prompt="x", **fields)
    return WaitingRequest(request, arrival_time, num_prompt, num_output, next(numbers), tenant)


def order(policy: SchedulingPolicy, requests: list[WaitingRequest], now: float = 10.0) -> list[int]:
    """The places of the requests in the order in which a queue lets them go, all granted."""
    queue = WaitQueue(policy, 100)
    for request in requests:
        queue.push(request, request.arrival_time)
    served = []
    while (chosen := queue.pop(now)) is not None:
        policy.on_granted(chosen, 0, now)
        served.append(requests.index(chosen))
    return served


def test_every_name_makes_a_policy_of_that_name() -> None:
    assert (
        sorted(POLICIES) == list_policies() == ["adaptive", "cost_optimized", "fair", "fifo", "priority", "slo_aware"]
    )
    for name in POLICIES:
        assert make(name).name == name


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown scheduling_policy 'fastest'; choose one of adaptive, "):
        get_policy("fastest")


@pytest.mark.parametrize("name", POLICIES)
def test_equal_requests_are_served_in_the_order_of_arrival(name: str) -> None:
    requests = [waiting(1.0) for _ in range(5)]
    assert order(make(name), requests) == [0, 1, 2, 3, 4]


def test_fifo_goes_by_arrival_and_not_by_the_order_of_pushes() -> None:
    assert order(make("fifo"), [waiting(2), waiting(1), waiting(3)]) == [1, 0, 2]


def test_priority_goes_first() -> None:
    low, critical, normal = RequestPriority.LOW, RequestPriority.CRITICAL, RequestPriority.NORMAL
    requests = [waiting(n, priority=priority) for n, priority in enumerate((low, normal, critical, normal))]
    assert order(make("priority"), requests) == [2, 1, 3, 0]


def test_an_urgent_request_that_comes_too_late_does_not_overtake() -> None:
    requests = [waiting(0, priority=RequestPriority.LOW), waiting(29, priority=0), waiting(31, priority=0)]
    assert order(make("priority", ageing_s=30), requests) == [1, 0, 2]


def test_least_slack_goes_first_and_hopeless_requests_go_last() -> None:
    requests = [
        waiting(0),
        waiting(1, slo=SLO(ttft_ms=60_000)),
        waiting(2, slo=SLO(ttft_ms=1_000)),  # due at 3 s
        waiting(3, slo=SLO(ttft_ms=100_000, deadline_ms=20_000)),
    ]
    assert order(make("slo_aware"), requests, now=10) == [3, 1, 0, 2]
    assert order(make("slo_aware"), requests, now=2.5) == [2, 3, 1, 0]


def test_of_equal_slack_the_shortest_goes_first() -> None:
    fleet = Fleet()
    fleet.add("engine")
    policy = make("slo_aware", fleet)
    prefill_s = policy.context.predictor.prefill_s
    # All must start within 5 s; the second has the longest answer, the third is the shortest.
    sizes = [(500, 100), (500, 900), (10, 10)]
    requests = [
        waiting(0, num_prompt=prompt, num_output=output, slo=SLO(ttft_ms=5_000 + 1e3 * prefill_s(prompt)))
        for prompt, output in sizes
    ]
    assert order(policy, requests, now=1) == [2, 0, 1]
    # Length never counts for more than the slack that a request has itself.
    urgent = waiting(0, num_prompt=500, num_output=900, slo=SLO(ttft_ms=1_000))
    assert order(policy, [requests[2], urgent], now=0.1) == [1, 0]


# ---- bounds, in a simulated service ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.sampled_from(RequestPriority), min_size=30, max_size=120),
    gaps=st.lists(st.floats(0, 0.4), min_size=120, max_size=120),
    ageing_s=st.floats(0.1, 20),
)
def test_ageing_bounds_who_may_overtake(levels: list[RequestPriority], gaps: list[float], ageing_s: float) -> None:
    arrivals = itertools.accumulate(gaps)
    jobs = [
        job(number, arrival, 500, 20, priority=level)
        for number, (level, arrival) in enumerate(zip(levels, arrivals, strict=False))
    ]
    service = Service(get_policy("priority"), places=2, ageing_s=ageing_s)
    service.run(jobs)
    for low in jobs:
        last = low.waiting.arrival_time + (int(low.waiting.request.priority) + 2) * ageing_s
        later = [other for other in jobs if other.waiting.arrival_time > last]
        assert all(other.granted_at >= low.granted_at for other in later)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.tuples(
        st.tuples(st.integers(1, 1500), st.integers(1, 150)), st.tuples(st.integers(1, 1500), st.integers(1, 150))
    ),
    places=st.integers(1, 8),
    num_engines=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_service_of_backlogged_tenants_stays_within_the_bound_of_vtc(
    shapes: tuple[tuple[int, int], tuple[int, int]], places: int, num_engines: int, seed: int
) -> None:
    rng = random.Random(seed)
    jobs = []
    for tenant, (num_prompt, num_output) in zip("ab", shapes, strict=True):
        for _ in range(100):
            size = rng.randint(1, num_prompt), rng.randint(1, num_output)
            jobs.append(job(next(numbers), 0.0, *size, tenant=tenant))
    rng.shuffle(jobs)
    gaps: list[float] = []

    def observe(service: Service) -> None:
        assert isinstance(service.policy, FairPolicy)
        if len(service.policy._num_waiting) == 2:
            gaps.append(service.service["a"] - service.service["b"])

    service = Service(get_policy("fair"), places=places, num_engines=num_engines)
    service.observe = observe
    service.run(jobs, until=10.0)
    longest_prompt = max(item.waiting.num_prompt_tokens for item in jobs)
    most_in_flight = places * num_engines * max(item.waiting.num_prompt_tokens + item.num_output for item in jobs)
    bound = 2 * max(PROMPT_PRICE * longest_prompt, OUTPUT_PRICE * most_in_flight)
    assert max(gaps) - min(gaps) <= bound


def test_fifo_lets_a_flood_drown_others_and_fair_does_not() -> None:
    def waits(name: str) -> float:
        flood = [job(number, 0.0, 800, 60, tenant="flood") for number in range(300)]
        normal = [job(1000 + number, 1.0 + number, 200, 60, tenant="normal") for number in range(20)]
        Service(get_policy(name)).run(flood + normal)
        return max(item.waited_s for item in normal)

    assert waits("fair") < 2 < 20 < waits("fifo")


def test_weights_share_out_service() -> None:
    jobs = [job(n, 0.0, 300, 50, tenant=tenant) for n, tenant in enumerate(["a", "b"] * 300)]
    service = Service(get_policy("fair"), tenant_weights={"a": 3.0})
    service.run(jobs, until=30.0)
    assert {item.tenant for item in service.queue} == {"a", "b"}
    assert service.service["a"] / service.service["b"] == pytest.approx(3, rel=0.1)


def test_a_tenant_that_was_away_saves_nothing_up() -> None:
    policy = make("fair")
    busy = [waiting(tenant="busy", num_prompt=100) for _ in range(3)]
    for request in busy:
        policy.on_arrival(request, 0.0)
    for request in busy[:2]:
        policy.on_left(request, 0.0)
        policy.on_granted(request, 40, 0.0)
    policy.on_arrival(waiting(tenant="new"), 1.0)
    assert isinstance(policy, FairPolicy)
    assert policy.service("new") == policy.service("busy") == 120  # uncached tokens alone are charged
    policy.on_ended(busy[0], 2.0, num_unserved_tokens=60)
    assert policy.service("busy") == 60


def test_counters_of_tenants_that_are_gone_are_bounded() -> None:
    policy = make("fair")
    for number in range(20_000):
        request = waiting(tenant=f"tenant-{number}")
        policy.on_arrival(request, 0.0)
        policy.on_left(request, 0.0)
        if number % 100 == 0:
            policy.on_granted(request, 0, 0.0)
            policy.on_ended(request, 0.0)
    assert isinstance(policy, FairPolicy)
    assert len(policy._service) <= 16_384
    assert not policy._num_waiting
    assert not policy._num_running


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_slo_aware_does_not_collapse_under_overload(seed: int) -> None:
    fifo, earliest = goodput(get_policy("fifo"), 1.2, seed), goodput(EarliestDeadline, 1.2, seed)
    aware = goodput(get_policy("slo_aware"), 1.2, seed)
    assert aware > 1.3 * max(fifo, earliest)
    assert aware > 0.78  # 1 / 1.2 could be served at all, a tenth of that is best effort's; the longest are late
    assert goodput(get_policy("slo_aware"), 0.8, seed) > 0.98


def test_best_effort_gets_its_share_of_a_busy_service() -> None:
    urgent = [job(n, n * 0.05, 300, 30, slo=SLO(ttft_ms=60_000)) for n in range(1000)]
    patient = [job(2000 + n, 0.0, 300, 30) for n in range(200)]
    service = Service(get_policy("slo_aware"), best_effort_share=0.2)
    service.run(urgent + patient, until=20.0)
    assert {item.has_objective for item in service.queue} == {True, False}
    granted = [sum(item.granted_at < 20.0 for item in jobs) for jobs in (patient, urgent)]
    assert granted[0] / sum(granted) == pytest.approx(0.2, abs=0.03)


def test_objectives_on_time_between_tokens_choose_engines_that_keep_them() -> None:
    fleet = Fleet()
    fast = fleet.add("fast", coefficients=StepCoefficients(5e-3, 1e-5, 0, 0, 0))
    slow = fleet.add("slow", coefficients=StepCoefficients(50e-3, 1e-5, 0, 0, 0))
    policy, rows = make("slo_aware", fleet), np.array([fast, slow])
    assert list(policy.narrow(waiting(slo=SLO(tpot_ms=20)), rows, fleet, 0.0)) == [fast]
    assert list(policy.narrow(waiting(slo=SLO(tpot_ms=1)), rows, fleet, 0.0)) == [fast, slow]
    assert list(policy.narrow(waiting(), rows, fleet, 0.0)) == [fast, slow]


def test_cost_optimized_takes_the_cheapest_engine_that_is_fast_enough() -> None:
    fleet = Fleet()
    fast = StepCoefficients(10e-3, 50e-6, 0, 0, 50e-6)
    slow = StepCoefficients(30e-3, 500e-6, 0, 0, 100e-6)
    dear, other = fleet.add("dear", price=30.0, coefficients=fast), fleet.add("other", price=30.0, coefficients=fast)
    cheap = fleet.add("cheap", price=1.0, coefficients=slow)
    policy, rows = make("cost_optimized", fleet), np.array([dear, other, cheap])

    def chosen(ttft_ms: float | None, num_prompt: int) -> list[int]:
        slo = None if ttft_ms is None else SLO(ttft_ms=ttft_ms)
        return list(policy.narrow(waiting(num_prompt=num_prompt, slo=slo), rows, fleet, 0.0))

    assert chosen(None, 2000) == [cheap]
    assert chosen(5000, 2000) == [cheap]  # a second there
    assert chosen(500, 2000) == [dear, other]
    assert chosen(1, 2000) == [dear, other, cheap]  # out of reach everywhere


def test_a_budget_keeps_engines_idle() -> None:
    fleet = Fleet()
    rows = np.array([fleet.add(str(n), price=price) for n, price in enumerate((10.0, 10.0, 15.0, 12.0))])
    policy = make("cost_optimized", fleet, budget_per_hour=20.0)

    def allowed(*places: int) -> list[int]:
        return [list(rows).index(row) for row in policy.narrow(waiting(), rows[list(places)], fleet, 0.0)]

    assert allowed(2, 3) == [3]
    for busy in (0, 1):
        fleet.grant(int(rows[busy]), Booking(10))
    assert allowed(0, 1, 2, 3) == [0, 1]
    assert allowed(2, 3) == [3]  # the others are full: the cheapest besides


# ---- adaptive -------------------------------------------------------------------------------------------


def adaptive_switches(jobs: list[Job]) -> list[tuple[float, str, str]]:
    service = Service(get_policy("adaptive"))
    service.run(jobs)
    return service.switches


def test_adaptive_does_not_oscillate_at_the_edge_of_saturation() -> None:
    rate = saturation_rate()
    for load in (0.7, 0.9, 1.0, 1.1):
        jobs = mixed_jobs(1500, load * rate, seed=4)
        switches = adaptive_switches(jobs)
        assert all(later[0] - earlier[0] >= 10 for earlier, later in itertools.pairwise(switches))
        assert len(switches) <= 3, switches
    assert not adaptive_switches(mixed_jobs(600, 0.3 * rate, seed=4))


def test_adaptive_answers_what_is_at_stake(caplog: pytest.LogCaptureFixture) -> None:
    flood = [job(n, n * 0.01, 500, 60, tenant="flood") for n in range(600)]
    normal = [job(1000 + n, n * 1.0, 500, 60, tenant="normal") for n in range(60)]
    with caplog.at_level(logging.INFO, logger="sagellm_control_plane"):
        assert next(new for _, _, new in adaptive_switches(flood + normal)) == "fair"
    assert "waiting requests are of the tenant 'flood'" in caplog.text
    levels = [job(n, n * 0.01, 500, 60, priority=level) for n, level in enumerate(list(RequestPriority) * 120)]
    assert next(new for _, _, new in adaptive_switches(levels)) == "priority"
    objectives = [job(n, n * 0.01, 500, 60, slo=SLO(ttft_ms=60_000)) for n in range(600)]
    assert next(new for _, _, new in adaptive_switches(objectives)) == "slo_aware"


def test_adaptive_serves_everyone_across_its_switches() -> None:
    quiet = mixed_jobs(200, 2.0, seed=1)
    jobs = quiet + [
        job(5000 + n, 20 + n * 0.02, 500, 60, tenant="flood", slo=SLO(ttft_ms=1000) if n % 2 else None)
        for n in range(1000)
    ]
    service = Service(get_policy("adaptive"))
    service.run(jobs)
    assert service.switches
    assert all(item.ended_at < float("inf") for item in jobs)
    assert not len(service.queue)
