"""Engines' figures for Prometheus: histograms of finished requests, gauges of the moment, one label for each engine."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm_core.engine_core.engine_core import EngineStats
from sagellm_protocol import Response, StreamEventEnd

_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LABELS = ("engine_id",)

_GAUGES = {
    "num_running": ("sagellm_requests_running", "Requests in the batch"),
    "num_waiting": ("sagellm_requests_waiting", "Requests in the queue"),
    "kv_usage": ("sagellm_kv_usage_ratio", "Share of the KV blocks in use"),
}
_COUNTERS = {
    "num_preemptions": ("sagellm_preemptions", "Requests that gave their KV blocks back"),
    "evict_count": ("sagellm_kv_evictions", "Cached blocks given up for others"),
    "num_steps": ("sagellm_engine_steps", "Steps executed"),
}


class EngineCollector(Collector):
    """Collects what `observe` saw and the last `stats` of each engine; register it with a registry of one's own."""

    def __init__(self) -> None:
        self.stats: dict[str, EngineStats] = {}
        self._requests = Counter("sagellm_requests", "Finished requests", (*_LABELS, "finish_reason"), registry=None)
        self._prompt = Counter("sagellm_prompt_tokens", "Prompt tokens", _LABELS, registry=None)
        self._output = Counter("sagellm_output_tokens", "Output tokens", _LABELS, registry=None)
        self._cached = Counter("sagellm_cached_prompt_tokens", "Prompt tokens found in cache", _LABELS, registry=None)
        self._ttft = _latency("sagellm_ttft_seconds", "Time to the first token")
        self._tpot = _latency("sagellm_tpot_seconds", "Time per output token after the first")

    def observe(self, answer: Response | StreamEventEnd) -> None:
        """Count one finished request."""
        engine_id, usage, metrics = answer.engine_id, answer.usage, answer.metrics
        self._requests.labels(engine_id, answer.finish_reason.value).inc()
        self._prompt.labels(engine_id).inc(usage.prompt_tokens)
        self._output.labels(engine_id).inc(usage.completion_tokens)
        self._cached.labels(engine_id).inc(usage.cached_tokens)
        if usage.completion_tokens:
            self._ttft.labels(engine_id).observe(metrics.ttft_ms / 1e3)
        if usage.completion_tokens > 1:
            self._tpot.labels(engine_id).observe(metrics.tpot_ms / 1e3)

    def collect(self) -> Iterator[Metric]:
        """The metric families, for a registry."""
        for own in (self._requests, self._prompt, self._output, self._cached, self._ttft, self._tpot):
            yield from own.collect()
        for field, (name, text) in _GAUGES.items():
            yield self._family(GaugeMetricFamily(name, text, labels=_LABELS), field)
        for field, (name, text) in _COUNTERS.items():
            yield self._family(CounterMetricFamily(name, text, labels=_LABELS), field)

    def _family(self, family: GaugeMetricFamily | CounterMetricFamily, field: str) -> Metric:
        for engine_id, stats in self.stats.items():
            family.add_metric([engine_id], getattr(stats, field))
        return family


def _latency(name: str, text: str) -> Histogram:
    return Histogram(name, text, _LABELS, buckets=_LATENCY_BUCKETS, registry=None)
