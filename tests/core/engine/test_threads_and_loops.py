"""Engines, threads and event loops: one step loop an engine, whichever event loops its callers run in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sagellm_backend.cpu.topology import read_topology
from sagellm_core import Executor, LLMEngine
from sagellm_core.engine_core.client import EngineCoreClient
from sagellm_core.factory import build_executor
from sagellm_core.input_processor import InputProcessor
from sagellm_protocol import SamplingParams, StreamEventDelta, UnavailableError
from tiny_engine import Brake, build_checkpoint, loop_threads, make_engine
from waiting import PATIENCE_S

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


async def ask(engine: LLMEngine, prompt: list[int]) -> list[int]:
    return (await engine.generate(prompt, sampling_params=SAMPLING)).output_tokens


async def settled(engine: LLMEngine) -> None:
    """Wait until nothing runs; then no block may be held."""
    while (stats := await engine.stats()).num_running + stats.num_waiting:
        await asyncio.sleep(0.01)
    assert stats.num_free_blocks == stats.num_blocks


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


async def test_two_engines_in_one_process(folder: Path, tmp_path: Path) -> None:
    build_checkpoint(tmp_path, "qwen3", seed=1)
    prompts = [[start, start + 1, start + 2] for start in range(5, 11)]
    async with make_engine(folder) as first, make_engine(tmp_path) as second:
        assert len(loop_threads()) == 2
        alone = [[await ask(engine, prompt) for prompt in prompts] for engine in (first, second)]
        runs = [ask(engine, prompt) for engine in (first, second) for prompt in prompts]
        together = await asyncio.gather(*runs)
        await first.stop()
        assert await ask(second, prompts[0]) == alone[1][0]  # the other's end does not touch it
    assert together == alone[0] + alone[1]
    assert alone[0] != alone[1]
    assert loop_threads() == []


async def test_start_and_stop_may_be_repeated(folder: Path) -> None:
    engine = make_engine(folder)
    await engine.stop()
    await engine.start()
    tokens = await ask(engine, [5, 6])
    await engine.start()
    assert len(loop_threads()) == 1
    await engine.stop()
    await engine.stop()
    assert loop_threads() == []
    async with engine:
        assert await ask(engine, [5, 6]) == tokens


async def test_two_starts_at_once_load_one_model(folder: Path) -> None:
    engine = make_engine(folder)
    await asyncio.gather(engine.start(), engine.start(), engine.start())
    assert len(loop_threads()) == 1
    await engine.stop()
    assert loop_threads() == []


def test_one_event_loop_after_the_other(folder: Path) -> None:
    engine = make_engine(folder)

    async def use_whole_life() -> list[int]:
        async with engine:
            return await ask(engine, [5, 6])

    first, second = asyncio.run(use_whole_life()), asyncio.run(use_whole_life())
    assert first == second
    # Started in one loop, used in another, stopped in a third: the step loop belongs to none of them.
    asyncio.run(engine.start())
    assert asyncio.run(ask(engine, [5, 6])) == first
    assert asyncio.run(engine.health_check())
    asyncio.run(engine.stop())
    assert loop_threads() == []


async def test_several_event_loops_at_once(folder: Path) -> None:
    async with make_engine(folder) as engine:
        expected = await ask(engine, [5, 6, 7])
        runs = [asyncio.to_thread(lambda: asyncio.run(ask(engine, [5, 6, 7]))) for _ in range(4)]
        assert await asyncio.gather(*runs, ask(engine, [5, 6, 7])) == [expected] * 5


def test_a_loop_that_ends_in_the_middle_of_a_request(folder: Path, brake: Brake) -> None:
    engine = make_engine(folder)
    asyncio.run(engine.start())

    async def leave_one_running() -> None:
        task = asyncio.ensure_future(engine.generate([5] * 20, sampling_params=LONG))
        await brake.held()
        assert not task.done()  # asyncio.run cancels it

    brake.set(3)
    asyncio.run(leave_one_running())
    brake.release()
    asyncio.run(settled(engine))
    assert len(asyncio.run(ask(engine, [5, 6]))) == 12
    asyncio.run(engine.stop())


class ClosedLoop:
    """An event loop that was closed under its requests, as the client sees it."""

    def call_soon_threadsafe(self, *_: object) -> None:
        raise RuntimeError("Event loop is closed")


async def test_a_loop_that_is_closed_under_its_request(folder: Path, brake: Brake) -> None:
    async with make_engine(folder) as engine:
        brake.set(3)
        client = engine._client
        assert isinstance(client, EngineCoreClient)
        async with aclosing(engine.stream([5] * 20, sampling_params=LONG, request_id="lost")) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    break
            known = client._consumers["lost"]
            client._consumers["lost"] = replace(known, loop=ClosedLoop())  # type: ignore[arg-type]
            brake.release()
            await settled(engine)
            assert "lost" not in client._consumers
            assert len(await ask(engine, [5, 6])) == 12


async def test_a_cancelled_start_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(folder)
    loading, go_on = threading.Event(), threading.Event()

    def wait_for_the_test(*arguments: Any) -> Executor:
        loading.set()
        go_on.wait(PATIENCE_S)
        return build_executor(*arguments)

    monkeypatch.setattr("sagellm_core.llm_engine.build_executor", wait_for_the_test)
    task = asyncio.ensure_future(engine.start())
    await asyncio.to_thread(loading.wait, PATIENCE_S)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until(lambda: loop_threads() == [])
    monkeypatch.undo()
    async with engine:
        assert len(await ask(engine, [5, 6])) == 12


async def test_what_fails_after_loading_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UnavailableError("not today; come back tomorrow")

    engine = make_engine(folder)
    with monkeypatch.context() as patch:
        patch.setattr(InputProcessor, "__init__", fail)
        with pytest.raises(UnavailableError, match="tomorrow"):
            await engine.start()
    assert loop_threads() == []
    assert not await engine.health_check()
    async with engine:
        assert len(await ask(engine, [5, 6])) == 12


async def test_a_broken_step_loop_says_so_and_can_be_restarted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_core.engine_core.scheduler import Scheduler

    def fail(*_: object) -> None:
        raise RuntimeError("a fault in the scheduler")

    async with make_engine(folder) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "schedule", fail)
            response = await engine.generate([5, 6], sampling_params=SAMPLING)
        assert response.error is not None
        assert "a fault in the scheduler" in response.error.message
        assert not await engine.health_check()
        with pytest.raises(UnavailableError, match="restart"):
            await engine.generate([5, 6], sampling_params=SAMPLING)
        await engine.stop()
        await engine.start()
        assert len(await ask(engine, [5, 6])) == 12


@pytest.mark.parametrize(("quota", "num_threads", "expected"), [(1.5, None, 1), (1.5, 2, 2), (None, None, 3)])
async def test_compute_threads_keep_to_the_quota_unless_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quota: float | None, num_threads: int | None, expected: int
) -> None:
    topology = replace(read_topology(), physical_cores=64, quota_cpus=quota)
    chosen: list[int] = []
    monkeypatch.setattr("sagellm_core.worker.worker.read_topology", lambda: topology)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    async with make_engine(folder, num_threads=num_threads):
        assert chosen == [expected]
