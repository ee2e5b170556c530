"""How long a dead engine waits for its restart, and when it is given up."""

from __future__ import annotations

import random

from sagellm_control_plane.lifecycle_config import LifecycleConfig

_JITTER = 0.2


class Restarts:
    """The failures of one engine in a row. Work that it did in between ends the row."""

    def __init__(self, config: LifecycleConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self.num_failures = 0

    def next_delay(self) -> float | None:
        """Count a failure: seconds until the restart, doubling and jittered; None for a crash loop."""
        self.num_failures += 1
        if self.num_failures > self._config.max_restarts:
            return None
        exponent = min(self.num_failures - 1, 32)  # beyond, the limit rules anyway
        delay = min(self._config.restart_backoff_s * 2.0**exponent, self._config.max_restart_backoff_s)
        return delay * self._rng.uniform(1 - _JITTER, 1 + _JITTER)

    def forget(self) -> None:
        """The engine has worked."""
        self.num_failures = 0
