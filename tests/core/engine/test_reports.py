"""What an engine tells of itself: reports that come by themselves, a copy of its cache that stays true, draining."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sagellm_core import LLMEngine
from sagellm_core.engine_core.report import EngineReport
from sagellm_kv_cache import AllBlocksCleared, BlockRemoved, BlockStored, CacheDigest, EventBatch, digest_of
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    RequestCancelledError,
    SamplingParams,
    UnavailableError,
)
from tiny_engine import Brake, make_engine
from waiting import PATIENCE_S

LONG = SamplingParams(max_tokens=90, ignore_eos=True)


class Watcher:
    """Keeps a copy of an engine's index by its reports alone."""

    def __init__(self) -> None:
        self.reports: list[EngineReport] = []
        self.hashes: set[bytes] = set()
        self.expected: int | None = None
        self.num_gaps = 0

    def __call__(self, report: EngineReport) -> None:
        self.reports.append(report)
        self.apply(report.cache)
        assert self.digest == report.digest

    @property
    def digest(self) -> CacheDigest:
        xor = 0
        for block_hash in self.hashes:
            xor ^= digest_of(block_hash)
        return CacheDigest(len(self.hashes), xor)

    def apply(self, batch: EventBatch) -> None:
        is_whole = bool(batch.events) and isinstance(batch.events[0], AllBlocksCleared)
        if self.expected is not None and not is_whole and batch.sequence != self.expected:
            self.num_gaps += 1
        self.expected = batch.next_sequence
        for event in batch:
            if isinstance(event, AllBlocksCleared):
                self.hashes.clear()
            elif isinstance(event, BlockStored):
                self.hashes.update(event.hashes)
            else:
                assert isinstance(event, BlockRemoved)
                self.hashes.difference_update(event.hashes)

    async def until(self, condition: Callable[[EngineReport], bool]) -> EngineReport:
        """The first report from now on of which `condition` holds."""
        known = len(self.reports)
        for _ in range(12_000):
            for report in self.reports[known:]:
                if condition(report):
                    return report
            await asyncio.sleep(0.005)
        raise AssertionError("no such report came")


async def busy(engine: LLMEngine, seed: int) -> None:
    """Requests with and without common beginnings, more than the cache holds."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 6)] * 16 + [rng.randrange(3, 290) for _ in range(20)] for _ in range(12)]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    await asyncio.gather(*(engine.generate(prompt, sampling_params=sampling) for prompt in prompts))


async def test_a_copy_of_the_index_stays_true(folder: Path) -> None:
    async with make_engine(folder, num_kv_blocks=24) as engine:
        await busy(engine, 0)  # before anybody watches
        early, late = Watcher(), Watcher()
        end_early = engine.watch(early, interval_s=0.05)
        await early.until(lambda report: isinstance(report.cache.events[0], AllBlocksCleared))
        await busy(engine, 1)
        engine.watch(late, interval_s=0.05)
        await busy(engine, 2)
        assert await engine.reset_prefix_cache()
        await busy(engine, 3)
        final = await late.until(lambda report: report.stats.num_running == 0 and not report.cache.events)
        assert final.digest == early.digest == late.digest
        assert final.digest.num_blocks == len(early.hashes) > 0
        assert (early.num_gaps, late.num_gaps) == (0, 0)
        assert [report.sequence for report in early.reports] == list(range(len(early.reports)))
        assert len({report.epoch for report in early.reports}) == 1
        assert final.stats.evict_count > 0
        end_early()
        known = len(early.reports)
        await late.until(lambda report: True)
        assert len(early.reports) == known


async def test_a_snapshot_is_all_and_told_to_all(folder: Path) -> None:
    async with make_engine(folder) as engine:
        unwatched = await engine.cache_snapshot()
        assert unwatched.events == (AllBlocksCleared(),)
        watcher = Watcher()
        engine.watch(watcher)
        await busy(engine, 0)
        batch = await engine.cache_snapshot()
        await watcher.until(lambda report: not report.cache.events)
        mine = Watcher()
        mine.apply(batch)
        assert mine.hashes == watcher.hashes
        assert watcher.num_gaps == 0


async def test_what_was_not_taken_in_time_is_sent_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagellm_core.engine_core.report._MAX_BLOCKS", 1)
    async with make_engine(folder) as engine:
        watcher = Watcher()
        engine.watch(watcher)
        await busy(engine, 0)
        await watcher.until(lambda report: not report.cache.events)
        assert all(report.cache.num_dropped == 0 for report in watcher.reports)
        assert watcher.num_gaps == 0
        assert watcher.hashes


async def test_reports_come_while_nothing_happens(folder: Path) -> None:
    async with make_engine(folder) as engine:
        watcher = Watcher()
        engine.watch(watcher, interval_s=0.02)
        started_at = time.monotonic()
        while len(watcher.reports) < 6:
            await asyncio.sleep(0.005)
        assert time.monotonic() - started_at > 0.08


async def test_silence_while_the_loop_hangs(folder: Path) -> None:
    async with make_engine(folder) as engine:
        watcher = Watcher()
        engine.watch(watcher, interval_s=0.02)
        await watcher.until(lambda report: True)
        assert engine._client is not None
        hangs, goes_on = threading.Event(), threading.Event()

        def hang(_: object) -> None:
            hangs.set()
            goes_on.wait(60)

        hanging = asyncio.ensure_future(engine._client.call(hang))
        await asyncio.to_thread(hangs.wait, 60)
        await asyncio.sleep(0)  # what was told before is here now
        known = len(watcher.reports)
        await asyncio.sleep(0.2)
        assert len(watcher.reports) == known
        goes_on.set()
        await hanging
        await watcher.until(lambda report: True)


async def test_steps_add_up(folder: Path) -> None:
    async with make_engine(folder, prefill_chunk_size=16, enable_prefix_caching=False) as engine:
        watcher = Watcher()
        engine.watch(watcher, interval_s=0.02)
        await watcher.until(lambda report: True)
        await engine.generate([9] * 40, sampling_params=SamplingParams(max_tokens=5, ignore_eos=True))
        await watcher.until(lambda report: report.stats.num_running == 0)
        steps = [step for report in watcher.reports for step in report.steps]
        assert [(step.prefill_tokens, step.num_decoding, step.kv_tokens) for step in steps] == [
            (16, 0, 0),
            (16, 0, 0),
            (8, 0, 0),
            *((0, 1, context) for context in (41, 42, 43, 44)),
        ]
        assert [step.prefill_attention for step in steps[:3]] == [16 * 8, 16 * (16 + 8), 8 * (32 + 4)]
        assert all(0 < step.duration_s < 60 for step in steps)


async def test_a_new_start_is_a_new_epoch(folder: Path) -> None:
    engine = make_engine(folder)
    epochs = []
    for _ in range(2):
        async with engine:
            watcher = Watcher()
            engine.watch(watcher)
            epochs.append((await watcher.until(lambda report: True)).epoch)
    assert len(set(epochs)) == 2
    with pytest.raises(UnavailableError, match="not running"):
        engine.watch(watcher)


async def test_a_watcher_that_fails_harms_nobody(folder: Path) -> None:
    seen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context["exception"]))

    def fail(report: EngineReport) -> None:
        raise ValueError("a watcher broke")

    async with make_engine(folder) as engine:
        watcher = Watcher()
        engine.watch(fail)
        engine.watch(watcher)
        await watcher.until(lambda report: True)
        assert seen
        with pytest.raises(InvalidArgumentError, match="interval_s"):
            engine.watch(watcher, interval_s=0)


def test_a_watch_ends_with_its_event_loop(folder: Path) -> None:
    engine, watcher = make_engine(folder), Watcher()

    async def begin() -> None:
        await engine.start()
        engine.watch(Watcher(), interval_s=0.01)

    async def go_on() -> None:
        engine.watch(watcher, interval_s=0.01)
        while len(watcher.reports) < 3:
            await asyncio.sleep(0.005)
        assert engine._client is not None
        assert len(engine._client._watchers) == 1
        await engine.stop()

    asyncio.run(begin())
    asyncio.run(go_on())


# ---- draining ---------------------------------------------------------------------------------------------


async def test_draining_waits_for_those_inside_and_refuses_others(folder: Path, brake: Brake) -> None:
    async with make_engine(folder) as engine:
        brake.set(3)
        stream = engine.stream([9, 8, 7], sampling_params=LONG)
        await anext(stream)
        drain = asyncio.ensure_future(engine.drain())
        await asyncio.sleep(0.02)
        assert engine.get_info()["draining"]
        assert not engine.is_ready
        with pytest.raises(UnavailableError, match="draining"):
            await engine.generate([9, 8, 7], sampling_params=LONG)
        with pytest.raises(UnavailableError, match="draining"):
            async for _ in engine.stream([9, 8, 7], sampling_params=LONG):
                pass
        assert not drain.done()
        brake.release()
        last = [event async for event in stream][-1]
        assert last.event == "end"
        assert last.finish_reason is FinishReason.LENGTH
        await asyncio.wait_for(drain, PATIENCE_S)
        await engine.drain()  # nobody is inside: at once
        engine.resume()
        assert (await engine.generate([9, 8, 7], sampling_params=LONG)).finish_reason is FinishReason.LENGTH


async def test_going_on_ends_a_drain(folder: Path, brake: Brake) -> None:
    async with make_engine(folder) as engine:
        brake.set(3)
        stream = engine.stream([9, 8, 7], sampling_params=LONG)
        await anext(stream)
        drain = asyncio.ensure_future(engine.drain())
        await asyncio.sleep(0.02)
        engine.resume()
        with pytest.raises(RequestCancelledError, match="go on"):
            await asyncio.wait_for(drain, PATIENCE_S)
        brake.release()
        await stream.aclose()


async def test_a_drain_that_is_given_up_leaves_the_engine_draining(folder: Path, brake: Brake) -> None:
    async with make_engine(folder) as engine:
        brake.set(3)
        stream = engine.stream([9, 8, 7], sampling_params=LONG)
        await anext(stream)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.drain(), 0.02)
        brake.release()
        await stream.aclose()
        assert not engine.is_ready
        await asyncio.wait_for(engine.drain(), PATIENCE_S)


async def test_an_id_can_be_used_again_at_once(folder: Path) -> None:
    """Outputs of a request that was left are not those of the next one with its id."""
    async with make_engine(folder) as engine:
        expected = await engine.generate([5, 6], sampling_params=LONG)
        for _ in range(10):
            stream = engine.stream([9, 8, 7], sampling_params=LONG, request_id="same")
            for _ in range(3):
                await anext(stream)
            await stream.aclose()
            response = await engine.generate([5, 6], sampling_params=LONG, request_id="same")
            assert response.output_tokens == expected.output_tokens
