"""Whether an engine lives: by its reports, and by health checks where it is silent.

An engine reports between two steps, so a long step is silent; its process answers meanwhile. It is lost

- after `hang_timeout_s` without a report or an answer, AND some health checks without one,
- after `stall_timeout_s` without a report, or with requests and without a step, whatever it answers,
- when it says several times in a row that it does not work.

Silent for half of `hang_timeout_s` it is doubted: it gets no new requests until it has given several signs of life.
"""

from __future__ import annotations

import random

from sagellm_control_plane.lifecycle_config import LifecycleConfig

_JITTER = 0.2


class HealthWatch:
    """The signs of life of one engine. Times are seconds of the control plane's clock, given by the caller."""

    def __init__(self, config: LifecycleConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self.begin(0.0)

    def begin(self, now: float, least_hang_timeout_s: float = 0.0) -> None:
        """The engine has just become ready: it is well."""
        self._hang_timeout_s = max(self._config.hang_timeout_s, least_hang_timeout_s)
        self._last_sign = now
        self._last_report: float | None = None  # None: it makes none
        self._last_progress = now
        self._num_steps = -1
        self._has_work = False
        self._num_failed_probes = 0
        self._num_denials = 0
        self._num_signs_in_doubt = 0
        self._next_probe_at = now + self._probe_delay()
        self.is_doubted = False

    def report(self, now: float, *, num_steps: int, has_work: bool) -> None:
        """The engine reported: so many steps since its start, and whether it has requests."""
        if num_steps != self._num_steps or not has_work:
            self._num_steps = num_steps
            self._last_progress = now
        self._has_work = has_work
        self._last_report = now
        self._sign(now)

    def answered(self, now: float) -> None:
        """Its process answered."""
        self._sign(now)

    def probed(self, now: float, is_ok: bool | None) -> None:
        """A health check ended: the engine says that it works, that it does not, or None where it said nothing."""
        if is_ok:
            self._num_denials = 0
            self._sign(now)
            return
        self._next_probe_at = now + self._probe_delay()
        self._num_failed_probes += 1
        self._num_denials += is_ok is False

    @property
    def makes_reports(self) -> bool:
        """Whether it has ever reported in this life."""
        return self._last_report is not None

    def ask(self, now: float) -> None:
        """Something went wrong: let the next look make a health check."""
        self._next_probe_at = min(self._next_probe_at, now)

    def excuse(self, seconds: float) -> None:
        """The watcher itself stood still for so long: nobody else is to blame for the silence."""
        self._last_sign += seconds
        if self._last_report is not None:
            self._last_report += seconds
        self._last_progress += seconds
        self._next_probe_at += seconds

    def is_probe_due(self, now: float) -> bool:
        """Whether it has been silent for long enough to be asked."""
        return now >= self._next_probe_at

    def look(self, now: float, *, has_work: bool = False) -> str | None:
        """Update `is_doubted`; why the engine is lost, None while it is not. `has_work`: it was given requests."""
        if self._num_denials >= self._config.probes_to_lose:
            return "its health check says that it does not work"
        silence = now - self._last_sign
        if silence >= self._hang_timeout_s / 2:
            self.is_doubted = True
            self._num_signs_in_doubt = 0
        if silence >= self._hang_timeout_s and self._num_failed_probes >= self._config.probes_to_lose:
            return f"it gave no sign of life for {silence:.1f} s"
        if self._last_report is None:
            return None
        stalled = now - self._last_progress
        if (self._has_work or has_work) and stalled >= self._config.stall_timeout_s:
            return f"it has requests and made no step for {stalled:.1f} s"
        unreported = now - self._last_report
        if unreported >= self._config.stall_timeout_s:
            return f"its step loop has been silent for {unreported:.1f} s"
        return None

    def _sign(self, now: float) -> None:
        self._last_sign = now
        self._num_failed_probes = 0
        self._next_probe_at = now + self._probe_delay()
        if self.is_doubted:
            self._num_signs_in_doubt += 1
            self.is_doubted = self._num_signs_in_doubt < self._config.signs_to_recover

    def _probe_delay(self) -> float:
        return self._config.probe_interval_s * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
