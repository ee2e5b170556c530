"""What an engine tells of itself unasked: its load, what its steps cost, what its prefix cache holds.

Holds `EngineStats`, `StepSample`, `EngineReport`, and `Reporter`, which makes them. Reports are plain frozen data, so
that they can be sent anywhere, and importing them costs nothing (no torch). They come while the step loop turns:
silence means that it hangs.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm_kv_cache import CacheDigest, EventBatch

if TYPE_CHECKING:
    from sagellm_core.engine_core.engine_core import EngineCore
    from sagellm_core.engine_core.output import SchedulerOutput

__all__ = ["CacheDigest", "EngineReport", "EngineStats", "Reporter", "StepSample"]

# A change of the cache is told so soon, in seconds: one report for many changes.
_SOON_S = 0.05
# Steps that a report speaks of, and blocks that its events do; above that the oldest steps are dropped, and the report
# holds all that is cached.
_MAX_STEPS = 4096
_MAX_BLOCKS = 65536


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment, for health pages, routers and metrics."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    kv_usage: float  # 0..1
    num_steps: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    evict_count: int
    num_prompt_tokens: int = 0  # of all requests taken since the start
    num_output_tokens: int = 0  # sampled since the start
    block_size: int = 0  # tokens a block holds


@dataclass(frozen=True, slots=True)
class StepSample:
    """What one step computed and how long it took.

    A request with one token in the step counts as decoding, all others as prefill.
    """

    prefill_tokens: int
    prefill_attention: float  # sum over the prefills of p * (c + p / 2): p tokens behind a context of c
    kv_tokens: int  # sum of the contexts of those that decode
    num_decoding: int
    duration_s: float

    @classmethod
    def of(cls, output: SchedulerOutput, duration_s: float) -> StepSample:
        """The sample of a step that took `duration_s` seconds."""
        num_decodes = output.num_decodes
        starts = output.query_start_loc[num_decodes:].tolist()
        ends = output.context_lens[num_decodes:].tolist()
        attention = 0.0
        for start, stop, end in zip(starts, starts[1:], ends, strict=False):
            num_tokens = stop - start
            attention += num_tokens * (end - num_tokens / 2)
        return cls(
            prefill_tokens=output.num_scheduled_tokens - num_decodes,
            prefill_attention=attention,
            kv_tokens=int(output.context_lens[:num_decodes].sum()),
            num_decoding=num_decodes,
            duration_s=duration_s,
        )


@dataclass(frozen=True, slots=True)
class EngineReport:
    """An engine from its last report until now.

    `epoch` is fresh for each start of an engine, `sequence` counts its reports from 0. `cache` tells how the prefix
    cache changed, and `digest` is the cache's after that. A batch that begins with `AllBlocksCleared` holds all that is
    cached, whatever was known before. Each new watcher and each snapshot bring such a report to all watchers, so a
    reader that was given a snapshot ignores what is not newer: batches whose `next_sequence` it has reached.
    """

    epoch: str
    sequence: int
    stats: EngineStats
    steps: tuple[StepSample, ...]
    cache: EventBatch
    digest: CacheDigest


class Reporter:
    """Collects what reports tell. Belongs to the step loop's thread; while nobody watches it records nothing."""

    def __init__(self, core: EngineCore, clock: Callable[[], float]) -> None:
        self._core = core
        self._clock = clock
        self._epoch = secrets.token_hex(8)
        self._interval_s: float | None = None
        self._steps: deque[StepSample] = deque(maxlen=_MAX_STEPS)
        self._sequence = 0
        self._last_at = clock()

    def watch(self, interval_s: float | None) -> None:
        """Let reports be due after `interval_s` at the latest; None: nobody wants them."""
        is_on = interval_s is not None
        if is_on != (self._interval_s is not None):
            self._steps.clear()
            self._core.kv_cache.record_events(_MAX_BLOCKS if is_on else 0)
            self._core.on_step = self._record if is_on else None
        self._interval_s = interval_s

    def seconds_left(self) -> float | None:
        """Until a report is due, 0 if it is; None while nobody watches."""
        if self._interval_s is None:
            return None
        wait = min(_SOON_S, self._interval_s) if self._core.kv_cache.has_events else self._interval_s
        return max(0.0, self._last_at + wait - self._clock())

    def report(self, *, everything: bool = False) -> EngineReport:
        """The next report; with `everything` all that is cached instead of what changed."""
        cache = self._core.kv_cache
        batch = cache.resync_events() if everything else cache.take_events()
        if batch.num_dropped:
            batch = cache.resync_events()
        report = EngineReport(
            self._epoch, self._sequence, self._core.stats(), tuple(self._steps), batch, cache.cached_digest
        )
        self._steps.clear()
        self._sequence += 1
        self._last_at = self._clock()
        return report

    def _record(self, output: SchedulerOutput, duration_s: float) -> None:
        self._steps.append(StepSample.of(output, duration_s))
