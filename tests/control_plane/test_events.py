"""The ring of events and its readers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from sagellm_control_plane.clock import LoopClock
from sagellm_control_plane.events import EventHub, EventKind


async def test_a_reader_gets_what_comes_and_what_was() -> None:
    hub = EventHub(LoopClock(), 10)
    hub.publish(EventKind.ENGINE, "first", engine_id="e")
    async with aclosing(hub.follow(0)) as old, aclosing(hub.follow()) as new:
        event, num_lost = await anext(old)
        assert (event.message, event.engine_id, num_lost) == ("first", "e", 0)
        waiting = asyncio.ensure_future(anext(new))
        await asyncio.sleep(0)
        hub.publish(EventKind.SCALE, "second", target=3)
        event, num_lost = await waiting
        assert (event.message, event.details, num_lost) == ("second", {"target": 3}, 0)
        assert event.to_dict()["kind"] == "scale"
    assert not hub._waiting


async def test_a_slow_reader_is_told_what_it_has_missed() -> None:
    hub = EventHub(LoopClock(), 3)
    async with aclosing(hub.follow(0)) as events:
        for number in range(10):
            hub.publish(EventKind.MOVED, str(number))
        got = [await anext(events) for _ in range(3)]
    assert [(event.message, num_lost) for event, num_lost in got] == [("7", 7), ("8", 0), ("9", 0)]
    assert [event.message for event in hub.recent()] == ["7", "8", "9"]


async def test_events_that_come_while_a_reader_works_are_not_lost() -> None:
    hub = EventHub(LoopClock(), 100)
    got: list[str] = []

    async def read() -> None:
        async with aclosing(hub.follow(0)) as events:
            async for event, _ in events:
                hub.publish(EventKind.POLICY, "echo") if event.message == "1" else None
                await asyncio.sleep(0)
                got.append(event.message)
                if len(got) == 4:
                    return

    reading = asyncio.ensure_future(read())
    for number in range(3):
        hub.publish(EventKind.POLICY, str(number))
        await asyncio.sleep(0)
    await asyncio.wait_for(reading, 60)
    assert sorted(got) == ["0", "1", "2", "echo"]
