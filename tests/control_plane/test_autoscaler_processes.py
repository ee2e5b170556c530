"""The autoscaler over real child processes: one more comes with the load and goes with it, and no request notices."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from sagellm_control_plane import ControlPlaneManager, EngineConfig, EngineState
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.events import EventKind
from sagellm_protocol import FinishReason, Response, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

_SCALING = AutoscalerConfig(
    max_replicas=2, ttft_ms=200, tpot_ms=100, interval_s=0.5, lead_s=1, down_after_s=3, cool_down_s=2
)
_NUM_TOKENS = 48


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sage-", dir="/tmp") as folder:  # the paths of sockets must be short
        yield Path(folder)


async def _until(condition: Callable[[], bool], *, within: float, busy: Sequence[asyncio.Task[None]] = ()) -> None:
    async def look() -> None:
        while not condition():
            for task in busy:
                assert not task.done(), task.exception()
            await asyncio.sleep(0.05)

    await asyncio.wait_for(look(), within)


async def test_a_replica_comes_with_the_load_and_goes_with_it(run_dir: Path) -> None:
    engine = EngineConfig(model="builtin", options={"max_batch_size": 2, "num_threads": 1, "num_kv_blocks": 64})
    manager = ControlPlaneManager(
        engine_configs=[engine],
        config=ControlPlaneConfig(autoscaling={"builtin": _SCALING}),
        make_engine=lambda config: ProcessEngineClient(config, run_dir=run_dir),
    )
    responses: list[Response] = []
    pids: set[int] = set()

    async def client(number: int, pause_s: float) -> None:
        """Asks for one answer after the other."""
        while True:
            prompt = f"{number}, {len(responses)}: once upon a time"
            sampling = SamplingParams(max_tokens=_NUM_TOKENS, ignore_eos=True)
            responses.append(await manager.execute_request(prompt=prompt, sampling_params=sampling))
            await asyncio.sleep(pause_s)

    def ready() -> list[int]:
        engines = [info for info in manager.list_engines() if info.state is EngineState.READY]
        pids.update(info.pid for info in engines if info.pid is not None)
        return [info.pid for info in engines if info.pid is not None]

    async with manager:
        (first,) = ready()
        clients = [asyncio.ensure_future(client(number, 0.0)) for number in range(8)]
        await _until(lambda: len(ready()) == 2, within=90, busy=clients)
        await _until(lambda: len({response.engine_id for response in responses}) == 2, within=60, busy=clients)

        for task in clients:
            task.cancel()
        await asyncio.wait(clients)
        quiet = [asyncio.ensure_future(client(99, 0.3))]  # somebody always asks while one goes
        await _until(lambda: len(manager.list_engines()) == 1, within=90, busy=quiet)
        num_answered = len(responses)
        await _until(lambda: len(responses) >= num_answered + 3, within=60, busy=quiet)
        (last,) = ready()
        quiet[0].cancel()

        gone = pids - {last}
        await _until(lambda: not any(psutil.pid_exists(pid) for pid in gone), within=60)
        scaled = [event.details for event in manager.events.recent() if event.kind is EventKind.SCALE]
        assert [(details["num_replicas"], details["target"]) for details in scaled] == [(1, 2), (2, 1)], scaled
        assert manager.num_waiting == 0
    assert len(pids) == 2
    assert first in pids
    assert all(response.finish_reason is FinishReason.LENGTH for response in responses)
    assert all(response.usage.completion_tokens == _NUM_TOKENS for response in responses)
    assert not psutil.pid_exists(last)
