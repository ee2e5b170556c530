"""What the gateway itself costs: an engine that answers at once behind it, `wrk` in front, all on this machine.

    python benchmarks/gateway_overhead.py [--seconds 6] [--connections 1,32] [--json FILE]

Three kinds of calls: a chat request of a few words and one of 4,000 words, both answered whole, and a streamed answer
of 128 tokens. Load generator and server share the machine's cores. `wrk` (https://github.com/wg/wrk) is taken from the
path. The last row is the same call without HTTP, from inside the process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sagellm_control_plane import ControlPlaneManager
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.engine_core import EngineStats
from sagellm_core.serving import run_server
from sagellm_gateway import create_app
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    ModelDescription,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    Usage,
)

WORD = "token "


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request."""

    title: str
    num_words: int
    stream: bool
    output_len: int = 1

    def body(self) -> dict[str, Any]:
        content = " ".join(f"word{i}" for i in range(self.num_words))
        messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": content}]
        limits = {"max_tokens": self.output_len, "temperature": 0.7}
        return {"model": "mock", "messages": messages, "stream": self.stream, **limits}


CALLS = (
    Call("short, whole", 20, stream=False, output_len=16),
    Call("4,000 words, whole", 4000, stream=False, output_len=16),
    Call("128 tokens streamed", 20, stream=True, output_len=128),
)


class InstantEngine:
    """Answers every request with `max_tokens` words at once; what the control plane asks of an engine."""

    engine_id = "instant"

    def __init__(self) -> None:
        self.config = LLMEngineConfig(model_path="mock", max_model_len=32768, max_batch_size=1024)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def execute(self, request: Request, /) -> Response:
        return self._response(request)

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        names = {"request_id": request.request_id, "trace_id": request.trace_id, "engine_id": self.engine_id}
        yield StreamEventStart(prompt_tokens=20, **names)
        for i in range(request.resolved_sampling().max_tokens):
            yield StreamEventDelta(chunk=WORD, chunk_tokens=[i], **names)
            await asyncio.sleep(0)  # as an engine does: one wake-up a token
        yield StreamEventEnd.of(self._response(request))

    async def describe_model(self) -> ModelDescription:
        return ModelDescription(model="mock", vocab_size=1000, hidden_size=8, max_model_len=self.config.max_model_len)

    def _response(self, request: Request) -> Response:
        count = request.resolved_sampling().max_tokens
        output = CompletionOutput(text=WORD * count, token_ids=list(range(count)), finish_reason=FinishReason.LENGTH)
        usage = Usage(prompt_tokens=20, completion_tokens=count)
        return Response.of([output], request_id=request.request_id, engine_id=self.engine_id, usage=usage)

    def abort(self, request_id: str) -> None:
        pass

    async def health_check(self) -> bool:
        return True

    async def stats(self) -> EngineStats:
        return EngineStats(0, 0, 8, 8, 0.0, 1, 0, 0, 0, 0)


def make_manager() -> ControlPlaneManager:
    """A control plane with the instant engine."""
    manager = ControlPlaneManager()
    manager.register_engine(InstantEngine(), model="mock")
    return manager


def serve() -> None:
    """The server process: prints its URL, then serves until it is ended."""
    manager = make_manager()
    app = create_app(manager, default_model="mock")
    run_server(app, "127.0.0.1", 0, start=manager.start, announce=lambda url: print(url, flush=True))


def measure(url: str, call: Call, connections: int, seconds: int, folder: Path) -> dict[str, Any]:
    """One run of wrk: requests a second and percentiles of the time of a whole answer in milliseconds."""
    script = folder / "post.lua"
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f"wrk.body = [==[{json.dumps(call.body())}]==]\n"
        "done = function(summary, latency, requests)\n"
        '  io.write(string.format("RESULT %d %d %d %f %f %f\\n", summary.requests, summary.duration,\n'
        "    summary.errors.status + summary.errors.read + summary.errors.timeout + summary.errors.connect,\n"
        "    latency:percentile(50), latency:percentile(90), latency:percentile(99)))\nend\n",
        encoding="utf-8",
    )
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), f"{url}/v1/chat/completions"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+)", output)
    assert found is not None, output
    count, micros, failed = (int(found[i]) for i in (1, 2, 3))
    rate = count / micros * 1e6
    result = {"call": call.title, "connections": connections, "requests_per_second": rate, "failed": failed}
    result |= {f"p{p}_ms": float(found[i]) / 1e3 for p, i in ((50, 4), (90, 5), (99, 6))}
    if call.stream:
        result["tokens_per_second"] = rate * call.output_len
    return result


async def measure_in_process(call: Call, seconds: float) -> dict[str, Any]:
    """The same request through the control plane alone, one at a time."""
    from sagellm_protocol import parse
    from sagellm_protocol.openai import ChatCompletionRequest

    request = parse(ChatCompletionRequest, call.body(), what="body").to_request()
    times = []
    async with make_manager() as manager:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started_at = time.perf_counter()
            if call.stream:
                async for _ in manager.stream_request(request):
                    pass
            else:
                await manager.execute_request(request)
            times.append(time.perf_counter() - started_at)
    times.sort()
    p50, p90, p99 = (1e3 * times[int(len(times) * share)] for share in (0.5, 0.9, 0.99))
    rate = len(times) / sum(times)
    result = {"call": f"{call.title}, in process", "connections": 1, "requests_per_second": rate, "failed": 0}
    result |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
    if call.stream:
        result["tokens_per_second"] = rate * call.output_len
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--connections", default="1,8,32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; install it (Debian: apt install wrk) and try again")
    results = []
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as folder:
            for call in CALLS:
                for connections in map(int, arguments.connections.split(",")):
                    results.append(measure(url, call, connections, arguments.seconds, Path(folder)))
    finally:
        server.terminate()
        server.wait()
    for call in (CALLS[0], CALLS[2]):
        results.append(asyncio.run(measure_in_process(call, arguments.seconds / 2)))
    table = Table("call", "connections", "requests/s", "p50 ms", "p90 ms", "p99 ms", "tokens/s", "failed")
    for result in results:
        tokens = f"{result['tokens_per_second']:,.0f}" if "tokens_per_second" in result else ""
        table.add_row(
            result["call"],
            str(result["connections"]),
            f"{result['requests_per_second']:,.0f}",
            *(f"{result[f'p{p}_ms']:.2f}" for p in (50, 90, 99)),
            tokens,
            str(result["failed"]),
        )
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
