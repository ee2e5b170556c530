"""What a request cost: times, memory, cache and communication.

Every figure is measured; what doesn't apply is 0 or None, never invented.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from pydantic import Field

from sagellm_protocol.model import ProtocolModel


def wall_clock_epoch() -> float:
    """Return the wall-clock time, in seconds since 1970, at which this process's monotonic clock read 0."""
    return time.time() - time.monotonic()


class Timestamps(ProtocolModel):
    """A request's milestones, in seconds of one monotonic clock; None is "not reached".

    ``epoch`` is the wall-clock time at which that clock read 0, so ``epoch + queued_at`` is a date.
    """

    queued_at: float | None = Field(default=None, description="Arrived at the engine.")
    scheduled_at: float | None = Field(default=None, description="Got its first share of a step.")
    executed_at: float | None = Field(default=None, description="Its first step began to run.")
    first_token_at: float | None = Field(default=None, description="Its first token was there.")
    completed_at: float | None = Field(default=None, description="Finished, for whatever reason.")
    epoch: float = 0.0

    @property
    def duration_s(self) -> float | None:
        """Seconds from arrival to the end; None while either is unknown."""
        if self.queued_at is None or self.completed_at is None:
            return None
        return self.completed_at - self.queued_at


class Metrics(ProtocolModel):
    """The figures of one request, or (by :meth:`aggregate`) of several. Milliseconds, bytes, tokens, shares of 1."""

    ttft_ms: float = Field(default=0.0, ge=0, description="Arrival to first token.")
    tbt_ms: float = Field(default=0.0, ge=0, description="Mean of itl_list.")
    tpot_ms: float = Field(default=0.0, ge=0, description="(last token - first token) / (tokens - 1).")
    throughput_tps: float = Field(default=0.0, ge=0, description="Output tokens a second, from arrival to the end.")
    peak_mem_mb: float = Field(default=0.0, ge=0, description="Peak memory of the engine's process or device, in MiB.")
    error_rate: float = Field(
        default=0.0, ge=0, le=1, description="1 if the request failed, else 0; aggregated: the share."
    )
    kv_used_tokens: int = Field(default=0, ge=0, description="Most tokens whose KV the request held.")
    kv_used_bytes: int = Field(default=0, ge=0, description="Most bytes of KV blocks the request held.")
    prefix_hit_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of the prompt's tokens found in the cache."
    )
    evict_count: int = Field(default=0, ge=0, description="Cached blocks evicted while it ran.")
    evict_ms: float = Field(default=0.0, ge=0, description="Time spent evicting them.")
    spec_accept_rate: float | None = Field(
        default=None, ge=0, le=1, description="Accepted share of drafts; None: no drafts."
    )
    prefill_ms: float = Field(default=0.0, ge=0, description="Scheduled to first token.")
    decode_ms: float = Field(default=0.0, ge=0, description="First token to the end.")
    kv_transfer_count: int = Field(default=0, ge=0)
    kv_transfer_bytes: int = Field(default=0, ge=0)
    kv_transfer_ms: float = Field(default=0.0, ge=0)
    comm_overhead_ms: float = Field(default=0.0, ge=0)
    allreduce_count: int = Field(default=0, ge=0)
    allgather_count: int = Field(default=0, ge=0)
    itl_list: list[float] = Field(default_factory=list, description="Milliseconds between a token and the one before.")
    timestamps: Timestamps | None = None

    @classmethod
    def aggregate(cls, metrics: Iterable[Metrics]) -> Metrics:
        """Return the figures of several requests as one.

        Latencies are means over the requests that have them (a failed request without a first token doesn't pull
        ``ttft_ms`` down); ``error_rate`` and ``prefix_hit_rate`` are means over all, ``spec_accept_rate`` over those
        with drafts. Counts and costs are sums, memory figures maxima, ``itl_list`` is concatenated.
        ``throughput_tps`` is all tokens over the time from the first arrival to the last end, so it needs timestamps:
        without them on every request it is 0. ``timestamps`` are the earliest (the latest for the end) on the first
        request's clock. Of nothing: all 0.
        """
        items = list(metrics)
        if not items:
            return cls()
        values: dict[str, object] = {name: _mean(items, name, only_positive=True) for name in _LATENCIES}
        values.update({name: _mean(items, name) for name in _SHARES})
        values.update({name: sum(getattr(item, name) for item in items) for name in _SUMS})
        values.update({name: max(getattr(item, name) for item in items) for name in _MAXIMA})
        accepted = [item.spec_accept_rate for item in items if item.spec_accept_rate is not None]
        values["spec_accept_rate"] = sum(accepted) / len(accepted) if accepted else None
        values["itl_list"] = [gap for item in items for gap in item.itl_list]
        values["timestamps"] = _joint_timestamps([item.timestamps for item in items if item.timestamps is not None])
        values["throughput_tps"] = _joint_throughput(items)
        return cls(**values)  # type: ignore[arg-type]


_LATENCIES = ("ttft_ms", "tbt_ms", "tpot_ms", "prefill_ms", "decode_ms")
_SHARES = ("error_rate", "prefix_hit_rate")
_SUMS = (
    "evict_count",
    "evict_ms",
    "kv_transfer_count",
    "kv_transfer_bytes",
    "kv_transfer_ms",
    "comm_overhead_ms",
    "allreduce_count",
    "allgather_count",
)
_MAXIMA = ("peak_mem_mb", "kv_used_tokens", "kv_used_bytes")


def _mean(items: Sequence[Metrics], name: str, *, only_positive: bool = False) -> float:
    values = [getattr(item, name) for item in items]
    if only_positive:
        values = [value for value in values if value > 0]
    return sum(values) / len(values) if values else 0.0


def _joint_timestamps(stamps: Sequence[Timestamps]) -> Timestamps | None:
    if not stamps:
        return None
    epoch = stamps[0].epoch

    def pick(choose: Callable[[list[float]], float], name: str) -> float | None:
        known = [(stamp.epoch - epoch) + at for stamp in stamps if (at := getattr(stamp, name)) is not None]
        return choose(known) if known else None

    return Timestamps(
        queued_at=pick(min, "queued_at"),
        scheduled_at=pick(min, "scheduled_at"),
        executed_at=pick(min, "executed_at"),
        first_token_at=pick(min, "first_token_at"),
        completed_at=pick(max, "completed_at"),
        epoch=epoch,
    )


def _joint_throughput(items: Sequence[Metrics]) -> float:
    stamps = [item.timestamps for item in items]
    durations = [stamp.duration_s if stamp is not None else None for stamp in stamps]
    known = [duration for duration in durations if duration is not None]
    if len(known) < len(items):
        return 0.0
    joint = _joint_timestamps([stamp for stamp in stamps if stamp is not None])
    span = joint.duration_s if joint is not None else None
    num_tokens = sum(item.throughput_tps * duration for item, duration in zip(items, known, strict=True))
    return num_tokens / span if span else 0.0
