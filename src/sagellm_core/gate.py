"""The way into an engine: holds `RequestGate`, which counts who is inside and can be closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from sagellm_protocol import RequestCancelledError, UnavailableError


class RequestGate:
    """Requests pass it while it is open; `drain` closes it and waits until the last has left. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._is_open = True
        self._empty: list[Future[None]] = []

    @property
    def is_open(self) -> bool:
        """Whether new requests may come in."""
        return self._is_open

    @contextmanager
    def pass_through(self) -> Iterator[None]:
        """Be inside for the length of the body.

        Raises:
            UnavailableError: the gate is closed.
        """
        with self._lock:
            if not self._is_open:
                raise UnavailableError("the engine is draining and takes no new requests; ask another, or retry later")
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                waiting = self._take_waiting() if self._num_inside == 0 else []
            for future in waiting:
                future.set_result(None)

    async def drain(self) -> None:
        """Close the gate and return when nobody is inside.

        Raises:
            RequestCancelledError: it was opened again meanwhile.
        """
        with self._lock:
            self._is_open = False
            if self._num_inside == 0:
                return
            future: Future[None] = Future()
            future.set_running_or_notify_cancel()  # whoever waits may give up; the future is set all the same
            self._empty.append(future)
        await asyncio.wrap_future(future)

    def open(self) -> None:
        """Let requests in again."""
        with self._lock:
            self._is_open = True
            waiting = self._take_waiting()
        for future in waiting:
            future.set_exception(RequestCancelledError("the engine was told to go on before it was drained"))

    def _take_waiting(self) -> list[Future[None]]:
        waiting, self._empty = self._empty, []
        return waiting
