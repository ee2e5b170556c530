"""Many deadlines, one timer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

import virtual_loop
from sagellm_control_plane.clock import LoopClock
from sagellm_control_plane.deadlines import Deadlines


@dataclass(eq=False)
class Item:
    at: float
    is_closed: bool = False
    expired_at: float | None = None


# No finer than the loop's clock can tell.
moments = st.integers(0, 10_000).map(lambda hundredths: hundredths / 100)


@given(st.lists(st.tuples(moments, st.one_of(st.none(), moments)), max_size=200))
def test_what_is_open_expires_in_time_and_nothing_else_does(plan: list[tuple[float, float | None]]) -> None:
    async def main() -> None:
        clock = LoopClock()

        def expire(item: Item) -> None:
            item.expired_at = clock.now()

        deadlines: Deadlines[Item] = Deadlines(clock, expire)

        def close(item: Item) -> None:
            item.is_closed = True
            deadlines.close()

        items = [Item(at) for at, _ in plan]
        for item in items:
            deadlines.add(item.at, item)
        for item, (_, closes_at) in zip(items, plan, strict=True):
            if closes_at is not None:
                clock.call_later(closes_at, close, item)
        await asyncio.sleep(101)
        for item, (at, closes_at) in zip(items, plan, strict=True):
            if closes_at is None or closes_at > at:
                assert item.expired_at is not None
                assert abs(item.expired_at - at) < 1e-6
            elif closes_at < at:
                assert item.expired_at is None
        assert len(deadlines) == sum(closes_at is None for _, closes_at in plan)

    virtual_loop.run(main)


async def test_what_is_closed_takes_no_memory() -> None:
    deadlines: Deadlines[Item] = Deadlines(LoopClock(), lambda item: None)
    for _ in range(10_000):
        item = Item(0.0)
        deadlines.add(LoopClock().now() + 600, item)
        item.is_closed = True
        deadlines.close()
    assert len(deadlines._heap) < 200
