"""What it costs that an engine runs in a child process: the same requests to one in this process and to one in a child.

    python benchmarks/engine_clients.py [--model builtin] [--rounds 5]

Prints medians over interleaved rounds: milliseconds of a request for one token, and of a token in a stream, alone and
among 16; and how long a child takes to start.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_core.config import LLMEngineConfig
from sagellm_core.llm_engine import LLMEngine
from sagellm_protocol import Request, SamplingParams

_PROMPT = "Tell me of the sea."


async def _stream(engine: EngineClient, num_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    async for _ in engine.stream(Request(prompt=_PROMPT, stream=True, sampling_params=sampling)):
        pass


async def _requests(engine: EngineClient) -> float:
    """Milliseconds a request."""
    started_at = time.perf_counter()
    for _ in range(100):
        await _stream(engine, 1)
    return (time.perf_counter() - started_at) * 1000 / 100


def _tokens(concurrency: int) -> Callable[[EngineClient], Coroutine[Any, Any, float]]:
    async def measure(engine: EngineClient) -> float:
        """Milliseconds a step, in which each stream gets a token."""
        started_at = time.perf_counter()
        await asyncio.gather(*(_stream(engine, 256) for _ in range(concurrency)))
        return (time.perf_counter() - started_at) * 1000 / 256

    return measure


_CASES = {"one-token request, ms": _requests, "step of 1 stream, ms": _tokens(1), "step of 16 streams, ms": _tokens(16)}


async def _main(model: str, rounds: int) -> None:
    config = LLMEngineConfig(model_path=model)
    with tempfile.TemporaryDirectory() as run_dir:
        own, child = LLMEngine(config), ProcessEngineClient(config, run_dir=run_dir)
        starts = []
        for _ in range(3):
            started_at = time.perf_counter()
            await child.start()
            starts.append(time.perf_counter() - started_at)
            if len(starts) < 3:
                await child.stop()
        await own.start()
        print(f"start of a child: {statistics.median(starts):.2f} s")
        try:
            for name, measure in _CASES.items():
                figures: dict[str, list[float]] = {"own": [], "child": []}
                for _ in range(rounds):
                    figures["own"].append(await measure(own))
                    figures["child"].append(await measure(child))
                here, there = statistics.median(figures["own"]), statistics.median(figures["child"])
                print(f"{name}: {here:.3f} here, {there:.3f} in a child, {there - here:+.3f}")
        finally:
            await child.stop()
            await own.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        asyncio.run(_main(arguments.model, arguments.rounds))
    else:
        uvloop.run(_main(arguments.model, arguments.rounds))
