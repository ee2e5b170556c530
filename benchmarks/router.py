"""What a routing decision costs, without any engine: `python benchmarks/router.py`.

A fleet of 1,000 engines with some load, an index of 1,000,000 cached blocks, prompts of 64 blocks that share a part
with what is cached. Prints microseconds of a decision (choose, book, book out) by policy, with the hashing of the
prompt's tokens and without, decisions a second, and bytes of memory a block. `docs/routing.md` quotes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import psutil
from numpy.typing import NDArray

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.routing import ROUTERS, RoutedRequest, RoutingContext, get_router
from sagellm_control_plane.text_index import text_keys
from sagellm_kv_cache.events import BlockStored, EventBatch
from sagellm_kv_cache.hashing import extend_block_hashes, root_hash

BLOCK_SIZE = 16
SHARED_BLOCKS = 8  # of a system prompt, cached on many engines
NUM_SYSTEMS = 32


@dataclass(frozen=True)
class Setup:
    """The state that decisions are made in."""

    fleet: Fleet
    context: RoutingContext
    systems: list[list[bytes]]
    own: dict[int, list[bytes]]  # blocks that only one engine has, by row


def build(num_engines: int, num_blocks: int, rng: random.Random) -> tuple[Setup, dict[str, float]]:
    """Fill fleet and index; what that cost."""
    fleet, context = Fleet(), RoutingContext()
    systems = [[rng.randbytes(32) for _ in range(SHARED_BLOCKS)] for _ in range(NUM_SYSTEMS)]
    batches: list[EventBatch] = []
    own: dict[int, list[bytes]] = {}
    for number in range(num_engines):
        row = fleet.add(f"engine-{number}", capacity=256, max_num_batched_tokens=8192, group=f"zone/{number % 16}")
        for _ in range(rng.randrange(24)):
            booking = Booking(rng.randrange(1, 4000))
            fleet.grant(row, booking)
            if rng.random() < 0.9:
                fleet.advance(booking, rng.randrange(1, 300))
        held = [block for system in rng.sample(systems, 8) for block in system]
        own[row] = [rng.randbytes(32) for _ in range(num_blocks // num_engines - len(held))]
        batches.append(EventBatch(0, (BlockStored((*held, *own[row]), bytes(32), (), BLOCK_SIZE),)))
    gc.collect()
    before, started_at = psutil.Process().memory_info().rss, time.perf_counter()
    for row, batch in enumerate(batches):
        context.prefixes.apply(row, "epoch", batch)
    seconds = time.perf_counter() - started_at
    gc.collect()
    used = psutil.Process().memory_info().rss - before
    figures = {
        "num_held": context.prefixes.num_held,
        "num_distinct": len(context.prefixes),
        "bytes_per_block": used / context.prefixes.num_held,
        "us_per_event_block": seconds / context.prefixes.num_held * 1e6,
    }
    return Setup(fleet, context, systems, own), figures


def prompts(setup: Setup, num_blocks: int, count: int, rng: random.Random) -> Iterator[RoutedRequest]:
    """A third knows nobody, a third shares a system prompt with many engines, a third a long context with one."""
    for number in range(count):
        kind = number % 3
        if kind == 0:
            hashes = [rng.randbytes(32) for _ in range(num_blocks)]
        elif kind == 1:
            shared = rng.choice(setup.systems)
            hashes = [*shared, *(rng.randbytes(32) for _ in range(num_blocks - len(shared)))]
        else:
            own = setup.own[rng.randrange(len(setup.own))]
            first = rng.randrange(len(own) - num_blocks)
            hashes = own[first : first + num_blocks]
        yield RoutedRequest(
            str(number),
            "model",
            num_blocks * BLOCK_SIZE + 5,
            200,
            tuple(hashes),
            session_id=str(number % 97),
            block_size=BLOCK_SIZE,
        )


def time_each(
    call: Callable[[RoutedRequest], object], requests: list[RoutedRequest], clock: Callable[[], int]
) -> NDArray[np.float64]:
    """Microseconds of each call. The hashes of a prompt have just been made, as they are when it is routed."""
    times = []
    for request in requests:
        request = replace(request, block_hashes=tuple(bytes(bytearray(each)) for each in request.block_hashes))
        started_at = clock()
        call(request)
        times.append(clock() - started_at)
    return np.array(times) / 1e3


def measure(name: str, setup: Setup, requests: list[RoutedRequest]) -> dict[str, float]:
    """One policy: every decision is booked, and booked out again, so that the load stays what it is."""
    router, fleet, rows = get_router(name)(setup.context), setup.fleet, setup.fleet.rows()

    def decide(request: RoutedRequest) -> None:
        choice = router.choose(request, rows, fleet, 0.0)
        booking = Booking(request.num_prompt_tokens, choice.num_cached_tokens)
        fleet.grant(choice.row, booking)
        router.on_granted(request, choice.row)
        router.on_ended(request, choice.row)
        fleet.end(booking)

    time_each(decide, requests[:200], time.perf_counter_ns)
    times = time_each(decide, requests, time.perf_counter_ns)
    # What else runs on the machine is in the former, not in the latter.
    cpu_times = time_each(decide, requests, time.thread_time_ns)
    return {
        "mean_us": float(times.mean()),
        "p50_us": float(np.quantile(times, 0.5)),
        "p99_us": float(np.quantile(times, 0.99)),
        "cpu_mean_us": float(cpu_times.mean()),
        "cpu_p99_us": float(np.quantile(cpu_times, 0.99)),
        "decisions_per_s": 1e6 / float(cpu_times.mean()),
    }


def measure_hashing(num_blocks: int, rng: random.Random) -> dict[str, float]:
    """What comes before a decision: naming the blocks of a prompt, by its tokens or by its text."""
    root, size = root_hash(), num_blocks * BLOCK_SIZE
    token_ids = [rng.randrange(150_000) for _ in range(size)]
    text = "".join(rng.choice("abcdefgh ") for _ in range(4 * size))

    def by_tokens() -> None:
        extend_block_hashes([], token_ids, BLOCK_SIZE, num_blocks, root)

    figures = {}
    for name, call in (("tokens_us", by_tokens), ("text_us", lambda: text_keys(text))):
        times = []
        for _ in range(2000):
            started_at = time.thread_time_ns()
            call()
            times.append(time.thread_time_ns() - started_at)
        figures[name] = float(np.median(times)) / 1e3
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="cached, over all engines")
    parser.add_argument("--prompt-blocks", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=6000)
    parser.add_argument("--router", action="append", choices=sorted(ROUTERS), help="several times; default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rng = random.Random(0)
    setup, index = build(options.engines, options.blocks, rng)
    requests = list(prompts(setup, options.prompt_blocks, options.decisions, rng))
    hashing = measure_hashing(options.prompt_blocks, rng)
    results = {name: measure(name, setup, requests) for name in options.router or sorted(set(ROUTERS) - {"adaptive"})}
    if options.json:
        print(json.dumps({"index": index, "hashing": hashing, "routers": results}, indent=2))
        return
    print(
        f"{options.engines} engines, {index['num_held']:,.0f} cached blocks ({index['num_distinct']:,.0f} distinct): "
        f"{index['bytes_per_block']:.0f} bytes a block, {index['us_per_event_block']:.2f} us to learn one"
    )
    print(
        f"naming a prompt of {options.prompt_blocks} blocks: {hashing['tokens_us']:.0f} us by tokens, "
        f"{hashing['text_us']:.0f} us by text"
    )
    print(f"{'':<16}{'us mean':>9}{'p50':>8}{'p99':>8}{'CPU mean':>10}{'p99':>8}{'a second':>11}{'with hashing':>14}")
    for name, row in results.items():
        hashed = 1e6 / (row["cpu_mean_us"] + hashing["tokens_us"])
        print(
            f"{name:<16}{row['mean_us']:9.1f}{row['p50_us']:8.1f}{row['p99_us']:8.1f}"
            f"{row['cpu_mean_us']:10.1f}{row['cpu_p99_us']:8.1f}{row['decisions_per_s']:11,.0f}{hashed:14,.0f}"
        )


if __name__ == "__main__":
    main()
