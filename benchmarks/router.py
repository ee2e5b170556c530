"""What a routing decision costs, without any engine: `python benchmarks/router.py`.

A fleet of 1,000 engines with some load, an index of 1,000,000 cached blocks, prompts of 64 blocks that share a part
with what is cached. Prints microseconds of a decision (choose, book, book out) by policy, with the hashing of the
prompt's tokens and without, decisions a second, and bytes of memory a block. On a shared machine percentiles are the
neighbours', too: beside them stand those of a loop that does nothing, and the 99th percentile over the prompts of each
one's best of several passes, which is what the slowest kind of prompt costs. `docs/routing.md` quotes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil
from numpy.typing import NDArray

from sagellm_control_plane.fleet import Booking, Fleet
from sagellm_control_plane.prompts import BlockNames
from sagellm_control_plane.routing import RoutedRequest, RoutingContext, get_router, list_routers
from sagellm_control_plane.text_index import text_keys
from sagellm_kv_cache.events import BlockStored, EventBatch
from sagellm_kv_cache.hashing import extend_block_hashes, root_hash

BLOCK_SIZE = 16
SHARED_BLOCKS = 8  # of a system prompt, cached on many engines
NUM_SYSTEMS = 32
NUM_PASSES = 5


@dataclass(frozen=True)
class Setup:
    """The state that decisions are made in."""

    fleet: Fleet
    context: RoutingContext
    num_own: dict[int, int]  # conversations that only one engine has, by row


@dataclass(frozen=True)
class Asked:
    """A request, and the tokens that its blocks are named after."""

    routed: RoutedRequest
    token_ids: list[int]

    def fresh(self, *, is_named: bool) -> RoutedRequest:
        """As it comes to the router, with its blocks named just now or not yet."""
        names: Sequence[bytes] = BlockNames(self.token_ids, BLOCK_SIZE, root_hash())
        return replace(self.routed, block_hashes=tuple(names) if is_named else names)


def tokens(num_blocks: int, *key: int) -> list[int]:
    """The same ones for the same key."""
    made: list[int] = np.random.default_rng(key).integers(0, 150_000, num_blocks * BLOCK_SIZE).tolist()
    return made


def build(num_engines: int, num_blocks: int, prompt_blocks: int, rng: random.Random) -> tuple[Setup, dict[str, float]]:
    """Fill fleet and index; what that cost."""
    fleet, context = Fleet(), RoutingContext()
    systems = [
        list(BlockNames(tokens(SHARED_BLOCKS, number), BLOCK_SIZE, root_hash())) for number in range(NUM_SYSTEMS)
    ]
    batches: list[EventBatch] = []
    num_own: dict[int, int] = {}
    for number in range(num_engines):
        row = fleet.add(f"engine-{number}", capacity=256, max_num_batched_tokens=8192, group=f"zone/{number % 16}")
        for _ in range(rng.randrange(24)):
            booking = Booking(rng.randrange(1, 4000))
            fleet.grant(row, booking)
            if rng.random() < 0.9:
                fleet.advance(booking, rng.randrange(1, 300))
        held = [block for system in rng.sample(systems, 8) for block in system]
        num_left = num_blocks // num_engines - len(held)
        num_own[row] = num_left // prompt_blocks
        for start in range(0, num_left, prompt_blocks):  # the last one is cached in part
            names = BlockNames(tokens(prompt_blocks, row, start // prompt_blocks), BLOCK_SIZE, root_hash())
            held += names[: num_left - start]
        batches.append(EventBatch(0, (BlockStored(tuple(held), bytes(32), (), BLOCK_SIZE),)))
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
    return Setup(fleet, context, num_own), figures


def prompts(setup: Setup, num_blocks: int, count: int, rng: random.Random) -> Iterator[Asked]:
    """A third knows nobody, a third shares a system prompt with many engines, a third a long context with one."""
    for number in range(count):
        kind = number % 3
        if kind == 0:
            token_ids = tokens(num_blocks, 0, 0, number)
        elif kind == 1:
            shared = tokens(SHARED_BLOCKS, rng.randrange(NUM_SYSTEMS))
            token_ids = shared + tokens(num_blocks - SHARED_BLOCKS, 0, 0, number)
        else:
            row = rng.randrange(len(setup.num_own))
            token_ids = tokens(num_blocks, row, rng.randrange(setup.num_own[row]))
        routed = RoutedRequest(
            str(number), "model", len(token_ids) + 5, 200, session_id=str(number % 97), block_size=BLOCK_SIZE
        )
        yield Asked(routed, token_ids)


def time_each(
    call: Callable[[RoutedRequest], object], asked: list[Asked], clock: Callable[[], int], *, is_named: bool = True
) -> NDArray[np.float64]:
    """Microseconds of each call."""
    times = []
    for each in asked:
        request = each.fresh(is_named=is_named)
        started_at = clock()
        call(request)
        times.append(clock() - started_at)
    return np.array(times) / 1e3


def measure(name: str, setup: Setup, asked: list[Asked]) -> dict[str, float]:
    """One policy: every decision is booked, and booked out again, so that the load stays what it is."""
    router, fleet, rows = get_router(name)(setup.context), setup.fleet, setup.fleet.rows()

    def decide(request: RoutedRequest) -> None:
        choice = router.choose(request, rows, fleet, 0.0)
        booking = Booking(request.num_prompt_tokens, choice.num_cached_tokens)
        fleet.grant(choice.row, booking)
        router.on_granted(request, choice.row)
        router.on_ended(request, choice.row)
        fleet.end(booking)

    time_each(decide, asked[:200], time.perf_counter_ns)
    times = np.array([time_each(decide, asked, time.perf_counter_ns) for _ in range(NUM_PASSES)])
    # What else runs on the machine is in the former, not in the latter, and even less in the best of the passes.
    cpu_times = time_each(decide, asked, time.thread_time_ns)
    naming_times = time_each(decide, asked, time.thread_time_ns, is_named=False)
    return {
        "mean_us": float(times.mean()),
        "p50_us": float(np.quantile(times, 0.5)),
        "p99_us": float(np.quantile(times, 0.99)),
        "best_p99_us": float(np.quantile(times.min(axis=0), 0.99)),
        "cpu_mean_us": float(cpu_times.mean()),
        "decisions_per_s": 1e6 / float(cpu_times.mean()),
        "decisions_with_naming_per_s": 1e6 / float(naming_times.mean()),
    }


def measure_machine(busy_us: float) -> dict[str, float]:
    """The same percentiles of a loop that always does the same and touches no memory: what the machine adds."""

    def spin(count: int) -> int:
        started_at = time.thread_time_ns()
        for _ in range(count):
            pass
        return time.thread_time_ns() - started_at

    count = int(busy_us * 1e3 * 100_000 / spin(100_000))
    times = np.array([spin(count) for _ in range(5000)]) / 1e3
    return {"p50_us": float(np.quantile(times, 0.5)), "p99_us": float(np.quantile(times, 0.99))}


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
    parser.add_argument("--router", action="append", choices=list_routers(), help="several times; default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rng = random.Random(0)
    setup, index = build(options.engines, options.blocks, options.prompt_blocks, rng)
    asked = list(prompts(setup, options.prompt_blocks, options.decisions, rng))
    hashing = measure_hashing(options.prompt_blocks, rng)
    results = {
        name: measure(name, setup, asked) for name in options.router or sorted(set(list_routers()) - {"adaptive"})
    }
    machine = measure_machine(50.0)
    if options.json:
        print(json.dumps({"index": index, "hashing": hashing, "machine": machine, "routers": results}, indent=2))
        return
    print(
        f"{options.engines} engines, {index['num_held']:,.0f} cached blocks ({index['num_distinct']:,.0f} distinct): "
        f"{index['bytes_per_block']:.0f} bytes a block, {index['us_per_event_block']:.2f} us to learn one"
    )
    print(
        f"naming all of a prompt of {options.prompt_blocks} blocks: {hashing['tokens_us']:.0f} us by tokens, "
        f"{hashing['text_us']:.0f} us by text; an empty loop takes {machine['p50_us']:.0f} us (p50) and "
        f"{machine['p99_us']:.0f} us (p99)"
    )
    print(f"{'':<16}{'us mean':>9}{'p50':>8}{'p99':>8}{'best':>8}{'CPU mean':>10}{'a second':>11}{'with naming':>14}")
    for name, row in results.items():
        print(
            f"{name:<16}{row['mean_us']:9.1f}{row['p50_us']:8.1f}{row['p99_us']:8.1f}{row['best_p99_us']:8.1f}"
            f"{row['cpu_mean_us']:10.1f}{row['decisions_per_s']:11,.0f}{row['decisions_with_naming_per_s']:14,.0f}"
        )


if __name__ == "__main__":
    main()
