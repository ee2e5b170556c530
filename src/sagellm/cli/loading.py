"""The bar that the command line shows while a model loads."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Most models are there sooner, from packed weights on the disk.
_PATIENCE_S = 0.3


class LoadingBar:
    """The `on_progress` of an engine: a bar on stderr if that is a terminal, once loading takes a noticeable time."""

    def __init__(self) -> None:
        self._first_call_s: float | None = None
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Draw the bar at done / total, and wipe it off at the end."""
        now = time.monotonic()
        if self._first_call_s is None:
            self._first_call_s = now
        if self._bar is None and done < total and sys.stderr.isatty() and now - self._first_call_s >= _PATIENCE_S:
            from tqdm import tqdm  # only a slow start pays for the import

            form = "Loading {bar} {percentage:3.0f} %"
            self._bar = tqdm(total=total, initial=done, leave=False, bar_format=form, ncols=50)
        elif self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
