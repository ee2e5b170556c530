"""Streams and events: the order of work on a device, and points in it.

`Stream` and `Event` are what all devices share (torch's own classes fit them). A CPU runs work at the moment it
is asked for, so its stream has nothing to wait for and its event is a time stamp.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from sagellm_protocol import InvalidArgumentError


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Any = None) -> None:
        """Mark the current end of `stream` (default: the current stream)."""

    def query(self) -> bool:
        """Whether the work before the mark is done."""

    def synchronize(self) -> None:
        """Wait for the work before the mark."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to that of `end_event`."""


class Stream(Protocol):
    """A queue of work on one device, done in order."""

    def record_event(self, event: Any = None) -> Any:
        """Mark the current end of the queue by `event` (default: a new one), and return it."""

    def wait_event(self, event: Any) -> None:
        """Let later work wait for `event`."""

    def synchronize(self) -> None:
        """Wait for all work in the queue."""


class HostEvent:
    """An event of a device that works synchronously: a time stamp."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        """Remember the present moment."""
        del stream
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """True: work on the host is done when it returns."""
        return True

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Milliseconds between two recorded events."""
        if self._seconds is None or end_event._seconds is None:
            raise InvalidArgumentError("both events must be recorded before the time between them is asked")
        return (end_event._seconds - self._seconds) * 1e3


class HostStream:
    """A stream of a device that works synchronously: always empty."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record `event` (default: a new one) now."""
        event = event or HostEvent()
        event.record(self)
        return event

    def wait_event(self, event: HostEvent) -> None:
        """Return at once: what the event stands for is done."""

    def synchronize(self) -> None:
        """Return at once."""
