"""What comes to a model and how it is served, an interval at a time: what the autoscaler decides by."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil

from sagellm_control_plane.capacity import Workload
from sagellm_control_plane.engines import ManagedEngine
from sagellm_protocol import Usage

_MEMORY = 512  # requests that lengths and gaps are taken from
_MIN_GAPS = 5  # of an interval, that tell how even they are


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One interval. What is not known is None: the workload before anything ended, times where nothing ended."""

    rate: float  # requests a second that came
    num_ended: int
    workload: Workload | None
    ttft_s: float | None  # at the quantile
    tpot_s: float | None


@dataclass(slots=True, eq=False)
class LoadMeter:
    """Counts the requests of one model. `quantile` is that of the objectives. Belongs to one event loop."""

    now: float
    quantile: float = 0.9
    _num_arrived: int = 0
    _last_arrival: float | None = None
    _gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))  # of this interval
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))  # each over the mean of its interval
    _requests: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    _ttfts_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    _tpots_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    def arrived(self, at: float) -> None:
        """A request came."""
        self._num_arrived += 1
        if self._last_arrival is not None:
            self._gaps_s.append(at - self._last_arrival)
        self._last_arrival = at

    def ended(self, usage: Usage, ttft_s: float, decode_s: float) -> None:
        """A request was answered: its first token `ttft_s` after it came, the last one `decode_s` after that."""
        num_uncached = max(1, usage.prompt_tokens - usage.cached_tokens)
        self._requests.append((usage.prompt_tokens, num_uncached, usage.completion_tokens))
        self._ttfts_s.append(ttft_s)
        if usage.completion_tokens > 1:
            self._tpots_s.append(decode_s / (usage.completion_tokens - 1))

    def close(self, now: float) -> LoadSample:
        """The interval since the last call; a new one begins."""
        self._keep_gaps()
        sample = LoadSample(
            rate=self._num_arrived / max(now - self.now, 1e-9),
            num_ended=len(self._ttfts_s),
            workload=self._workload(),
            ttft_s=_quantile(self._ttfts_s, self.quantile),
            tpot_s=_quantile(self._tpots_s, self.quantile),
        )
        self.now, self._num_arrived = now, 0
        self._ttfts_s.clear()
        self._tpots_s.clear()
        return sample

    def _keep_gaps(self) -> None:
        # A rate that rises or falls is no burst: what varies is what varies within an interval.
        if len(self._gaps_s) >= _MIN_GAPS and (mean := _mean(self._gaps_s)) > 0:
            self._gaps.extend(gap / mean for gap in self._gaps_s)
        self._gaps_s.clear()

    def _workload(self) -> Workload | None:
        if not self._requests:
            return None
        prompts, uncached, outputs = zip(*self._requests, strict=True)
        high = _quantile(uncached, self.quantile)
        assert high is not None
        return Workload(
            num_prompt_tokens=_mean(prompts),
            num_uncached_tokens=_mean(uncached),
            num_output_tokens=_mean(outputs),
            num_uncached_tokens_high=high,
            arrival_scv=_scv(self._gaps),
            service_scv=_scv(uncached),
        )


class LoadMeters:
    """The meters of the models that somebody watches; what comes to others is not counted."""

    def __init__(self) -> None:
        self._meters: dict[str, LoadMeter] = {}

    def open(self, model: str, now: float, quantile: float) -> LoadMeter:
        """Begin to count the requests of a model."""
        meter = self._meters[model] = LoadMeter(now, quantile)
        return meter

    def of(self, engine: ManagedEngine) -> LoadMeter | None:
        """The meter of an engine's model; None where nobody watches that."""
        return self._meters.get(engine.instance.model_name) if self._meters else None


def _mean(values: deque[float] | tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _scv(values: deque[float] | tuple[float, ...]) -> float:
    """The squared coefficient of variation; that of a Poisson process where there is too little to tell."""
    if len(values) < 20 or not (mean := _mean(values)):
        return 1.0
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def _quantile(values: deque[float] | tuple[float, ...], share: float) -> float | None:
    ranked = sorted(values)
    return ranked[max(0, ceil(share * len(ranked)) - 1)] if ranked else None
