"""The figures of this moment, for `/admin/stats`: engines, queue, rates and latencies of the last minutes.

Everything is counted where it happens and summed up only when somebody asks. Latencies are those of the last
`WINDOW_S` seconds, of at most `MAX_REQUESTS` requests; rates those of the last `RATE_S` seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import psutil

from sagellm_control_plane import ControlPlaneManager, EngineInfo
from sagellm_gateway.explanation import event_entry
from sagellm_protocol import Request, Response, StreamEventEnd

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineStats

WINDOW_S = 300.0
RATE_S = 10.0
MAX_REQUESTS = 8192
NUM_EVENTS = 20  # the last ones

_SAMPLE_EVERY_S = 1.0
# An engine in the midst of a long step answers later; until then its last figures stand.
_PATIENCE_S = 1.0
_PERCENTILES = (50, 90, 99)


class LiveStats:
    """Watches a control plane. `observe` is told of every request that ends; `run` samples the rates.

    Belongs to the event loop of its manager. `clock` counts seconds.
    """

    def __init__(self, manager: ControlPlaneManager, clock: Callable[[], float] = time.monotonic) -> None:
        self._manager = manager
        self._clock = clock
        self._started_at = clock()
        self._process = psutil.Process()
        self._num_requests = 0
        self._num_failed = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=MAX_REQUESTS)  # (end, TTFT ms, TPOT ms)
        self._stats: dict[str, EngineStats] = {}
        self._num_sampled_tokens = 0  # by all engines, of requests that still run, too
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=64)  # (time, sampled tokens, requests)

    def observe(self, _: Request, answer: Response | StreamEventEnd, waited_s: float) -> None:
        """Count a request that has ended and had waited so long for an engine."""
        fields = answer.__dict__  # every attribute of a pydantic value costs about as much as this
        usage, metrics = fields["usage"].__dict__, fields["metrics"].__dict__
        self._num_requests += 1
        self._num_failed += fields["error"] is not None
        self._num_prompt_tokens += usage["prompt_tokens"]
        self._num_output_tokens += usage["completion_tokens"]
        ttft_ms = metrics["ttft_ms"] + waited_s * 1e3 if metrics["ttft_ms"] else 0.0
        self._recent.append((self._clock(), ttft_ms, metrics["tpot_ms"]))

    async def run(self) -> None:
        """Sample the rates until cancelled."""
        while True:
            await self._sample()
            await asyncio.sleep(_SAMPLE_EVERY_S)

    async def snapshot(self) -> dict[str, Any]:
        """The figures of this moment, as plain JSON values. Shares are 0 to 1, times as their names say."""
        await self._sample()
        infos, config = self._manager.list_engines(), self._manager.config
        recent = [entry for entry in self._recent if entry[0] >= self._clock() - WINDOW_S]
        return {
            "time": time.time(),
            "uptime_s": self._clock() - self._started_at,
            "models": sorted({info.model for info in infos}),
            "engines": [engine_entry(self._manager, info, self._stats.get(info.engine_id)) for info in infos],
            "queue_depth": self._manager.num_waiting,
            "totals": {
                "requests": self._num_requests,
                "failed": self._num_failed,
                "prompt_tokens": self._num_prompt_tokens,
                "output_tokens": self._num_output_tokens,
            },
            "rates": self._rates(),
            "ttft_ms": _percentiles([ttft_ms for _, ttft_ms, _ in recent if ttft_ms > 0]),
            "tpot_ms": _percentiles([tpot_ms for _, _, tpot_ms in recent if tpot_ms > 0]),
            "window_s": WINDOW_S,
            "policies": {"scheduling": config.scheduling_policy, "routing": config.routing_policy or "adaptive"},
            "events": [event_entry(event) for event in self._manager.events.recent()[-NUM_EVENTS:]],
            "process": self._describe_process(),
        }

    def _describe_process(self) -> dict[str, int]:
        """This process, without engines of their own: what should stay as it is over time."""
        with self._process.oneshot():
            return {
                "pid": self._process.pid,
                "rss_bytes": self._process.memory_info().rss,
                "num_files": self._process.num_fds(),
                "num_threads": self._process.num_threads(),
                "num_tasks": len(asyncio.all_tasks()),
            }

    async def _sample(self) -> None:
        try:
            stats = await asyncio.wait_for(self._manager.engine_stats(), _PATIENCE_S)
        except asyncio.TimeoutError:
            return
        for engine_id, stat in stats.items():
            before = self._stats.get(engine_id)
            # A counter that went back belongs to an engine that was started again.
            is_same = before is not None and stat.num_output_tokens >= before.num_output_tokens
            self._num_sampled_tokens += stat.num_output_tokens - (before.num_output_tokens if before and is_same else 0)
        self._stats = stats
        now = self._clock()
        while self._samples and self._samples[0][0] < now - RATE_S:
            self._samples.popleft()
        if not self._samples or now - self._samples[-1][0] > _SAMPLE_EVERY_S / 4:
            self._samples.append((now, self._num_sampled_tokens, self._num_requests))

    def _rates(self) -> dict[str, float]:
        then, num_tokens, num_requests = self._samples[0] if self._samples else (self._started_at, 0, 0)
        elapsed = max(self._clock() - then, 1e-3)
        return {
            "output_tokens_per_s": max(0, self._num_sampled_tokens - num_tokens) / elapsed,
            "requests_per_s": (self._num_requests - num_requests) / elapsed,
        }


def engine_entry(manager: ControlPlaneManager, info: EngineInfo, stats: EngineStats | None) -> dict[str, Any]:
    """An engine as a JSON object; figures of an engine that is not loaded are zeros.

    `load` is the share of its places that are taken: of the requests that it may have at the same time.
    """
    num_places = manager.get_engine_config(info.engine_id).max_batch_size
    return {
        "engine_id": info.engine_id,
        "model": info.model,
        "state": info.state.value,
        "pid": info.pid,
        "error": info.error,
        "type": info.instance_type.name.lower(),
        "load": info.num_requests / max(num_places, 1),
        "max_model_len": info.max_model_len,
        "max_requests": num_places,
        "num_requests": info.num_requests,
        "num_tokens": info.num_tokens,
        "num_running": stats.num_running if stats else 0,
        "num_waiting": stats.num_waiting if stats else 0,
        "num_output_tokens": stats.num_output_tokens if stats else 0,
        "kv_usage": stats.kv_usage if stats else 0.0,
        "prefix_hit_rate": stats.prefix_hit_tokens / max(stats.prefix_query_tokens, 1) if stats else 0.0,
        "num_blocks": stats.num_blocks if stats else 0,
        "num_free_blocks": stats.num_free_blocks if stats else 0,
        "num_preemptions": stats.num_preemptions if stats else 0,
    }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Nearest-rank percentiles; None where there are no values."""
    ranked = sorted(values)
    count = len(ranked)
    return {f"p{p}": ranked[-(-count * p // 100) - 1] if ranked else None for p in _PERCENTILES}
