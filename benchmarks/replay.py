"""A recorded load on real engines under one policy after the other: what routing, objectives and fairness bring.

    python benchmarks/replay.py routing --trace conversation_trace.jsonl [--routing round_robin,marginal_cost] ...
    python benchmarks/replay.py slo     --trace conversation_trace.jsonl [--scheduling fifo,slo_aware] ...
    python benchmarks/replay.py fair    [--scheduling fifo,fair] ...

Each run starts its own child processes, so that every policy begins with cold caches; with `--rounds` the policies take
turns, since machines are noisy. `routing` replays the same requests at the same times and compares the times to the
first token. `slo` gives every other request a tight objective, by what prompts take on idle engines of this hour, and
looks for the highest rate at which 90 % of the requests meet theirs: the goodput. `fair` lets one tenant flood the
queue while another always has a few requests waiting, and follows the service that both have got (a token of a prompt
counts 1, one of an answer 2) against the bound of the virtual token counter (Sheng et al., OSDI 2024).
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compare import locked
from sagellm_benchmark.serve.arrivals import random_times, recorded_times
from sagellm_benchmark.serve.prompts import LoadRequest, fit_into, trace_requests
from sagellm_benchmark.serve.vocabulary import Vocabulary
from sagellm_benchmark.traces import read_trace
from sagellm_control_plane import ControlPlaneManager, EngineConfig
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_protocol import SLO, Request, SageLLMError, SamplingParams

ATTAINED = 0.9
GIVEN_UP = 0.7  # share of objectives; a policy below it at two rates in a row is not asked for higher ones
LOOSE = 10  # times the tight objective
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2


@dataclass(frozen=True, slots=True)
class Seen:
    """What one request's reader saw. Times in seconds."""

    ttft_s: float
    tpot_s: float
    num_cached: int
    is_met: bool  # its objective; True where it had none
    is_failed: bool = False


class Fleet:
    """Child engines under one manager, for the time of the body."""

    def __init__(self, arguments: argparse.Namespace, **policies: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        options: dict[str, Any] = {"max_batch_size": arguments.places, "num_threads": arguments.threads}
        options |= {"quantization": arguments.quantization} if arguments.quantization else {}
        options |= {"max_model_len": arguments.max_model_len} if arguments.max_model_len else {}
        self.manager = ControlPlaneManager(
            engine_configs=[EngineConfig(kind="cpu", model=arguments.model, options=options)] * arguments.engines,
            make_engine=lambda config: ProcessEngineClient(config, run_dir=Path(self._folder.name)),
            **policies,
        )

    async def __aenter__(self) -> ControlPlaneManager:
        await self.manager.start()
        return self.manager

    async def __aexit__(self, *error: object) -> None:
        await self.manager.stop()
        self._folder.cleanup()


async def ask(manager: ControlPlaneManager, request: Request) -> Seen:
    """Send one request and read its stream."""
    sent_at = time.monotonic()
    first_at: float | None = None
    try:
        async for event in manager.stream_request(request):
            now = time.monotonic()
            if event.event == "delta" and event.chunk_tokens and first_at is None:
                first_at = now
            if event.event == "end":
                if event.error is not None or first_at is None:
                    return Seen(now - sent_at, 0.0, 0, is_met=False, is_failed=True)
                ttft_s = first_at - sent_at
                wanted = None if request.slo is None else request.slo.ttft_ms
                tokens = max(1, event.usage.completion_tokens - 1)
                return Seen(
                    ttft_s,
                    (now - first_at) / tokens,
                    event.usage.cached_tokens,
                    is_met=wanted is None or ttft_s <= wanted / 1e3,
                )
    except SageLLMError:
        pass  # refused: counted as failed
    return Seen(time.monotonic() - sent_at, 0.0, 0, is_met=False, is_failed=True)


async def replay(manager: ControlPlaneManager, requests: Sequence[Request], times: Sequence[float]) -> list[Seen]:
    """Send each request at its time, whatever has become of the others."""
    begin = time.monotonic()

    async def one(request: Request, at_s: float) -> Seen:
        await asyncio.sleep(max(0.0, begin + at_s - time.monotonic()))
        return await ask(manager, request)

    return list(await asyncio.gather(*(one(*pair) for pair in zip(requests, times, strict=True))))


def load(arguments: argparse.Namespace, count: int) -> list[LoadRequest]:
    """The requests of the trace, in the size of the model."""
    trace = [entry.scaled(arguments.scale) for entry in read_trace(arguments.trace, count)]
    vocabulary = Vocabulary(tuple(range(64, arguments.vocab_size)))
    return fit_into(trace_requests(trace, vocabulary, takes_tokens=True), arguments.max_model_len)[0]


def times_at(wanted: Sequence[LoadRequest], rate: float | None, arguments: argparse.Namespace) -> list[float]:
    """When to send each, in seconds: at random or as recorded (which is in bursts), at `rate` a second on average."""
    recorded = [entry.at_s for entry in wanted]
    if rate is None:
        return recorded_times(recorded, speed=1.0)
    if arguments.recorded:
        return recorded_times(recorded, speed=rate * (max(recorded) - min(recorded)) / len(recorded))
    return random_times(len(wanted), rate, seed=arguments.seed)


def as_request(model: str, wanted: LoadRequest, **fields: Any) -> Request:
    """A greedy request whose answer is exactly as long as in the trace."""
    sampling = SamplingParams(max_tokens=wanted.output_len, ignore_eos=True)
    return Request(model=model, prompt=wanted.prompt, sampling_params=sampling, stream=True, **fields)


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure of the runs; the most of what failed."""
    return {key: (max if key == "failed" else statistics.median)(run[key] for run in runs) for key in runs[0]}


# ---- routing ------------------------------------------------------------------------------------------


async def compare_routing(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same requests at the same times, routed by each policy."""
    wanted = load(arguments, arguments.requests)
    times = times_at(wanted, arguments.rate, arguments)
    num_input = sum(entry.input_len or 0 for entry in wanted)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.routing}
    for name in arguments.rounds * arguments.routing:
        async with Fleet(arguments, routing_policy=name) as manager:
            seen = await replay(manager, [as_request(arguments.model, entry) for entry in wanted], times)
        ttfts = sorted(one.ttft_s for one in seen)
        runs[name].append(
            {
                "failed": sum(one.is_failed for one in seen),
                "ttft_mean_ms": 1e3 * statistics.mean(ttfts),
                "ttft_p50_ms": 1e3 * ttfts[len(ttfts) // 2],
                "ttft_p90_ms": 1e3 * ttfts[int(0.9 * (len(ttfts) - 1))],
                "tpot_mean_ms": 1e3 * statistics.mean(one.tpot_s for one in seen),
                "cached": sum(one.num_cached for one in seen) / num_input,
            }
        )
    rows = [{"routing": name, **medians(of_name)} for name, of_name in runs.items()]
    return [{**row, "ttft_to_first": rows[0]["ttft_mean_ms"] / row["ttft_mean_ms"]} for row in rows]


# ---- objectives ---------------------------------------------------------------------------------------


async def compare_goodput(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The highest rate at which 90 % of the requests meet their objective, by policy.

    A round goes through all rates, and at each through all policies; rounds count by their medians.
    """
    wanted = load(arguments, arguments.requests)
    ttft_ms = arguments.ttft_ms or arguments.ttft_times * await idle_ttft_ms(arguments, wanted)
    objectives = [SLO(ttft_ms=ttft_ms), SLO(ttft_ms=LOOSE * ttft_ms)]
    requests = [as_request(arguments.model, entry, slo=objectives[number % 2]) for number, entry in enumerate(wanted)]
    rounds: dict[str, list[dict[float, float]]] = {name: [] for name in arguments.scheduling}
    for _ in range(arguments.rounds):
        for name in rounds:
            rounds[name].append({})
        for rate in arguments.rates:
            times = times_at(wanted, rate, arguments)
            last = {name: [1.0, 1.0, *of_name[-1].values()][-2:] for name, of_name in rounds.items()}
            left = [name for name, shares in last.items() if max(shares) >= GIVEN_UP]
            with locked(arguments.lock if left else None, fcntl.LOCK_EX):
                for name in left:
                    share = rounds[name][-1][rate] = await attainment(arguments, name, requests, times)
                    print(f"{rate:g} a second, {name}: {share:.3f} of the objectives are met", flush=True)
    found = {name: [highest_rate(shares) for shares in of_name] for name, of_name in rounds.items()}
    base = found[arguments.scheduling[0]]
    return [
        {
            "scheduling": name,
            "tight_ms": ttft_ms,
            "goodput_per_s": highest_rate(together(of_name)),
            "of_rounds": [round(rate, 1) for rate in found[name]],
            "to_first": statistics.median(map(_ratio, found[name], base)),
            **{f"met at {rate:g}/s": share for rate, share in together(of_name).items()},
        }
        for name, of_name in rounds.items()
    ]


async def idle_ttft_ms(arguments: argparse.Namespace, wanted: Sequence[LoadRequest]) -> float:
    """The time to the first token that nine of ten requests stay within if each has the engines to itself."""
    with locked(arguments.lock, fcntl.LOCK_EX):
        async with Fleet(arguments) as manager:
            requests = [as_request(arguments.model, entry) for entry in wanted[: arguments.idle_requests]]
            ttfts = sorted([(await ask(manager, request)).ttft_s for request in requests])
    return 1e3 * ttfts[int(ATTAINED * (len(ttfts) - 1))]


def _ratio(rate: float, base: float) -> float:
    return rate / base if base else float("nan")


def together(rounds: Sequence[dict[float, float]]) -> dict[float, float]:
    """The median share of the rounds, by rate; one that gave up before counts with its last share."""
    rates = sorted({rate for shares in rounds for rate in shares})
    return {rate: statistics.median(shares.get(rate, min(shares.values())) for shares in rounds) for rate in rates}


def highest_rate(shares: dict[float, float]) -> float:
    """The rate at which the share of objectives that are met falls below 90 %, between the rates that were tried.

    More load can't be better, so shares that rise with the rate are noise: neighbours out of order are averaged (Ayer
    and others, An empirical distribution function for sampling with incomplete information, 1955). Of a policy that
    always stays above, the highest rate tried; of one that never gets there, 0.
    """
    blocks: list[tuple[float, list[float]]] = []  # a share, and the rates that have it
    for rate in sorted(shares):
        share, rates = shares[rate], [rate]
        while blocks and blocks[-1][0] < share:
            other, others = blocks.pop()
            share = (share * len(rates) + other * len(others)) / (len(rates) + len(others))
            rates = others + rates
        blocks.append((share, rates))
    points = [(rate, share) for share, rates in blocks for rate in rates]
    for (rate, share), (higher, less) in itertools.pairwise(points):
        if share >= ATTAINED > less:
            return rate + (higher - rate) * (share - ATTAINED) / (share - less)
    return points[-1][0] if points[-1][1] >= ATTAINED else 0.0


async def attainment(
    arguments: argparse.Namespace, name: str, requests: Sequence[Request], times: Sequence[float]
) -> float:
    """The share of requests that meet their objective under a scheduling policy."""
    async with Fleet(arguments, scheduling_policy=name, routing_policy="marginal_cost") as manager:
        warm = [request.model_copy(update={"slo": None}) for request in requests[: 4 * arguments.engines]]
        await asyncio.gather(*(ask(manager, request) for request in warm))  # step times are learned
        await manager.reset_prefix_cache()
        seen = await replay(manager, requests, times)
    return sum(one.is_met for one in seen) / len(seen)


# ---- fairness -----------------------------------------------------------------------------------------


class Backlog:
    """Two tenants that always have requests waiting, and the service that each has got."""

    def __init__(self, arguments: argparse.Namespace, manager: ControlPlaneManager) -> None:
        self._arguments = arguments
        self._manager = manager
        self._end = time.monotonic() + arguments.seconds
        self.service = {"flood": 0, "normal": 0}
        self.largest_gap = 0

    async def run(self, num_users: dict[str, int]) -> None:
        """Until the time is over: so many users a tenant, each with one request at a time."""
        counted = itertools.count()
        users = [self._user(tenant, next(counted)) for tenant, count in num_users.items() for _ in range(count)]
        await asyncio.gather(*users)

    async def _user(self, tenant: str, number: int) -> None:
        arguments = self._arguments
        for turn in itertools.count():
            if time.monotonic() > self._end:
                return
            first = number * 7919 + turn * 104_729
            prompt = [64 + (first + place) % 4000 for place in range(arguments.input_len)]
            request = as_request(arguments.model, LoadRequest(prompt, arguments.output_len), tenant=tenant)
            async for event in self._manager.stream_request(request):
                if event.event == "start":
                    self._serve(tenant, INPUT_WEIGHT * event.prompt_tokens)
                elif event.event == "delta":
                    self._serve(tenant, OUTPUT_WEIGHT * len(event.chunk_tokens))

    def _serve(self, tenant: str, amount: int) -> None:
        self.service[tenant] += amount
        if time.monotonic() < self._end:  # then both still have requests waiting
            self.largest_gap = max(self.largest_gap, abs(self.service["flood"] - self.service["normal"]))


async def compare_fairness(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest gap of service between a flooding tenant and one that always has a few requests waiting."""
    rows = []
    places = arguments.places * arguments.engines
    running = places * (arguments.input_len + arguments.output_len)
    bound = 2 * max(INPUT_WEIGHT * arguments.input_len, OUTPUT_WEIGHT * running)
    for name in arguments.scheduling:
        async with Fleet(arguments, scheduling_policy=name, routing_policy="least_loaded") as manager:
            backlog = Backlog(arguments, manager)
            # Twice as many requests as there are places: some always wait.
            await backlog.run({"normal": 2 * places, "flood": 20 * places})
        gap = backlog.largest_gap
        rows.append({"scheduling": name, **backlog.service, "largest_gap": gap, "bound": bound, "within": gap <= bound})
    return rows


# ---- the command --------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return text.split(",")


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Read the flags, run the experiment, show its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("routing", "slo", "fair"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--quantization")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--places", type=int, default=8, help="requests that an engine runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of an engine")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1 / 32, help="of the trace's lengths")
    parser.add_argument("--rate", type=float, help="requests a second on average; the trace's own without it")
    parser.add_argument(
        "--recorded", action="store_true", help="with a rate: the trace's times, sped up, not random ones"
    )
    parser.add_argument("--rates", type=numbers, default=[1, 2, 3, 4, 6, 8], help="slo: rates to try, ascending")
    parser.add_argument("--ttft-ms", type=float, help="slo: the tight objective; the other: 10 times")
    parser.add_argument(
        "--ttft-times", type=float, default=3.0, help="slo: without it, so many times what idle engines take"
    )
    parser.add_argument("--idle-requests", type=int, default=100, help="slo: requests that tell what those take")
    parser.add_argument("--seconds", type=float, default=30, help="fair: how long")
    parser.add_argument("--input-len", type=int, default=64, help="fair: tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=32, help="fair: tokens of an answer")
    parser.add_argument("--routing", type=names, default=["round_robin", "least_loaded", "marginal_cost"])
    parser.add_argument("--scheduling", type=names)
    parser.add_argument(
        "--rounds", type=int, default=1, help="routing, slo: runs of each policy, in turn; medians count"
    )
    parser.add_argument("--lock", type=Path, help="slo: file to lock while policies run at one rate (shared machines)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.trace is None and arguments.experiment != "fair":
        parser.error("--trace is needed: a file of recorded requests")
    arguments.scheduling = arguments.scheduling or ["fifo", "slo_aware" if arguments.experiment == "slo" else "fair"]
    experiments = {"routing": compare_routing, "slo": compare_goodput, "fair": compare_fairness}
    rows = asyncio.run(experiments[arguments.experiment](arguments))
    policy, *figures = dict.fromkeys(name for row in rows for name in row)
    table = Table(policy, *(str(row[policy]) for row in rows))
    for name in figures:
        table.add_row(name.replace("_", " "), *(_text(row.get(name)) for row in rows))
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, indent=2, default=str))


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
