"""Every figure of a response is measured, and the figures agree with each other."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from sagellm_core import LLMEngine
from sagellm_core.models.decoder import CausalLM
from sagellm_protocol import FinishReason, Metrics, SamplingParams, StreamEventDelta, StreamEventEnd
from tiny_engine import BLOCK_SIZE, Brake, make_engine

PROMPT = list(range(10, 31))  # 21 tokens: two full blocks and a part
BYTES_PER_TOKEN = 3 * 2 * 2 * 24 * 4  # layers, K and V, KV heads, head size, float32
NUM_TOKENS = 12


def tokens(num_tokens: int = NUM_TOKENS, **fields: object) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": num_tokens, "ignore_eos": True, **fields})


def check_times(metrics: Metrics, num_tokens: int, elapsed_ms: float) -> None:
    """What holds for every sequence that gave at least one token."""
    stamps = metrics.timestamps
    assert stamps is not None
    milestones = [stamps.queued_at, stamps.scheduled_at, stamps.executed_at, stamps.first_token_at, stamps.completed_at]
    known = [at for at in milestones if at is not None]
    assert len(known) == 5
    assert known == sorted(known)
    duration = known[-1] - known[0]
    assert abs(stamps.epoch + known[-1] - time.time()) < 60
    assert 0 < metrics.ttft_ms <= duration * 1e3 <= elapsed_ms
    assert metrics.ttft_ms == pytest.approx((known[3] - known[0]) * 1e3)
    assert len(metrics.itl_list) == num_tokens - 1
    assert all(gap >= 0 for gap in metrics.itl_list)
    assert metrics.throughput_tps == pytest.approx(num_tokens / duration, rel=1e-6)
    mean = sum(metrics.itl_list) / (num_tokens - 1) if num_tokens > 1 else 0.0
    assert metrics.tbt_ms == pytest.approx(mean)
    assert metrics.tpot_ms == pytest.approx(mean, abs=1e-6)
    assert 0 < metrics.prefill_ms <= metrics.ttft_ms
    assert (metrics.decode_ms > 0) == (num_tokens > 1)


def check_not_used(metrics: Metrics) -> None:
    """One device, no drafts, no transfers: what does not apply is 0 or None."""
    assert metrics.spec_accept_rate is None
    assert metrics.kv_transfer_count == metrics.kv_transfer_bytes == metrics.kv_transfer_ms == 0
    assert metrics.comm_overhead_ms == metrics.allreduce_count == metrics.allgather_count == 0


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
async def test_a_plain_request(folder: Path, num_tokens: int) -> None:
    async with make_engine(folder) as engine:
        began = time.monotonic()
        response = await engine.generate(PROMPT, sampling_params=tokens(num_tokens))
        elapsed_ms = (time.monotonic() - began) * 1e3
        bytes_per_token = engine.get_info()["kv_bytes_per_token"]
    metrics = response.metrics
    check_times(metrics, num_tokens, elapsed_ms)
    check_not_used(metrics)
    num_held = len(PROMPT) + num_tokens - 1  # the last token is never computed
    assert bytes_per_token == BYTES_PER_TOKEN
    assert metrics.kv_used_tokens == num_held
    assert metrics.kv_used_bytes == -(-num_held // BLOCK_SIZE) * BLOCK_SIZE * BYTES_PER_TOKEN
    assert metrics.prefix_hit_rate == metrics.evict_count == metrics.evict_ms == metrics.error_rate == 0
    assert metrics.peak_mem_mb > 10
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(PROMPT), num_tokens)


async def test_stream_and_response_measure_the_same_things(folder: Path) -> None:
    async with make_engine(folder) as engine:
        began = time.monotonic()
        events = [event async for event in engine.stream(PROMPT, sampling_params=tokens())]
        elapsed_ms = (time.monotonic() - began) * 1e3
    end = events[-1]
    assert isinstance(end, StreamEventEnd)
    check_times(end.metrics, NUM_TOKENS, elapsed_ms)


async def test_a_repeated_prompt_hits_its_full_blocks(folder: Path) -> None:
    async with make_engine(folder) as engine:
        first = await engine.generate(PROMPT, sampling_params=tokens())
        second = await engine.generate(PROMPT, sampling_params=tokens())
    num_cached = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
    assert second.output_tokens == first.output_tokens
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, num_cached)
    assert second.metrics.prefix_hit_rate == pytest.approx(num_cached / len(PROMPT))
    assert second.metrics.kv_used_tokens == first.metrics.kv_used_tokens  # shared blocks are held, too


async def test_evictions_are_counted_where_the_cache_overflows(folder: Path) -> None:
    async with make_engine(folder, max_model_len=48, num_kv_blocks=6) as engine:
        responses = [await engine.generate([start] * 30, sampling_params=tokens(4)) for start in (5, 6, 7, 8)]
        stats = await engine.stats()
    counts = [response.metrics.evict_count for response in responses]
    assert counts[0] == 0
    assert counts[-1] > 0
    assert sum(counts) == stats.evict_count
    assert responses[-1].metrics.evict_ms > 0


async def test_a_stop_string_ends_the_figures_with_the_answer(folder: Path) -> None:
    async with make_engine(folder) as engine:
        plain = await engine.generate(PROMPT, sampling_params=tokens(40))
        stop = next(char for char in plain.output_text[3:] if char.isascii() and char.isprintable())
        began = time.monotonic()
        stopped = await engine.generate(PROMPT, sampling_params=tokens(40, stop=stop))
        elapsed_ms = (time.monotonic() - began) * 1e3
    num_tokens = len(stopped.output_tokens)
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert 0 < num_tokens < 40
    check_times(stopped.metrics, num_tokens, elapsed_ms)
    assert stopped.metrics.kv_used_tokens >= len(PROMPT) + num_tokens - 1  # the step loop may be a token ahead


async def test_several_outputs_count_together(folder: Path) -> None:
    sampling = tokens(n=2, temperature=1.0, seed=1)
    async with make_engine(folder) as engine:
        response = await engine.generate(PROMPT, sampling_params=sampling)
    metrics = response.metrics
    assert len(response.outputs) == 2
    assert response.usage.prompt_tokens == len(PROMPT)
    assert response.usage.completion_tokens == 2 * NUM_TOKENS
    assert len(metrics.itl_list) == 2 * (NUM_TOKENS - 1)
    assert metrics.kv_used_tokens == 2 * (len(PROMPT) + NUM_TOKENS - 1)
    assert metrics.timestamps is not None
    assert metrics.timestamps.duration_s is not None
    assert metrics.throughput_tps == pytest.approx(2 * NUM_TOKENS / metrics.timestamps.duration_s, rel=1e-3)
    assert 0 < metrics.ttft_ms <= metrics.timestamps.duration_s * 1e3


async def test_an_aborted_request_counts_what_it_got(folder: Path, brake: Brake) -> None:
    async with make_engine(folder) as engine:
        brake.set(3)
        received = 0
        end: StreamEventEnd | None = None
        async for event in engine.stream(PROMPT, sampling_params=tokens(100), request_id="mine"):
            if isinstance(event, StreamEventDelta):
                received += len(event.chunk_tokens)
                if received == 3:
                    engine.abort("mine")
                    brake.release()
            elif isinstance(event, StreamEventEnd):
                end = event
    assert end is not None
    assert end.finish_reason is FinishReason.ABORT
    assert end.metrics.error_rate == 0
    assert len(end.metrics.itl_list) == len(end.output_tokens) - 1 == received - 1
    assert end.metrics.kv_used_tokens >= len(PROMPT) + received - 1


async def wait_for_preemption(engine: LLMEngine) -> None:
    while (await engine.stats()).num_preemptions == 0:
        await asyncio.sleep(0)


async def test_a_preempted_request_remembers_what_it_held(folder: Path) -> None:
    async with make_engine(folder, max_model_len=96, num_kv_blocks=12) as engine:
        runs = [
            asyncio.ensure_future(engine.generate([start] * 24, sampling_params=tokens(60), request_id=f"r{start}"))
            for start in (5, 6, 7)
        ]
        await wait_for_preemption(engine)
        responses = await asyncio.gather(*runs)
    for response in responses:
        assert response.metrics.kv_used_tokens == 24 + 60 - 1
        assert response.metrics.kv_used_bytes == -(-83 // BLOCK_SIZE) * BLOCK_SIZE * BYTES_PER_TOKEN


async def test_a_failed_request_counts_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_engine(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(CausalLM, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("the device broke")))
            response = await engine.generate(PROMPT, sampling_params=tokens())
    metrics = response.metrics
    assert response.finish_reason is FinishReason.ERROR
    assert metrics.error_rate == 1
    assert metrics.ttft_ms == metrics.tpot_ms == metrics.throughput_tps == metrics.decode_ms == 0
    assert metrics.itl_list == []
    assert metrics.timestamps is not None
    assert metrics.timestamps.first_token_at is None
    assert metrics.timestamps.completed_at is not None
