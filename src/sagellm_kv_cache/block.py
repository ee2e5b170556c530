"""The unit of KV memory: `Block`, and `FreeBlockQueue`, the list of blocks threaded through the blocks themselves.

A block stands for `block_size` consecutive slots of every layer's KV tensor; nothing here touches those tensors.
All blocks are made once and never replaced, so identity is equality and a block's pointers can live inside it
(the layout of vLLM's V1 block pool).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Block:
    """One KV block: who uses it, what it holds, and where it stands among the free ones.

    A block is *used* while `ref_count > 0`, *cached* while the prefix cache leads to it, and both, either or neither.
    The first three fields of its content are set together by `fill`, when all its slots are computed; from then on
    no one writes to the block until `forget`.
    """

    block_id: int
    ref_count: int = 0
    # Content: the hash of the whole sequence up to the end of this block, that of its predecessor, and its own
    # tokens as little-endian int32. None until the block is full.
    block_hash: bytes | None = None
    parent_hash: bytes | None = None
    token_bytes: bytes = b""
    # What eviction policies weigh; all reset with the content.
    hit_count: int = 0
    retention: int = 0
    sequence_tokens: int = 0
    # Place among the free blocks: links of FreeBlockQueue, or the ticket of a heap entry (0 = none).
    previous_free: Block | None = field(default=None, repr=False)
    next_free: Block | None = field(default=None, repr=False)
    ticket: int = 0

    @property
    def is_full(self) -> bool:
        """Whether all slots are computed and the content is final."""
        return self.block_hash is not None

    def fill(self, block_hash: bytes, parent_hash: bytes, token_bytes: bytes) -> None:
        """Seal the content of a block whose slots are all computed."""
        assert self.block_hash is None, f"{self!r} is sealed already"
        self.block_hash = block_hash
        self.parent_hash = parent_hash
        self.token_bytes = token_bytes

    def forget(self) -> None:
        """Drop the content and everything known about its use; the slots may be written again."""
        self.block_hash = None
        self.parent_hash = None
        self.token_bytes = b""
        self.hit_count = 0
        self.retention = 0
        self.sequence_tokens = 0

    def __repr__(self) -> str:
        content = self.block_hash.hex()[:8] if self.block_hash is not None else "open"
        return f"Block({self.block_id}, ref_count={self.ref_count}, {content})"


class FreeBlockQueue:
    """A doubly linked list through `Block.previous_free` / `next_free`; every operation is O(1).

    `collections.deque` would do but for `remove`: a cache hit takes a block out of the middle. A block stands in at
    most one queue.
    """

    __slots__ = ("_head", "_size", "_tail")

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-1)
        self._head.next_free = self._tail
        self._tail.previous_free = self._head
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Block]:
        """Blocks from the first to the last; the queue must not change meanwhile."""
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def append(self, block: Block) -> None:
        """Put a block at the end."""
        assert block.next_free is None, f"{block!r} is in a queue already"
        last = self._tail.previous_free
        assert last is not None
        last.next_free = block
        block.previous_free = last
        block.next_free = self._tail
        self._tail.previous_free = block
        self._size += 1

    def remove(self, block: Block) -> None:
        """Take a block out, wherever it stands."""
        before, after = block.previous_free, block.next_free
        assert before is not None, f"{block!r} is in no queue"
        assert after is not None, f"{block!r} is in no queue"
        before.next_free = after
        after.previous_free = before
        block.previous_free = block.next_free = None
        self._size -= 1

    def popleft(self) -> Block:
        """Take the first block out; IndexError if the queue is empty."""
        first = self._head.next_free
        if first is None or first is self._tail:
            raise IndexError("pop from an empty FreeBlockQueue")
        self.remove(first)
        return first
