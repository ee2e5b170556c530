"""What one sequence cost, measured: holds `OutputTimer`.

Times of tokens are read from the clock given when their output arrives where the user's text is made, so they include
every queue on the way. What only the engine core can see (scheduling, cache, memory) comes from its `RequestTimings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sagellm_protocol.metrics import Metrics, Timestamps

if TYPE_CHECKING:
    from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest, RequestTimings

__all__ = ["OutputTimer"]


class OutputTimer:
    """Collects the times of one sequence. `clock` counts seconds and is the one of `core.arrival_time`."""

    def __init__(
        self,
        core: EngineCoreRequest,
        clock: Callable[[], float],
        epoch: float,
        peak_mem_mb: Callable[[], float] | None,
    ) -> None:
        self._core = core
        self._clock = clock
        self._epoch = epoch
        self._peak_mem_mb = peak_mem_mb
        self._first_at: float | None = None
        self._last_at = 0.0
        self._itl_ms: list[float] = []
        self._kv_used_tokens = 0
        self._timings: RequestTimings | None = None

    def record(self, output: EngineCoreOutput, num_tokens: int) -> None:
        """Note an output with `num_tokens` new tokens as it arrives; those that arrive together have no time between.

        Tokens that were made elsewhere are not among the new ones.
        """
        now = self._clock()
        self._kv_used_tokens = max(self._kv_used_tokens, output.kv_used_tokens)
        self._timings = output.metrics or self._timings
        if num_tokens == 0:
            return
        if self._first_at is None:
            self._first_at = now
        else:
            self._itl_ms.append((now - self._last_at) * 1e3)
        self._itl_ms.extend([0.0] * (num_tokens - 1))
        self._last_at = now

    def metrics(self, num_tokens: int, num_cached_tokens: int, *, failed: bool) -> Metrics:
        """The figures of the finished sequence with `num_tokens` output tokens."""
        now = self._clock()
        arrival, timings = self._core.arrival_time, self._timings
        itl_ms = self._itl_ms[: max(0, num_tokens - 1)]
        duration = now - arrival
        return Metrics(
            ttft_ms=0.0 if self._first_at is None else (self._first_at - arrival) * 1e3,
            tbt_ms=sum(itl_ms) / len(itl_ms) if itl_ms else 0.0,
            tpot_ms=self._tpot_ms(num_tokens),
            throughput_tps=num_tokens / duration if duration > 0 else 0.0,
            peak_mem_mb=self._peak_mem_mb() if self._peak_mem_mb is not None else 0.0,
            error_rate=1.0 if failed else 0.0,
            kv_used_tokens=max(self._kv_used_tokens, timings.kv_used_tokens if timings else 0),
            kv_used_bytes=timings.kv_used_bytes if timings else 0,
            prefix_hit_rate=min(1.0, num_cached_tokens / len(self._core.prompt_token_ids)),
            evict_count=timings.evict_count if timings else 0,
            evict_ms=timings.evict_ms if timings else 0.0,
            prefill_ms=_span_ms(timings.scheduled_at, timings.first_token_at) if timings else 0.0,
            decode_ms=_span_ms(timings.first_token_at, timings.last_token_at) if timings else 0.0,
            itl_list=itl_ms,
            timestamps=self._timestamps(now),
        )

    def _tpot_ms(self, num_tokens: int) -> float:
        if self._first_at is None or num_tokens < 2:
            return 0.0
        return (self._last_at - self._first_at) * 1e3 / (num_tokens - 1)

    def _timestamps(self, now: float) -> Timestamps:
        timings = self._timings
        return Timestamps(
            queued_at=self._core.arrival_time,
            scheduled_at=timings.scheduled_at if timings else None,
            # A request is scheduled into the step that runs next: both happen at the same moment.
            executed_at=timings.scheduled_at if timings else None,
            first_token_at=self._first_at,
            completed_at=now,
            epoch=self._epoch,
        )


def _span_ms(start: float | None, end: float | None) -> float:
    """Milliseconds from start to end; 0 while either has not been reached."""
    return 0.0 if start is None or end is None else max(0.0, end - start) * 1e3
