from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from sagellm_benchmark import Load, describe_latency, describe_throughput, run_load
from sagellm_benchmark.requests import random_prompts, stream_batch
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError


@pytest.fixture
async def engine() -> AsyncIterator[LLMEngine]:
    async with LLMEngine(LLMEngineConfig(model_path="builtin", backend_type="cpu")) as started:
        yield started


async def test_every_token_arrives_once_and_in_order(engine: LLMEngine) -> None:
    times = await stream_batch(engine, random_prompts(5, 9, 1000, seed=0), 6, concurrency=2)
    assert [len(arrivals) for arrivals in times] == [6] * 5
    assert all(arrivals == sorted(arrivals) and arrivals[0] > 0 for arrivals in times)
    # Two at a time: the last pair cannot begin before the first has ended.
    assert times[4][0] > min(times[0][-1], times[1][-1])


async def test_a_request_that_fails_is_an_error(engine: LLMEngine) -> None:
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        await stream_batch(engine, [[10**9]], 4)


async def test_results_are_plain_json(engine: LLMEngine) -> None:
    load = Load(input_len=8, output_len=4, requests=3, concurrency=3, runs=2, warmup=1)
    calls: list[None] = []
    runs = await run_load(engine, load, on_run=lambda: calls.append(None))
    assert len(calls) == 3
    assert [[len(arrivals) for arrivals in times] for times in runs] == [[4] * 3] * 2
    latency = json.loads(json.dumps(describe_latency(engine, load, runs)))
    assert 0 < latency["ttft_ms"]["p50"] <= latency["latency_ms"]["p50"]
    assert latency["tpot_ms"]["mean"] > 0
    assert latency["prefill_tokens_per_second"] > 0
    assert latency["engine"]["kernels"]["linear"]
    throughput = json.loads(json.dumps(describe_throughput(engine, load, runs)))
    assert throughput["output_tokens_per_second"] == pytest.approx(4 * throughput["requests_per_second"], rel=0.3)
    assert throughput["total_tokens_per_second"] == pytest.approx(12 * throughput["requests_per_second"])
    assert len(throughput["runs"]) == 2


async def test_single_tokens_have_neither_gaps_nor_a_decode_rate(engine: LLMEngine) -> None:
    load = Load(input_len=4, output_len=1, requests=1, concurrency=1, runs=1, warmup=0)
    latency = describe_latency(engine, load, await run_load(engine, load))
    assert latency["itl_ms"] is None
    assert latency["tpot_ms"] is None
    assert latency["decode_tokens_per_second"] is None


def test_random_prompts_repeat_with_their_seed_and_differ_otherwise() -> None:
    prompts = random_prompts(3, 20, 50, seed=4)
    assert prompts == random_prompts(3, 20, 50, seed=4)
    assert prompts != random_prompts(3, 20, 50, seed=5)
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_empty_loads_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="output_len"):
        Load(input_len=1, output_len=0, requests=1, concurrency=1, runs=1)
