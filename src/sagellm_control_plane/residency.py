"""Which models are in memory where not all fit: those unused for long make room for those that are asked for.

A model that is asked for waits in line. Idle engines make room at once, the longest unused first. Engines with requests
are left alone for `swap_patience_s`; then they take no new requests, end those that run and go. So a model that is in
memory serves what comes for it meanwhile (few swaps), and none that waits starves.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from sagellm_control_plane.clock import Clock
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.types import EngineState
from sagellm_protocol import ResourceExhaustedError

if TYPE_CHECKING:
    from sagellm_core.config import LLMEngineConfig

_IN_MEMORY = (EngineState.STARTING, EngineState.READY, EngineState.DRAINING)
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")


class Residency:
    """The line of engines that wait for memory, and who makes room. `budget_bytes` None: everything fits."""

    def __init__(self, budget_bytes: int | None, patience_s: float, clock: Clock) -> None:
        self._budget_bytes = budget_bytes
        self._patience_s = patience_s
        self._clock = clock
        self._line: dict[ManagedEngine, float] = {}  # since when each waits

    @property
    def num_waiting(self) -> int:
        """Engines that wait for memory."""
        return len(self._line)

    @property
    def first(self) -> ManagedEngine | None:
        """The engine whose turn is next."""
        return next(iter(self._line), None)

    def may_load(self, engine: ManagedEngine, engines: Iterable[ManagedEngine]) -> bool:
        """Whether it can load now; else it stands in line, and the next call may find room.

        Raises `ResourceExhaustedError` for a model that is larger than the budget.
        """
        if self._budget_bytes is None:
            return True
        if engine.memory_bytes > self._budget_bytes:
            self._line.pop(engine, None)
            raise ResourceExhaustedError(
                f"{engine.engine_id} needs {_mib(engine.memory_bytes)} MiB, memory_budget_bytes allows "
                f"{_mib(self._budget_bytes)} MiB; raise it or choose a smaller model",
                retryable=False,
                field="memory_budget_bytes",
            )
        self._line.setdefault(engine, self._clock.now())
        if self.first is not engine or engine.memory_bytes > self._free_bytes(engines):
            return False
        del self._line[engine]
        return True

    def leave_line(self, engine: ManagedEngine) -> None:
        """It is not asked for any more."""
        self._line.pop(engine, None)

    def fits(self, engine: ManagedEngine, engines: Iterable[ManagedEngine]) -> bool:
        """Whether it fits beside all that are loaded and those in line."""
        if self._budget_bytes is None:
            return True
        waiting = sum(other.memory_bytes for other in self._line if other is not engine)
        return engine.memory_bytes + waiting <= self._free_bytes(engines)

    def who_yields(self, engines: Iterable[ManagedEngine]) -> list[ManagedEngine]:
        """The engines that have to go so that the first in line can load; none where enough are on their way."""
        if not self._line:
            return []
        first, since = next(iter(self._line.items()))
        engines = list(engines)
        going = sum(engine.memory_bytes for engine in engines if engine.state in _IN_MEMORY and engine.is_leaving)
        missing = first.memory_bytes - self._free_bytes(engines) - going
        is_patient = self._clock.now() - since < self._patience_s
        candidates = [engine for engine in engines if engine.state is EngineState.READY and not engine.is_leaving]
        chosen = []
        for engine in sorted(candidates, key=lambda engine: (engine.num_requests > 0, engine.last_used)):
            if missing <= 0 or (engine.num_requests and is_patient):
                break
            chosen.append(engine)
            missing -= engine.memory_bytes
        return chosen

    def _free_bytes(self, engines: Iterable[ManagedEngine]) -> int:
        assert self._budget_bytes is not None
        return self._budget_bytes - sum(engine.memory_bytes for engine in engines if engine.state in _IN_MEMORY)


def expected_bytes(config: LLMEngineConfig) -> int:
    """Memory that an engine will need, before it was ever loaded: its files and its KV cache; 0 where not known."""
    path = Path(config.model_path).expanduser()
    weights = 0
    if path.is_file():
        weights = path.stat().st_size
    elif path.is_dir():
        found = (sum(file.stat().st_size for file in path.glob(pattern)) for pattern in _WEIGHTS)
        weights = next((size for size in found if size), 0)  # the same weights often lie there in several forms
    return weights + (config.kv_cache_memory_bytes or 0)


def measured_bytes(engine: ManagedEngine) -> int:
    """Memory that a loaded engine needs: of a process of its own what it occupies, else weights and KV cache."""
    described = 0 if engine.description is None else engine.description.weight_bytes
    occupied = 0
    if engine.pid is not None:
        try:
            occupied = psutil.Process(engine.pid).memory_info().rss
        except psutil.NoSuchProcess:  # it has just died: whoever watches it will find out
            occupied = 0
    return max(occupied, described + (engine.client.config.kv_cache_memory_bytes or 0), engine.memory_bytes)


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // 2**20)
