from __future__ import annotations

from sagellm_kv_cache import AllBlocksCleared, BlockRemoved, BlockStored, EventQueue

STORED = BlockStored(hashes=(b"a", b"b"), parent_hash=b"r", token_ids=(1, 2, 3, 4), block_size=2)
REMOVED = BlockRemoved(hashes=(b"a",))


def test_batches_are_numbered_without_gaps() -> None:
    queue = EventQueue(capacity=100)
    assert (queue.take().sequence, len(queue.take())) == (0, 0)
    queue.put(STORED)
    queue.put(REMOVED)
    first = queue.take()
    assert (first.sequence, first.events, first.num_dropped) == (0, (STORED, REMOVED), 0)
    queue.put(AllBlocksCleared())
    second = queue.take()
    assert second.sequence == first.next_sequence == 2
    assert list(second) == [AllBlocksCleared()]
    assert queue.take().sequence == 3


def test_overflow_drops_the_oldest_and_says_so() -> None:
    queue = EventQueue(capacity=3)
    for event in (STORED, REMOVED, REMOVED, AllBlocksCleared()):
        queue.put(event)
    batch = queue.take()
    assert batch.events == (REMOVED, REMOVED, AllBlocksCleared())
    assert (batch.sequence, batch.num_dropped) == (1, 1)
    queue.put(REMOVED)
    assert (queue.take().num_dropped, queue.take().sequence) == (0, 5)


def test_an_event_above_the_capacity_is_dropped_itself() -> None:
    queue = EventQueue(capacity=1)
    queue.put(STORED)
    batch = queue.take()
    assert (batch.events, batch.sequence, batch.num_dropped) == ((), 1, 1)


def test_replace_stands_for_all_that_was_queued() -> None:
    queue = EventQueue(capacity=2)
    for event in (STORED, REMOVED, REMOVED):
        queue.put(event)
    batch = queue.replace([AllBlocksCleared(), STORED, STORED])
    assert (batch.sequence, batch.num_dropped, len(batch)) == (3, 0, 3)
    following = queue.take()
    assert (following.sequence, following.events, following.num_dropped) == (6, (), 0)


def test_zero_capacity_means_off() -> None:
    assert not EventQueue(0).is_enabled
    assert EventQueue(1).is_enabled
