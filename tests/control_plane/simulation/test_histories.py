"""Random histories of the whole control plane on virtual time: requests, cancellations, deaths, hangs, operators.

Engines are replaced and autoscaled meanwhile. Whatever happens: no request is lost or answered twice, every answer is
the right one to the token, and all books are at zero in the end. `SAGELLM_SIMULATION_EXAMPLES=20000` runs so many
histories instead of those of every day.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import virtual_loop
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.events import EventKind
from sagellm_control_plane.policies import POLICIES
from sagellm_control_plane.routing import ROUTERS
from sagellm_control_plane.types import EngineState
from sagellm_protocol import ErrorCode, FinishReason
from sim_world import QUOTAS, World, make_request

pytestmark = pytest.mark.usefixtures("quiet")
_NUM_EXAMPLES = int(os.environ.get("SAGELLM_SIMULATION_EXAMPLES", "120"))

_PROMPTS = st.sampled_from(
    ["hi", "a longer prompt with some tokens", "a longer prompt with other tokens", "x" * 300, "poison", "poison7"]
)
_KILLERS = st.sampled_from(["poison", "poison1", "poison7"])
_INNOCENT = _PROMPTS.filter(lambda prompt: not prompt.startswith("poison"))


def _requests(prompts: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    fields = st.fixed_dictionaries(
        {
            "prompt": prompts,
            "max_tokens": st.sampled_from([1, 5, 20, 60]),
            "n": st.sampled_from([1, 1, 1, 2]),
            "seed": st.sampled_from([None, 1, 2]),
            "priority": st.integers(-2, 2),
            "tenant": st.sampled_from([None, "a", "b"]),
            "session_id": st.sampled_from([None, "s"]),
            "deadline_s": st.sampled_from([None, None, None, 0.1, 3.0]),
            "is_stream": st.booleans(),
        }
    )
    return st.tuples(st.just("submit"), fields)


_NUMBERS = st.integers(0, 7)
_FAULTS = st.tuples(st.sampled_from(["die", "die unseen", "hang", "go on"]), _NUMBERS)
_CRASHES = st.tuples(st.just("crash"), _NUMBERS)
_OPERATIONS = st.tuples(st.sampled_from(["add", "start", "hold", "remove"]), _NUMBERS)
_CANCELS = st.tuples(st.just("cancel"), _NUMBERS)
_REPLACEMENTS = st.tuples(st.just("replace"), st.none())
_BURSTS = st.tuples(st.just("burst"), st.integers(5, 40))
_PAUSES = st.sampled_from([0.0, 0.0, 0.01, 0.03, 0.2, 1.0, 5.0])


def _histories(*actions: st.SearchStrategy[tuple[str, Any]], max_size: int = 30) -> st.SearchStrategy[Any]:
    return st.lists(st.tuples(st.one_of(*actions), _PAUSES), min_size=1, max_size=max_size)


_WORLDS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(sorted(POLICIES)),
        "router": st.sampled_from(sorted(ROUTERS)),
        "num_engines": st.integers(1, 4),
        "seed": st.integers(0, 99),
    }
)

_SCALING = AutoscalerConfig(
    max_replicas=4, ttft_ms=100, tpot_ms=30, interval_s=1, lead_s=2, down_after_s=4, cool_down_s=3
)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Thousands of deaths are not worth a line each."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


async def _live(world: World, history: list[tuple[tuple[str, Any], float]], *, is_started: bool = False) -> None:
    if is_started:
        await world.manager.start()
    for number, ((what, how), pause) in enumerate(history):
        if what == "submit":
            fields = dict(how)
            is_stream = fields.pop("is_stream")
            world.submit(make_request(number, **fields), is_stream=is_stream)
        elif what == "burst":
            for part in range(how):
                world.submit(make_request(f"{number}-{part}", prompt=f"burst {part}", max_tokens=60))
        elif what == "cancel":
            world.cancel(how)
        elif what == "replace":
            world.replace()
        elif what in ("add", "start", "hold", "stop", "remove"):
            world.operate(what, how)
        else:
            world.fault(what, how)
        await asyncio.sleep(pause)
    await world.settle()
    world.check()
    await world.manager.stop()


def _run(setup: dict[str, Any], history: list[Any], *, is_started: bool = False, **options: Any) -> World:
    async def main() -> World:
        world = World(**setup, **options)
        await _live(world, history, is_started=is_started)
        return world

    return virtual_loop.run(main)


@settings(max_examples=_NUM_EXAMPLES)
@given(setup=_WORLDS, history=_histories(_requests(_INNOCENT), _requests(_INNOCENT), _CANCELS, _FAULTS, _OPERATIONS))
def test_no_request_is_lost_or_answered_twice(setup: dict[str, Any], history: list[Any]) -> None:
    _run(setup, history, quotas=QUOTAS)


@settings(max_examples=_NUM_EXAMPLES // 2)
@given(
    setup=_WORLDS,
    is_separated=st.booleans(),
    history=st.one_of(
        _histories(_requests(_PROMPTS), _requests(_KILLERS), _CANCELS, _FAULTS, _FAULTS),
        _histories(_requests(_PROMPTS), _requests(_KILLERS), _CANCELS, _FAULTS, _CRASHES),
    ),
)
def test_requests_that_kill_engines_among_others(setup: dict[str, Any], is_separated: bool, history: list[Any]) -> None:
    """Each takes three engines with it at most, whatever else kills engines, and nobody is condemned in its place."""
    if is_separated:
        setup = {**setup, "num_engines": max(2, setup["num_engines"])}
    _run(setup, history, is_separated=is_separated)


@settings(max_examples=_NUM_EXAMPLES // 2)
@given(setup=_WORLDS, history=_histories(_requests(_INNOCENT), _CANCELS, _FAULTS, _OPERATIONS))
def test_prefill_and_decode_on_instances_of_their_own(setup: dict[str, Any], history: list[Any]) -> None:
    _run({**setup, "num_engines": max(2, setup["num_engines"])}, history, is_separated=True)


@settings(max_examples=_NUM_EXAMPLES // 2)
@given(setup=_WORLDS, history=_histories(_requests(_INNOCENT), _requests(_INNOCENT), _CANCELS))
def test_a_small_queue_refuses_and_loses_nothing(setup: dict[str, Any], history: list[Any]) -> None:
    _run({**setup, "num_engines": 1}, history, max_num_waiting=2)


@settings(max_examples=_NUM_EXAMPLES // 2)
@given(
    setup=_WORLDS,
    history=_histories(
        _requests(_INNOCENT), st.tuples(st.sampled_from(["stop", "start", "hold", "remove", "add"]), _NUMBERS), _FAULTS
    ),
)
def test_operators_who_stop_engines_end_requests_with_abort(setup: dict[str, Any], history: list[Any]) -> None:
    _run(setup, history)


@settings(max_examples=_NUM_EXAMPLES // 2)
@given(
    setup=_WORLDS,
    history=_histories(_requests(_INNOCENT), _requests(_INNOCENT), _CANCELS, _FAULTS, _OPERATIONS, _REPLACEMENTS),
)
def test_replacements_among_everything_else(setup: dict[str, Any], history: list[Any]) -> None:
    _run(setup, history, is_flaky=True)


@settings(max_examples=_NUM_EXAMPLES // 4)
@given(setup=_WORLDS, history=_histories(_requests(_INNOCENT), _requests(_INNOCENT), _CANCELS, _REPLACEMENTS))
def test_replacements_leave_no_moment_without_a_ready_engine(setup: dict[str, Any], history: list[Any]) -> None:
    async def main() -> None:
        world = World(**setup, is_flaky=True)
        world.has_faults = False
        await _live(world, history, is_started=True)
        assert {call.outcome for call in world.calls if not call.was_cancelled} <= {
            *FinishReason,
            ErrorCode.DEADLINE_EXCEEDED,
            ErrorCode.RESOURCE_EXHAUSTED,
        }
        assert not any(call.outcome is FinishReason.ABORT for call in world.calls)

    virtual_loop.run(main)


@settings(max_examples=_NUM_EXAMPLES // 4)
@given(
    setup=_WORLDS,
    history=_histories(_BURSTS, _BURSTS, _requests(_INNOCENT), _CANCELS, _FAULTS, _REPLACEMENTS),
)
def test_the_autoscaler_among_faults_and_replacements(setup: dict[str, Any], history: list[Any]) -> None:
    async def main() -> None:
        world = World(**setup, is_flaky=True, autoscaling={"sim": _SCALING})
        await _live(world, history, is_started=True)

    virtual_loop.run(main)


def test_replicas_come_with_the_load_and_go_with_it() -> None:
    async def main() -> None:
        scaling = _SCALING.model_copy(update={"ttft_ms": 500, "tpot_ms": 150})
        world = World(policy="adaptive", router="adaptive", num_engines=1, seed=1, autoscaling={"sim": scaling})
        world.has_faults = False
        await world.manager.start()
        for number in range(600):
            world.submit(make_request(number, prompt=f"{number} {'x' * 200}", max_tokens=20))
            await asyncio.sleep(0.05)
        most = world.states().count(EngineState.READY)
        assert 2 <= most <= _SCALING.max_replicas
        await world.settle()
        world.check()
        assert all(isinstance(call.outcome, FinishReason) for call in world.calls)
        await asyncio.sleep(120)
        assert world.states() == [EngineState.READY]
        kinds = [event.message for event in world.manager.events.recent() if event.kind is EventKind.SCALE]
        assert len(kinds) >= most, kinds
        await world.manager.stop()

    virtual_loop.run(main)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_request_starves_under_constant_load(policy: str) -> None:
    """One request of the lowest priority, without an objective, of a tenant that has just begun: it gets its turn."""

    async def main() -> None:
        world = World(policy=policy, router="marginal_cost", num_engines=1, seed=1)
        await world.manager.start()
        number = 0

        async def load() -> None:
            nonlocal number
            while True:
                number += 1
                fields = {"prompt": f"busy {number}", "tenant": "a", "priority": -2, "deadline_s": 60.0}
                world.submit(make_request(number, max_tokens=20, **fields))
                await asyncio.sleep(0.15)

        loading = asyncio.ensure_future(load())
        await asyncio.sleep(5)
        poor = world.submit(make_request(100_000, prompt="poor", tenant="b", priority=2))
        assert poor.task is not None
        await asyncio.wait({poor.task}, timeout=300)
        loading.cancel()
        assert poor.outcome is not None, f"it starved behind {number} others"
        await world.settle()
        world._check_books()
        await world.manager.stop()

    virtual_loop.run(main)
