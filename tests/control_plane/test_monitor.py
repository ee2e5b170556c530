"""Waiting with a limit: whatever ends the wait, what was waited for has ended before, and nobody misses an error."""

from __future__ import annotations

import asyncio

import pytest

import virtual_loop
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clock import LoopClock
from sagellm_control_plane.monitor import OutOfTime, within


class Slow:
    """Something long, that takes a second to end when it is cancelled."""

    has_ended = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(1)
            self.has_ended = True


def test_what_takes_too_long_has_ended_when_that_is_told() -> None:
    async def main() -> None:
        slow = Slow()
        with pytest.raises(OutOfTime, match="more than 2 s"):
            await within(LoopClock(), 2, slow.run())
        assert slow.has_ended
        assert asyncio.get_running_loop().time() == 3

    virtual_loop.run(main)


def test_who_is_cancelled_leaves_nothing_behind() -> None:
    async def main() -> None:
        slow = Slow()
        waiting = asyncio.ensure_future(within(LoopClock(), 50, slow.run()))
        await asyncio.sleep(2)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        assert slow.has_ended

    virtual_loop.run(main)


@pytest.mark.parametrize("num_turns", range(4))
def test_an_error_in_the_moment_of_the_cancellation_is_no_error_that_nobody_saw(num_turns: int) -> None:
    """`virtual_loop` fails with what asyncio says of exceptions that were never retrieved."""

    async def main() -> None:
        answer = asyncio.get_running_loop().create_future()

        async def ping() -> None:
            await answer

        waiting = asyncio.ensure_future(within(LoopClock(), 50, ping()))
        await asyncio.sleep(1)
        answer.set_exception(EngineLostError("it is gone"))
        for _ in range(num_turns):  # of the loop, between the error and the cancellation
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        if waiting.cancelled() is False:
            assert isinstance(waiting.exception(), EngineLostError)

    virtual_loop.run(main)


def test_an_error_is_the_callers() -> None:
    async def fail() -> None:
        raise EngineLostError("it is gone")

    with pytest.raises(EngineLostError):
        virtual_loop.run(lambda: within(LoopClock(), 50, fail()))
