"""The least of many things whose keys mostly grow."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
K = TypeVar("K", bound="tuple[object, ...]")

_SPARE = 64  # entries of things that were discarded, before the heap is cleared of them


class LazyHeap(Generic[T, K]):
    """A heap of things, each under a key that it had once: brought up to date when it comes to the top.

    So a key that grows costs nothing until it matters. Whoever owns the heap puts a thing in again when its key becomes
    less, and discards what is no longer there.
    """

    def __init__(self, key_of: Callable[[T], K]) -> None:
        """`key_of` tells the present key of a thing that was put in and not discarded."""
        self._key_of = key_of
        self._filed: dict[T, K] = {}
        self._heap: list[tuple[K, int, T]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._filed)

    def put(self, item: T) -> None:
        """It is there, or its key has become less."""
        key, filed = self._key_of(item), self._filed.get(item)
        if filed is None or key < filed:
            self._filed[item] = key
            heappush(self._heap, (key, next(self._numbers), item))
            if len(self._heap) > 2 * len(self._filed) + _SPARE:
                self._heap = [(key, next(self._numbers), item) for item, key in self._filed.items()]
                heapify(self._heap)

    def discard(self, item: T) -> None:
        """It is no longer there."""
        self._filed.pop(item, None)

    def first(self) -> T | None:
        """The thing with the least key; None where there is none."""
        heap = self._heap
        while heap:
            filed, number, item = heap[0]
            if self._filed.get(item) != filed:
                heappop(heap)
                continue
            key = self._key_of(item)
            if key == filed:
                return item
            self._filed[item] = key
            heapreplace(heap, (key, number, item))
        return None
