"""Waiting for an engine in such a way that somebody else can end the wait.

An engine that hangs never answers, so whoever waits for it has to be told from outside. A task for each event would
cost more than the event: `Pull` cancels the await of the task that is waiting anyway, as `asyncio.timeout` does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Pull:
    """The waits of one request on one engine, one at a time."""

    __slots__ = ("_error", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop  # kept: to ask for the running one costs a system call
        self._task: asyncio.Task[object] | None = None
        self._error: Exception | None = None

    async def wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `await call()` gives, or the error that `interrupt` was given, now or before."""
        self.begin()
        try:
            return await call()
        except asyncio.CancelledError as error:
            raise self.reason(error) from None
        finally:
            self.end()

    def begin(self) -> None:
        """The running task is about to wait; raises the error of an interruption before. `wait` in three parts."""
        if self._error is not None:
            raise self._error
        self._task = asyncio.current_task(self._loop)

    def end(self) -> None:
        """It waits no more."""
        self._task = None

    def reason(self, cancelled: asyncio.CancelledError) -> BaseException:
        """What to raise for a cancellation between `begin` and `end`: the error of an interruption, or itself."""
        return cancelled if self._error is None or not self._is_ours() else self._error

    def interrupt(self, error: Exception) -> None:
        """Let this wait, and every later one, end with `error`; the first error counts."""
        if self._error is not None:
            return
        self._error = error
        if self._task is not None:
            self._task.cancel()

    def _is_ours(self) -> bool:
        """Whether the cancellation came from `interrupt` alone."""
        if self._task is None:
            return False
        return sys.version_info < (3, 11) or self._task.uncancel() == 0
