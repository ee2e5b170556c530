"""Deadlines of many requests with one timer: most requests end long before theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from sagellm_control_plane.clock import Clock, TimerHandle

_SPARE = 64  # entries of what has ended, before the heap is cleared of them


class Mortal(Protocol):
    """What a deadline is for."""

    is_closed: bool


T = TypeVar("T", bound=Mortal)


class Deadlines(Generic[T]):
    """Calls `expire(item)` when an item's time has come, unless it is closed. Belongs to one event loop."""

    def __init__(self, clock: Clock, expire: Callable[[T], None]) -> None:
        self._clock = clock
        self._expire = expire
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()
        self._num_open = 0
        self._timer: TimerHandle | None = None
        self._timer_at = float("inf")

    def __len__(self) -> int:
        """Items that are not closed."""
        return self._num_open

    def add(self, at: float, item: T) -> None:
        """An item expires at `at`; `close` has to be called when it is closed."""
        heappush(self._heap, (at, next(self._numbers), item))
        self._num_open += 1
        if at < self._timer_at:
            self._arm(at)

    def close(self) -> None:
        """One of the items is closed."""
        self._num_open -= 1
        if len(self._heap) > 2 * self._num_open + _SPARE:
            self._heap = [entry for entry in self._heap if not entry[2].is_closed]
            heapify(self._heap)  # a timer stays: it finds nothing, which costs less than to end and begin it each time

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._clock.call_later(max(0.0, at - self._clock.now()), self._look)

    def _look(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        now = self._clock.now()
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].is_closed):
            item = heappop(self._heap)[2]
            if not item.is_closed:
                self._expire(item)
        if self._heap and self._num_open:
            self._arm(self._heap[0][0])
