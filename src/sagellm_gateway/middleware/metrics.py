"""Figures of the calls themselves, whatever they ask for: how many, how they ended, how long they took.

A route is known by its path with the variables unfilled, so that no client can make up new series.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm_core.engine_metrics import Histogram

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Seconds, to the end of the answer.
_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class HttpFigures(Collector):
    """What is counted of calls, for a registry: `begin` and `end` are told of each."""

    def __init__(self) -> None:
        self._num_in_progress = 0
        self._num_ended: dict[tuple[str, str, int], int] = {}  # (method, route, status)
        self._durations: dict[tuple[str, str], Histogram] = {}

    def begin(self) -> None:
        """Count a call in; `end` counts it out."""
        self._num_in_progress += 1

    def end(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a call that is over."""
        self._num_in_progress -= 1
        method = method if method in _METHODS else "OTHER"
        ended = (method, route, status)
        self._num_ended[ended] = self._num_ended.get(ended, 0) + 1
        durations = self._durations.get((method, route))
        if durations is None:
            durations = self._durations[method, route] = Histogram(_BOUNDS)
        durations.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The metric families, for a registry."""
        labels = ("method", "handler")
        # The status by its class, as vLLM's server has it: its dashboards ask for "5xx".
        ended = CounterMetricFamily("http_requests", "Calls that are over", labels=(*labels, "status", "code"))
        for (method, route, status), count in self._num_ended.items():
            ended.add_metric((method, route, f"{status // 100}xx", str(status)), count)
        yield ended
        text = "Arrival of a call to the end of its answer"
        durations = HistogramMetricFamily("http_request_duration_seconds", text, labels=labels)
        for key, histogram in self._durations.items():
            histogram.add_to(durations, key)
        yield durations
        yield GaugeMetricFamily("http_requests_inprogress", "Calls in work", value=self._num_in_progress)
