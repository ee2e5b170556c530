"""Which engine a request goes to, by every rule."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.routing import (
    ROUTERS,
    Choice,
    RoutedRequest,
    RoutingContext,
    RoutingPolicy,
    get_router,
    list_routers,
)
from sagellm_control_plane.step_time import StepCoefficients
from sagellm_kv_cache.events import BlockStored, EventBatch
from sagellm_protocol import InvalidArgumentError, UnavailableError

HASHES = tuple(sha256(bytes([number])).digest() for number in range(64))
CACHE_POLICIES = ["cache_aware", "kv_overlap", "lmetric", "marginal_cost", "prefix_aware"]


def fleet_of(*names: str, **static: Any) -> Fleet:
    fleet = Fleet()
    for name in names:
        fleet.add(name, **static)
    return fleet


def request(**fields: Any) -> RoutedRequest:
    values: dict[str, Any] = {"num_prompt_tokens": 1024, "num_output_tokens": 100, "block_hashes": HASHES}
    return RoutedRequest("r", "model", **{**values, **fields})


def router(name: str, context: RoutingContext | None = None) -> RoutingPolicy:
    return get_router(name)(context or RoutingContext())


def choose(policy: RoutingPolicy, fleet: Fleet, asked: RoutedRequest | None = None) -> Choice:
    return policy.choose(asked or request(), fleet.rows(), fleet, 0.0)


def cache(context: RoutingContext, row: int, num_blocks: int) -> None:
    context.prefixes.apply(row, "e", EventBatch(0, (BlockStored(HASHES[:num_blocks], bytes(32), (), 16),)))


def load(fleet: Fleet, row: int, num: int, *, prompt: int = 100, decoding: bool = True) -> None:
    for _ in range(num):
        booking = Booking(prompt)
        fleet.grant(row, booking)
        if decoding:
            fleet.first_token(booking)


# ---- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_chooses_a_candidate_and_changes_nothing(name: str) -> None:
    fleet = fleet_of("a", "b", "c", "d", capacity=4, group="z/r")
    policy = router(name, RoutingContext(location="z/r"))
    before = {column: getattr(fleet, column).copy() for column in ("num_requests", "queued_tokens", "last_grant")}
    for asked in (request(), request(block_hashes=(), text="hello"), request(session_id="s", num_prompt_tokens=1)):
        choice = policy.choose(asked, np.array([3, 1]), fleet, 0.0)
        assert choice.row in (3, 1)
        assert choice.rule
        assert 0 <= choice.num_cached_tokens < asked.num_prompt_tokens
        assert all(len(scores) == 2 for scores in (choice.scores or {}).values())
    for column, values in before.items():
        np.testing.assert_array_equal(getattr(fleet, column), values)


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"hash", "random", "power_of_two"}))
def test_idle_equal_engines_take_turns(name: str) -> None:
    fleet = fleet_of("a", "b", "c")
    policy = router(name)
    chosen = []
    for _ in range(6):
        row = choose(policy, fleet).row
        booking = Booking(10)
        fleet.grant(row, booking)
        fleet.end(booking)
        chosen.append(row)
    assert chosen == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"random", "round_robin"}))
def test_a_burst_between_two_reports_is_spread(name: str) -> None:
    """Booking is immediate: no herd runs to the engine that looked best in the last report."""
    context = RoutingContext()
    fleet = fleet_of("a", "b", "c", "d", capacity=64)
    for row in range(4):
        cache(context, row, 2 if row == 0 else 0)
    policy, counts = router(name, context), Counter[int]()
    for _ in range(64):
        asked = request(session_id="s")
        choice = choose(policy, fleet, asked)
        fleet.grant(choice.row, Booking(asked.num_prompt_tokens, choice.num_cached_tokens))
        policy.on_granted(asked, choice.row)
        counts[choice.row] += 1
    assert len(counts) == 4
    assert max(counts.values()) <= 32, counts


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_state_gives_a_choice(data: st.DataObject) -> None:
    context = RoutingContext(location="z/h0")
    fleet = Fleet()
    for number in range(data.draw(st.integers(1, 6))):
        zero = st.sampled_from([0.0, 1e-6, 1e-2])
        row = fleet.add(
            f"e{number}", group=f"z/h{number}", coefficients=StepCoefficients(*(data.draw(zero) for _ in range(5)))
        )
        load(fleet, row, data.draw(st.integers(0, 5)), decoding=data.draw(st.booleans()))
        cache(context, row, data.draw(st.integers(0, 64)))
    rows = np.array(data.draw(st.lists(st.sampled_from(fleet.rows().tolist()), min_size=1, unique=True)))
    asked = request(num_prompt_tokens=data.draw(st.integers(1, 2000)), num_output_tokens=data.draw(st.integers(0, 99)))
    for name in ROUTERS:
        assert router(name, context).choose(asked, rows, fleet, 0.0).row in rows


# ---- one by one ---------------------------------------------------------------------------------------


def test_least_loaded_counts_requests() -> None:
    fleet = fleet_of("a", "b")
    load(fleet, 0, 2, prompt=1)
    load(fleet, 1, 1, prompt=5000)
    assert choose(router("least_loaded"), fleet).row == 1


def test_random_is_even_and_repeatable() -> None:
    fleet = fleet_of("a", "b", "c")
    draws = [[choose(policy, fleet).row for _ in range(300)] for policy in (router("random"), router("random"))]
    assert draws[0] == draws[1]
    assert min(Counter(draws[0]).values()) > 60


def test_power_of_two_takes_the_less_loaded_of_its_two() -> None:
    fleet = fleet_of("a", "b")
    load(fleet, 0, 3)
    policy = router("power_of_two")
    assert {choose(policy, fleet).row for _ in range(20)} == {1}


def test_hash_keeps_a_beginning_on_its_engine_and_moves_few_when_engines_change() -> None:
    fleet = fleet_of(*(f"e{i}" for i in range(10)))
    policy = router("hash")
    asked = [request(block_hashes=(sha256(str(i).encode()).digest(),) * 9) for i in range(300)]
    first = [choose(policy, fleet, one).row for one in asked]
    assert first == [choose(policy, fleet, one).row for one in asked]
    assert len(set(first)) == 10
    gone = fleet.row_of("e4")
    fleet.remove(gone)
    again = [choose(policy, fleet, one).row for one in asked]
    assert all(new == old for new, old in zip(again, first, strict=True) if old != gone)


def test_a_session_stays_until_its_engine_stands_out() -> None:
    fleet = fleet_of("a", "b", "c", "d", capacity=100)
    policy, asked = router("session"), request(session_id="alice")
    home = choose(policy, fleet, asked).row
    load(fleet, home, 1)
    assert choose(policy, fleet, asked).row != home, "one request of two is more than 1.25 times the mean"
    for row in range(4):
        load(fleet, row, 3)
    assert choose(policy, fleet, asked).row == home
    load(fleet, home, 20)
    second = choose(policy, fleet, asked).row
    assert second != home
    assert choose(policy, fleet, asked).row == second, "the next one of its own order, not any"


def test_prefix_aware_follows_the_cache_below_the_load_bound() -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", "c", capacity=100)
    cache(context, 1, 32)
    cache(context, 2, 8)
    policy = router("prefix_aware", context)
    choice = choose(policy, fleet)
    assert (choice.row, choice.num_cached_tokens) == (1, 512)
    load(fleet, 1, 3)
    choice = choose(policy, fleet)
    assert (choice.row, choice.num_cached_tokens) == (2, 128)


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_cached_prompts_are_found_again(name: str) -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", "c", capacity=100)
    cache(context, 2, 64)
    choice = choose(router(name, context), fleet)
    assert (choice.row, choice.num_cached_tokens) == (2, 1023), "the last token is always computed"


def test_the_default_would_wait_only_for_an_engine_that_has_more_of_the_prompt() -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", "c", capacity=100)
    policy, asked, rows = router("marginal_cost", context), request(), fleet.rows()
    others = np.array([0, 1])
    assert not policy.would_wait(asked, others, rows, fleet), "nobody has it"
    cache(context, 2, 5)
    assert policy.would_wait(asked, others, rows, fleet)
    assert not policy.would_wait(asked, rows, rows, fleet), "that one is free, too"
    assert not policy.would_wait(asked, others, others, fleet), "that one takes no requests"
    assert not policy.would_wait(request(block_hashes=()), others, rows, fleet)
    cache(context, 0, 5)
    assert not policy.would_wait(asked, others, rows, fleet)


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_engines_that_tell_nothing_are_known_by_what_was_sent_to_them(name: str) -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", "c", capacity=100)
    policy, asked = router(name, context), request(block_hashes=(), text="Once upon a time. " * 200)
    context.prefixes.apply(0, "e", EventBatch(0, ()))  # this one tells
    policy.on_granted(asked, 0)
    assert len(context.texts) == 0
    policy.on_granted(asked, 1)
    choice = choose(policy, fleet, asked)
    assert (choice.row, choice.num_cached_tokens) == (1, 1023)
    policy.on_engine_removed(1)
    assert choose(policy, fleet, asked).num_cached_tokens == 0


def test_cache_aware_leaves_affinity_when_out_of_balance() -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", capacity=200)
    cache(context, 0, 32)
    policy = router("cache_aware", context)
    load(fleet, 0, 64)
    assert choose(policy, fleet).row == 0
    load(fleet, 0, 1)
    assert choose(policy, fleet).row == 1


def test_kv_overlap_adds_prefill_and_decode_blocks() -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", capacity=100)
    cache(context, 0, 32)  # 512 of 1,024 tokens
    policy = router("kv_overlap", context)
    load(fleet, 0, 1, prompt=500)
    assert choose(policy, fleet).row == 0
    load(fleet, 0, 1, prompt=20)
    choice = choose(policy, fleet)
    assert choice.row == 1
    assert choice.scores is not None
    assert choice.scores["cost_blocks"].tolist() == [(512 + 520 + 1024) / 16, (1024 + 1024) / 16]


def test_lmetric_multiplies_uncached_tokens_and_load() -> None:
    context = RoutingContext()
    fleet = fleet_of("a", "b", capacity=100)
    cache(context, 0, 32)
    policy = router("lmetric", context)
    assert choose(policy, fleet).row == 0
    load(fleet, 0, 2)
    assert choose(policy, fleet).row == 1, "512 * 3 > 1024 * 1"


def test_topology_prefers_the_near_until_they_stand_out() -> None:
    fleet = Fleet()
    for name, group in (("far", "eu/r1/h1"), ("rack", "us/r1/h9"), ("host", "us/r1/h1")):
        fleet.add(name, group=group, capacity=100)
    policy = router("topology", RoutingContext(location="us/r1/h1"))
    assert choose(policy, fleet).row == fleet.row_of("host")
    load(fleet, fleet.row_of("host"), 3)
    assert choose(policy, fleet).row == fleet.row_of("rack")
    load(fleet, fleet.row_of("rack"), 3)
    choice = choose(policy, fleet)
    assert choice.row == fleet.row_of("far")
    assert "busier" in choice.rule


# ---- names --------------------------------------------------------------------------------------------


class Last(RoutingPolicy):
    name = "last"

    def choose(self, request: RoutedRequest, rows: Any, fleet: Fleet, now: float) -> Choice:
        return Choice(int(rows[-1]), rule="the last")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown routing_policy 'fastest'; choose one of adaptive, "):
        get_router("fastest")


def test_adaptive_is_the_default_rule_and_every_class_knows_its_name() -> None:
    assert get_router("adaptive") is get_router("marginal_cost")
    assert list_routers() == sorted(ROUTERS)
    for name in set(ROUTERS) - {"adaptive"}:
        assert get_router(name).name == name


def test_another_distribution_adds_a_router_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "sagellm.routing_policies"
    points = EntryPoints(
        [
            EntryPoint("last", f"{__name__}:Last", group),
            EntryPoint("wrong", "json:loads", group),
            EntryPoint("missing", "no_such_module:X", group),
        ]
    )
    monkeypatch.setattr("sagellm_control_plane.plugins.entry_points", lambda **query: points.select(**query))
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Last=Last))
    assert get_router("last") is Last
    assert "last" in list_routers()
    with pytest.raises(InvalidArgumentError, match=r"'wrong' .* no subclass of RoutingPolicy"):
        get_router("wrong")
    with pytest.raises(UnavailableError, match=r"'missing' .* can't be loaded"):
        get_router("missing")
