"""The index is what the engines' caches are, or says at once that it isn't."""

from __future__ import annotations

from hashlib import sha256
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sagellm_control_plane.block_map import BlockMap
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_control_plane.prompts import BlockNames
from sagellm_control_plane.text_index import TEXT_BLOCK_BYTES, TextIndex, text_keys
from sagellm_kv_cache import hashing
from sagellm_kv_cache.events import AllBlocksCleared, BlockRemoved, BlockStored, CacheDigest, EventBatch, KVCacheEvent
from sagellm_kv_cache.hashing import digest_of, root_hash

HASHES = [sha256(bytes([number])).digest() for number in range(24)]
NUM_ENGINES = 4


def stored(*numbers: int) -> BlockStored:
    return BlockStored(tuple(HASHES[number] for number in numbers), bytes(32), (), 16)


def removed(*numbers: int) -> BlockRemoved:
    return BlockRemoved(tuple(HASHES[number] for number in numbers))


def digest(numbers: set[int]) -> CacheDigest:
    xor = 0
    for number in numbers:
        xor ^= digest_of(HASHES[number])
    return CacheDigest(len(numbers), xor)


def longest_prefix(prompt: list[int], cached: set[int]) -> int:
    return next((index for index, number in enumerate(prompt) if number not in cached), len(prompt))


# ---- matching -----------------------------------------------------------------------------------------


@given(
    st.lists(st.sets(st.integers(0, 23)), min_size=1, max_size=40),
    st.lists(st.integers(0, 23), max_size=24),
)
def test_a_match_is_the_longest_prefix_without_a_gap(caches: list[set[int]], prompt: list[int]) -> None:
    blocks = BlockMap()
    for row, cached in enumerate(caches):
        for number in cached:
            blocks.add(row, HASHES[number])
    keys = [HASHES[number] for number in prompt]
    expected = [longest_prefix(prompt, cached) for cached in caches]
    assert blocks.match(keys, len(caches)).tolist() == expected
    assert blocks.match(keys, len(caches) + 60).tolist() == expected + [0] * 60


def test_a_match_of_many_engines_at_many_depths() -> None:
    blocks, keys = BlockMap(), [number.to_bytes(8, "big") for number in range(600)]
    for row in range(500):
        for key in keys[: row + 1]:
            blocks.add(row, key)
    assert blocks.match(keys, 500).tolist() == list(range(1, 501))
    assert blocks.num_held == 500 * 501 // 2
    assert len(blocks) == 500
    for row in range(500):
        blocks.clear(row)
    assert (len(blocks), blocks.num_held) == (0, 0)


@given(st.integers(0, 700), st.sets(st.integers(0, 699), max_size=3), st.sampled_from([1, 5, 20]))
@settings(deadline=None)
def test_a_long_prompt_is_matched_up_to_the_first_gap(length: int, gaps: set[int], num_rows: int) -> None:
    blocks, keys = BlockMap(), [sha256(number.to_bytes(2, "big")).digest() for number in range(700)]
    for number in set(range(length)) - gaps:
        for row in range(num_rows):
            blocks.add(row, keys[number])
    assert blocks.match(keys, num_rows).tolist() == [min({length, *gaps})] * num_rows


def test_a_prompt_is_named_only_as_far_as_it_is_looked_up() -> None:
    blocks, token_ids = BlockMap(), list(range(4000))
    root = root_hash()
    names = BlockNames(token_ids, 4, root)
    with patch.object(hashing, "sha256", wraps=sha256) as hasher:
        assert blocks.match(names, 1).tolist() == [0]
        assert hasher.call_count == 1
        for name in names[:40]:
            blocks.add(0, name)
        hasher.reset_mock()
        assert blocks.match(BlockNames(token_ids, 4, root), 1).tolist() == [40]
        assert hasher.call_count == 64


class Blocks(RuleBasedStateMachine):
    """The map against plain sets. Keys fall into two buckets at first, so that these overflow and the map grows."""

    def __init__(self) -> None:
        super().__init__()
        self.map = BlockMap()
        self.sets: dict[int, set[int]] = {row: set() for row in range(70)}

    @staticmethod
    def name(number: int) -> bytes:
        return (number // 2 * 2**20 + number % 2 + 6).to_bytes(8, "little") + bytes(24)

    @rule(row=st.integers(0, 69), numbers=st.lists(st.integers(0, 60), max_size=20))
    def add(self, row: int, numbers: list[int]) -> None:
        for number in numbers:
            assert self.map.add(row, self.name(number)) == (number not in self.sets[row])
            self.sets[row].add(number)

    @rule(number=st.integers(0, 60), rows=st.sets(st.integers(0, 69), max_size=40))
    def share(self, number: int, rows: set[int]) -> None:
        for row in rows:
            self.add(row, [number])

    @rule(first=st.integers(0, 2000), row=st.integers(0, 69))
    def add_many(self, first: int, row: int) -> None:
        self.add(row, list(range(first, first + 300)))

    @rule(row=st.integers(0, 69), numbers=st.lists(st.integers(0, 60), max_size=20))
    def discard(self, row: int, numbers: list[int]) -> None:
        for number in numbers:
            assert self.map.discard(row, self.name(number)) == (number in self.sets[row])
            self.sets[row].discard(number)

    @rule(row=st.integers(0, 69))
    def clear(self, row: int) -> None:
        self.map.clear(row)
        self.sets[row].clear()

    @rule(prompt=st.lists(st.integers(0, 60), max_size=12))
    def match(self, prompt: list[int]) -> None:
        expected = [longest_prefix(prompt, held) for held in self.sets.values()]
        assert self.map.match([self.name(number) for number in prompt], 70).tolist() == expected

    @invariant()
    def counts(self) -> None:
        assert len(self.map) == len(set().union(*self.sets.values()))
        assert self.map.num_held == sum(map(len, self.sets.values()))
        assert all(self.map.num_held_by(row) == len(held) for row, held in self.sets.items())

    def teardown(self) -> None:
        for row in self.sets:
            self.map.clear(row)
        assert (len(self.map), self.map.num_held) == (0, 0)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# ---- following events ---------------------------------------------------------------------------------


def test_a_gap_empties_the_row_until_a_snapshot() -> None:
    index = PrefixIndex()
    assert index.apply(0, "x", EventBatch(0, (stored(0, 1),)))
    assert not index.apply(0, "x", EventBatch(2, (stored(2),)))
    assert index.match(HASHES[:3], 1).tolist() == [0]
    assert not index.apply(0, "x", EventBatch(3, (stored(3),))), "still out of step"
    assert not index.check(0, CacheDigest())
    assert index.apply(0, "x", EventBatch(4, (AllBlocksCleared(), stored(0, 1, 2))))
    assert index.match(HASHES[:4], 1).tolist() == [3]
    assert index.check(0, digest({0, 1, 2}))


def test_a_batch_that_comes_twice_or_late_changes_nothing() -> None:
    index = PrefixIndex()
    first, second = EventBatch(0, (stored(0),)), EventBatch(1, (removed(0), stored(1)))
    assert index.apply(0, "x", first)
    assert index.apply(0, "x", second)
    assert index.apply(0, "x", first)
    assert index.apply(0, "x", EventBatch(0, (stored(0), removed(0), stored(1), stored(2))))
    assert index.num_blocks(0) == 2
    assert index.check(0, digest({1, 2}))


def test_a_new_epoch_forgets_the_old_life() -> None:
    index = PrefixIndex()
    assert index.apply(0, "x", EventBatch(0, (stored(0, 1),)))
    assert index.apply(0, "y", EventBatch(0, (stored(1),)))
    assert index.check(0, digest({1}))
    assert not index.apply(0, "z", EventBatch(7, (stored(2),))), "it has cached things before that nobody heard of"
    assert index.num_blocks(0) == 0


def test_a_lost_removal_is_found_by_the_digest() -> None:
    index = PrefixIndex()
    assert index.apply(0, "x", EventBatch(0, (stored(0, 1),)))
    assert not index.check(0, digest({0}))
    assert index.match(HASHES[:2], 1).tolist() == [0], "no credit for what may be gone"
    assert not index.check(0, digest({0}))


def test_a_full_index_learns_nothing_more_and_never_says_too_much() -> None:
    index = PrefixIndex(max_num_blocks=3)
    assert index.apply(0, "x", EventBatch(0, (stored(0, 1),)))
    assert index.apply(1, "x", EventBatch(0, (stored(0, 1, 2),)))
    assert index.num_held == 3
    assert index.match(HASHES[:3], 2).tolist() == [2, 1]
    assert index.check(1, digest({0, 1, 2})), "it has heard of all: no reason for a snapshot"
    index.reset(0)
    assert index.apply(1, "x", EventBatch(1, (AllBlocksCleared(), stored(0, 1, 2))))
    assert index.match(HASHES[:3], 2).tolist() == [0, 3]


def test_a_row_is_followed_from_its_first_events_to_its_reset() -> None:
    index = PrefixIndex()
    assert not index.follows(0)
    assert not index.check(0, CacheDigest())
    index.apply(0, "x", EventBatch(0, ()))
    assert index.follows(0)
    index.reset(0)
    assert not index.follows(0)


class Engine:
    """A cache that tells its changes, over a line that loses, doubles and delays them."""

    def __init__(self) -> None:
        self.num_lives = 0
        self.restart()

    def restart(self) -> None:
        self.num_lives += 1
        self.cached: set[int] = set()
        self.sequence = 0
        self.pending: list[KVCacheEvent] = []

    @property
    def epoch(self) -> str:
        return str(self.num_lives)

    def tell(self, event: KVCacheEvent) -> None:
        self.pending.append(event)
        self.sequence += 1

    def take(self) -> EventBatch:
        events, self.pending = tuple(self.pending), []
        return EventBatch(self.sequence - len(events), events)

    def snapshot(self) -> EventBatch:
        batch = EventBatch(self.sequence, (AllBlocksCleared(), stored(*sorted(self.cached))))
        self.sequence = batch.next_sequence
        self.pending = []
        return batch


ENGINES = st.integers(0, NUM_ENGINES - 1)
BLOCKS = st.sets(st.integers(0, 23), min_size=1, max_size=8)


class FollowedEngines(RuleBasedStateMachine):
    """After every report the index is exactly the engines' caches where it says so, and empty where it doesn't."""

    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex()
        self.engines = [Engine() for _ in range(NUM_ENGINES)]
        self.told: list[set[int] | None] = [None] * NUM_ENGINES  # the cache as of the last report in step
        self.old: list[list[tuple[str, EventBatch]]] = [[] for _ in range(NUM_ENGINES)]

    @rule(row=ENGINES, blocks=BLOCKS)
    def store(self, row: int, blocks: set[int]) -> None:
        engine = self.engines[row]
        new = blocks - engine.cached
        if new:
            engine.cached |= new
            engine.tell(stored(*sorted(new)))

    @rule(row=ENGINES, blocks=BLOCKS)
    def evict(self, row: int, blocks: set[int]) -> None:
        engine = self.engines[row]
        gone = blocks & engine.cached
        if gone:
            engine.cached -= gone
            engine.tell(removed(*sorted(gone)))

    @rule(row=ENGINES)
    def clear(self, row: int) -> None:
        self.engines[row].cached = set()
        self.engines[row].tell(AllBlocksCleared())

    @rule(row=ENGINES)
    def restart(self, row: int) -> None:
        self.engines[row].restart()

    @rule(row=ENGINES)
    def lose(self, row: int) -> None:
        self.engines[row].take()

    @rule(row=ENGINES)
    def forget(self, row: int) -> None:
        self.index.reset(row)
        self.told[row] = None

    @rule(row=ENGINES)
    def report(self, row: int) -> None:
        engine = self.engines[row]
        batch = engine.take()
        is_in_step = self.index.apply(row, engine.epoch, batch) and self.index.check(row, digest(engine.cached))
        self.old[row].append((engine.epoch, batch))
        self.told[row] = set(engine.cached) if is_in_step else None

    @rule(row=ENGINES)
    def resync(self, row: int) -> None:
        engine = self.engines[row]
        assert self.index.apply(row, engine.epoch, engine.snapshot())
        assert self.index.check(row, digest(engine.cached))
        self.told[row] = set(engine.cached)

    @rule(row=ENGINES, data=st.data())
    def repeat(self, row: int, data: st.DataObject) -> None:
        """An old batch of the same life arrives again."""
        engine = self.engines[row]
        same = [batch for epoch, batch in self.old[row] if epoch == engine.epoch]
        if same and self.told[row] is not None:
            assert self.index.apply(row, engine.epoch, data.draw(st.sampled_from(same)))

    @invariant()
    def the_index_is_what_was_told(self) -> None:
        for row, told in enumerate(self.told):
            assert self.index.num_blocks(row) == len(told or ())
        for prompt in (list(range(24)), list(range(12, 24)), [5, 3, 9]):
            matched = self.index.match([HASHES[number] for number in prompt], NUM_ENGINES)
            expected = [longest_prefix(prompt, told or set()) for told in self.told]
            np.testing.assert_array_equal(matched, expected)


TestFollowedEngines = FollowedEngines.TestCase
TestFollowedEngines.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


# ---- engines that tell nothing ------------------------------------------------------------------------


def test_texts_share_the_blocks_of_their_common_beginning() -> None:
    system = "You are a helpful assistant. " * 60
    one, other = text_keys(system + "What is a quark?"), text_keys(system + "Who was Ada?")
    num_shared = len(system.encode()) // TEXT_BLOCK_BYTES
    assert one[:num_shared] == other[:num_shared]
    assert one[num_shared:] != other[num_shared:]
    assert text_keys("") == []
    assert text_keys("\ud800"), "a lone surrogate is legal in JSON"


def test_the_text_index_forgets_the_least_recent_and_ends_before_beginnings() -> None:
    index = TextIndex(max_blocks_per_row=6)
    first, second = [bytes([i]) * 8 for i in range(4)], [bytes([100 + i]) * 8 for i in range(4)]
    index.record(1, first)
    index.record(1, second)
    assert len(index) == 6
    assert index.match(first, 3).tolist() == [0, 2, 0]
    assert index.match(second, 3).tolist() == [0, 4, 0]
    index.record(1, [bytes([i]) * 8 for i in range(200)])
    assert len(index) == 6
    index.reset(1)
    assert len(index) == 0
