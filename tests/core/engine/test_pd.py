"""Prefill and decode on engines of their own: the caller sees one engine's answer, whatever the hand-over does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.pd_executor import PDExecutor
from sagellm_core.runtime import PDRole, PDRuntime
from sagellm_protocol import (
    EmbedParams,
    FinishReason,
    InvalidArgumentError,
    KVTransferError,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    UnavailableError,
)
from tiny_engine import BLOCK_SIZE, build_checkpoint, make_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [(11 * i) % 290 + 3 for i in range(45)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(llama: tuple[Path, Any]) -> AsyncIterator[tuple[LLMEngine, LLMEngine, LLMEngine]]:
    """One alone, and a pair."""
    folder = llama[0]
    async with make_engine(folder) as alone, make_engine(folder) as prefill, make_engine(folder) as decode:
        yield alone, prefill, decode


def ask(prompt: list[int] | None = None, **sampling: Any) -> Request:
    fields = {"max_tokens": 16, "temperature": 1.0, "seed": 3, "ignore_eos": True, **sampling}
    return Request.model_validate({"prompt": prompt or PROMPT, "sampling_params": fields})


async def collected(stream: Any) -> tuple[list[StreamEventDelta], StreamEventEnd]:
    async with aclosing(stream) as events:
        seen: list[StreamEvent] = [event async for event in events]
    assert [event.event for event in seen[:1] + seen[-1:]] == ["start", "end"]
    assert isinstance(seen[-1], StreamEventEnd)
    return [event for event in seen[1:-1] if isinstance(event, StreamEventDelta)], seen[-1]


def outputs_of(answer: Response | StreamEventEnd) -> list[Any]:
    return [
        (output.text, output.token_ids, output.finish_reason, output.stop_reason, output.logprobs)
        for output in answer.outputs
    ]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    prompt=st.lists(st.integers(3, 299), min_size=1, max_size=40),
    fields=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 12), "n": st.integers(1, 3), "temperature": st.sampled_from([0.0, 1.0])},
        optional={
            "stop": st.lists(st.sampled_from(["e", " t", "the", "\n", "a"]), min_size=1, max_size=3),
            "logprobs": st.just(2),
            "repetition_penalty": st.just(1.3),
            "ignore_eos": st.just(True),
        },
    ),
)
async def test_two_engines_answer_as_one(
    engines: tuple[LLMEngine, LLMEngine, LLMEngine], prompt: list[int], fields: dict[str, Any]
) -> None:
    alone, prefill, decode = engines
    request = Request.model_validate({"prompt": prompt, "sampling_params": {"seed": 9, **fields}})
    deltas, end = await collected(PDExecutor(prefill, decode).stream(request))
    expected = await alone.execute(request)
    assert outputs_of(end) == outputs_of(expected)
    assert end.usage.completion_tokens == expected.usage.completion_tokens
    for index, output in enumerate(expected.outputs):
        assert "".join(delta.chunk for delta in deltas if delta.index == index) == output.text


@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("block_size", [8, 16])
async def test_in_every_kind_of_cache(tmp_path: Path, kv_cache_dtype: str, block_size: int) -> None:
    build_checkpoint(tmp_path)
    options = {"kv_cache_dtype": kv_cache_dtype, "block_size": block_size}
    engines = [make_engine(tmp_path, **options) for _ in range(3)]
    async with engines[0] as alone, engines[1] as prefill, engines[2] as decode:
        for request in (ask(), ask(temperature=0.0), ask(n=3)):
            response = await PDExecutor(prefill, decode).execute(request)
            assert outputs_of(response) == outputs_of(await alone.execute(request))
            assert response.usage.cached_tokens == len(PROMPT) // block_size * block_size


async def test_with_the_model_that_ships() -> None:
    """Native kernels where they are built, a conversation, a form that the answer must have."""
    options = {"model_path": "builtin", "backend_type": "cpu", "max_model_len": 512, "num_kv_blocks": 128}
    engines = [LLMEngine(LLMEngineConfig.model_validate(options)) for _ in range(3)]
    request = Request.model_validate(
        {
            "messages": [{"role": "user", "content": "Tell me all about engines and their caches. " * 5}],
            "structured_output": {"json_object": True},
            "sampling_params": {"max_tokens": 40, "temperature": 1.2, "seed": 4},
        }
    )
    async with engines[0] as alone, engines[1] as prefill, engines[2] as decode:
        response = await PDExecutor(prefill, decode).execute(request)
        assert outputs_of(response) == outputs_of(await alone.execute(request))
        assert response.usage.cached_tokens >= 32


async def test_what_it_costs_is_measured(engines: tuple[LLMEngine, LLMEngine, LLMEngine]) -> None:
    _, prefill, decode = engines
    response = await PDExecutor(prefill, decode).execute(ask(PROMPT[::-1]))
    metrics = response.metrics
    assert metrics.kv_transfer_count == 1
    assert metrics.kv_transfer_bytes > 0
    assert metrics.kv_transfer_ms > 0
    assert metrics.ttft_ms > 0
    assert len(metrics.itl_list) in range(1, 16)  # the prefill engine may have made more than one token
    assert metrics.tpot_ms > 0


@pytest.mark.parametrize("failure", ["refused", "slow"])
async def test_a_hand_over_that_fails_changes_nothing(
    engines: tuple[LLMEngine, LLMEngine, LLMEngine], monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    alone, prefill, decode = engines

    async def import_prefix(blocks: object) -> int:
        if failure == "slow":
            await asyncio.sleep(3600)
        raise KVTransferError("the wire broke")

    monkeypatch.setattr(decode, "import_prefix", import_prefix)
    request = ask([len(failure), *PROMPT])
    response = await PDExecutor(prefill, decode, timeout_s=0.05).execute(request)
    assert outputs_of(response) == outputs_of(await alone.execute(request))
    assert (response.metrics.kv_transfer_count, response.usage.cached_tokens) == (0, 0)


@pytest.mark.parametrize(
    "sampling", [{"num_beams": 2, "temperature": 0.0, "seed": None}, {"prompt_logprobs": 1, "temperature": 0.0}]
)
async def test_what_cannot_be_split_runs_on_one(
    engines: tuple[LLMEngine, LLMEngine, LLMEngine], sampling: dict[str, Any]
) -> None:
    alone, prefill, decode = engines
    steps = (await prefill.stats()).num_steps
    request = ask(**sampling)
    assert outputs_of(await PDExecutor(prefill, decode).execute(request)) == outputs_of(await alone.execute(request))
    assert (await prefill.stats()).num_steps == steps


async def test_leaving_frees_both_engines(engines: tuple[LLMEngine, LLMEngine, LLMEngine]) -> None:
    _, prefill, decode = engines
    for num_events in (1, 2, 8):
        async with aclosing(PDExecutor(prefill, decode).stream(ask(max_tokens=60))) as events:
            for _ in range(num_events):
                await anext(events)
        for engine in (prefill, decode):
            while (stats := await engine.stats()).num_running + stats.num_waiting:
                await asyncio.sleep(0.005)
            assert stats.num_free_blocks == stats.num_blocks


async def test_a_wrong_request_is_refused(engines: tuple[LLMEngine, LLMEngine, LLMEngine]) -> None:
    executor = PDExecutor(*engines[1:])
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        await executor.execute(ask([9999]))
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        PDExecutor(*engines[1:], timeout_s=0)


# ---- the runtime ------------------------------------------------------------------------------------------


async def test_the_runtime_chooses_by_length_and_load(folder: Path) -> None:
    prefills = [make_engine(folder, engine_id=f"p{i}") for i in range(2)]
    decodes = [make_engine(folder, engine_id=f"d{i}") for i in range(2)]
    async with PDRuntime(prefill=prefills, decode=decodes, min_handed_over_tokens=2 * BLOCK_SIZE) as runtime:
        assert runtime.roles == {
            "p0": PDRole.PREFILL,
            "p1": PDRole.PREFILL,
            "d0": PDRole.DECODE,
            "d1": PDRole.DECODE,
        }
        short = await runtime.execute(ask(PROMPT[:10]))
        assert short.engine_id.startswith("d")
        assert [(await engine.stats()).num_steps for engine in prefills] == [0, 0]
        responses = await asyncio.gather(*(runtime.execute(ask([i, *PROMPT])) for i in range(3, 11)))
        assert {response.engine_id for response in responses} == {"d0", "d1"}
        assert all([(await engine.stats()).num_steps > 0 for engine in prefills])
        for i, response in enumerate(responses, 3):
            assert response.output_tokens == (await decodes[0].execute(ask([i, *PROMPT]))).output_tokens
        assert all(
            (member.num_requests, member.num_prompt_tokens) == (0, 0) for member in runtime._members
        )  # nothing stays booked
        deltas, end = await collected(runtime.stream(ask(PROMPT)))
        assert [token_id for delta in deltas for token_id in delta.chunk_tokens] == end.output_tokens


async def test_without_prefill_engines_mixed_ones_do_all(folder: Path) -> None:
    async with PDRuntime(mixed=[make_engine(folder)], min_handed_over_tokens=0) as runtime:
        assert (await runtime.execute(ask())).finish_reason is FinishReason.LENGTH
        vector = await runtime.execute(Request(prompt=PROMPT, embed=EmbedParams()))
        assert vector.embedding


async def test_engines_that_drain_are_left_out(folder: Path) -> None:
    prefill, decode = make_engine(folder), make_engine(folder)
    async with PDRuntime(prefill=[prefill], decode=[decode], min_handed_over_tokens=0) as runtime:
        expected = (await runtime.execute(ask())).output_tokens
        await prefill.drain()
        assert (await runtime.execute(ask())).output_tokens == expected
        await decode.drain()
        with pytest.raises(UnavailableError, match="no engine"):
            await runtime.execute(ask())
        decode.resume()
        assert (await runtime.execute(ask())).output_tokens == expected


async def test_a_runtime_needs_somebody_who_decodes(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="decode or mixed"):
        PDRuntime(prefill=[make_engine(folder)])


async def test_a_failed_start_leaves_nothing_running(folder: Path, tmp_path: Path) -> None:
    good = make_engine(folder)
    runtime = PDRuntime(prefill=[make_engine(tmp_path)], decode=[good])
    with pytest.raises(Exception, match=r"config\.json"):
        await runtime.start()
    assert not good.is_ready
