"""Engines that die and requests that go on, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import pytest

import virtual_loop
from sagellm_control_plane.config import FailoverConfig
from sagellm_control_plane.events import EventKind
from sagellm_protocol import ErrorCode, FinishReason, Request, StreamEvent, StreamEventStart
from sim_engine import SimEngine, answer_of
from sim_world import Call, World, make_request


def client(world: World, number: int) -> SimEngine:
    found = world.engines[number].client
    assert isinstance(found, SimEngine)
    return found


async def serve(num_engines: int = 2, **options: Any) -> World:
    world = World(policy="fifo", router="round_robin", num_engines=num_engines, seed=2, **options)
    await world.manager.start()
    return world


async def close(world: World) -> None:
    await world.settle()
    world.check()
    await world.manager.stop()


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_request_goes_on_where_its_engine_died(is_stream: bool) -> None:
    async def main() -> None:
        world = await serve()
        request = make_request(1, prompt="a long answer", seed=5, max_tokens=60, n=2)
        call = world.submit(request, is_stream=is_stream)
        await asyncio.sleep(0.2)
        client(world, 0).die()
        await close(world)
        assert client(world, 1).num_resumed == 1
        trace = world.manager.explain("r1")
        assert [stay.engine_id for stay in trace.stays] == ["e-0", "e-1"]
        assert trace.to_dict()["stays"][0]["left_because"] == "e-0 died"
        assert call.outcome in (FinishReason.STOP, FinishReason.LENGTH)
        answers = [tokens for tokens, _ in answer_of(request, 5)]
        outputs = call.response.outputs if call.response is not None else call.events[-1].outputs  # type: ignore[union-attr]
        assert [output.token_ids for output in outputs] == answers
        kinds = [event.kind for event in world.manager.events.recent()]
        assert EventKind.LOST in kinds
        assert EventKind.MOVED in kinds

    virtual_loop.run(main)


def test_a_hanging_engine_loses_its_requests_to_another() -> None:
    async def main() -> None:
        world = await serve()
        call = world.submit(make_request(1, prompt="hang under it", max_tokens=60))
        await asyncio.sleep(0.2)
        client(world, 0).is_hanging = True
        await asyncio.wait({call.task}, timeout=30)  # type: ignore[arg-type]
        assert isinstance(call.outcome, FinishReason)
        await close(world)

    virtual_loop.run(main)


def test_with_failover_off_the_request_ends_with_its_engine() -> None:
    async def main() -> None:
        world = await serve(failover=FailoverConfig(enabled=False))
        call = world.submit(make_request(1, prompt="alone", max_tokens=60))
        await asyncio.sleep(0.2)
        client(world, 0).die()
        await asyncio.wait({call.task}, timeout=5)  # type: ignore[arg-type]
        assert call.outcome is ErrorCode.UNAVAILABLE
        assert world.manager.explain("r1").outcome == "unavailable"
        await world.settle()
        world._check_books()
        await world.manager.stop()

    virtual_loop.run(main)


def running(world: World) -> SimEngine:
    """The engine that has the only request."""
    return next(engine for engine in map(partial(client, world), range(len(world.engines))) if engine.requests)


@pytest.mark.parametrize("is_moving_on", [True, False])
def test_a_limit_of_moves_holds_for_a_request_that_makes_no_token(is_moving_on: bool) -> None:
    async def main() -> None:
        world = await serve(3, failover=FailoverConfig(max_moves=1))
        call = world.submit(make_request(1, prompt="x" * 300, max_tokens=60, seed=5))
        for _ in range(2):
            await asyncio.sleep(0.25 if is_moving_on else 0.005)
            running(world).die()
        await asyncio.wait({call.task}, timeout=5)  # type: ignore[arg-type]
        assert (call.outcome is ErrorCode.UNAVAILABLE) is not is_moving_on
        await world.settle()
        await world.manager.stop()

    virtual_loop.run(main)


def victims(world: World) -> list[set[str]]:
    """The requests that each lost engine took with it, in the order of the losses."""
    events = world.manager.events.recent()
    lost = [event for event in events if event.kind is EventKind.LOST]
    moved = [event for event in events if event.kind in (EventKind.MOVED, EventKind.REFUSED)]
    ends = [event.sequence for event in lost[1:]] + [len(events)]
    return [
        {move.request_id for move in moved if move.engine_id == loss.engine_id and loss.sequence < move.sequence < end}
        for loss, end in zip(lost, ends, strict=False)
    ]


@pytest.mark.parametrize("prompt", ["poison", "poison3"])
@pytest.mark.parametrize(("num_others", "most_lost"), [(0, 2), (1, 2), (6, 2), (30, 3)])
def test_a_request_that_kills_is_refused_after_its_second_engine(prompt: str, num_others: int, most_lost: int) -> None:
    """Or its third, where so many moved with it that one of them was aboard of the second, too."""

    async def main() -> None:
        world = await serve(4)
        others = [
            world.submit(make_request(number, prompt=f"innocent {number}", max_tokens=60, seed=number + 30))
            for number in range(num_others)
        ]
        await asyncio.sleep(0.1)
        poison = world.submit(make_request("p", prompt=prompt, max_tokens=60, seed=1))
        await close(world)
        assert poison.outcome is ErrorCode.INTERNAL
        assert all(isinstance(call.outcome, FinishReason) for call in others)
        assert 2 <= len(victims(world)) <= most_lost
        assert all("rp" in victims_of_one for victims_of_one in victims(world))

    virtual_loop.run(main)


@pytest.mark.parametrize("is_calm", [True, False])
def test_an_engine_of_its_own_is_awaited_under_constant_load(is_calm: bool) -> None:
    async def main() -> None:
        world = await serve(3 if is_calm else 4)
        if not is_calm:  # an engine is lost for a reason of its own
            client(world, 3).crash()
            world.has_crashed = True
        calls: list[Call] = []

        async def load() -> None:
            for number in range(400):
                calls.append(world.submit(make_request(number, prompt=f"busy {number}", max_tokens=60)))
                await asyncio.sleep(0.05)

        loading = asyncio.ensure_future(load())
        await asyncio.sleep(2)
        poison = world.submit(make_request("p", prompt="poison", max_tokens=60))
        await asyncio.wait({poison.task}, timeout=60)  # type: ignore[arg-type]
        assert poison.outcome is ErrorCode.INTERNAL
        assert is_calm or victims(world)[-1] == {"rp"}
        await loading
        await close(world)
        assert all(isinstance(call.outcome, FinishReason) for call in calls)
        assert sum("rp" in victims_of_one for victims_of_one in victims(world)) == (2 if is_calm else 3)

    virtual_loop.run(main)


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_who_gives_up_waiting_for_an_engine_of_its_own_leaves_it_to_the_others(is_cancelled: bool) -> None:
    async def main() -> None:
        world = await serve(3)
        others = [world.submit(make_request(number, prompt=f"busy {number}", max_tokens=60)) for number in range(30)]
        await asyncio.sleep(0.1)
        poison = world.submit(make_request("p", prompt="poison", max_tokens=60, priority=-2, deadline_s=2.0))
        while len(victims(world)) < 2 or not any(engine.is_reserved for engine in world.engines):
            await asyncio.sleep(0.005)
        assert world.manager._dispatcher._moved
        if is_cancelled:
            world.cancel(30)
        await close(world)
        assert poison.outcome is (None if is_cancelled else ErrorCode.DEADLINE_EXCEEDED)
        assert all(isinstance(call.outcome, FinishReason) for call in others)
        assert not any(engine.is_reserved for engine in world.engines)

    virtual_loop.run(main)


def test_signals_from_outside_condemn_nobody() -> None:
    async def main() -> None:
        world = await serve(3)
        call = world.submit(make_request(1, prompt="x" * 300, max_tokens=60, seed=5))
        await asyncio.sleep(0)
        for number in range(11):
            while len(world.manager.explain("r1").stays) == number or len(victims(world)) < number:
                await asyncio.sleep(0.005)
            if number % 2:
                running(world).is_hanging = True
            else:
                running(world).die()
        await close(world)
        stays = world.manager.explain("r1").stays
        assert len(stays) == 12
        assert not any(stay.num_output_tokens for stay in stays[:-1])
        assert isinstance(call.outcome, FinishReason)

    virtual_loop.run(main)


@pytest.mark.parametrize("is_calm", [True, False])
def test_where_engines_die_anyway_two_in_a_row_are_bad_luck(is_calm: bool) -> None:
    async def main() -> None:
        world = await serve(4)
        client(world, 3).crash()  # under nobody
        await asyncio.sleep(100 if is_calm else 10)
        call = world.submit(make_request(1, prompt="x" * 300, max_tokens=60, seed=5))
        for number in range(2):
            await asyncio.sleep(0.005)  # it has begun, and not made a token yet
            stays = world.manager.explain("r1").stays
            assert [stay.num_output_tokens for stay in stays] == [0] * (number + 1)
            running(world).crash()
        world.has_crashed = True
        await close(world)
        assert (call.outcome is ErrorCode.INTERNAL) is is_calm

    virtual_loop.run(main)


def test_two_engines_that_fail_at_once_condemn_nobody() -> None:
    async def main() -> None:
        world = await serve(3)
        call = world.submit(make_request(1, prompt="innocent", max_tokens=60, seed=5))
        await asyncio.sleep(0.2)

        async def silence(_: Request) -> AsyncGenerator[StreamEvent, None]:
            await asyncio.Event().wait()
            yield StreamEventStart(request_id="r1", prompt_tokens=1)

        client(world, 1).stream = silence  # type: ignore[method-assign]
        client(world, 0).crash()
        await asyncio.sleep(0.1)
        client(world, 1).crash()
        await close(world)
        assert isinstance(call.outcome, FinishReason)
        stays = world.manager.explain("r1").stays
        assert [(stay.engine_id, stay.num_output_tokens > 0) for stay in stays] == [
            ("e-0", True),
            ("e-1", False),
            ("e-2", True),
        ]

    virtual_loop.run(main)


def test_a_drained_engine_counts_for_nothing() -> None:
    async def main() -> None:
        world = await serve()
        call = world.submit(make_request(1, prompt="undisturbed", max_tokens=60))
        await asyncio.sleep(0.1)
        world.manager.drain_engine("e-0")
        await close(world)
        assert len(world.manager.explain("r1").stays) == 1
        assert isinstance(call.outcome, FinishReason)

    virtual_loop.run(main)


def test_a_late_request_ends_though_its_engine_hangs() -> None:
    async def main() -> None:
        world = await serve(1)
        call = world.submit(make_request(1, prompt="late", max_tokens=60, deadline_s=1.0))
        await asyncio.sleep(0.1)
        client(world, 0).is_hanging = True
        started_at = asyncio.get_running_loop().time()
        await asyncio.wait({call.task}, timeout=60)  # type: ignore[arg-type]
        assert call.outcome is ErrorCode.DEADLINE_EXCEEDED
        assert asyncio.get_running_loop().time() - started_at < 8
        await close(world)

    virtual_loop.run(main)
