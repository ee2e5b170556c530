"""The manager under arbitrary use, against a KV store that is a dict from slot to what was computed there.

The value of a slot is the namespace and all tokens up to its own: exactly what keys and values depend on. So reading
a request's context back through its block table shows at once if a block was shared wrongly, written while shared,
handed out twice or reused too early.
"""

from __future__ import annotations

import functools
import operator
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_requests import FakeRequest
from sagellm_kv_cache import (
    EVICTION_POLICIES,
    AllBlocksCleared,
    Block,
    BlockRemoved,
    BlockStored,
    BlockTables,
    CacheDigest,
    EventBatch,
    KVCacheManager,
    digest_of,
    root_hash,
)

MAX_REQUESTS = 5
MAX_TOKENS = 30
picks = st.integers(0, MAX_REQUESTS - 1)
namespaces = st.sampled_from([None, None, None, "x"])
tokens = st.sampled_from([0, 0, 0, 1])  # mostly equal beginnings
token_lists = st.lists(tokens, min_size=1, max_size=16)
Value = tuple[str | None, str | None, tuple[int, ...]]


class KVCacheMachine(RuleBasedStateMachine):
    """Requests arrive, are computed in chunks, decode, are preempted, resubmitted and finished."""

    @initialize(
        num_blocks=st.integers(2, 10),
        block_size=st.sampled_from([1, 2, 3, 4]),
        policy=st.sampled_from(sorted(EVICTION_POLICIES)),
        event_capacity=st.sampled_from([2, 1000]),
        first=token_lists,
    )
    def start(self, num_blocks: int, block_size: int, policy: str, event_capacity: int, first: list[int]) -> None:
        self.manager = KVCacheManager(
            num_blocks, block_size, eviction_policy=policy, event_capacity=event_capacity, clock=lambda: 0.0
        )
        self.tables = BlockTables(MAX_REQUESTS, MAX_TOKENS, block_size)
        self.store: dict[int, Value] = {}
        self.requests: list[tuple[FakeRequest, int]] = []  # with their rows
        self.replica: set[bytes] = set()  # the index as told by events
        self.next_event = 0
        self.submit(first, None, None, True)

    # ---- rules ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(token_ids=token_lists, salt=namespaces, lora=namespaces, read=st.sampled_from([True, True, False]))
    def submit(self, token_ids: list[int], salt: str | None, lora: str | None, read: bool) -> None:
        request = FakeRequest(list(token_ids), cache_salt=salt, lora_id=lora, read_prefix_cache=read)
        self.requests.append((request, self.tables.add_row()))

    @rule(
        pick=picks,
        action=st.sampled_from(
            ["compute"] * 8 + ["preempt", "preempt", "fork", "follow up", "finish", "reset", "resync"]
        ),
        size=st.integers(1, 12),
        lookahead=st.sampled_from([0, 0, 0, 2]),
    )
    def act(self, pick: int, action: str, size: int, lookahead: int) -> None:
        """One rule for nearly all: hypothesis leaves out whole rules in many of its runs."""
        if action == "reset":
            return self._reset()
        if action == "resync" or not self.requests:
            return self._resync()
        request, row = self.requests[pick % len(self.requests)]
        if action == "compute":
            self._compute(request, row, size, lookahead)
        elif action == "preempt":
            self._preempt(request, row, size % 3)
        elif action == "fork" and len(self.requests) < MAX_REQUESTS:
            self._resubmit(request, len(request.token_ids) - size % 4, size % 3)
        elif action in ("follow up", "finish"):
            self._finish(request, row)
            if action == "follow up":
                self._resubmit(request, len(request.token_ids), size)
        return None

    def _resubmit(self, origin: FakeRequest, length: int, num_more: int) -> None:
        """The same beginning again, as a beam or a next turn does."""
        token_ids = (origin.token_ids[: max(1, length)] + [0] * num_more)[:MAX_TOKENS]
        self.submit(token_ids, origin.cache_salt, origin.lora_id, True)

    def _preempt(self, request: FakeRequest, row: int, retention: int) -> None:
        self.manager.free(request, retention=retention)
        request.num_computed_tokens = 0
        self.tables.clear(row)

    def _finish(self, request: FakeRequest, row: int) -> None:
        self.manager.free(request)
        self.tables.free_row(row)
        self.requests.remove((request, row))

    def _compute(self, request: FakeRequest, row: int, chunk: int, lookahead: int) -> None:
        """One chunk of the request's owed tokens, or a new output token where none is owed."""
        if request.num_computed_tokens == len(request.token_ids):
            if len(request.token_ids) == MAX_TOKENS:
                return
            request.token_ids.append(0)
        cached = [] if request.blocks else self._find(request)
        start = request.num_computed_tokens or len(cached) * self.manager.block_size
        count = min(chunk, len(request.token_ids) - start)
        assert count > 0, "the last token must be left to compute"
        if not self._allocate(request, count, cached, lookahead):
            self._preempt(*self.requests[-1], retention=chunk % 3)  # as the scheduler does, to get on
            return
        self.tables.extend_to(row, request.blocks)
        assert self.tables.rows([row])[0].tolist() == request.block_ids
        self._attend_and_write(request, row, start, count)
        request.num_computed_tokens = start + count
        self.manager.cache_full_blocks(request)

    def _reset(self) -> None:
        is_idle = not any(request.blocks for request, _ in self.requests)
        assert self.manager.reset_prefix_cache() == is_idle
        if is_idle:
            self.store.clear()
            assert self.manager.stats().num_cached_blocks == 0

    def _resync(self) -> None:
        self._read_events()
        told = set(self.replica)
        self._apply(self.manager.resync_events())
        assert self.replica == told

    # ---- what must hold after each --------------------------------------------------------------------

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if not hasattr(self, "manager"):
            return
        requests = [request for request, _ in self.requests]
        self.manager.check_integrity(requests)
        held = {block.block_id for request in requests for block in request.blocks}
        stats = self.manager.stats()
        assert self.manager.num_free_blocks == stats.num_free_blocks == self.manager.num_blocks - len(held)
        assert 0 <= stats.usage <= 1

    @invariant()
    def events_tell_the_truth(self) -> None:
        if hasattr(self, "manager"):
            self._read_events()
            assert len(self.replica) == self.manager.stats().num_cached_blocks

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            while self.requests:
                self._finish(*self.requests[0])
            self.manager.check_integrity([])
            assert self.manager.num_free_blocks == self.manager.num_blocks

    # ---- steps of the above ---------------------------------------------------------------------------

    def _find(self, request: FakeRequest) -> list[Block]:
        cached, num_cached = self.manager.find_cached_prefix(request)
        assert num_cached == len(cached) * self.manager.block_size < len(request.token_ids)
        assert len(cached) == self._expected_hits(request)
        for block in cached:
            assert block.is_full
        return cached

    def _expected_hits(self, request: FakeRequest) -> int:
        """By a hash chain of our own over what the events say is cached."""
        if not request.read_prefix_cache:
            return 0
        self._read_events()
        size, parent, hits = self.manager.block_size, root_hash(request.cache_salt, request.lora_id), 0
        for index in range((len(request.token_ids) - 1) // size):
            token_ids = request.token_ids[index * size : (index + 1) * size]
            parent = sha256(parent + b"".join(t.to_bytes(4, "little") for t in token_ids)).digest()
            if parent not in self.replica:
                break
            hits += 1
        return hits

    def _allocate(self, request: FakeRequest, count: int, cached: list[Block], lookahead: int) -> bool:
        size, free = self.manager.block_size, self.manager.num_free_blocks
        before, stats = list(request.blocks), self.manager.stats()
        start = request.num_computed_tokens or len(cached) * size
        missing = max(0, -(-(start + count + lookahead) // size) - len(before) - len(cached))
        fits = missing <= free - sum(block.ref_count == 0 for block in cached)
        assert self.manager.allocate_slots(request, count, cached, lookahead) == fits
        if fits:
            assert request.blocks[: len(before) + len(cached)] == before + cached
            assert len(request.blocks) == len(before) + len(cached) + missing
        else:
            assert request.blocks == before
            assert self.manager.stats() == stats
        return fits

    def _attend_and_write(self, request: FakeRequest, row: int, start: int, count: int) -> None:
        """Read the context through the block table, then write the new tokens' slots."""
        slots = self.tables.slots_batch([row, row], [0, start], [start, count]).tolist()
        for position, slot in enumerate(slots[:start]):
            assert self.store[slot] == self._value(request, position), "a foreign or missing token in the context"
        for position, slot in enumerate(slots[start:], start):
            block = request.blocks[position // self.manager.block_size]
            assert slot // self.manager.block_size == block.block_id
            assert block.ref_count == 1, "a shared block is written"
            assert not block.is_full, "a sealed block is written"
            self.store[slot] = self._value(request, position)

    @staticmethod
    def _value(request: FakeRequest, position: int) -> Value:
        return request.cache_salt, request.lora_id, tuple(request.token_ids[: position + 1])

    def _read_events(self) -> None:
        batch = self.manager.take_events()
        if batch.num_dropped:
            assert batch.sequence > self.next_event
            self.next_event = batch.next_sequence
            batch = self.manager.resync_events()
        self._apply(batch)
        xor = functools.reduce(operator.xor, map(digest_of, self.replica), 0)
        assert self.manager.cached_digest == CacheDigest(len(self.replica), xor)
        assert not self.manager.has_events

    def _apply(self, batch: EventBatch) -> None:
        assert batch.sequence == self.next_event
        self.next_event = batch.next_sequence
        for event in batch:
            if isinstance(event, AllBlocksCleared):
                self.replica.clear()
            elif isinstance(event, BlockRemoved):
                assert self.replica.issuperset(event.hashes)
                self.replica.difference_update(event.hashes)
            else:
                assert self.replica.isdisjoint(event.hashes)
                assert len(event.token_ids) == len(event.hashes) * event.block_size
                self._check_chain(event)
                self.replica.update(event.hashes)

    def _check_chain(self, event: BlockStored) -> None:
        size, parent = event.block_size, event.parent_hash
        for index, block_hash in enumerate(event.hashes):
            token_ids = event.token_ids[index * size : (index + 1) * size]
            assert block_hash == sha256(parent + b"".join(t.to_bytes(4, "little") for t in token_ids)).digest()
            parent = block_hash


KVCacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestKVCache = KVCacheMachine.TestCase


class LongKVCacheMachine(KVCacheMachine):
    """The same for longer."""


LongKVCacheMachine.TestCase.settings = settings(max_examples=500, stateful_step_count=100, deadline=None)
TestKVCacheLong = pytest.mark.slow(LongKVCacheMachine.TestCase)
