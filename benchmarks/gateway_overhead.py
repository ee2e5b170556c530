"""What the gateway itself costs: an engine that answers at once behind it, `wrk` in front, all on this machine.

    python benchmarks/gateway_overhead.py [--seconds 6] [--connections 1,32] [--with-key] [--json FILE]

The gateway runs with its default settings, its access log goes to a file; `--with-key` demands a key and counts its
requests and tokens. Load generator and server share the machine's cores. `wrk` (https://github.com/wg/wrk) is taken
from the path.

The first table is throughput, by three kinds of calls: a chat request of a few words and one of 4,000 words, both
answered whole, and a streamed answer of 128 tokens. Its last rows are the same calls without HTTP, from inside the
process, one at a time; of three engines, too, where each prompt is split into tokens and routed by what is cached.

The second table is latency, of 8 streams whose engine makes a token for each every 20 ms, as a batch does: how long
from sending a request to its first token, and from the moment a token was made until the caller has it; over HTTP and
from inside the process, and what HTTP adds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sagellm_control_plane import ControlPlaneManager
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineStats
from sagellm_gateway import create_app
from sagellm_gateway.keys import RateLimits, key_of
from sagellm_gateway.serving import run_gateway
from sagellm_gateway.settings import AuthSettings, GatewaySettings, LimitSettings, ServerSettings
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
    TokenizeRequest,
    Usage,
)

WORD = "token "
KEY = "sk-sage-for-the-benchmark"

NUM_STREAMS = 8
TOKENS_A_STREAM = 16
STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request."""

    title: str
    num_words: int
    stream: bool
    output_len: int = 1
    model: str = "instant"

    def body(self) -> dict[str, Any]:
        content = " ".join(f"word{i}" for i in range(self.num_words))
        messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": content}]
        limits = {"max_tokens": self.output_len, "temperature": 0.7}
        return {"model": self.model, "messages": messages, "stream": self.stream, **limits}


CALLS = (
    Call("short, whole", 20, stream=False, output_len=16),
    Call("4,000 words, whole", 4000, stream=False, output_len=16),
    Call("128 tokens streamed", 20, stream=True, output_len=128),
)
PACED = Call("paced", 20, stream=True, output_len=TOKENS_A_STREAM, model="paced")


@cache
def _answer(num_tokens: int) -> Response:
    text, finish_reason = WORD * num_tokens, FinishReason.LENGTH
    output = CompletionOutput(text=text, token_ids=list(range(num_tokens)), finish_reason=finish_reason)
    return Response.of([output], request_id="", usage=Usage(prompt_tokens=20, completion_tokens=num_tokens))


class InstantEngine:
    """Answers every request with `max_tokens` words at once; what the control plane asks of an engine."""

    engine_id = "instant"

    def __init__(self) -> None:
        self.config = LLMEngineConfig(model_path=self.engine_id, max_model_len=32768, max_batch_size=1024)

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

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        text = request.prompt or "".join(str(message.content) for message in request.messages or ())
        return [len(word) for word in text.split()]

    async def describe_model(self) -> ModelDescription:
        return ModelDescription(
            model=self.engine_id, vocab_size=1000, hidden_size=8, max_model_len=self.config.max_model_len
        )

    def _response(self, request: Request) -> Response:
        # What all answers of a length have in common is made once: the engine's time is not the gateway's.
        ready = _answer(request.max_tokens or request.resolved_sampling().max_tokens)
        return ready.model_copy(update={"request_id": request.request_id, "engine_id": self.engine_id})

    def abort(self, request_id: str) -> None:
        pass

    async def health_check(self) -> bool:
        return True

    async def stats(self) -> EngineStats:
        return EngineStats(0, 0, 8, 8, 0.0, 1, 0, 0, 0, 0)


class PacedEngine(InstantEngine):
    """Streams the first token at once and the others in steps that all streams share; a token is its time in ns."""

    engine_id = "paced"

    def __init__(self) -> None:
        super().__init__()
        self._step: asyncio.Future[int] | None = None

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        names = {"request_id": request.request_id, "trace_id": request.trace_id, "engine_id": self.engine_id}
        yield StreamEventStart(prompt_tokens=20, **names)
        for i in range(request.resolved_sampling().max_tokens):
            made_at = time.monotonic_ns() if i == 0 else await self._next_step()
            yield StreamEventDelta(chunk=f"{made_at} ", chunk_tokens=[i], **names)
        yield StreamEventEnd.of(self._response(request))

    async def _next_step(self) -> int:
        if self._step is None:
            loop = asyncio.get_running_loop()
            self._step = loop.create_future()
            loop.call_at((loop.time() // STEP_S + 1) * STEP_S, self._end_step)
        return await asyncio.shield(self._step)

    def _end_step(self) -> None:
        step, self._step = self._step, None
        assert step is not None
        step.set_result(time.monotonic_ns())


def make_manager(*, num_instant: int = 1, policy: str | None = None) -> ControlPlaneManager:
    """A control plane with engines of both kinds."""
    manager = ControlPlaneManager(scheduling_policy=policy)
    for number in range(num_instant):
        manager.register_engine(InstantEngine(), engine_id=f"instant-{number}", model="instant")
    manager.register_engine(PacedEngine(), model="paced")
    return manager


def serve(*, with_key: bool) -> None:
    """The server process: prints its URL, then serves until it is ended."""
    limits = RateLimits(requests_per_minute=10**9, tokens_per_minute=10**9)
    settings = GatewaySettings(
        server=ServerSettings(port=0),
        auth=AuthSettings(keys=[key_of(KEY, name="benchmark")] if with_key else []),
        limits=LimitSettings(per_key=limits) if with_key else LimitSettings(),
    )
    gateway = create_app(make_manager(), default_model="instant", settings=settings)
    run_gateway(gateway, announce=lambda url: print(url, flush=True))


def measure(url: str, call: Call, connections: int, seconds: int, folder: Path) -> dict[str, Any]:
    """One run of wrk: requests a second and percentiles of the time of a whole answer in milliseconds."""
    script = folder / "post.lua"
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.headers["Authorization"] = "Bearer {KEY}"\n'
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


async def measure_in_process(call: Call, seconds: float, *, num_engines: int = 1) -> dict[str, Any]:
    """The same request through the control plane alone, one at a time.

    With several engines prompts are split into tokens and hashed to find who has them cached, and both the scheduling
    and the routing policy are `adaptive`.
    """
    from sagellm_protocol import parse
    from sagellm_protocol.openai import ChatCompletionRequest

    request = parse(ChatCompletionRequest, call.body(), what="body").to_request()
    times = []
    manager = make_manager(num_instant=num_engines, policy="adaptive" if num_engines > 1 else None)
    async with manager:
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
    where = "in process" if num_engines == 1 else f"in process, {num_engines} engines"
    result = {"call": f"{call.title}, {where}", "connections": 1, "requests_per_second": rate, "failed": 0}
    result |= {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
    if call.stream:
        result["tokens_per_second"] = rate * call.output_len
    return result


async def latency_over_http(url: str, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds to first tokens and of the others on their way, of streams over connections that stay open."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(PACED.body()).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    request, end = head.encode() + content, time.monotonic() + seconds
    first: list[float] = []
    later: list[float] = []

    async def call_again_and_again() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() < end:
            await asyncio.sleep(random.uniform(0, STEP_S))  # or all would begin in the same moment
            sent_at = time.monotonic_ns()
            writer.write(request)
            has_begun = False
            while b"[DONE]" not in (message := await reader.readuntil(b"\n\n")):
                now, found = time.monotonic_ns(), re.search(rb'"content":"(\d+) "', message)
                if found is not None:
                    (later if has_begun else first).append((now - (int(found[1]) if has_begun else sent_at)) / 1e6)
                    has_begun = True
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    await asyncio.gather(*(call_again_and_again() for _ in range(NUM_STREAMS)))
    return first, later


async def latency_in_process(seconds: float) -> tuple[list[float], list[float]]:
    """The same of streams that are read from the control plane itself."""
    from sagellm_protocol import parse
    from sagellm_protocol.openai import ChatCompletionRequest

    call, end = parse(ChatCompletionRequest, PACED.body(), what="body"), time.monotonic() + seconds
    first: list[float] = []
    later: list[float] = []

    async def call_again_and_again(manager: ControlPlaneManager) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(random.uniform(0, STEP_S))
            sent_at, has_begun = time.monotonic_ns(), False
            async for event in manager.stream_request(call.to_request()):
                if isinstance(event, StreamEventDelta):
                    now, made_at = time.monotonic_ns(), int(event.chunk)
                    (later if has_begun else first).append((now - (made_at if has_begun else sent_at)) / 1e6)
                    has_begun = True

    async with make_manager() as manager:
        await asyncio.gather(*(call_again_and_again(manager) for _ in range(NUM_STREAMS)))
    return first, later


def compare_latencies(url: str, seconds: float) -> list[dict[str, Any]]:
    """p50 and p99 in milliseconds of both ways, and their difference."""
    over_http = asyncio.run(latency_over_http(url, seconds))
    in_process = asyncio.run(latency_in_process(seconds))
    rows = []
    for title, http, direct in zip(("to the first token", "of a token"), over_http, in_process, strict=True):
        row: dict[str, Any] = {"latency": title, "streams": NUM_STREAMS}
        for share in (0.5, 0.99):
            of_http, of_direct = (sorted(times)[int(len(times) * share)] for times in (http, direct))
            name = f"p{share * 100:.0f}"
            row |= {f"http_{name}_ms": of_http, f"direct_{name}_ms": of_direct, f"added_{name}_ms": of_http - of_direct}
        rows.append(row)
    return rows


def show(results: list[dict[str, Any]], latencies: list[dict[str, Any]]) -> None:
    """Print both tables."""
    console = Console(width=None if sys.stdout.isatty() else 120)
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
    console.print(table)
    ways = ("http", "direct", "added")
    table = Table(f"latency at {NUM_STREAMS} streams", *(f"{way} p{p} ms" for p in (50, 99) for way in ways))
    for row in latencies:
        table.add_row(row["latency"], *(f"{row[f'{way}_p{p}_ms']:.2f}" for p in (50, 99) for way in ways))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--connections", default="1,8,32")
    parser.add_argument("--with-key", action="store_true", help="demand a key, count its requests and tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(with_key=arguments.with_key)
        return
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed; install it (Debian: apt install wrk) and try again")
    results = []
    with tempfile.TemporaryDirectory() as name, Path(name, "access.log").open("wb") as log:
        command = [sys.executable, __file__, "--serve", *(["--with-key"] if arguments.with_key else [])]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for call in CALLS:
                for connections in map(int, arguments.connections.split(",")):
                    results.append(measure(url, call, connections, arguments.seconds, Path(name)))
            latencies = compare_latencies(url, arguments.seconds)
        finally:
            server.terminate()
            server.wait()
    for call, num_engines in ((CALLS[0], 1), (CALLS[0], 3), (CALLS[2], 1)):
        results.append(asyncio.run(measure_in_process(call, arguments.seconds / 2, num_engines=num_engines)))
    show(results, latencies)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"throughput": results, "latency": latencies}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
