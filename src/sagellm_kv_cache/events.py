"""What happened to the prefix cache, for those outside who keep a copy of its index (routers, planners).

Events are numbered without gaps from 0. The queue between the cache and its reader is bounded by the number of
blocks it speaks of: when the reader is slow the oldest events are dropped, `EventBatch.num_dropped` says so, and the
reader takes a full copy with `KVCacheManager.resync_events()`, which starts with `AllBlocksCleared`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A run of consecutive blocks of one sequence entered the cache.

    `hashes[0]` follows `parent_hash` (`hashing.root_hash(...)` for the start of a sequence), each other hash the one
    before it. `token_ids` are the tokens of all of them: `len(hashes) * block_size`.
    """

    hashes: tuple[bytes, ...]
    parent_hash: bytes
    token_ids: tuple[int, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These blocks were evicted."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is cached any more."""


KVCacheEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events in order. `events[i]` has the number `sequence + i`; `num_dropped` were lost just before `sequence`."""

    sequence: int
    events: tuple[KVCacheEvent, ...]
    num_dropped: int = 0

    @property
    def next_sequence(self) -> int:
        """The number that the first event of the next batch has if nothing is lost."""
        return self.sequence + len(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[KVCacheEvent]:
        return iter(self.events)


@dataclass(frozen=True, slots=True)
class CacheDigest:
    """What a reader's copy of the index must add up to: the cached blocks, and their hashes' first 8 bytes xored."""

    num_blocks: int = 0
    xor: int = 0  # of the bytes as little-endian numbers


class EventQueue:
    """A bounded queue of events. `capacity` counts blocks spoken of; 0 turns the queue off."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._events: deque[KVCacheEvent] = deque()
        self._num_blocks = 0
        self._next_sequence = 0
        self._num_dropped = 0

    def __len__(self) -> int:
        return len(self._events)

    def resize(self, capacity: int) -> None:
        """Change the capacity; what is queued is dropped, as a reader who begins now must ask for all anyway."""
        self.capacity = capacity
        self._clear()

    @property
    def is_enabled(self) -> bool:
        """Whether anybody wants events; building them is skipped otherwise."""
        return self.capacity > 0

    def put(self, event: KVCacheEvent) -> None:
        """Append an event and drop the oldest while the queue is over its capacity."""
        self._events.append(event)
        self._num_blocks += _weight(event)
        self._next_sequence += 1
        while self._num_blocks > self.capacity:
            self._num_blocks -= _weight(self._events.popleft())
            self._num_dropped += 1

    def take(self) -> EventBatch:
        """All queued events; the queue is empty afterwards."""
        batch = EventBatch(self._next_sequence - len(self._events), tuple(self._events), self._num_dropped)
        self._clear()
        return batch

    def replace(self, events: Sequence[KVCacheEvent]) -> EventBatch:
        """A batch of `events` in place of whatever is queued, whose effect they must contain; any number of them."""
        batch = EventBatch(self._next_sequence, tuple(events))
        self._next_sequence = batch.next_sequence
        self._clear()
        return batch

    def _clear(self) -> None:
        self._events.clear()
        self._num_blocks = 0
        self._num_dropped = 0


def _weight(event: KVCacheEvent) -> int:
    return 1 if isinstance(event, AllBlocksCleared) else len(event.hashes)
