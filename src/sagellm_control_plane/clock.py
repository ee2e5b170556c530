"""Time as the control plane sees it: seconds of one monotonic clock.

Everything here that waits or measures is given a `Clock`. `LoopClock` is the running event loop's own time, so that a
loop on virtual time drives the whole control plane; a simulator brings a clock of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

_SAME_CLOCK_S = 0.5


class TimerHandle(Protocol):
    """A call that is planned; `asyncio.TimerHandle` is one."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Where now, waiting and planned calls come from."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    async def sleep(self, delay_s: float, /) -> None:
        """Return when `delay_s` seconds have passed; at once for 0 and less, after other tasks had their turn."""
        ...

    def call_later(self, delay_s: float, callback: Callable[..., Any], /, *args: Any) -> TimerHandle:
        """Call `callback(*args)` in `delay_s` seconds unless the handle is cancelled first."""
        ...


class LoopClock:
    """The time of the event loop that runs first; outside of one the machine's, which is the same on a usual loop.

    The machine's clock is asked itself where the loop goes by it: it is finer (uvloop counts milliseconds) and cheaper.
    """

    def now(self) -> float:
        """Seconds of the loop's clock."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # none runs yet
            return time.monotonic()
        is_usual = abs(loop.time() - time.monotonic()) < _SAME_CLOCK_S
        # From here on in place of this method: a request asks half a dozen times.
        self.now = time.monotonic if is_usual else loop.time  # type: ignore[method-assign]
        return self.now()

    async def sleep(self, delay_s: float, /) -> None:
        """As `asyncio.sleep`."""
        await asyncio.sleep(delay_s)

    def call_later(self, delay_s: float, callback: Callable[..., Any], /, *args: Any) -> TimerHandle:
        """As the running loop's; `RuntimeError` outside of one."""
        return asyncio.get_running_loop().call_later(delay_s, callback, *args)
