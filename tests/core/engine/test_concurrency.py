"""Many requests at once: none leaks a block, none changes another, cancelling frees at once."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from model_zoo import build
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnavailableError,
)
from small_tokenizers import byte_level_backend
from tiny_engine import Brake

NUM_REQUESTS = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    build("qwen3", folder)
    byte_level_backend(vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


def make_engine(folder: Path, **options: Any) -> LLMEngine:
    fields = {"max_model_len": 128, "num_kv_blocks": 64, "block_size": 8, "max_batch_size": 16, **options}
    return LLMEngine(LLMEngineConfig.model_validate({"model_path": str(folder), **fields}))


def make_workload(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Mixed lengths, greedy and seeded sampling, some with shared prefixes and penalties."""
    shared_prefix = [rng.randrange(3, 250) for _ in range(24)]
    workload = []
    for i in range(NUM_REQUESTS):
        prompt = (shared_prefix if i % 3 == 0 else []) + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 40))]
        fields: dict[str, Any] = {"max_tokens": rng.randrange(1, 32), "ignore_eos": True}
        if i % 4:
            fields |= {"temperature": 0.9, "seed": i, "top_p": rng.choice([1.0, 0.8]), "top_k": rng.choice([0, 20])}
        if i % 5 == 0:
            fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
        workload.append((prompt, SamplingParams(**fields)))
    return workload


async def run_and_maybe_cancel(
    engine: LLMEngine, prompt: list[int], sampling: SamplingParams, cancel_after: int | None
) -> list[int]:
    """The tokens of one request; it is left after `cancel_after` deltas."""
    tokens: list[int] = []
    async with aclosing(engine.stream(prompt, sampling_params=sampling)) as events:
        num_deltas = 0
        async for event in events:
            if isinstance(event, StreamEventDelta):
                tokens += event.chunk_tokens
                num_deltas += 1
            if cancel_after is not None and num_deltas >= cancel_after:
                break
    return tokens


async def settled(engine: LLMEngine) -> None:
    """Wait until the engine has taken in the last cancellations; then nothing may be held."""
    while (stats := await engine.stats()).num_running + stats.num_waiting:
        await asyncio.sleep(0.01)
    assert stats.num_free_blocks == stats.num_blocks
    assert engine._client is not None
    await engine._client.check_integrity()


async def test_requests_in_company_equal_their_solo_runs(checkpoint: Path) -> None:
    rng = random.Random(7)
    workload = make_workload(rng)
    cancels = [rng.randrange(0, 6) if rng.random() < 0.3 else None for _ in workload]
    async with make_engine(checkpoint, enable_prefix_caching=False) as alone:
        expected = [(await alone.generate(prompt, sampling_params=s)).output_tokens for prompt, s in workload]
    async with make_engine(checkpoint, prefill_chunk_size=16) as engine:
        runs = [
            run_and_maybe_cancel(engine, prompt, sampling, cancel)
            for (prompt, sampling), cancel in zip(workload, cancels, strict=True)
        ]
        results = await asyncio.gather(*runs)
        await settled(engine)
        stats = await engine.stats()
    assert stats.num_preemptions > 0, "the workload should not fit at once"
    assert stats.prefix_hit_tokens > 0
    for got, want, cancel in zip(results, expected, cancels, strict=True):
        assert got == (want if cancel is None else want[: len(got)])
    assert sum(cancel is None for cancel in cancels) > 30


async def test_cancelling_a_consumer_frees_its_blocks_within_a_step(checkpoint: Path, brake: Brake) -> None:
    async with make_engine(checkpoint) as engine:
        brake.set(3)
        task = asyncio.ensure_future(
            engine.generate([5] * 60, sampling_params=SamplingParams(max_tokens=60, ignore_eos=True))
        )
        await brake.held()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        brake.release()
        await settled(engine)
        assert (await engine.stats()).num_steps == 4, "the one that was under way was the last"


async def test_stream_grammar_and_concatenation(checkpoint: Path) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=3, ignore_eos=True)
    async with make_engine(checkpoint) as engine:
        events = [event async for event in engine.stream("The quick brown fox", sampling_params=sampling)]
        whole = await engine.generate("The quick brown fox", sampling_params=sampling)
    assert isinstance(events[0], StreamEventStart)
    assert isinstance(events[-1], StreamEventEnd)
    deltas = [event for event in events[1:-1] if isinstance(event, StreamEventDelta)]
    assert len(deltas) == len(events) - 2
    assert len(whole.outputs) == 3
    assert len({tuple(output.token_ids) for output in whole.outputs}) == 3
    for output in whole.outputs:
        own = [delta for delta in deltas if delta.index == output.index]
        assert "".join(delta.chunk for delta in own) == output.text
        assert [token_id for delta in own for token_id in delta.chunk_tokens] == output.token_ids
    assert events[-1].outputs == whole.outputs


async def test_abort_ends_with_the_reason_abort(checkpoint: Path, brake: Brake) -> None:
    async with make_engine(checkpoint) as engine:
        brake.set(3)
        sampling = SamplingParams(max_tokens=60, ignore_eos=True)
        task = asyncio.ensure_future(engine.generate([5] * 20, sampling_params=sampling, request_id="mine"))
        await brake.held()
        with pytest.raises(InvalidArgumentError, match="fresh id"):
            await engine.generate([5], request_id="mine")
        engine.abort("mine")
        brake.release()
        response = await task
        assert response.finish_reason is FinishReason.ABORT
        await settled(engine)


async def test_stopping_the_engine_ends_its_requests(checkpoint: Path, brake: Brake) -> None:
    engine = make_engine(checkpoint)
    await engine.start()
    brake.set(3)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    task = asyncio.ensure_future(engine.generate([5] * 20, sampling_params=sampling))
    await brake.held()
    stopping = asyncio.ensure_future(engine.stop())
    await asyncio.sleep(0)
    brake.release()
    await stopping
    assert (await task).finish_reason is FinishReason.ABORT
    assert not await engine.health_check()
    with pytest.raises(UnavailableError, match="start"):
        await engine.generate("hello")


async def test_a_bad_request_disturbs_nobody(checkpoint: Path) -> None:
    async with make_engine(checkpoint) as engine:
        sampling = SamplingParams(max_tokens=10, ignore_eos=True)
        good = asyncio.ensure_future(engine.generate([5, 6, 7], sampling_params=sampling))
        for prompt, match in (([5] * 200, "128"), ([99999], "vocabulary"), ("", "empty")):
            with pytest.raises(InvalidArgumentError, match=match):
                await engine.generate(prompt, sampling_params=sampling)
        with pytest.raises(InvalidArgumentError, match="temperature"):
            await engine.generate([5], sampling_params=SamplingParams(temperature=-1.0))
        response: Response = await good
        assert len(response.output_tokens) == 10


@pytest.mark.parametrize("strategy", ["beam_search", "contrastive"])
async def test_sequence_strategies_run_in_company_and_leave_nothing(checkpoint: Path, strategy: str) -> None:
    sampling = SamplingParams.model_validate({"strategy": strategy, "max_tokens": 12, "ignore_eos": True})
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    async with make_engine(checkpoint) as engine:
        alone = await engine.generate([5, 6, 7, 8], sampling_params=sampling)
        together = await asyncio.gather(
            engine.generate([5, 6, 7, 8], sampling_params=sampling),
            *(engine.generate([i, i + 1], sampling_params=plain) for i in range(5, 15)),
        )
        await settled(engine)
    assert alone.output_tokens
    assert together[0].output_tokens == alone.output_tokens
