from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_requests import FakeRequest, compute, release, run_and_free
from sagellm_kv_cache import (
    EVICTION_POLICIES,
    Block,
    CostPolicy,
    EvictionPolicy,
    KVCacheManager,
    LFUPolicy,
    LRUPolicy,
    PriorityPolicy,
    create_eviction_policy,
)
from sagellm_protocol import InvalidArgumentError


def drain(policy: EvictionPolicy) -> list[int]:
    return [policy.pop().block_id for _ in range(len(policy))]


def filled(policy: EvictionPolicy, blocks: list[Block]) -> EvictionPolicy:
    for block in blocks:
        policy.add(block)
    return policy


def test_lru_gives_the_longest_free() -> None:
    blocks = [Block(i) for i in range(4)]
    policy = filled(LRUPolicy(), blocks)
    policy.remove(blocks[0])
    policy.add(blocks[0])
    assert [block.block_id for block in policy] == [1, 2, 3, 0]
    assert drain(policy) == [1, 2, 3, 0]


def test_lfu_gives_the_least_hit_then_the_longest_free() -> None:
    blocks = [Block(i, hit_count=hits) for i, hits in enumerate([3, 0, 1, 0])]
    assert drain(filled(LFUPolicy(), blocks)) == [1, 3, 2, 0]


def test_lfu_ages_what_was_popular_long_ago() -> None:
    policy = LFUPolicy()
    policy.add(Block(0, hit_count=4))
    survivors = []
    for index in range(1, 8):  # a stream of blocks never hit
        policy.add(Block(index))
        survivors.append(policy.pop().block_id)
    assert survivors == [1, 2, 3, 4, 0, 5, 6]


def test_priority_gives_the_least_retained() -> None:
    blocks = [Block(i, retention=retention) for i, retention in enumerate([1, 0, -1, 0])]
    assert drain(filled(PriorityPolicy(), blocks)) == [2, 1, 3, 0]


def test_cost_keeps_long_sequences_longer() -> None:
    blocks = [Block(0, sequence_tokens=32_768), Block(1, sequence_tokens=16), Block(2, sequence_tokens=16, hit_count=9)]
    assert drain(filled(CostPolicy(), blocks)) == [1, 0, 2]


@pytest.mark.parametrize("name", sorted(EVICTION_POLICIES))
@given(operations=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 3)), max_size=80))
def test_every_policy_is_a_set_with_an_order(name: str, operations: list[tuple[bool, int, int]]) -> None:
    blocks, policy = [Block(i) for i in range(10)], create_eviction_policy(name)
    inside: set[int] = set()
    for toggle, index, worth in operations:
        block = blocks[index]
        if not toggle and inside:
            expected = next(iter(policy))
            assert policy.pop() is expected
            inside.remove(expected.block_id)
        elif index in inside:
            policy.remove(block)
            inside.remove(index)
        else:
            block.hit_count = block.retention = worth
            policy.add(block)
            inside.add(index)
        assert {block.block_id for block in policy} == inside
        assert len(policy) == len(inside)
    assert sorted(drain(policy)) == sorted(inside)
    with pytest.raises(IndexError):
        policy.pop()


def test_heap_does_not_grow_with_hits() -> None:
    policy, block = LFUPolicy(), Block(0)
    for _ in range(1000):
        policy.add(block)
        policy.remove(block)
    policy.add(block)
    assert len(policy._heap) <= policy._SLACK + 3


@pytest.mark.parametrize("name", sorted(EVICTION_POLICIES))
def test_a_sequence_is_evicted_from_its_tail(name: str) -> None:
    manager = KVCacheManager(8, 2, eviction_policy=name)
    old, other = FakeRequest(list(range(8))), FakeRequest([90, 91])
    run_and_free(manager, old)
    run_and_free(manager, FakeRequest(list(range(5))))  # the first two blocks are hit once more
    compute(manager, FakeRequest([70] * 8))  # takes the four blank ones
    compute(manager, other)
    assert manager.evict_count == 1
    old.token_ids.append(8)
    assert manager.find_cached_prefix(old)[1] == 6
    compute(manager, FakeRequest([80, 81, 82, 83]))
    assert manager.find_cached_prefix(old)[1] == 2


def test_retention_outlasts_recency_and_is_the_highest_of_all_users() -> None:
    manager = KVCacheManager(4, 2, eviction_policy="priority")
    kept, plain = FakeRequest([1, 1]), FakeRequest([2, 2])
    run_and_free(manager, kept, retention=5)
    run_and_free(manager, FakeRequest([1, 1, 9]), retention=0)
    run_and_free(manager, plain)
    big = FakeRequest([3] * 6)
    compute(manager, big)
    kept.token_ids.append(0)
    plain.token_ids.append(0)
    assert manager.find_cached_prefix(kept)[1] == 2
    assert manager.find_cached_prefix(plain)[1] == 0
    release(manager, big)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidArgumentError, match="choose one of cost, lfu, lru, priority"):
        create_eviction_policy("random")


def test_a_policy_object_can_be_passed() -> None:
    class MostRecent(LRUPolicy):
        def pop(self) -> Block:
            last = list(self)[-1]
            self.remove(last)
            return last

    manager = KVCacheManager(2, 2, eviction_policy=MostRecent())
    run_and_free(manager, FakeRequest([1, 1]))
    run_and_free(manager, FakeRequest([2, 2]))
    run_and_free(manager, FakeRequest([3, 3]))
    assert manager.find_cached_prefix(FakeRequest([1, 1, 0]))[1] == 2
    assert manager.find_cached_prefix(FakeRequest([2, 2, 0]))[1] == 0
