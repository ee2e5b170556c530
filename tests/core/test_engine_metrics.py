"""Engines' figures under the names that vLLM's dashboards ask for."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeEngine
from sagellm_core.engine_metrics import EngineCollector
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    Metrics,
    Request,
    Response,
    SamplingParams,
    StreamEventEnd,
    Timestamps,
    Usage,
)

LABELS = {"model_name": "m", "engine": "e0"}


class Page:
    """A scraped page."""

    def __init__(self, collector: EngineCollector) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        text = generate_latest(registry).decode()
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._registry = registry

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(name, {**LABELS, **labels})


def answer(**changes: object) -> Response:
    times = Timestamps(queued_at=10.0, scheduled_at=10.5, first_token_at=11.0, completed_at=12.0)
    metrics = Metrics(
        ttft_ms=1000.0, tpot_ms=250.0, prefill_ms=500.0, decode_ms=900.0, itl_list=[200.0, 300.0], timestamps=times
    )
    output = CompletionOutput(text="abc", token_ids=[1, 2, 3], finish_reason=FinishReason.STOP)
    usage = Usage(prompt_tokens=7, completion_tokens=3)
    names = {"request_id": "r", "engine_id": "e0"}
    return Response.of([output], metrics=metrics, usage=usage, **names).model_copy(update=changes)


def observed(*answers: Response | StreamEventEnd, request: Request | None = None, waited_s: float = 0.0) -> Page:
    collector = EngineCollector(lambda engine_id: "m" if engine_id == "e0" else "")
    for each in answers:
        collector.observe(request or Request(prompt="hi", model="m"), each, waited_s)
    return Page(collector)


def test_a_request_is_counted_once_in_every_family() -> None:
    page = observed(answer(), StreamEventEnd.of(answer()))
    assert page.value("vllm:request_success_total", finished_reason="stop") == 2
    for name, total in {
        "vllm:time_to_first_token_seconds": 2.0,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:e2e_request_latency_seconds": 4.0,
        "vllm:request_queue_time_seconds": 1.0,
        "vllm:request_prefill_time_seconds": 1.0,
        "vllm:request_decode_time_seconds": 1.8,
        "vllm:request_inference_time_seconds": 2.8,
        "vllm:request_prompt_tokens": 14.0,
        "vllm:request_generation_tokens": 6.0,
        "vllm:request_max_num_generation_tokens": 6.0,
        "vllm:request_params_n": 2.0,
    }.items():
        assert page.value(f"{name}_count") == 2, name
        assert abs((page.value(f"{name}_sum") or 0.0) - total) < 1e-9, name


def test_gaps_between_tokens_are_counted_one_by_one_under_both_names() -> None:
    page = observed(answer())
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
        assert page.value(f"{name}_count") == 2
        assert page.value(f"{name}_bucket", le="0.2") == 1
        assert page.value(f"{name}_bucket", le="0.3") == 2
        assert page.value(f"{name}_bucket", le="+Inf") == 2


def test_the_wait_in_front_of_the_engines_counts() -> None:
    page = observed(answer(), waited_s=2.0)
    assert page.value("vllm:time_to_first_token_seconds_sum") == 3.0
    assert page.value("vllm:request_queue_time_seconds_sum") == 2.5
    assert page.value("vllm:e2e_request_latency_seconds_sum") == 4.0
    assert page.value("vllm:request_prefill_time_seconds_sum") == 0.5


def test_max_tokens_is_counted_where_it_was_given() -> None:
    page = observed(answer())
    assert page.value("vllm:request_params_max_tokens_count") is None or not page.value(
        "vllm:request_params_max_tokens_count"
    )
    for request in (
        Request(prompt="hi", max_tokens=5),
        Request(prompt="hi", sampling_params=SamplingParams(max_tokens=5)),
    ):
        assert observed(answer(), request=request).value("vllm:request_params_max_tokens_sum") == 5


def test_a_request_that_was_given_up_is_an_abort_and_has_no_times() -> None:
    end = StreamEventEnd(request_id="r", engine_id="e0", finish_reason=FinishReason.ABORT)
    page = observed(end)
    assert page.value("vllm:request_success_total", finished_reason="abort") == 1
    assert page.value("vllm:time_to_first_token_seconds_count") == 0
    assert page.value("vllm:e2e_request_latency_seconds_count") == 0
    without_engine = observed(end.model_copy(update={"engine_id": ""}))
    assert without_engine.value("vllm:request_success_total", engine="", finished_reason="abort") == 1


async def test_gauges_and_counters_of_the_engines() -> None:
    engine = FakeEngine()
    async with engine:
        await engine.execute(Request(prompt="a b", max_tokens=3))
        collector = EngineCollector(lambda _: "m")
        collector.stats = {"e0": await engine.stats(), "e1": await engine.stats()}
        collector.num_queued = {"m": 4, "other": 2}
        page = Page(collector)
    assert page.value("vllm:prompt_tokens_total") == 2
    assert page.value("vllm:generation_tokens_total") == 3
    assert page.value("vllm:num_requests_running") == 0
    assert page.value("vllm:num_requests_waiting") == 4
    assert page.value("vllm:num_requests_waiting", engine="e1") == 0
    assert page.value("vllm:num_requests_waiting", engine="", model_name="other") == 2
    assert page.value("vllm:cache_config_info", block_size="16", num_gpu_blocks="8") == 1
    for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "vllm:num_preemptions_total"):
        assert page.value(name) == 0


def test_observing_is_cheap() -> None:
    collector = EngineCollector(lambda _: "m")
    request, whole = Request(prompt="hi", max_tokens=16), answer()
    best = float("inf")
    for _ in range(20):
        started_at = time.perf_counter()
        for _ in range(200):
            collector.observe(request, whole, 0.0)
        best = min(best, (time.perf_counter() - started_at) / 200)
    assert best < 60e-6  # 4 microseconds on a machine of its own
