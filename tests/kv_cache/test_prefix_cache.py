from __future__ import annotations

from sagellm_kv_cache import AllBlocksCleared, Block, BlockRemoved, BlockStored, EventQueue, PrefixCache, root_hash
from sagellm_kv_cache.hashing import encode_tokens, extend_block_hashes

BLOCK_SIZE = 2
ROOT = root_hash()


def chain(token_ids: list[int], root: bytes = ROOT) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, BLOCK_SIZE, len(token_ids) // BLOCK_SIZE, root)
    return hashes


def full_blocks(token_ids: list[int], first_id: int = 0, root: bytes = ROOT) -> list[Block]:
    parent, blocks = root, []
    for index, block_hash in enumerate(chain(token_ids, root)):
        block = Block(first_id + index)
        block.fill(block_hash, parent, encode_tokens(token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]))
        blocks.append(block)
        parent = block_hash
    return blocks


def make_cache(capacity: int = 100) -> PrefixCache:
    return PrefixCache(BLOCK_SIZE, EventQueue(capacity))


def match(cache: PrefixCache, token_ids: list[int], root: bytes = ROOT) -> list[int]:
    return [block.block_id for block in cache.match(root, chain(token_ids, root), token_ids)]


def test_match_stops_at_the_first_miss() -> None:
    cache, blocks = make_cache(), full_blocks([1, 2, 3, 4, 5, 6])
    cache.store(blocks)
    assert match(cache, [1, 2, 3, 4, 5, 6, 7]) == [0, 1, 2]
    assert match(cache, [1, 2, 3, 9, 5, 6]) == [0]
    assert match(cache, [9, 2, 3, 4]) == []
    cache.remove([blocks[1]])
    assert match(cache, [1, 2, 3, 4, 5, 6]) == [0]


def test_match_does_not_step_over_a_hole() -> None:
    cache, blocks = make_cache(), full_blocks([0] * 6)  # equal tokens, different prefixes
    cache.store(blocks)
    cache.remove([blocks[1]])
    assert match(cache, [0] * 6) == [0]


def test_roots_are_separate_worlds() -> None:
    cache = make_cache()
    cache.store(full_blocks([1, 2], root=root_hash("a")))
    assert match(cache, [1, 2], root_hash("a")) == [0]
    assert match(cache, [1, 2]) == []


def test_hits_are_checked_against_the_tokens_themselves() -> None:
    """A chain that belongs to other tokens (a collision, an outdated list) must not lead to their blocks."""
    cache = make_cache()
    cache.store(full_blocks([1, 2, 3, 4, 5, 6]))
    stolen = chain([1, 2, 3, 4, 5, 6])
    assert cache.match(ROOT, stolen, [1, 2, 3, 9, 5, 6])[-1].block_id == 0
    assert cache.match(ROOT, stolen, [9, 2, 3, 4, 5, 6]) == []
    assert cache.match(ROOT, stolen, [1, 2, 3]) == cache.match(ROOT, stolen[:1], [1, 2])
    assert cache.match(root_hash("other tenant"), stolen, [1, 2, 3, 4, 5, 6]) == []


def test_the_first_of_equal_blocks_is_indexed() -> None:
    cache = make_cache()
    first, second = full_blocks([1, 2, 3, 4]), full_blocks([1, 2, 3, 4, 5, 6], first_id=10)
    cache.store(first)
    cache.store(second)
    assert match(cache, [1, 2, 3, 4, 5, 6]) == [0, 1, 12]
    assert [block in cache for block in [*first, *second]] == [True, True, False, False, True]
    assert Block(5) not in cache
    assert len(cache) == 3


def test_events_tell_runs_with_their_parents() -> None:
    cache = make_cache()
    a, b = full_blocks([1, 2, 3, 4]), full_blocks([1, 2, 3, 4, 5, 6, 7, 8], first_id=10)
    cache.store(a[1:])
    cache.store(b)
    cache.remove([a[1], b[3]])
    cache.clear()
    hashes = chain([1, 2, 3, 4, 5, 6, 7, 8])
    assert list(cache.events.take()) == [
        BlockStored((hashes[1],), hashes[0], (3, 4), BLOCK_SIZE),
        BlockStored((hashes[0],), ROOT, (1, 2), BLOCK_SIZE),
        BlockStored((hashes[2], hashes[3]), hashes[1], (5, 6, 7, 8), BLOCK_SIZE),
        BlockRemoved((hashes[1], hashes[3])),
        AllBlocksCleared(),
    ]


def test_nothing_is_recorded_when_nobody_listens() -> None:
    cache, blocks = make_cache(capacity=0), full_blocks([1, 2])
    cache.store(blocks)
    cache.remove(blocks)
    cache.clear()
    assert len(cache.events.take()) == 0
    assert cache.events.take().num_dropped == 0


def test_resync_gives_the_whole_tree_parents_first() -> None:
    cache = make_cache()
    trunk = full_blocks([1, 2, 3, 4])
    branch = full_blocks([1, 2, 3, 4, 5, 6, 7, 8], first_id=10)[2:]
    other = full_blocks([1, 2, 3, 4, 9, 9], first_id=20)[2:]
    orphan = full_blocks([8, 8, 7, 7], first_id=30)[1:]
    for blocks in (branch, other, orphan, trunk):  # entered in another order
        cache.store(blocks)
    batch = cache.resync_events()
    assert batch.events[0] == AllBlocksCleared()
    stored = [event for event in batch if isinstance(event, BlockStored)]
    assert len(stored) == 4  # runs are merged
    known = {ROOT, orphan[0].parent_hash}
    tokens: dict[bytes, tuple[int, ...]] = {}
    for event in stored:
        assert event.parent_hash in known
        known.update(event.hashes)
        for index, block_hash in enumerate(event.hashes):
            tokens[block_hash] = event.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
    assert tokens == {
        block.block_hash: tuple(x)
        for block, x in zip(
            [*trunk, *branch, *other, *orphan], [(1, 2), (3, 4), (5, 6), (7, 8), (9, 9), (7, 7)], strict=True
        )
    }
    assert len(cache.events.take()) == 0
