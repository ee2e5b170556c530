"""A server under mixed load for a long time: does anything leak, does anything fail?

    python benchmarks/soak.py [--minutes 15] [--clients 32] [--leave-share 0.2] [--json FILE] [-- SERVE OPTIONS]

A real `sage-llm serve` process with the built-in model; clients that call every API it serves, a fifth of them going
away in the middle of the answer; some calls that must be refused. Before and after, when all is quiet, these are the
same: file descriptors, asyncio tasks, free blocks of the KV cache, requests in the books. In between memory must not
grow, answers that are determined must stay the same to the letter, and nothing may fail that was not asked to. Ends
with status 1 where one of it does not hold. Options after `--` go to the server, such as `-- --replicas 2`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sagellm_benchmark.serve.http import HttpClient
from soak_calls import ACTIONS, SoakClient, Tally, everything

START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0
SAMPLE_EVERY_S = 2.0
# Of calls that one server has in work: a place that is not given back soon shows as a refusal.
SPARE_PLACES = 8
MIB = 2**20
# So small a cache is touched as a whole in the first minute, and prefixes are evicted from it all the time.
CONFIG = f"engine: {{model: builtin, options: {{kv_cache_memory_bytes: {32 * MIB}}}}}\n"


class Server:
    """A server process; `log` is what it wrote."""

    def __init__(self, options: Sequence[str], home: Path) -> None:
        command = [sys.executable, "-m", "sagellm", "serve", "--port", "0", "--access-log", "off", *options]
        self.process = subprocess.Popen(
            command, env={**os.environ, "HOME": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self.url = ""
        self._has_url = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._has_url.wait(START_TIMEOUT_S) or not self.url:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {''.join(self.log)}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"at (https?://[^/\s]+)", line):
                self.url = found.group(1)
                self._has_url.set()
        self._has_url.set()

    def end(self) -> int:
        """Stop it and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(5)
        return status

    def errors(self) -> list[str]:
        """Lines of its log that tell of an error."""
        return [line.rstrip() for line in self.log if re.search(r"Traceback|Error\b|ERROR|never retrieved", line)]

    @property
    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@contextmanager
def running(options: Sequence[str]) -> Iterator[Server]:
    """A server with a home folder of its own."""
    with tempfile.TemporaryDirectory(prefix="sagellm-soak-") as folder:
        home = Path(folder)
        (home / ".sage-llm").mkdir()
        (home / ".sage-llm" / "config.yaml").write_text(CONFIG, encoding="utf-8")
        server = Server(options, home)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    at_s: float
    rss_mib: float  # of all its processes
    num_files: int  # file descriptors of all its processes
    num_tasks: int  # of the gateway's event loop
    num_requests: int  # in the control plane's books: in the queue or granted to an engine
    num_running: int  # on the engines
    num_used_blocks: int  # of all KV caches, cached ones included
    num_calls: int = 0  # answered so far


async def sample(server: Server, http: HttpClient, tally: Tally, began: float) -> Sample:
    """Look at the server from outside, and ask it."""
    stats = await get(http, "/admin/stats")
    engines = stats["engines"]
    return Sample(
        at_s=time.monotonic() - began,
        rss_mib=sum(process.memory_info().rss for process in server.family) / MIB,
        num_files=sum(process.num_fds() for process in server.family),
        num_tasks=stats["process"]["num_tasks"],
        num_requests=stats["queue_depth"] + sum(engine["num_requests"] for engine in engines),
        num_running=sum(engine["num_running"] + engine["num_waiting"] for engine in engines),
        num_used_blocks=sum(engine["num_blocks"] - engine["num_free_blocks"] for engine in engines),
        num_calls=tally.answered.total() + tally.num_left,
    )


async def get(http: HttpClient, path: str) -> Any:
    """A JSON answer."""
    async with http.call("GET", path) as answer:
        body = await answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path}: status {answer.status}: {body.decode(errors='replace')}")
    return msgspec.json.decode(body)


async def settled(server: Server, tally: Tally, began: float, like: Sample | None = None) -> Sample:
    """The server at rest, caches forgotten: as soon as it is like `like`, else when the patience ends."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        await asyncio.sleep(1.0)
        # One connection, a fresh one each time: connections are counted, too.
        http = HttpClient(server.url)
        try:
            async with http.call("POST", "/admin/cache/reset") as answer:
                is_reset = all(msgspec.json.decode(await answer.read())["reset"].values())
            found = await sample(server, http, tally, began)
        finally:
            http.close()
        is_quiet = is_reset and found.num_requests + found.num_running == 0
        if (is_quiet and (like is None or not differences(like, found))) or time.monotonic() > deadline:
            return found


def differences(before: Sample, after: Sample) -> list[str]:
    """What is more than it was."""
    names = {
        "num_files": "file descriptors",
        "num_tasks": "asyncio tasks",
        "num_requests": "requests in the books",
        "num_running": "requests on engines",
        "num_used_blocks": "blocks in use",
    }
    return [
        f"{title}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name, title in names.items()
        if getattr(after, name) > getattr(before, name)
    ]


def memory_slope(samples: Sequence[Sample]) -> float:
    """MiB a minute over the second half: the median slope of all pairs (Theil and Sen), deaf to single peaks."""
    half = (samples[0].at_s + samples[-1].at_s) / 2
    later = [entry for entry in samples if entry.at_s >= half]
    later = later[:: max(1, len(later) // 200)]
    slopes = [
        60 * (b.rss_mib - a.rss_mib) / (b.at_s - a.at_s)
        for number, a in enumerate(later)
        for b in later[number + 1 :]
        if b.at_s > a.at_s
    ]
    return statistics.median(slopes) if slopes else 0.0


async def soak(server: Server, options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole run; returns what was found."""
    tally, began = Tally(), time.monotonic()
    warm = SoakClient(http := HttpClient(server.url), tally, options.seed, 0.0)
    for _ in range(2):
        await everything(warm)
    http.close()
    before = await settled(server, tally, began)
    samples = [before]
    end = time.monotonic() + options.minutes * 60
    clients = [asyncio.ensure_future(live(server, tally, options, number, end)) for number in range(options.clients)]
    watch = HttpClient(server.url)
    told = time.monotonic()
    while any(not client.done() for client in clients):
        await asyncio.wait(clients, timeout=SAMPLE_EVERY_S)
        samples.append(await sample(server, watch, tally, began))
        if time.monotonic() - told > 30:
            told = time.monotonic()
            now = samples[-1]
            tell(
                f"{now.at_s / 60:.1f} min: {now.num_calls} calls, {tally.failed.total()} failed, "
                f"{now.rss_mib:.1f} MiB, {now.num_files} files, {now.num_tasks} tasks"
            )
    for client in clients:
        client.result()
    watch.close()
    after = await settled(server, tally, began, before)
    return verdict(tally, before, samples[1:], after, server, options)


async def live(server: Server, tally: Tally, options: argparse.Namespace, number: int, end: float) -> None:
    """One client's life; now and then it comes back over new connections."""
    http = HttpClient(server.url)
    client = SoakClient(http, tally, options.seed + 1 + number, options.leave_share)
    weights = [weight for weight, _ in ACTIONS]
    try:
        while time.monotonic() < end:
            ((_, action),) = client.random.choices(ACTIONS, weights)
            await action(client)
            if client.random.random() < 0.02:
                http.close()
            if client.random.random() < 0.1:
                await asyncio.sleep(client.random.random() * 0.2)
    finally:
        http.close()


def verdict(
    tally: Tally, before: Sample, samples: Sequence[Sample], after: Sample, server: Server, options: argparse.Namespace
) -> dict[str, Any]:
    """What was found, and what of it must not be."""
    slope = memory_slope(samples)
    problems = [f"{count} × {name}: {tally.examples[name]}" for name, count in tally.failed.items()]
    problems += differences(before, after)
    if slope > options.max_slope:
        problems.append(f"memory grows by {slope:.2f} MiB a minute, more than {options.max_slope:g}")
    problems += [f"in the server's log: {line}" for line in server.errors()[:20]]
    seconds = samples[-1].at_s - before.at_s
    return {
        "minutes": seconds / 60,
        "num_answered": tally.answered.total(),
        "num_left": tally.num_left,
        "num_failed": tally.failed.total(),
        "calls_per_second": after.num_calls / seconds,
        "memory_slope_mib_per_minute": slope,
        "peak_rss_mib": max(entry.rss_mib for entry in samples),
        "before": asdict(before),
        "after": asdict(after),
        "answered": dict(tally.answered.most_common()),
        "problems": problems,
        "log": server.log[-1000:],
        "samples": [asdict(entry) for entry in samples],
    }


def table(result: dict[str, Any]) -> Table:
    """Before, the most in between, and after."""
    rows = Table("", "before", "at most", "after", box=SIMPLE_HEAD, pad_edge=False)
    for name, title, digits in (
        ("rss_mib", "memory, MiB", 1),
        ("num_files", "file descriptors", 0),
        ("num_tasks", "asyncio tasks", 0),
        ("num_requests", "requests in the books", 0),
        ("num_running", "requests on engines", 0),
        ("num_used_blocks", "KV blocks in use", 0),
    ):
        most = max(entry[name] for entry in result["samples"])
        rows.add_row(title, *(f"{value:.{digits}f}" for value in (result["before"][name], most, result["after"][name])))
    for column in rows.columns[1:]:
        column.justify = "right"
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="A server under mixed load for a long time.")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--leave-share", type=float, default=0.2, help="of the streams that clients break off")
    parser.add_argument("--max-slope", type=float, default=1.0, help="of memory, in MiB a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found into this file")
    parser.add_argument("serve", nargs="*", help="further options of `sage-llm serve`, after --")
    options = parser.parse_args()
    console, remarks = Console(highlight=False), Console(stderr=True, highlight=False)
    places = str(options.clients + SPARE_PLACES)
    with running(["--model", "builtin", "--max-concurrent", places, *options.serve]) as server:
        result = asyncio.run(soak(server, options, remarks.print))
        if (status := server.end()) != 0:
            result["problems"].append(f"the server ended with status {status}: {''.join(server.log[-5:])}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"{result['minutes']:.1f} minutes, {options.clients} clients, {result['calls_per_second']:.1f} calls a second: "
        f"{result['num_answered']} answered as they should, {result['num_left']} broken off, "
        f"{result['num_failed']} failed",
        soft_wrap=True,
    )
    console.print(table(result))
    console.print(f"memory grows by {result['memory_slope_mib_per_minute']:+.2f} MiB a minute")
    for problem in result["problems"]:
        console.print(f"PROBLEM {problem}", markup=False, soft_wrap=True)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
