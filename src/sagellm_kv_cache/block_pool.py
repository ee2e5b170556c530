"""The fixed set of KV blocks: who holds each, which are free, and what is evicted to make room.

A block is in exactly one place:

    used       ref_count > 0, in the block tables of that many requests; cached or not
    blank      free and without content: handed out first, most recently freed first (its memory is warm)
    candidate  free and cached: held by the eviction policy until it is hit again or evicted

`num_free` counts blank blocks and candidates together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sagellm_kv_cache.block import Block
from sagellm_kv_cache.eviction import EvictionPolicy
from sagellm_kv_cache.prefix_cache import PrefixCache
from sagellm_protocol import InternalError


class BlockPool:
    """Hands out blocks, counts references, evicts. All blocks exist from the start; ids are 0 to num_blocks - 1."""

    def __init__(
        self, num_blocks: int, prefix_cache: PrefixCache, policy: EvictionPolicy, clock: Callable[[], float]
    ) -> None:
        self.blocks = tuple(Block(block_id) for block_id in range(num_blocks))
        self.evict_count = 0
        self.evict_seconds = 0.0
        self._prefix_cache = prefix_cache
        self._policy = policy
        self._clock = clock
        self._blank = list(reversed(self.blocks))  # a stack: lowest ids on top

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, cached ones included."""
        return len(self._blank) + len(self._policy)

    @property
    def num_used(self) -> int:
        """Blocks with at least one user."""
        return len(self.blocks) - self.num_free

    def allocate(self, num_blocks: int) -> list[Block]:
        """Take `num_blocks <= num_free` blocks without content, each with one reference; evicts where it must."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted, {self.num_free} free: the caller checks"
        num_blank = min(num_blocks, len(self._blank))
        taken = [self._blank.pop() for _ in range(num_blank)]
        if num_blank < num_blocks:
            taken += self._evict(num_blocks - num_blank)
        for block in taken:
            block.ref_count = 1
        return taken

    def touch(self, blocks: Iterable[Block]) -> None:
        """Add one reference to each of these cached blocks: a request has hit them."""
        for block in blocks:
            if block.ref_count == 0:
                self._policy.remove(block)
            block.ref_count += 1
            block.hit_count += 1

    def free(self, blocks: Iterable[Block]) -> None:
        """Drop one reference of each, in this order: the first becomes free, and so evictable, first."""
        for block in blocks:
            assert block.ref_count > 0, f"double free of {block!r}"
            block.ref_count -= 1
            if block.ref_count > 0:
                continue
            if block in self._prefix_cache:
                self._policy.add(block)
            else:
                block.forget()
                self._blank.append(block)

    def clear_cache(self) -> None:
        """Turn all candidates into blank blocks and empty the index; no block may be in use."""
        assert self.num_used == 0, f"{self.num_used} blocks are in use"
        self._prefix_cache.clear()
        while len(self._policy):
            block = self._policy.pop()
            block.forget()
            self._blank.append(block)

    def _evict(self, num_blocks: int) -> list[Block]:
        started_at = self._clock()
        victims = [self._policy.pop() for _ in range(num_blocks)]
        self._prefix_cache.remove(victims)
        for block in victims:
            block.forget()
        self.evict_count += num_blocks
        self.evict_seconds += self._clock() - started_at
        return victims

    def check_integrity(self, expected_ref_counts: Sequence[int] | None = None) -> None:
        """Raise InternalError unless every block is in exactly one place and the counts agree; O(num_blocks).

        `expected_ref_counts[block_id]` is compared with the counts kept, where the caller knows all users.
        """
        blank = {block.block_id for block in self._blank}
        candidates = {block.block_id for block in self._policy}
        _require(len(blank) == len(self._blank), "a block is blank twice")
        _require(len(candidates) == len(self._policy), "the eviction policy counts its blocks wrongly")
        _require(not blank & candidates, f"blocks {blank & candidates} are both blank and candidates")
        for block in self.blocks:
            is_blank, is_candidate = block.block_id in blank, block.block_id in candidates
            _require(block.ref_count >= 0, f"{block!r} has a negative count")
            _require((block.ref_count == 0) == (is_blank or is_candidate), f"{block!r} is lost or freed in use")
            _require(not is_blank or not block.is_full, f"{block!r} is blank with content")
            _require(not is_candidate or block in self._prefix_cache, f"{block!r} is a candidate but not indexed")
            _require(block.ref_count <= 1 or block.is_full, f"{block!r} is shared but still written")
        for block in self._prefix_cache:
            _require(block in self._prefix_cache, f"{block!r} is indexed under a wrong hash")
            _require(self.blocks[block.block_id] is block, f"{block!r} is indexed but not of this pool")
        if expected_ref_counts is not None:
            for block, expected in zip(self.blocks, expected_ref_counts, strict=True):
                _require(block.ref_count == expected, f"{block!r} should have {expected} users")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InternalError(f"the KV cache is inconsistent: {message}; please report this with the steps before it")
