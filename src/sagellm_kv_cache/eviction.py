"""Which cached content is given up first when new blocks are needed.

A policy holds the *candidates*: blocks that no request uses but that a later request could still hit. Blocks
without content never come here; the pool hands those out first. Each policy must evict a sequence from its tail:
a block is worth nothing once its predecessor is gone, since lookups walk from the start. All of these do, because
a request frees its blocks last one first and everything weighed here is at least as high for the predecessor.

A new policy is a class and a line in `EVICTION_POLICIES`; one from elsewhere is passed to the manager as an object.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from sagellm_kv_cache.block import Block, FreeBlockQueue
from sagellm_protocol import InvalidArgumentError


class EvictionPolicy(ABC):
    """The set of free-but-cached blocks, and the order in which they lose their content."""

    @abstractmethod
    def add(self, block: Block) -> None:
        """A cached block's last user has left: it may be evicted from now on."""

    @abstractmethod
    def remove(self, block: Block) -> None:
        """A candidate was hit and is in use again."""

    @abstractmethod
    def pop(self) -> Block:
        """Take out the block to evict next; IndexError if there is none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """The candidates in eviction order; may cost O(n log n), for inspection only."""


class LRUPolicy(EvictionPolicy):
    """Least recently freed first. Every operation is O(1)."""

    def __init__(self) -> None:
        self._queue = FreeBlockQueue()

    def add(self, block: Block) -> None:
        self._queue.append(block)

    def remove(self, block: Block) -> None:
        self._queue.remove(block)

    def pop(self) -> Block:
        return self._queue.popleft()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._queue)


class HeapPolicy(EvictionPolicy):
    """Lowest `value` first, the longest free among equals; O(log n).

    A removed block leaves its heap entry behind, recognised by a stale ticket; the heap is rebuilt when most of it
    is stale. `floor` is the value of the last block evicted: a policy that adds it ages old values (Young, "The
    k-server dual and loose competitiveness for paging", 1994), so that what was popular once is not kept forever.
    """

    _SLACK = 64

    def __init__(self) -> None:
        self.floor = 0.0
        self._heap: list[tuple[float, int, Block]] = []
        self._size = 0
        self._last_ticket = 0

    @abstractmethod
    def value(self, block: Block) -> float:
        """What keeping the block is worth; read once, when it becomes free."""

    def add(self, block: Block) -> None:
        assert block.ticket == 0, f"{block!r} is a candidate already"
        self._last_ticket += 1
        block.ticket = self._last_ticket
        self._size += 1
        heapq.heappush(self._heap, (self.value(block), block.ticket, block))

    def remove(self, block: Block) -> None:
        assert block.ticket != 0, f"{block!r} is no candidate"
        block.ticket = 0
        self._size -= 1
        if len(self._heap) > 2 * self._size + self._SLACK:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].ticket]
            heapq.heapify(self._heap)

    def pop(self) -> Block:
        while True:
            value, ticket, block = heapq.heappop(self._heap)
            if ticket == block.ticket:
                break
        block.ticket = 0
        self._size -= 1
        self.floor = value
        return block

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Block]:
        live = (entry for entry in self._heap if entry[1] == entry[2].ticket)
        return (block for _, _, block in sorted(live, key=lambda entry: entry[:2]))


class LFUPolicy(HeapPolicy):
    """Least frequently hit first, with dynamic aging (LFU-DA: Arlitt et al., "Evaluating content management
    techniques for Web proxy caches", 2000)."""

    def value(self, block: Block) -> float:
        return self.floor + 1 + block.hit_count


class PriorityPolicy(HeapPolicy):
    """Lowest retention first (`KVCacheManager.free(request, retention=...)`), least recently freed among equals."""

    def value(self, block: Block) -> float:
        return block.retention


class CostPolicy(HeapPolicy):
    """Cheapest to compute again first, weighed by hits and aged (GreedyDual-Size-Frequency: Cherkasova, 1998; all
    blocks have one size).

    A token's cost is 1 for the matrix products plus context / 8192 for attention, taken over the longest sequence
    that held the block: one cost for all its blocks, so that ties fall to the tail. For a decoder of hidden size h
    the two parts are equal at about 6 h tokens of context; 8192 stands for models of one to two billion parameters.
    """

    BALANCE_TOKENS = 8192

    def value(self, block: Block) -> float:
        return self.floor + (1 + block.hit_count) * (1 + block.sequence_tokens / self.BALANCE_TOKENS)


EVICTION_POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {
        "lru": LRUPolicy,
        "lfu": LFUPolicy,
        "priority": PriorityPolicy,
        "cost": CostPolicy,
    }
)


def create_eviction_policy(name: str) -> EvictionPolicy:
    """A fresh policy by its registered name."""
    if name not in EVICTION_POLICIES:
        known = ", ".join(sorted(EVICTION_POLICIES))
        raise InvalidArgumentError(f"unknown eviction policy {name!r}; choose one of {known}", field="eviction_policy")
    return EVICTION_POLICIES[name]()
