"""An engine of which only the life is there: it loads, reports, hangs and dies as it is told, on virtual time.

It checks the supervisor, too: nothing starts twice, nobody stops an engine that runs requests unless that was wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sagellm_control_plane.clients.base import EngineLostError, EngineRecord
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineStats
from sagellm_protocol import ModelDescription, UnavailableError

STATS = EngineStats(
    num_running=0,
    num_waiting=0,
    num_blocks=8,
    num_free_blocks=8,
    kv_usage=0.0,
    num_steps=0,
    num_preemptions=0,
    prefix_query_tokens=0,
    prefix_hit_tokens=0,
    evict_count=0,
)


@dataclass(frozen=True)
class FakeReport:
    """As much of an `EngineReport` as the supervisor reads."""

    stats: EngineStats


class FakeThread:
    """An engine that cannot be killed, as one in a thread. `FakeChild` can."""

    def __init__(self, name: str = "fake", *, load_s: float = 1.0, stop_s: float = 0.5, reports: bool = True) -> None:
        self.config = LLMEngineConfig(model_path="fake", engine_id=name)
        self.engine_id = name
        self.load_s, self.stop_s, self.reports = load_s, stop_s, reports
        self.start_errors: list[Exception] = []  # of the next starts
        self.is_running = False
        self.is_hanging = False
        self.is_in_step = False  # a long one: the process answers, the step loop does not
        self.is_sick = False  # its health check says so
        self.is_busy = False  # it has requests
        self.makes_steps = True
        self.num_steps = 0
        self.num_output_tokens = 0
        self.num_starts = 0
        self.num_probes = 0
        self.log: list[str] = []
        self._is_moving = False
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        if self.is_running:
            return
        self._move("start")
        try:
            await asyncio.sleep(self.load_s)
            if self.start_errors:
                raise self.start_errors.pop(0)
            self.is_running, self.is_hanging, self.is_sick, self.is_in_step = True, False, False, False
            self.num_starts += 1
        finally:
            self._is_moving = False

    async def stop(self) -> None:
        self._move("stop")
        try:
            while self.is_hanging:
                await asyncio.sleep(1)  # as a thread that is waited for
            await asyncio.sleep(self.stop_s)
            self._end()
        finally:
            self._is_moving = False

    async def health_check(self) -> bool:
        self.num_probes += 1
        while self.is_hanging or self.is_in_step:
            await asyncio.sleep(0.1)
        return self.is_running and not self.is_sick

    async def describe_model(self) -> ModelDescription:
        return ModelDescription(model="fake", vocab_size=10, hidden_size=4, max_model_len=64)

    def watch(self, callback: Callable[[Any], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        if not self.is_running:
            raise UnavailableError("the engine is not running; call start() first")
        watcher = asyncio.ensure_future(self._report(callback, interval_s))
        self._watchers.append(watcher)
        return lambda: watcher.cancel() and None

    async def _report(self, callback: Callable[[Any], None], interval_s: float) -> None:
        while self.is_running and self.reports:
            if not (self.is_hanging or self.is_in_step):
                self.num_steps += self.makes_steps and self.is_busy
                stats = replace(
                    STATS,
                    num_steps=self.num_steps,
                    num_running=int(self.is_busy),
                    num_output_tokens=self.num_output_tokens,
                )
                callback(FakeReport(stats))
            await asyncio.sleep(interval_s)

    def _move(self, what: str) -> None:
        assert not self._is_moving, f"{self.engine_id}: {what} while {self.log[-1]} is under way"
        self._is_moving = True
        self.log.append(what)

    def _end(self) -> None:
        self.is_running = self.is_hanging = False
        for watcher in self._watchers:
            watcher.cancel()
        self._watchers.clear()


class FakeChild(FakeThread):
    """An engine in a process of its own."""

    pid: int | None = 1

    def __init__(self, name: str = "fake", **options: Any) -> None:
        super().__init__(name, **options)
        self.on_lost: Callable[[EngineLostError], None] | None = None
        self.is_detached = False
        self.is_struck = True  # whatever it is told to do comes from outside

    async def start(self) -> None:
        self.is_struck = True
        await super().start()

    async def kill(self) -> None:
        self.log.append("kill")
        self._end()

    async def ping(self) -> None:
        while self.is_hanging:
            await asyncio.sleep(0.1)
        if not self.is_running:
            raise EngineLostError(f"{self.engine_id} is gone")

    def die(self, *, is_seen: bool = True) -> None:
        """As after kill -9 from outside; not `is_seen`: the broken connection has not been noticed yet."""
        if self.is_running:
            self._end()
            if is_seen and self.on_lost is not None:
                self.on_lost(EngineLostError(f"{self.engine_id} died"))

    def record(self) -> EngineRecord:
        return EngineRecord(self.engine_id, 1, 0.0, "socket", f"epoch-{self.num_starts}", self.config.given())

    async def detach(self) -> None:
        self.is_detached = True
