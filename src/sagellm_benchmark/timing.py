"""From the moments at which tokens arrived to rates and latencies.

Every measurement of an engine yields the same raw figures: for each request of a batch the seconds, counted from when
the batch was handed over, at which each of its tokens arrived (`TokenTimes`). All rates are derived from those, in one
place, so that engines and peers are compared by the same definitions.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

TokenTimes = list[list[float]]
"""For each request, the arrival of each of its tokens in seconds since the batch began; ascending."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, extremes and percentiles of one quantity."""

    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of one or more values."""
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(statistics.fmean(ordered), ordered[0], p50, p90, p99, ordered[-1])

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ascending values lie, linear between neighbours (Hyndman & Fan's type 7)."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def first_token_times(times: TokenTimes) -> list[float]:
    """Time to first token of each request."""
    return [arrivals[0] for arrivals in times]


def times_per_token(times: TokenTimes) -> list[float]:
    """Mean time per token after the first, of each request that has more than one."""
    return [(arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) for arrivals in times if len(arrivals) > 1]


def gaps(times: TokenTimes) -> list[float]:
    """All times between a token and the one before it."""
    return [b - a for arrivals in times for a, b in pairwise(arrivals)]


def duration(times: TokenTimes) -> float:
    """From the start to the last token of all."""
    return max(arrivals[-1] for arrivals in times)


def output_rate(times: TokenTimes) -> float:
    """Output tokens a second end to end, prompts included."""
    return sum(map(len, times)) / duration(times)


def prefill_rate(times: TokenTimes, input_len: int) -> float:
    """Prompt tokens a second, until every request has its first token."""
    return len(times) * input_len / max(first_token_times(times))


def decode_rate(times: TokenTimes) -> float | None:
    """Output tokens a second while all requests decode: from the latest first token to the earliest last one.

    None where there is no such time: single tokens, or a request that ends before another begins.
    """
    begin = max(first_token_times(times))
    end = min(arrivals[-1] for arrivals in times)
    if end <= begin:
        return None
    return sum(begin < moment <= end for arrivals in times for moment in arrivals) / (end - begin)
