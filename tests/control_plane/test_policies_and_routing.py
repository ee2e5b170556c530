"""Which waiting request goes first, and to which engine."""

from __future__ import annotations

from typing import Any

import pytest

from fake_engine import FakeEngine
from sagellm_control_plane import ExecutionInstance, ExecutionInstanceType, PDSeparationConfig
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.policies import POLICIES, WaitingRequest, get_policy, next_request
from sagellm_control_plane.router import ROUTERS, get_router, prefer_by_phase
from sagellm_protocol import SLO, InvalidArgumentError, Request, RequestPriority


def waiting(number: int, *, num_tokens: int = 10, **fields: Any) -> WaitingRequest:
    return WaitingRequest(Request(prompt="x", **fields), float(number), num_tokens, number)


ARRIVALS = [
    waiting(0, num_tokens=50, priority=RequestPriority.LOW),
    waiting(1, num_tokens=40, slo=SLO(deadline_ms=9000)),
    waiting(2, num_tokens=30, slo=SLO(ttft_ms=1000, deadline_ms=60_000), priority=RequestPriority.LOW),
    waiting(3, num_tokens=20, priority=RequestPriority.CRITICAL),
    waiting(4, num_tokens=60),
]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("fifo", [0, 1, 2, 3, 4]),
        ("priority", [3, 1, 4, 0, 2]),
        ("slo_aware", [2, 1, 0, 3, 4]),  # due at 3 s, at 10 s, never
        ("cost_optimized", [3, 2, 1, 0, 4]),
        ("adaptive", [3, 1, 4, 2, 0]),
    ],
)
def test_policies_order_requests(name: str, order: list[int]) -> None:
    policy, left = get_policy(name), list(ARRIVALS)
    served = []
    while left:
        chosen = next_request(policy, left)
        served.append(chosen.sequence_number)
        left.remove(chosen)
    assert served == order


def test_equal_requests_are_served_in_order_of_arrival_by_every_policy() -> None:
    same_time = [WaitingRequest(Request(prompt="x"), 1.0, 10, number) for number in (3, 1, 2)]
    for policy in POLICIES.values():
        assert next_request(policy, same_time).sequence_number == 1


def engine(name: str, kind: ExecutionInstanceType = ExecutionInstanceType.GENERAL, **state: int) -> ManagedEngine:
    managed = ManagedEngine(ExecutionInstance(instance_id=name, instance_type=kind), FakeEngine())
    for field, value in state.items():
        setattr(managed, field, value)
    return managed


def test_round_robin_takes_turns() -> None:
    engines = [engine("a"), engine("b"), engine("c")]
    route = get_router("round_robin")
    turns = []
    for number in range(6):
        chosen = route(engines)
        chosen.enter(1, number)
        turns.append(chosen.engine_id)
    assert turns == ["a", "b", "c", "a", "b", "c"]


def test_least_loaded_counts_requests_and_adaptive_counts_tokens() -> None:
    engines = [engine("a", num_requests=1, num_tokens=900), engine("b", num_requests=2, num_tokens=100)]
    assert get_router("least_loaded")(engines).engine_id == "a"
    assert get_router("adaptive")(engines).engine_id == "b"


def test_idle_engines_take_turns_under_every_router() -> None:
    for route in ROUTERS.values():
        assert route([engine("a", last_grant=5), engine("b", last_grant=4)]).engine_id == "b"


def test_prompts_prefer_instances_of_their_length_and_take_others_rather_than_wait() -> None:
    config = PDSeparationConfig(prefilling_threshold_input_tokens=100)
    prefill = engine("p", ExecutionInstanceType.PREFILLING)
    decode = engine("d", ExecutionInstanceType.DECODING)
    assert prefer_by_phase([prefill, decode], 100, config) == [prefill]
    assert prefer_by_phase([prefill, decode], 99, config) == [decode]
    assert prefer_by_phase([prefill], 1, config) == [prefill]


@pytest.mark.parametrize("get", [get_policy, get_router])
def test_unknown_names_list_the_known_ones(get: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown .*_policy 'fastest'; choose one of adaptive, "):
        get("fastest")
