"""What the KV cache's bookkeeping costs, without any model: `python benchmarks/kv_cache_micro.py`.

Prints one line a case: the median and the best of several rounds, in microseconds. `docs/kv-cache.md` quotes them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sagellm_kv_cache import EVICTION_POLICIES, Block, BlockTables, KVCacheManager

BLOCK_SIZE = 16


@dataclass(eq=False)
class BenchRequest:
    """A request as the manager sees it."""

    token_ids: list[int]
    request_id: str = "req-bench"
    num_computed_tokens: int = 0
    blocks: list[Block] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    cache_salt: str | None = None
    lora_id: str | None = None
    read_prefix_cache: bool = True


def measure(run: Callable[[], object], *, setup: Callable[[], object] = lambda: None, rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls of `run`, `setup` before each not counted."""
    seconds = []
    for _ in range(rounds):
        setup()
        started_at = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_at)
    return seconds


def report(name: str, seconds: list[float], *, per: int = 1, unit: str = "call") -> None:
    """One line: what an item costs when a call handles `per` of them."""
    median, best = statistics.median(seconds) / per * 1e6, min(seconds) / per * 1e6
    print(f"{name:<58} {median:9.2f} us/{unit:<6} (best {best:.2f})")


def bench_prefix(num_tokens: int, rounds: int) -> None:
    """A long prompt: hashed at first sight, looked up again, registered, freed and taken over."""
    num_blocks = num_tokens // BLOCK_SIZE
    manager = KVCacheManager(num_blocks + 8, BLOCK_SIZE)
    token_ids = [random.randrange(150_000) for _ in range(num_tokens)]
    request = BenchRequest(token_ids)
    cold = measure(
        lambda: manager.find_cached_prefix(request), setup=lambda: request.block_hashes.clear(), rounds=rounds
    )
    report(f"find_cached_prefix, {num_tokens} tokens, first sight, miss", cold, per=num_blocks, unit="block")

    def compute() -> None:
        manager.reset_prefix_cache()
        assert manager.allocate_slots(request, num_tokens)
        request.num_computed_tokens = num_tokens

    def release() -> None:
        manager.free(request)
        request.num_computed_tokens = 0

    seconds = []
    for _ in range(rounds):
        compute()
        seconds += measure(lambda: manager.cache_full_blocks(request), rounds=1)
        release()
    report("cache_full_blocks, all at once, hashes known", seconds, per=num_blocks, unit="block")
    seconds = measure(lambda: manager.find_cached_prefix(request), rounds=rounds)
    report("find_cached_prefix, hashes known, full hit", seconds, per=num_blocks, unit="block")
    found = manager.find_cached_prefix(request)[0]
    seconds = []
    for _ in range(rounds):
        seconds += measure(lambda: manager.allocate_slots(request, BLOCK_SIZE, found), rounds=1)
        release()
    report("allocate_slots, taking the hits over", seconds, per=num_blocks, unit="block")
    seconds = []
    for _ in range(rounds):
        manager.allocate_slots(request, BLOCK_SIZE, found)
        seconds += measure(release, rounds=1)
    report("free", seconds, per=num_blocks, unit="block")


def bench_decode(rounds: int) -> None:
    """The part of every decode step of one request where no block becomes full."""
    manager = KVCacheManager(256, BLOCK_SIZE)
    request = BenchRequest(list(range(1000)))
    manager.allocate_slots(request, 1000)
    request.num_computed_tokens = 1000
    manager.cache_full_blocks(request)
    request.token_ids.append(1)

    def step() -> None:
        for _ in range(100):
            manager.allocate_slots(request, 1)
            manager.cache_full_blocks(request)

    report("allocate_slots + cache_full_blocks, one decode", measure(step, rounds=rounds), per=100, unit="token")


def bench_eviction(rounds: int) -> None:
    """A full pool of cached blocks: each new request of 64 blocks evicts 64."""
    for policy in EVICTION_POLICIES:
        manager = KVCacheManager(16_384, BLOCK_SIZE, eviction_policy=policy)
        for index in range(256 + rounds):
            request = BenchRequest([index, *range(64 * BLOCK_SIZE - 1)])
            manager.allocate_slots(request, 64 * BLOCK_SIZE)
            request.num_computed_tokens = 64 * BLOCK_SIZE
            manager.cache_full_blocks(request)
            manager.free(request)
        stats = manager.stats()
        print(f"{'eviction, ' + policy:<58} {stats.evict_ms * 1e3 / stats.evict_count:9.2f} us/block")


def bench_tables(rounds: int) -> None:
    """The arrays of a step from persistent tables: decodes only, and a mixed step."""
    for num_requests, context in ((8, 2048), (64, 2048), (256, 2048)):
        tables, rows = filled_tables(num_requests, context)
        starts, counts = np.full(num_requests, context - 1), np.ones(num_requests, dtype=np.int64)
        width = context // BLOCK_SIZE
        name = f"{num_requests} decodes of {context} tokens"
        slots = partial(tables.slots_batch, rows, starts, counts)
        report(f"slots_batch, {name}", measure(slots, rounds=rounds))
        report(f"rows, {name}", measure(partial(tables.rows, rows, width), rounds=rounds))
    tables, rows = filled_tables(64, 4096)
    counts = np.array([1] * 63 + [2048])
    starts = np.array([4095] * 63 + [1024])
    report(
        "slots_batch, 63 decodes and a chunk of 2048",
        measure(lambda: tables.slots_batch(rows, starts, counts), rounds=rounds),
    )


def filled_tables(num_requests: int, context: int) -> tuple[BlockTables, NDArray[np.int64]]:
    """Tables in which every request has blocks for `context` tokens."""
    width = context // BLOCK_SIZE
    tables = BlockTables(num_requests, width, BLOCK_SIZE)
    rows = [tables.add_row() for _ in range(num_requests)]
    for row in rows:
        tables.append(row, range(row * width, (row + 1) * width))
    return tables, np.array(rows)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description="Cost of the KV cache's bookkeeping.")
    parser.add_argument("--tokens", type=int, default=32_768, help="length of the long prompt")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    random.seed(0)
    bench_prefix(args.tokens, args.rounds)
    bench_decode(args.rounds)
    bench_eviction(args.rounds)
    bench_tables(args.rounds * 20)


if __name__ == "__main__":
    main()
