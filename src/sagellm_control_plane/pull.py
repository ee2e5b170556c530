"""Waiting for an engine in such a way that somebody else can end the wait.

An engine that hangs never answers, so whoever waits for it has to be told from outside. A task for each event would
cost more than the event: `Pull` cancels the await of the task that is waiting anyway, as `asyncio.timeout` does.
"""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType


class Pull:
    """The waits of one request on one engine, one at a time: `with pull: answer = await ...`.

    Each ends with what was awaited, or with the error that `interrupt` was given, now or before.
    """

    __slots__ = ("_error", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop  # kept: to ask for the running one costs a system call
        self._task: asyncio.Task[object] | None = None
        self._error: Exception | None = None

    def __enter__(self) -> None:
        """The running task is about to wait; raises the error of an interruption before."""
        if self._error is not None:
            raise self._error
        self._task = asyncio.current_task(self._loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It waits no more; raises the error of an interruption, whatever the wait has made of the cancellation."""
        task, self._task = self._task, None
        if self._error is not None and _is_uncancelled(task):
            raise self._error from None

    def interrupt(self, error: Exception) -> None:
        """Let this wait, and every later one, end with `error`; the first error counts."""
        if self._error is not None:
            return
        self._error = error
        if self._task is not None:
            self._task.cancel()


def _is_uncancelled(task: asyncio.Task[object] | None) -> bool:
    """Take one cancellation back; whether nobody but `interrupt` has cancelled."""
    if task is None:
        return False
    return sys.version_info < (3, 11) or task.uncancel() == 0
