"""Waits for what a test wants to see, not for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

# Only what hangs takes as long, however busy the machine is.
PATIENCE_S = 60.0


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    """Let the event loop run until `condition()` is true; what comes from threads and timers may take its time."""
    deadline, num_turns = time.monotonic() + timeout_s, 0
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0 if num_turns < 1000 else 0.005)
        num_turns += 1
