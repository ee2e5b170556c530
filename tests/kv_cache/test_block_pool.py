from __future__ import annotations

import pytest

from sagellm_kv_cache import BlockPool, EventQueue, LRUPolicy, PrefixCache, root_hash
from sagellm_kv_cache.hashing import encode_tokens, hash_block
from sagellm_protocol import InternalError


class Ticks:
    """A clock that advances one second a reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_pool(num_blocks: int) -> tuple[BlockPool, PrefixCache]:
    cache = PrefixCache(1, EventQueue(0))
    return BlockPool(num_blocks, cache, LRUPolicy(), Ticks()), cache


def cache_block(pool: BlockPool, cache: PrefixCache, token_id: int) -> int:
    """Take a block, fill and index it, give it back; its id."""
    (block,) = pool.allocate(1)
    tokens = encode_tokens([token_id])
    block.fill(hash_block(root_hash(), tokens), root_hash(), tokens)
    cache.store([block])
    pool.free([block])
    return block.block_id


def test_blank_blocks_go_first_and_the_warmest_of_them() -> None:
    pool, cache = make_pool(4)
    assert [block.block_id for block in pool.allocate(3)] == [0, 1, 2]
    pool.free([pool.blocks[1]])
    assert cache_block(pool, cache, 7) == 1
    pool.free([pool.blocks[0]])
    assert [block.block_id for block in pool.allocate(3)] == [0, 3, 1]
    assert (pool.evict_count, pool.evict_seconds, pool.num_free) == (1, 1.0, 0)
    assert len(cache) == 0
    pool.check_integrity([1, 1, 1, 1])


def test_touch_takes_candidates_back_and_counts_hits() -> None:
    pool, cache = make_pool(2)
    block = pool.blocks[cache_block(pool, cache, 7)]
    assert pool.num_free == 2
    pool.touch([block])
    pool.touch([block])
    assert (block.ref_count, block.hit_count, pool.num_free, pool.num_used) == (2, 2, 1, 1)
    pool.free([block])
    assert pool.num_used == 1
    pool.free([block])
    assert pool.num_used == 0
    assert block in cache


def test_peak_counts_hits_too() -> None:
    pool, cache = make_pool(3)
    cached = [pool.blocks[cache_block(pool, cache, token_id)] for token_id in (7, 8)]
    pool.touch(cached)
    pool.free(cached)


def test_misuse_trips_an_assertion() -> None:
    pool, _ = make_pool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="in use"):
        pool.clear_cache()
    pool.free(blocks)
    with pytest.raises(AssertionError, match="double free of Block"):
        pool.free(blocks)


def test_integrity_notices_what_went_wrong() -> None:
    def broken_by(break_it: object) -> str:
        pool, cache = make_pool(3)
        cached = pool.blocks[cache_block(pool, cache, 7)]
        (used,) = pool.allocate(1)
        pool.check_integrity()
        assert callable(break_it)
        break_it(pool, cache, cached, used)
        with pytest.raises(InternalError) as caught:
            pool.check_integrity([0, 1, 0])
        return str(caught.value)

    assert "lost or freed in use" in broken_by(lambda p, c, cached, used: setattr(used, "ref_count", 0))
    assert "lost or freed in use" in broken_by(lambda p, c, cached, used: p._policy.pop())
    assert "negative count" in broken_by(lambda p, c, cached, used: setattr(used, "ref_count", -1))
    assert "blank twice" in broken_by(lambda p, c, cached, used: p._blank.append(p._blank[0]))
    assert "both blank and candidates" in broken_by(lambda p, c, cached, used: p._blank.append(cached))
    assert "shared but still written" in broken_by(lambda p, c, cached, used: setattr(used, "ref_count", 2))
    assert "candidate but not indexed" in broken_by(lambda p, c, cached, used: c.remove([cached]))
    assert "under a wrong hash" in broken_by(lambda p, c, cached, used: c._index.update({b"x": used}))
    assert "blank with content" in broken_by(
        lambda p, c, cached, used: p._blank[0].fill(bytes(32), bytes(32), bytes(4))
    )
    assert "should have 1 users" in broken_by(lambda p, c, cached, used: p.allocate(1) and p.free([used]))
