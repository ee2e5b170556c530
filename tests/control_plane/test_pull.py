"""Waits that somebody else can end."""

from __future__ import annotations

import asyncio

import pytest

from sagellm_control_plane.pull import Pull
from sagellm_protocol import UnavailableError


async def _hang(pull: Pull) -> None:
    with pull:
        await asyncio.Event().wait()


async def test_an_interrupted_wait_ends_with_the_error_it_is_given() -> None:
    pull = Pull(asyncio.get_running_loop())
    task = asyncio.ensure_future(_hang(pull))
    await asyncio.sleep(0)
    pull.interrupt(UnavailableError("gone"))
    pull.interrupt(UnavailableError("the first one counts"))
    with pytest.raises(UnavailableError, match="gone"):
        await task
    with pytest.raises(UnavailableError, match="gone"):
        await _hang(pull)


async def test_the_task_goes_on_after_an_interruption() -> None:
    pull = Pull(asyncio.get_running_loop())

    async def body() -> str:
        with pytest.raises(UnavailableError):
            await _hang(pull)
        await asyncio.sleep(0)  # a cancellation that is left over would end it here
        return "on"

    task = asyncio.ensure_future(body())
    await asyncio.sleep(0)
    pull.interrupt(UnavailableError("gone"))
    assert await task == "on"


async def test_a_cancellation_from_outside_stays_one() -> None:
    pull = Pull(asyncio.get_running_loop())
    task = asyncio.ensure_future(_hang(pull))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_interruption_between_waits_is_met_at_the_next() -> None:
    pull = Pull(asyncio.get_running_loop())
    with pull:
        await asyncio.sleep(0)
    pull.interrupt(UnavailableError("gone"))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="gone"), pull:
        pytest.fail("nobody waits for an engine that is gone")
