"""Prefill and decode in child processes, which are killed under way: the tokens are those of one engine alone."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sagellm_control_plane import ControlPlaneManager, EngineConfig, ExecutionInstanceType, PDSeparationConfig
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import Request, SamplingParams, StreamEventEnd
from waiting import until

pytestmark = pytest.mark.slow

OPTIONS = {"num_threads": 1, "max_batch_size": 16}
KINDS = {"p": ExecutionInstanceType.PREFILLING, "d": ExecutionInstanceType.DECODING}
NAMES = ("p0", "p1", "d0", "d1")
NUM_STREAMS = 10
BLOCK_SIZE = 16


def requests() -> list[Request]:
    """Prompts of seven blocks; no two begin alike."""
    text = "Once upon a time there was an engine that computed prompts for another one. " * 6
    sampling = [SamplingParams(max_tokens=200, temperature=0.9, seed=n, ignore_eos=True) for n in range(NUM_STREAMS)]
    return [
        Request(request_id=f"r{n}", model="builtin", prompt=f"{n}: {text}", stream=True, sampling_params=sampling[n])
        for n in range(NUM_STREAMS)
    ]


class House:
    """Two prefill and two decode engines, and streams that are read to their ends."""

    def __init__(self, manager: ControlPlaneManager) -> None:
        self.manager = manager

    async def read(self, request: Request) -> list[int]:
        tokens: list[int] = []
        async for event in self.manager.stream_request(request):
            if event.event == "delta":
                tokens += event.chunk_tokens
        assert isinstance(event, StreamEventEnd)
        assert event.error is None
        assert event.output_tokens == tokens
        return tokens

    def ask(self) -> list[asyncio.Task[list[int]]]:
        return [asyncio.ensure_future(self.read(request)) for request in requests()]

    def stays(self) -> list[list[dict[str, Any]]]:
        return [self.manager.explain(request.request_id).to_dict()["stays"] for request in requests()]

    def send(self, name: str, which: signal.Signals) -> None:
        pid = self.manager._pool.get(name).pid
        assert pid is not None
        os.kill(pid, which)

    def num_requests(self, name: str) -> int:
        row = self.manager._pool.get(name).row
        return 0 if row is None else int(self.manager._pool.fleet.num_requests[row])

    def num_decoding(self, name: str) -> int:
        row = self.manager._pool.get(name).row
        return 0 if row is None else int(self.manager._pool.fleet.num_decoding[row])

    async def settled(self) -> None:
        """Everybody is back, and the books are empty."""
        engines = self.manager._pool.engines
        await until(lambda: all(engine.takes_requests for engine in engines))
        assert not self.manager._pool.fleet.num_requests.any()
        assert self.manager.num_waiting == 0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sage-", dir="/tmp") as folder:  # the paths of sockets must be short
        yield Path(folder) / "run"


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    async def answers() -> list[list[int]]:
        async with LLMEngine(LLMEngineConfig(model_path="builtin", **OPTIONS)) as alone:
            return [(await alone.execute(request)).output_tokens for request in requests()]

    return asyncio.run(answers())


@asynccontextmanager
async def house_in(run_dir: Path) -> AsyncIterator[House]:
    config = ControlPlaneConfig(
        lifecycle=LifecycleConfig(restart_backoff_s=0.1),
        pd=PDSeparationConfig(prefilling_threshold_input_tokens=32, hand_over_s_per_token=0.0),
    )
    manager = ControlPlaneManager(config=config, make_engine=lambda given: ProcessEngineClient(given, run_dir=run_dir))
    for name in NAMES:
        configured = EngineConfig(model="builtin", engine_id=name, options=OPTIONS)
        manager.register_config(configured, instance_type=KINDS[name[0]])
    async with manager:
        # As if the decode engines were busy for a long time: the rule has to send every prompt away.
        for name in ("d0", "d1"):
            manager._pool.fleet.queued_tokens[manager._pool.fleet.row_of(name)] += 10**9
        yield House(manager)


async def test_tokens_are_those_of_one_engine(run_dir: Path, expected: list[list[int]]) -> None:
    async with house_in(run_dir) as house:
        assert await asyncio.gather(*house.ask()) == expected
        stays = [stay for request in house.stays() for stay in request]
        assert len(stays) == NUM_STREAMS
        assert {stay["prefilled_by"] for stay in stays} == {"p0", "p1"}
        assert {stay["engine_id"] for stay in stays} == {"d0", "d1"}
        assert all(stay["hand_over_s"] is not None for stay in stays)
        stats = await house.manager._pool.stats()
        num_received = sum(stats[name].prefix_hit_tokens for name in ("d0", "d1"))
        assert num_received >= NUM_STREAMS * 6 * BLOCK_SIZE
        await house.settled()


async def test_a_prefill_engine_killed_with_prompts_under_way(run_dir: Path, expected: list[list[int]]) -> None:
    async with house_in(run_dir) as house:
        house.send("p0", signal.SIGSTOP)  # so that the prompts it gets are on it when it dies
        tasks = house.ask()
        await until(lambda: house.num_requests("p0") > 0)
        house.send("p0", signal.SIGKILL)
        assert await asyncio.gather(*tasks) == expected
        lost = [stay for stays in house.stays() for stay in stays if stay["prefilled_by"] == "p0"]
        assert any(stay["hand_over_s"] is None for stay in lost)
        await house.settled()
        assert await house.read(requests()[0].model_copy(update={"request_id": "again"})) == expected[0]


async def test_a_decode_engine_killed_in_mid_stream(run_dir: Path, expected: list[list[int]]) -> None:
    async with house_in(run_dir) as house:
        tasks = house.ask()
        await until(lambda: house.num_decoding("d0") > 0)
        house.send("d0", signal.SIGKILL)
        assert await asyncio.gather(*tasks) == expected
        moved = [stays for stays in house.stays() if len(stays) > 1]
        assert moved
        assert all(stays[0]["engine_id"] == "d0" and stays[0]["prefilled_by"] is not None for stays in moved)
        await house.settled()


async def test_a_decode_engine_killed_before_it_has_the_prompt(run_dir: Path, expected: list[list[int]]) -> None:
    async with house_in(run_dir) as house:
        for name in ("p0", "p1"):
            house.send(name, signal.SIGSTOP)
        tasks = house.ask()
        await until(lambda: house.num_requests("p0") + house.num_requests("p1") == NUM_STREAMS)
        house.send("d0", signal.SIGKILL)
        for name in ("p0", "p1"):
            house.send(name, signal.SIGCONT)
        assert await asyncio.gather(*tasks) == expected
        assert any(len(stays) > 1 for stays in house.stays())
        await house.settled()
