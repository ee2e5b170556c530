"""An event loop on virtual time: whenever nothing is left to do, its clock jumps to the next planned call.

>>> virtual_loop.run(main)          # `main` is an async function; an hour of sleep takes no time at all

Nothing waits and nothing depends on the speed of the machine, so that a run is the same every time. A loop that has
nothing planned and nothing to do would wait for ever: it raises `DeadlockError` instead and names the tasks that hang.
Threads and sockets live on real time and have no place here.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Every task waits, and nothing is planned that could wake one."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. `time()` starts at 0; `advance` moves it by hand."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Where a usual selector would sleep, this one moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            waiting = "; ".join(sorted(map(_where, asyncio.all_tasks(self._loop))))
            raise DeadlockError(f"nothing is planned and every task waits: {waiting}")
        self._loop.advance(timeout)
        return events


def _where(task: asyncio.Task[Any]) -> str:
    """The line of our own code at which a task waits."""
    coroutine, place = task.get_coro(), "?"
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        place = f"{frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"
        coroutine = coroutine.cr_await
    return f"{task.get_name()} in {place}"


def run(main: Callable[[], Awaitable[T]]) -> T:
    """The result of `main()` on a loop of its own; tasks that it leaves behind are cancelled."""
    loop = VirtualLoop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    task = loop.create_task(_main(main))
    try:
        result = loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_asyncgens())
    except DeadlockError:
        task.cancel()
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        raise
    finally:
        loop.close()
    assert not errors, f"exceptions that nobody saw: {errors}"
    return result


async def _main(main: Callable[[], Awaitable[T]]) -> T:
    try:
        return await main()
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
