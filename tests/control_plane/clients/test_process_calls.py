"""Engines in child processes: requests and all else that is asked of them while they live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import pytest_asyncio

from child_engines import begin, events_of, make_client, running, silence
from sagellm_control_plane.clients.base import Detachable, Killable
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_core.engine_core.report import EngineReport
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Request,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenizeRequest,
    UnavailableError,
)
from waiting import until

# One child for all: nothing here ends it.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessEngineClient]:
    async with running(make_client(tmp_path_factory.mktemp("r", numbered=True) / "run")) as client:
        yield client


# ---- requests -----------------------------------------------------------------------------------------


async def test_a_stream_has_a_start_deltas_and_one_end(client: ProcessEngineClient) -> None:
    start, *deltas, end = await events_of(client, prompt="hi", request_id="r-1", trace_id="t-1")
    assert isinstance(start, StreamEventStart)
    assert all(isinstance(delta, StreamEventDelta) for delta in deltas)
    assert isinstance(end, StreamEventEnd)
    assert "".join(delta.chunk for delta in deltas) == end.output_text == "w0 w1 w2 "  # type: ignore[union-attr]
    assert {(event.request_id, event.trace_id, event.engine_id) for event in (start, *deltas, end)} == {
        ("r-1", "t-1", "e0")
    }


async def test_choices_and_log_probabilities_come_through(client: ProcessEngineClient) -> None:
    sampling = SamplingParams(n=2, temperature=0.5, logprobs=1, max_tokens=2)
    events = await events_of(client, prompt="hi", max_tokens=None, sampling_params=sampling)
    deltas = [event for event in events if isinstance(event, StreamEventDelta)]
    assert sorted(delta.index for delta in deltas) == [0, 0, 1, 1]
    assert all(delta.logprobs and delta.logprobs[0].token_id == delta.chunk_tokens[0] for delta in deltas)


async def test_a_whole_answer_and_a_vector(client: ProcessEngineClient) -> None:
    response = await client.execute(Request(prompt="hi", max_tokens=2))
    assert (response.output_text, response.finish_reason) == ("w0 w1 ", FinishReason.LENGTH)
    vector = await client.execute(Request.model_validate({"prompt": "a b", "embed": {}}))
    assert vector.embedding == [2.0, 0.5, 0.25, 0.125]


async def test_errors_keep_their_class_and_context(client: ProcessEngineClient) -> None:
    with pytest.raises(InvalidArgumentError, match="refused") as refused:
        await events_of(client, prompt="refuse")
    assert refused.value.context["field"] == "prompt"
    end = (await events_of(client, prompt="fail"))[-1]
    assert isinstance(end, StreamEventEnd)
    assert (end.finish_reason, end.error is not None) == (FinishReason.ERROR, True)


async def test_a_request_id_may_run_once(client: ProcessEngineClient) -> None:
    task = await begin(client, request_id="r-1")
    with pytest.raises(InvalidArgumentError, match="already running"):
        await events_of(client, prompt="hi", request_id="r-1")
    client.abort("r-1")
    await task
    assert len(await events_of(client, prompt="hi", request_id="r-1")) == 5


async def test_abort_ends_a_stream_with_abort(client: ProcessEngineClient) -> None:
    task = await begin(client, request_id="r-1")
    client.abort("r-1")
    end = (await task)[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT
    with pytest.raises(NotFoundError):
        client.abort("r-1")


async def test_leaving_a_stream_frees_the_request(client: ProcessEngineClient) -> None:
    async with aclosing(client.stream(Request(prompt="wait", max_tokens=3, stream=True))) as events:
        async for _ in events:
            break
    waiting = asyncio.ensure_future(client.execute(Request(prompt="wait", max_tokens=3)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    while (await client.stats()).num_running:
        await asyncio.sleep(0.01)


async def test_many_requests_at_once_get_their_own_answers(client: ProcessEngineClient) -> None:
    answers = await asyncio.gather(*(events_of(client, prompt="hi", max_tokens=n % 7 + 1) for n in range(2500)))
    for n, events in enumerate(answers):
        assert len(events) == n % 7 + 3


# ---- what engines tell --------------------------------------------------------------------------------


async def test_reports_come_and_begin_with_all_that_is_cached(client: ProcessEngineClient) -> None:
    reports: list[EngineReport] = []
    end = client.watch(reports.append, interval_s=0.02)
    await until(lambda: len(reports) >= 4)
    assert [report.sequence for report in reports] == list(
        range(reports[0].sequence, reports[0].sequence + len(reports))
    )
    assert len({report.epoch for report in reports}) == 1
    assert reports[0].stats == await client.stats()
    end()
    await silence(reports)


async def test_texts_are_split_here(client: ProcessEngineClient) -> None:
    ids = await client.tokenize(TokenizeRequest(prompt="Hello world"))
    assert await client.detokenize(ids, skip_special_tokens=True) == "Hello world"
    assert len(await client.token_texts(ids)) == len(ids)
    long = "Hello " * 2000
    assert await client.detokenize(await client.tokenize(TokenizeRequest(prompt=long))) is not None


async def test_drain_refuses_until_resumed(client: ProcessEngineClient) -> None:
    task = await begin(client, request_id="r-1")
    draining = asyncio.ensure_future(client.drain())
    await until(lambda: not draining.done())
    await asyncio.sleep(0.05)
    with pytest.raises(UnavailableError, match="draining"):
        await events_of(client, prompt="hi")
    client.abort("r-1")
    await task
    await draining
    client.resume()
    assert len(await events_of(client, prompt="hi")) == 5


async def test_information(client: ProcessEngineClient) -> None:
    info = client.get_info()
    assert (info["engine_id"], info["running"], info["pid"]) == ("e0", True, client.pid)
    assert (await client.describe_model()).vocab_size > 0
    assert client.config.model_path == "builtin"
    assert await client.health_check()
    assert await client.reset_prefix_cache()
    assert isinstance(client, Killable)
    assert isinstance(client, Detachable)
