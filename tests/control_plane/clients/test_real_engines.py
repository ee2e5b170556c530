"""Child processes around the real engine: the same tokens as in this process, and prefixes that change hands."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import psutil
import pytest

from sagellm_control_plane.clients.base import PrefixTransfer
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import (
    KVTransferError,
    Request,
    ResumePoint,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    TokenizeRequest,
)

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time there was an engine that lived in a process of its own. " * 4
SAMPLING = SamplingParams(max_tokens=24, temperature=0.8, seed=5, n=2)


@pytest.fixture
async def children(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[ProcessEngineClient]]:
    run_dir = tmp_path_factory.mktemp("r") / "run"
    children = [
        ProcessEngineClient(LLMEngineConfig(model_path="builtin", engine_id=name, num_threads=1), run_dir=run_dir)
        for name in ("a", "b")
    ]
    for child in children:
        await child.start()
    yield children
    for child in children:
        await child.stop()


async def end_of(engine: LLMEngine | ProcessEngineClient, request: Request) -> StreamEventEnd:
    event = [event async for event in engine.stream(request)][-1]
    assert isinstance(event, StreamEventEnd)
    return event


async def test_tokens_are_those_of_an_engine_in_this_process(children: list[ProcessEngineClient]) -> None:
    request = Request(prompt=PROMPT, stream=True, sampling_params=SAMPLING)
    async with LLMEngine(LLMEngineConfig(model_path="builtin")) as own:
        expected = await end_of(own, request)
    for child in children:
        found = await end_of(child, request)
        assert [output.token_ids for output in found.outputs] == [output.token_ids for output in expected.outputs]
        assert found.output_text == expected.output_text
        assert found.metrics.ttft_ms > 0


async def test_an_answer_goes_on_in_another_child(children: list[ProcessEngineClient]) -> None:
    first, second = children
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=5)
    request = Request(prompt=PROMPT, stream=True, sampling_params=sampling)
    expected = await end_of(first, request)
    resumed = request.model_copy(
        update={"resume_from": ResumePoint(output_token_ids=[expected.output_tokens[:9]], seed=5)}
    )
    events = [event async for event in second.stream(resumed)]
    deltas = [event for event in events if isinstance(event, StreamEventDelta)]
    assert [token for delta in deltas for token in delta.chunk_tokens] == expected.output_tokens[9:]
    assert isinstance(events[-1], StreamEventEnd)
    assert events[-1].output_text == expected.output_text


async def test_a_prefix_goes_from_one_to_the_other(children: list[ProcessEngineClient]) -> None:
    first, second = children
    assert isinstance(first, PrefixTransfer)
    request = Request(prompt=PROMPT, stream=True, max_tokens=16)
    expected = await end_of(first, request)
    prompt = await first.tokenize(TokenizeRequest(prompt=PROMPT))
    blocks = await first.export_prefix(prompt)
    assert blocks is not None
    assert await second.import_prefix(blocks) == blocks.num_tokens > 0
    found = await end_of(second, request)
    assert found.output_tokens == expected.output_tokens
    assert found.usage.cached_tokens == blocks.num_tokens
    assert await first.export_prefix([1, 2, 3]) is None
    damaged = type(blocks)(
        blocks.token_ids, None, None, blocks.format, blocks.data[:-1] + bytes([blocks.data[-1] ^ 1]), blocks.checksum
    )
    with pytest.raises(KVTransferError):
        await second.import_prefix(damaged)


async def test_a_child_is_ready_soon(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Measured at 1.3 s on two free cores; on busy ones its own time counts."""
    child = ProcessEngineClient(LLMEngineConfig(model_path="builtin"), run_dir=tmp_path_factory.mktemp("r") / "run")
    began_at = time.monotonic()
    await child.start()
    elapsed = time.monotonic() - began_at
    times = psutil.Process(child.pid).cpu_times()
    await child.stop()
    assert min(elapsed, times.user + times.system) < 10
