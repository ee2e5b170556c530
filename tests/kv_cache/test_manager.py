from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import pytest

from cache_requests import FakeRequest, compute, release, run_and_free
from sagellm_kv_cache import BlockStored, CacheRequest, KVCacheManager, hashing
from sagellm_protocol import InternalError, InvalidArgumentError


def test_construction_checks_sizes() -> None:
    with pytest.raises(InvalidArgumentError, match="num_blocks must be at least 1, got 0"):
        KVCacheManager(0, 16)
    with pytest.raises(InvalidArgumentError, match="block_size must be at least 1"):
        KVCacheManager(1, 0)


def test_fake_request_satisfies_the_protocol() -> None:
    request: CacheRequest = FakeRequest([1])
    assert request.read_prefix_cache


def test_slots_are_given_block_by_block() -> None:
    manager, request = KVCacheManager(4, 4), FakeRequest(list(range(9)))
    for num_computed, num_new, num_blocks in ((0, 3, 1), (3, 1, 1), (4, 1, 2), (5, 4, 3)):
        request.num_computed_tokens = num_computed
        assert manager.allocate_slots(request, num_new)
        assert len(request.blocks) == num_blocks
    assert request.block_ids == [0, 1, 2]
    assert (manager.num_free_blocks, manager.usage) == (1, 0.75)
    manager.free(request)
    assert (request.blocks, manager.num_free_blocks) == ([], 4)


def test_lookahead_reserves_room_once() -> None:
    manager, request = KVCacheManager(4, 4), FakeRequest([1, 2, 3])
    assert manager.allocate_slots(request, 3, num_lookahead_tokens=2)
    assert len(request.blocks) == 2
    request.num_computed_tokens = 3
    assert manager.allocate_slots(request, 1, num_lookahead_tokens=2)
    assert len(request.blocks) == 2


def test_failed_allocation_changes_nothing() -> None:
    manager, first, second = KVCacheManager(4, 4), FakeRequest([1] * 8), FakeRequest([1] * 8 + [2] * 9)
    compute(manager, first)
    blocks, num_cached = manager.find_cached_prefix(second)
    before = manager.stats()
    assert num_cached == 8
    assert not manager.allocate_slots(second, 9, blocks)
    assert manager.stats() == before
    assert [block.ref_count for block in blocks] == [1, 1]
    assert second.blocks == []
    manager.check_integrity([first, second])
    assert manager.allocate_slots(second, 8, blocks)


def test_idle_hits_are_not_free_for_others() -> None:
    """Four blocks are free, but three of them are the hits themselves."""
    manager = KVCacheManager(4, 2)
    run_and_free(manager, FakeRequest([1, 2, 3, 4, 5, 6]))
    request = FakeRequest([1, 2, 3, 4, 5, 6, 7, 8, 9])
    blocks, num_cached = manager.find_cached_prefix(request)
    assert (num_cached, manager.num_free_blocks) == (6, 4)
    assert not manager.allocate_slots(request, 3, blocks)
    assert manager.allocate_slots(request, 2, blocks)
    assert request.block_ids[:3] == [block.block_id for block in blocks]
    assert manager.num_free_blocks == 0


@pytest.mark.parametrize("already_counted", [False, True])
def test_computed_tokens_may_count_the_hits_already(already_counted: bool) -> None:
    manager = KVCacheManager(8, 2)
    run_and_free(manager, FakeRequest([1, 2, 3, 4]))
    request = FakeRequest([1, 2, 3, 4, 5])
    blocks, num_cached = manager.find_cached_prefix(request)
    request.num_computed_tokens = num_cached if already_counted else 0
    assert manager.allocate_slots(request, 1, blocks)
    assert len(request.blocks) == 3


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_a_hit_never_covers_the_last_token(num_tokens: int, num_cached: int) -> None:
    manager = KVCacheManager(8, 4)
    run_and_free(manager, FakeRequest(list(range(12))))
    assert manager.find_cached_prefix(FakeRequest(list(range(num_tokens))))[1] == num_cached


def test_only_computed_full_blocks_are_shared() -> None:
    manager, request = KVCacheManager(8, 4), FakeRequest(list(range(12)))
    compute(manager, request, 7)
    reader = FakeRequest(list(range(12)))
    assert manager.find_cached_prefix(reader)[1] == 4
    compute(manager, request, 8)
    assert manager.find_cached_prefix(reader)[1] == 8
    compute(manager, reader)
    assert reader.block_ids[:2] == request.block_ids[:2]
    assert reader.block_ids[2] not in request.block_ids


def test_output_tokens_are_shared_too() -> None:
    manager, request = KVCacheManager(8, 2), FakeRequest([1, 2, 3])
    for token_id in (4, 5):
        compute(manager, request)
        request.token_ids.append(token_id)
    release(manager, request)
    assert manager.find_cached_prefix(FakeRequest([1, 2, 3, 4, 9]))[1] == 4


@pytest.mark.parametrize("field", ["cache_salt", "lora_id"])
def test_salts_and_adapters_are_separate(field: str) -> None:
    manager = KVCacheManager(16, 2)
    for value in (None, "", "a", "b"):
        for expected_hit in (0, 2):
            request = FakeRequest([1, 2, 3])
            setattr(request, field, value)
            assert run_and_free(manager, request) == expected_hit


def test_reading_and_caching_can_be_turned_off() -> None:
    manager = KVCacheManager(8, 2)
    blind = FakeRequest([1, 2, 3], read_prefix_cache=False)
    run_and_free(manager, FakeRequest([1, 2, 3]))
    assert run_and_free(manager, blind) == 0
    assert manager.stats().prefix_query_tokens == 3
    manager = KVCacheManager(8, 2, enable_prefix_caching=False)
    run_and_free(manager, FakeRequest([1, 2, 3]))
    assert run_and_free(manager, FakeRequest([1, 2, 3])) == 0
    assert manager.stats().num_cached_blocks == 0


def test_a_preempted_request_finds_its_own_blocks() -> None:
    manager, request = KVCacheManager(4, 2), FakeRequest([1, 2, 3, 4, 5])
    compute(manager, request)
    hashes = list(request.block_hashes)
    release(manager, request)
    assert (request.block_hashes, request.blocks) == (hashes, [])
    assert compute(manager, request) == 4


def test_freeing_twice_is_harmless() -> None:
    manager, request = KVCacheManager(4, 2), FakeRequest([1, 2, 3])
    compute(manager, request)
    manager.free(request)
    manager.free(request)
    manager.check_integrity([])


def test_registering_after_an_abort_is_harmless() -> None:
    manager, request = KVCacheManager(4, 2), FakeRequest([1, 2, 3])
    compute(manager, request, 1)
    manager.free(request)
    request.num_computed_tokens = 3  # the step that was under way has ended
    manager.cache_full_blocks(request)
    assert manager.stats().num_cached_blocks == 0


def test_block_tables_are_append_only_under_duplicates() -> None:
    manager, first, second = KVCacheManager(8, 2), FakeRequest([1, 2, 3]), FakeRequest([1, 2, 3])
    assert manager.allocate_slots(first, 3)
    assert manager.allocate_slots(second, 3)
    own = second.block_ids
    for request in (first, second):
        request.num_computed_tokens = 3
        manager.cache_full_blocks(request)
    assert second.block_ids == own
    assert manager.stats().num_cached_blocks == 1
    manager.free(second)
    assert manager.find_cached_prefix(FakeRequest([1, 2, 0]))[0] == first.blocks[:1]
    manager.check_integrity([first])


def test_a_duplicate_takes_over_when_its_twin_was_evicted() -> None:
    manager, first, second = KVCacheManager(4, 2), FakeRequest([1, 2, 3, 4]), FakeRequest([1, 2, 3, 4])
    for request in (first, second):
        assert manager.allocate_slots(request, 4)
    for request in (first, second):
        request.num_computed_tokens = 4
        manager.cache_full_blocks(request)
    release(manager, first)
    evictor = FakeRequest([9, 9, 9, 9])
    compute(manager, evictor)
    assert manager.evict_count == 2
    assert manager.find_cached_prefix(FakeRequest([1, 2, 3, 4, 5]))[1] == 0
    release(manager, second)
    assert manager.find_cached_prefix(FakeRequest([1, 2, 3, 4, 5]))[1] == 4
    manager.check_integrity([evictor])


def test_cached_blocks_are_taken_at_admission_only() -> None:
    manager, request = KVCacheManager(8, 2), FakeRequest([1, 2, 3])
    compute(manager, request)
    with pytest.raises(InternalError, match="req-test has blocks already"):
        manager.allocate_slots(request, 1, request.blocks[:1])


def test_hits_that_were_evicted_meanwhile_are_refused() -> None:
    manager = KVCacheManager(2, 2)
    run_and_free(manager, FakeRequest([1, 2, 3]))
    late = FakeRequest([1, 2, 9])
    blocks, _ = manager.find_cached_prefix(late)
    run_and_free(manager, FakeRequest([7, 7, 7, 7]))
    with pytest.raises(InternalError, match="evicted between lookup and allocation"):
        manager.allocate_slots(late, 1, blocks)
    manager.check_integrity([])


def test_reset_needs_an_idle_cache() -> None:
    manager, request = KVCacheManager(4, 2), FakeRequest([1, 2, 3])
    compute(manager, request)
    assert not manager.reset_prefix_cache()
    assert manager.stats().num_cached_blocks == 1
    release(manager, request)
    assert manager.reset_prefix_cache()
    assert manager.stats().num_cached_blocks == 0
    assert run_and_free(manager, request) == 0
    manager.check_integrity([])


def test_hashing_is_done_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(data: bytes) -> object:
        calls.append(len(data))
        return sha256(data)

    monkeypatch.setattr(hashing, "sha256", counting)
    manager, request = KVCacheManager(64, 4), FakeRequest(list(range(100)))
    for _ in range(3):
        manager.find_cached_prefix(request)
    compute(manager, request)
    block_hashes = [size for size in calls if size == 32 + 4 * 4]
    assert len(block_hashes) == 25


def test_statistics_count_tokens_at_admission() -> None:
    clock = iter(range(100))
    manager = KVCacheManager(4, 2, clock=lambda: float(next(clock)))
    run_and_free(manager, FakeRequest([1, 2, 3, 4, 5]))
    waiting = FakeRequest([1, 2, 3, 4, 5])
    for _ in range(5):  # looking again while waiting counts nothing
        manager.find_cached_prefix(waiting)
    compute(manager, waiting)
    waiting.token_ids += [6, 7]
    compute(manager, waiting)  # nor does growing
    stats = manager.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens, stats.prefix_hit_rate) == (10, 4, 0.4)
    assert (stats.num_used_blocks, stats.num_free_blocks, stats.usage) == (4, 0, 1.0)
    release(manager, waiting)
    run_and_free(manager, FakeRequest([9] * 4))
    stats = manager.stats()
    assert (stats.evict_count, stats.evict_ms) == (1, 1000.0)
    assert stats.usage == 0.0
    assert KVCacheManager(1, 1).stats().prefix_hit_rate == 0.0


def test_events_reach_the_reader() -> None:
    manager = KVCacheManager(4, 2, event_capacity=2)
    run_and_free(manager, FakeRequest([1, 2, 3, 4, 5]))
    (stored,) = manager.take_events()
    assert isinstance(stored, BlockStored)
    assert stored.token_ids == (1, 2, 3, 4)
    run_and_free(manager, FakeRequest([6, 7, 8, 9]))
    run_and_free(manager, FakeRequest([5, 5, 5, 5]))
    lossy = manager.take_events()
    assert lossy.num_dropped > 0
    whole = manager.resync_events()
    assert whole.sequence == lossy.next_sequence
    assert len(whole) > 1


def test_integrity_knows_the_requests() -> None:
    manager, request = KVCacheManager(4, 2), FakeRequest([1, 2, 3])
    compute(manager, request)
    manager.check_integrity()
    manager.check_integrity([request])
    with pytest.raises(InternalError, match="should have 0 users"):
        manager.check_integrity([])
    request.num_computed_tokens = 5
    with pytest.raises(InternalError, match="has computed 5 tokens but holds 2 blocks of 2"):
        manager.check_integrity([request])
    request.num_computed_tokens = 3
    request.blocks.append(request.blocks[0])
    with pytest.raises(InternalError, match="holds a block twice"):
        manager.check_integrity([request])


def test_the_package_needs_no_torch() -> None:
    code = "import sys, sagellm_kv_cache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
