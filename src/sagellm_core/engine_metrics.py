"""Engines' figures for Prometheus, under the names that vLLM's dashboards and autoscalers ask for.

Counted per engine with plain numbers and made into families only for a scrape: a request costs a few microseconds. What
a name means is written in docs/metrics.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sagellm_core.engine_core.report import EngineStats
from sagellm_protocol import Request, Response, StreamEventEnd
from sagellm_protocol.metrics import Timestamps

_LABELS = ("model_name", "engine")

# Upper bounds in seconds. From a native kernel's decode step to a prompt of many thousand tokens on a slow machine.
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0),
    *(15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(mantissa * 10**exponent) for exponent in range(6) for mantissa in (1, 2, 5))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

# What a histogram is of -> its names, its meaning, its upper bounds.
_HISTOGRAMS: dict[str, tuple[tuple[str, ...], str, Sequence[float]]] = {
    "ttft": (("vllm:time_to_first_token_seconds",), "Arrival to first token", _TTFT_S),
    "gap": (
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "Between a token and the one before",
        _TOKEN_S,
    ),
    "tpot": (("vllm:request_time_per_output_token_seconds",), "A request's mean time between tokens", _TOKEN_S),
    "e2e": (("vllm:e2e_request_latency_seconds",), "Arrival to the end of the answer", _REQUEST_S),
    "queue": (("vllm:request_queue_time_seconds",), "Arrival to the request's first step", _REQUEST_S),
    "inference": (("vllm:request_inference_time_seconds",), "First step to the last token", _REQUEST_S),
    "prefill": (("vllm:request_prefill_time_seconds",), "First step to first token", _REQUEST_S),
    "decode": (("vllm:request_decode_time_seconds",), "First token to last token", _REQUEST_S),
    "prompt": (("vllm:request_prompt_tokens",), "Prompt tokens of a request", _TOKENS),
    "output": (("vllm:request_generation_tokens",), "Output tokens of a request", _TOKENS),
    "longest": (("vllm:request_max_num_generation_tokens",), "Output tokens of a request's longest choice", _TOKENS),
    "max_tokens": (("vllm:request_params_max_tokens",), "The max_tokens of requests that give one", _TOKENS),
    "n": (("vllm:request_params_n",), "The n of requests", _CHOICES),
}

# Field of `EngineStats` -> names and meaning.
_GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "num_running": (("vllm:num_requests_running",), "Requests in the batch"),
    "kv_usage": (
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "Share of the KV blocks in use, 0 to 1",
    ),
}
_COUNTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "prefix_query_tokens": (
        ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries"),
        "Prompt tokens looked up in the prefix cache",
    ),
    "prefix_hit_tokens": (
        ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits"),
        "Prompt tokens found in the prefix cache",
    ),
    "num_prompt_tokens": (("vllm:prompt_tokens",), "Prompt tokens of requests taken"),
    "num_output_tokens": (("vllm:generation_tokens",), "Tokens sampled"),
    "num_preemptions": (("vllm:num_preemptions",), "Times that a request gave its KV blocks back"),
    "evict_count": (("sagellm_kv_evictions",), "Cached blocks given up for others"),
    "num_steps": (("sagellm_engine_steps",), "Steps executed"),
}


class Histogram:
    """Counts of values by upper bound; `observe` costs a fraction of a microsecond."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def observe_all(self, values: Sequence[float], unit: float) -> None:
        """Count values that are given in `unit`s."""
        if not values:
            return
        counts, bounds = self._counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value * unit)] += 1
        self._total += sum(values) * unit

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Put it into a family, with these labels."""
        count, buckets = 0, []
        for bound, further in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            count += further
            buckets.append((bound, count))
        family.add_metric(labels, buckets, self._total)


@dataclass(slots=True)
class _Figures:
    """What is counted of one engine's requests."""

    labels: tuple[str, str]
    num_ended: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by finish reason
    of: dict[str, Histogram] = field(
        default_factory=lambda: {key: Histogram(bounds) for key, (_, _, bounds) in _HISTOGRAMS.items()}
    )


class EngineCollector(Collector):
    """Collects what `observe` saw and the last `stats` of each engine; register it with a registry of one's own.

    `model_of` gives the name of an engine's model, or nothing. `num_queued` has the requests of a model that wait in
    front of its engines; they are counted with the first of these, so that sums are right.
    """

    def __init__(self, model_of: Callable[[str], str]) -> None:
        self.stats: dict[str, EngineStats] = {}
        self.num_queued: dict[str, int] = {}
        self._model_of = model_of
        self._figures: dict[str, _Figures] = {}

    def observe(self, request: Request, answer: Response | StreamEventEnd, waited_s: float) -> None:
        """Count one request that has ended and had waited so long before an engine had it."""
        fields = answer.__dict__  # every attribute of a pydantic value costs about as much as this
        engine_id, outputs, usage = fields["engine_id"], fields["outputs"], fields["usage"].__dict__
        # A request that was given up may never have had an engine.
        key = engine_id or f"/{request.model}"
        figures = self._figures.get(key)
        if figures is None:
            model_name = self._model_of(engine_id) or request.model
            figures = self._figures[key] = _Figures((model_name, engine_id))
        figures.num_ended[fields["finish_reason"]] += 1
        of, num_output_tokens = figures.of, usage["completion_tokens"]
        of["prompt"].observe(usage["prompt_tokens"])
        of["output"].observe(num_output_tokens)
        of["n"].observe(len(outputs) or 1)
        of["longest"].observe(
            num_output_tokens if len(outputs) < 2 else max(len(output.token_ids) for output in outputs)
        )
        asked = request.__dict__
        limit, sampling = asked["max_tokens"], asked["sampling_params"]
        if limit is None and sampling is not None and "max_tokens" in sampling.model_fields_set:
            limit = sampling.max_tokens
        if limit is not None:
            of["max_tokens"].observe(limit)
        _observe_times(of, fields["metrics"].__dict__, num_output_tokens, waited_s)

    def collect(self) -> Iterator[Metric]:
        """The metric families, for a registry."""
        yield self._ended()
        for key, (names, text, _) in _HISTOGRAMS.items():
            for name in names:
                family = HistogramMetricFamily(name, text, labels=_LABELS)
                for figures in self._figures.values():
                    figures.of[key].add_to(family, figures.labels)
                yield family
        for key, (names, text) in _GAUGES.items():
            for name in names:
                yield self._of_stats(GaugeMetricFamily(name, text, labels=_LABELS), key)
        for key, (names, text) in _COUNTERS.items():
            for name in names:
                yield self._of_stats(CounterMetricFamily(name, text, labels=_LABELS), key)
        yield self._waiting()
        yield self._sleep_state()
        yield self._cache_config()

    # ---- steps of the above ---------------------------------------------------------------------------

    def _ended(self) -> Metric:
        text = "Requests that have ended, whatever the reason"
        family = CounterMetricFamily("vllm:request_success", text, labels=(*_LABELS, "finished_reason"))
        for figures in self._figures.values():
            for reason, count in figures.num_ended.items():
                family.add_metric((*figures.labels, reason), count)
        return family

    def _of_stats(self, family: GaugeMetricFamily | CounterMetricFamily, key: str) -> Metric:
        for engine_id, stats in self.stats.items():
            family.add_metric((self._model_of(engine_id), engine_id), getattr(stats, key))
        return family

    def _waiting(self) -> Metric:
        family = GaugeMetricFamily("vllm:num_requests_waiting", "Requests in the queues", labels=_LABELS)
        queued = dict(self.num_queued)
        for engine_id, stats in self.stats.items():
            model_name = self._model_of(engine_id)
            family.add_metric((model_name, engine_id), stats.num_waiting + queued.pop(model_name, 0))
        for model_name, num_queued in queued.items():  # no engine of theirs is ready
            family.add_metric((model_name, ""), num_queued)
        return family

    def _sleep_state(self) -> Metric:
        labels = (*_LABELS, "sleep_state")
        family = GaugeMetricFamily("vllm:engine_sleep_state", "1 for the state it is in", labels=labels)
        for engine_id in self.stats:
            for state in ("awake", "weights_offloaded", "discard_all"):
                family.add_metric((self._model_of(engine_id), engine_id, state), state == "awake")
        return family

    def _cache_config(self) -> Metric:
        text = "Size of the KV cache: blocks, and tokens a block"
        labels = (*_LABELS, "block_size", "num_gpu_blocks")
        family = GaugeMetricFamily("vllm:cache_config_info", text, labels=labels)
        for engine_id, stats in self.stats.items():
            sizes = (str(stats.block_size), str(stats.num_blocks))
            family.add_metric((self._model_of(engine_id), engine_id, *sizes), 1)
        return family


def _observe_times(of: dict[str, Histogram], figures: dict[str, Any], num_output_tokens: int, waited_s: float) -> None:
    if num_output_tokens:
        of["ttft"].observe(figures["ttft_ms"] / 1e3 + waited_s)
    if num_output_tokens > 1:
        of["tpot"].observe(figures["tpot_ms"] / 1e3)
        of["gap"].observe_all(figures["itl_list"], 1e-3)
    times: Timestamps | None = figures["timestamps"]
    if times is None:
        return
    queued_at, scheduled_at, completed_at = times.queued_at, times.scheduled_at, times.completed_at
    if queued_at is None or completed_at is None:
        return
    of["e2e"].observe(completed_at - queued_at + waited_s)
    if scheduled_at is None:
        return
    prefill_s, decode_s = figures["prefill_ms"] / 1e3, figures["decode_ms"] / 1e3
    of["queue"].observe(scheduled_at - queued_at + waited_s)
    of["prefill"].observe(prefill_s)
    of["decode"].observe(decode_s)
    of["inference"].observe(prefill_s + decode_s)
