"""What happens in the control plane, for people and programs that watch: states, moves, policy switches, scaling.

Events are numbered from 0 and kept in a ring. A reader holds nothing but the number of the event that it wants next, so
any number of slow readers cost nothing; one that falls behind the ring is told how many it has missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sagellm_control_plane.clock import Clock
from sagellm_protocol.model import ProtocolEnum

logger = logging.getLogger(__name__)


class EventKind(ProtocolEnum):
    """What an event is about."""

    ENGINE = "engine"  # came, changed its state, left
    LOST = "lost"  # an engine died or hangs
    MOVED = "moved"  # a request goes on elsewhere
    REFUSED = "refused"  # a request that was running has ended because it could not go on
    POLICY = "policy"  # the scheduling policy changed its mind
    SCALE = "scale"


_LEVELS = {EventKind.LOST: logging.WARNING, EventKind.REFUSED: logging.WARNING}


@dataclass(frozen=True, slots=True)
class ControlEvent:
    """One event. `at` is in seconds of the control plane's clock."""

    sequence: int
    at: float
    kind: EventKind
    message: str
    engine_id: str | None = None
    request_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "sequence": self.sequence,
            "at": self.at,
            "kind": self.kind.value,
            "message": self.message,
            "engine_id": self.engine_id,
            "request_id": self.request_id,
            "details": dict(self.details),
        }


class EventHub:
    """The ring of the last `capacity` events. Belongs to one event loop."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self._clock = clock
        self._ring: deque[ControlEvent] = deque(maxlen=capacity)
        self._next = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def publish(
        self,
        kind: EventKind,
        message: str,
        *,
        engine_id: str | None = None,
        request_id: str | None = None,
        **details: Any,
    ) -> None:
        """Tell everyone, and the log. `details` are plain JSON values."""
        event = ControlEvent(self._next, self._clock.now(), kind, message, engine_id, request_id, details)
        self._next += 1
        self._ring.append(event)
        logger.log(_LEVELS.get(kind, logging.INFO), "%s", message)
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    def recent(self) -> list[ControlEvent]:
        """Those that are still kept, oldest first."""
        return list(self._ring)

    async def follow(self, first: int | None = None) -> AsyncGenerator[tuple[ControlEvent, int], None]:
        """Events from number `first` on (None: from now on), each with how many were lost just before it; no end."""
        wanted = self._next if first is None else first
        while True:
            for event in self._since(wanted):
                yield event, event.sequence - wanted
                wanted = event.sequence + 1
            if wanted < self._next:
                continue
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)

    def _since(self, wanted: int) -> list[ControlEvent]:
        if wanted >= self._next:
            return []
        return list(self._ring)[-(self._next - wanted) :]
