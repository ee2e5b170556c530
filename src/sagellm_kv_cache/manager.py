"""`KVCacheManager`: which blocks a request has, and what it can take over from others.

A request's life here, driven by the scheduler:

    blocks, n = manager.find_cached_prefix(request)           # admission: n tokens need not be computed
    manager.allocate_slots(request, num_new_tokens, blocks)   # before each step: slots for its tokens, or False
    manager.cache_full_blocks(request)                        # after each step: others may share what is full now
    manager.free(request)                                     # finished, aborted or preempted

Rules that hold throughout: a request's block table only grows until it is freed; only full blocks are shared and
full blocks are never written, so every slot that a step writes belongs to one request alone; content outlives its
request until the space is needed, so a preempted request finds its own blocks again.

One thread calls all methods (the step loop); none of them knows tensors or devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from sagellm_kv_cache.block import Block
from sagellm_kv_cache.block_pool import BlockPool
from sagellm_kv_cache.events import CacheDigest, EventBatch, EventQueue
from sagellm_kv_cache.eviction import EvictionPolicy, create_eviction_policy
from sagellm_kv_cache.hashing import TOKEN_BYTES, encode_tokens, extend_block_hashes, root_hash
from sagellm_kv_cache.prefix_cache import PrefixCache
from sagellm_kv_cache.stats import KVCacheStats
from sagellm_protocol import InternalError, InvalidArgumentError


class CacheRequest(Protocol):
    """What the manager reads of a request. It changes the two lists in place and nothing else."""

    @property
    def request_id(self) -> str:
        """For messages."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and output so far; only ever appended to."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens from the start whose keys and values are in the request's blocks."""

    @property
    def blocks(self) -> list[Block]:
        """The block table; the manager's, append-only until `free`. Empty at first."""

    @property
    def block_hashes(self) -> list[bytes]:
        """The hash chain over `token_ids`, extended when needed and kept after `free`. Empty at first."""

    @property
    def cache_salt(self) -> str | None:
        """Requests share blocks only under equal salts."""

    @property
    def lora_id(self) -> str | None:
        """The adapter that keys and values were computed with."""

    @property
    def read_prefix_cache(self) -> bool:
        """False: compute everything, as when each prompt token's own output is wanted."""


class KVCacheManager:
    """Block tables, prefix hits and eviction of one engine's KV cache of `num_blocks * block_size` tokens.

    `eviction_policy` is a name of `EVICTION_POLICIES` or an object of one's own. `event_capacity` bounds the queue
    behind `take_events`, in blocks spoken of; 0 records no events. `clock` gives seconds and times evictions.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        eviction_policy: str | EvictionPolicy = "lru",
        event_capacity: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value, least in (("num_blocks", num_blocks, 1), ("block_size", block_size, 1)):
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, got {value}", field=name)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        policy = create_eviction_policy(eviction_policy) if isinstance(eviction_policy, str) else eviction_policy
        self._prefix_cache = PrefixCache(block_size, EventQueue(event_capacity))
        self._pool = BlockPool(num_blocks, self._prefix_cache, policy, clock)
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0

    # ---- figures --------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, those kept for the prefix cache included."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks held by requests, 0 to 1."""
        return self._pool.num_used / self.num_blocks

    @property
    def evict_count(self) -> int:
        """Blocks whose content was given up so far."""
        return self._pool.evict_count

    @property
    def evict_ms(self) -> float:
        """Time spent on that, in milliseconds."""
        return self._pool.evict_seconds * 1e3

    def stats(self) -> KVCacheStats:
        """All figures at this moment."""
        return KVCacheStats(
            num_blocks=self.num_blocks,
            num_used_blocks=self._pool.num_used,
            num_cached_blocks=len(self._prefix_cache),
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            evict_count=self.evict_count,
            evict_ms=self.evict_ms,
        )

    # ---- a request's life -----------------------------------------------------------------------------

    def find_cached_prefix(self, request: CacheRequest) -> tuple[list[Block], int]:
        """The cached blocks that the request can start from, and how many tokens they hold.

        Never all of its tokens: the last one must be computed, for its output is the next token. Changes nothing but
        `request.block_hashes`; the blocks are the request's only once `allocate_slots` was given them, which must
        come before any other allocation.
        """
        if not (self.enable_prefix_caching and request.read_prefix_cache):
            return [], 0
        token_ids = request.token_ids
        num_blocks = (len(token_ids) - 1) // self.block_size
        if num_blocks <= 0:
            return [], 0
        root = root_hash(request.cache_salt, request.lora_id)
        extend_block_hashes(request.block_hashes, token_ids, self.block_size, num_blocks, root)
        blocks = self._prefix_cache.match(root, request.block_hashes[:num_blocks], token_ids)
        return blocks, len(blocks) * self.block_size

    def find_cached_blocks(self, request: CacheRequest) -> list[Block]:
        """All full blocks of the request's tokens that are cached, from the start to the first miss.

        For carrying content in and out: it covers the last token too and asks nothing about `read_prefix_cache`.
        Changes nothing but `request.block_hashes`.
        """
        num_blocks = len(request.token_ids) // self.block_size
        root = root_hash(request.cache_salt, request.lora_id)
        extend_block_hashes(request.block_hashes, request.token_ids, self.block_size, num_blocks, root)
        return self._prefix_cache.match(root, request.block_hashes[:num_blocks], request.token_ids)

    def allocate_slots(
        self,
        request: CacheRequest,
        num_new_tokens: int,
        cached_blocks: Sequence[Block] = (),
        num_lookahead_tokens: int = 0,
    ) -> bool:
        """Give the request slots for its next `num_new_tokens` (and room for drafts), or change nothing: False.

        `cached_blocks` are what `find_cached_prefix` found, at admission only; whether `num_computed_tokens` counts
        them already makes no difference.
        """
        assert num_new_tokens >= 0, num_new_tokens
        assert num_lookahead_tokens >= 0, num_lookahead_tokens
        blocks = request.blocks
        num_computed = max(request.num_computed_tokens, len(cached_blocks) * self.block_size)
        num_tokens = num_computed + num_new_tokens + num_lookahead_tokens
        num_missing = max(0, -(-num_tokens // self.block_size) - len(blocks) - len(cached_blocks))
        # Hits that nobody holds stand among the free blocks, but taking them does not make room for others.
        num_idle_hits = sum(block.ref_count == 0 for block in cached_blocks)
        if num_missing + num_idle_hits > self._pool.num_free:
            return False
        if not blocks:
            self._admit(request, cached_blocks)
        elif cached_blocks:
            raise InternalError(f"{request.request_id} has blocks already; cached blocks are taken at admission only")
        if num_missing:
            blocks.extend(self._pool.allocate(num_missing))
        return True

    def cache_full_blocks(self, request: CacheRequest) -> None:
        """Make what `num_computed_tokens` says is computed available to others; cheap where no block became full."""
        if not self.enable_prefix_caching:
            return
        blocks = request.blocks
        num_computed = min(request.num_computed_tokens, len(request.token_ids))
        num_full = min(num_computed // self.block_size, len(blocks))
        if num_full == 0 or blocks[num_full - 1].is_full:
            return
        first = num_full - 1
        while first > 0 and not blocks[first - 1].is_full:
            first -= 1
        self._seal(request, first, num_full)
        self._prefix_cache.store(blocks[first:num_full])

    def free(self, request: CacheRequest, *, retention: int = 0) -> None:
        """Give all blocks back, the last first; a request without blocks is left alone.

        What is cached stays so until the space is needed. `retention` tells the policy "priority" how long: higher
        stays longer.
        """
        blocks = request.blocks
        full = [block for block in blocks if block.is_full]
        self._prefix_cache.store(full)  # a duplicate takes over where the block that it equals was evicted
        sequence_tokens = len(blocks) * self.block_size
        for block in full:
            block.retention = max(block.retention, retention)
            block.sequence_tokens = max(block.sequence_tokens, sequence_tokens)
        self._pool.free(reversed(blocks))
        blocks.clear()

    # ---- the cache as a whole -------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content, as after a change of weights. False, and nothing done, while a request holds
        blocks: preempt the running ones first."""
        if self._pool.num_used:
            return False
        self._pool.clear_cache()
        return True

    def record_events(self, capacity: int) -> None:
        """Record events from now on, for at most `capacity` blocks; 0: no more. Begin with `resync_events`."""
        self._prefix_cache.events.resize(capacity)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would find any."""
        return len(self._prefix_cache.events) > 0

    @property
    def cached_digest(self) -> CacheDigest:
        """The digest of all that is cached, with the events not taken yet."""
        return self._prefix_cache.digest

    def take_events(self) -> EventBatch:
        """What was stored and removed since the last call, oldest first; empty without `event_capacity`."""
        return self._prefix_cache.events.take()

    def resync_events(self) -> EventBatch:
        """The whole present content as events, in place of those not taken yet, for a reader that lost some."""
        return self._prefix_cache.resync_events()

    def check_integrity(self, requests: Iterable[CacheRequest] | None = None) -> None:
        """Raise InternalError unless all invariants hold; O(num_blocks).

        With `requests`, all that may hold blocks (none: the engine is idle), reference counts must match their block
        tables exactly and no table may name a block twice.
        """
        if requests is None:
            self._pool.check_integrity()
            return
        ref_counts = [0] * self.num_blocks
        for request in requests:
            ids = [block.block_id for block in request.blocks]
            if len(set(ids)) != len(ids):
                raise InternalError(f"the KV cache is inconsistent: {request.request_id} holds a block twice: {ids}")
            if len(ids) * self.block_size < request.num_computed_tokens:
                raise InternalError(
                    f"the KV cache is inconsistent: {request.request_id} has computed {request.num_computed_tokens} "
                    f"tokens but holds {len(ids)} blocks of {self.block_size}"
                )
            for block_id in ids:
                ref_counts[block_id] += 1
        self._pool.check_integrity(ref_counts)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _admit(self, request: CacheRequest, cached_blocks: Sequence[Block]) -> None:
        """Take the hits over; refuses blocks that changed their content since they were found."""
        if any(
            block.block_hash != expected
            for block, expected in zip(cached_blocks, request.block_hashes[: len(cached_blocks)], strict=True)
        ):
            raise InternalError(f"cached blocks of {request.request_id} were evicted between lookup and allocation")
        self._pool.touch(cached_blocks)
        request.blocks.extend(cached_blocks)
        if self.enable_prefix_caching and request.read_prefix_cache:
            self._prefix_query_tokens += len(request.token_ids)
            self._prefix_hit_tokens += len(cached_blocks) * self.block_size

    def _seal(self, request: CacheRequest, first: int, end: int) -> None:
        """Write hash and tokens into the request's blocks `first` to `end`, whose slots are all computed."""
        root = root_hash(request.cache_salt, request.lora_id)
        hashes = request.block_hashes
        extend_block_hashes(hashes, request.token_ids, self.block_size, end, root)
        data = encode_tokens(request.token_ids[first * self.block_size : end * self.block_size])
        width = self.block_size * TOKEN_BYTES
        parent = hashes[first - 1] if first else root
        for index in range(first, end):
            start = (index - first) * width
            request.blocks[index].fill(hashes[index], parent, data[start : start + width])
            parent = hashes[index]
