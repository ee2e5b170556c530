from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_kv_cache import Block, FreeBlockQueue


def ids(queue: FreeBlockQueue) -> list[int]:
    return [block.block_id for block in queue]


def test_queue_is_first_in_first_out_and_removes_from_anywhere() -> None:
    blocks = [Block(i) for i in range(5)]
    queue = FreeBlockQueue()
    for block in blocks:
        queue.append(block)
    for index in (2, 0, 4):  # middle, first, last
        queue.remove(blocks[index])
    assert ids(queue) == [1, 3]
    queue.append(blocks[2])
    assert [queue.popleft().block_id for _ in range(len(queue))] == [1, 3, 2]
    assert len(queue) == 0


def test_queue_refuses_misuse() -> None:
    queue, other, block = FreeBlockQueue(), FreeBlockQueue(), Block(0)
    with pytest.raises(IndexError):
        queue.popleft()
    with pytest.raises(AssertionError, match="in no queue"):
        queue.remove(block)
    queue.append(block)
    for full in (queue, other):
        with pytest.raises(AssertionError, match="in a queue already"):
            full.append(block)


@given(st.lists(st.tuples(st.sampled_from(["append", "remove", "popleft"]), st.integers(0, 7)), max_size=60))
def test_queue_equals_a_list(operations: list[tuple[str, int]]) -> None:
    blocks, queue = [Block(i) for i in range(8)], FreeBlockQueue()
    model: list[int] = []
    for operation, index in operations:
        if operation == "append" and index not in model:
            queue.append(blocks[index])
            model.append(index)
        elif operation == "remove" and index in model:
            queue.remove(blocks[index])
            model.remove(index)
        elif operation == "popleft" and model:
            assert queue.popleft().block_id == model.pop(0)
        assert ids(queue) == model
        assert len(queue) == len(model)


def test_content_is_sealed_once_and_forgotten_whole() -> None:
    block = Block(3)
    block.fill(b"h" * 32, b"p" * 32, b"tokens")
    block.hit_count, block.retention, block.sequence_tokens = 2, 1, 64
    with pytest.raises(AssertionError, match="sealed already"):
        block.fill(b"h" * 32, b"p" * 32, b"tokens")
    block.forget()
    assert block.parent_hash is None
    assert (block.is_full, block.token_bytes, block.hit_count) == (False, b"", 0)
    assert (block.retention, block.sequence_tokens) == (0, 0)


def test_repr_says_what_matters() -> None:
    block = Block(3, ref_count=2)
    assert repr(block) == "Block(3, ref_count=2, open)"
    block.fill(bytes(32), bytes(32), b"")
    assert repr(block) == "Block(3, ref_count=2, 00000000)"
