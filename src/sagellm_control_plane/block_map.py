"""Which engines hold which blocks, and how much of a prompt each of them holds.

A hash table in two numpy arrays: buckets of eight slots, each slot the first 8 bytes of a block's hash and its holder.
All blocks of a prompt are looked up by one gather, so that the misses of the processor's caches overlap: over a million
blocks that is what the time goes into. 24 to 48 bytes a block that one engine holds.

The holder is a row of the fleet, or leads to a set of rows, one integer with bit r for row r; the longest prefix on all
engines at once is then one AND a block. Two blocks whose hashes begin alike are one block here; routing can bear that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WIDTH = 8  # slots of a bucket
_FIRST_BUCKETS = 128
_NOBODY = -1  # rows are 0 and above, sets of rows are numbered downwards from -2
_FIRST_LOOK = 16  # blocks of a prompt that are looked up first, and then four times as many again and again
_FEW = 16  # rows that are counted bit by bit; more of them are counted by numpy


class BlockMap:
    """Sets of blocks by row. Blocks are given by hashes of one length, a multiple of 8 bytes."""

    def __init__(self) -> None:
        self._allocate(_FIRST_BUCKETS)
        self._overflow: dict[int, int] = {}  # holders of the blocks that found their bucket full
        self._sets: list[int] = []
        self._free_sets: list[int] = []
        self._num_held_by: Counter[int] = Counter()
        self._num_distinct = 0
        self.num_held = 0  # pairs of block and row

    def __len__(self) -> int:
        """Distinct blocks."""
        return self._num_distinct

    def num_held_by(self, row: int) -> int:
        """Blocks of one row."""
        return self._num_held_by[row]

    def add(self, row: int, block_hash: bytes) -> bool:
        """Whether the row did not hold the block before."""
        key = _key(block_hash)
        slot, holder = self._find(key)
        if holder == _NOBODY:
            self._insert(key, row)
        elif holder >= 0:
            if holder == row:
                return False
            self._put(key, slot, self._new_set(1 << holder | 1 << row))
        else:
            rows = self._sets[-2 - holder]
            if rows >> row & 1:
                return False
            self._sets[-2 - holder] = rows | 1 << row
        self.num_held += 1
        self._num_held_by[row] += 1
        return True

    def discard(self, row: int, block_hash: bytes) -> bool:
        """Whether the row held the block until now."""
        key = _key(block_hash)
        slot, holder = self._find(key)
        if holder == row:
            self._remove(key, slot)
        elif holder <= -2 and self._sets[-2 - holder] >> row & 1:
            rows = self._sets[-2 - holder] ^ 1 << row
            if rows & (rows - 1):
                self._sets[-2 - holder] = rows
            else:
                self._free_sets.append(-2 - holder)
                self._put(key, slot, rows.bit_length() - 1)
        else:
            return False
        self.num_held -= 1
        self._num_held_by[row] -= 1
        return True

    def clear(self, row: int) -> None:
        """The row holds nothing any more. Looks at every block of the map."""
        if not self._num_held_by[row]:
            return
        holders = self._holders
        alone = holders == row
        self._num_distinct -= int(np.count_nonzero(alone))
        self._keys[alone], holders[alone] = 0, _NOBODY
        shared = np.flatnonzero(holders <= -2)
        for slot, holder in zip(shared.tolist(), holders[shared].tolist(), strict=True):
            if (left := self._without(row, holder)) is not None:
                holders[slot] = left
        for key, holder in list(self._overflow.items()):
            if holder == row:
                del self._overflow[key]
                self._num_distinct -= 1
            elif (left := self._without(row, holder)) is not None:
                self._overflow[key] = left
        self.num_held -= self._num_held_by.pop(row)

    def match(self, block_hashes: Sequence[bytes], size: int) -> NDArray[np.int64]:
        """How many of a prompt's first blocks, without a gap, each of the rows 0 to `size` - 1 holds."""
        counts = np.zeros(size, np.int64)
        holders = self._lookup(block_hashes)
        if not holders:
            return counts
        first = holders[0]
        if first >= 0 and holders.count(first) == len(holders):
            counts[first] = len(holders)
            return counts
        levels, ends = self._levels(holders)
        if levels[0].bit_count() <= _FEW:
            for level, end in zip(levels, ends, strict=True):  # deeper levels overwrite what the higher ones said
                while level:
                    row = level.bit_length() - 1
                    level ^= 1 << row
                    counts[row] = end
            return counts
        width = (levels[0].bit_length() + 7) // 8
        num_rows = min(size, 8 * width)
        if len(levels) == 1:
            bits = np.unpackbits(np.frombuffer(levels[0].to_bytes(width, "little"), np.uint8), bitorder="little")
            np.putmask(counts[:num_rows], bits[:num_rows].view(np.bool_), ends[0])
            return counts
        data = np.frombuffer(b"".join([level.to_bytes(width, "little") for level in levels]), np.uint8)
        bits = np.unpackbits(data.reshape(-1, width), axis=1, bitorder="little")
        num_levels = bits.sum(axis=0, dtype=np.uint8 if len(levels) < 256 else np.int64)
        counts[:num_rows] = np.array([0, *ends])[num_levels[:num_rows]]
        return counts

    # ---- steps of the above ---------------------------------------------------------------------------

    def _lookup(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The holders of the first blocks, up to the first that nobody has.

        Longer and longer parts are looked at, since most prompts share a beginning or nothing with what is cached, and
        the rest of the hashes may not even be made yet.
        """
        if not block_hashes or (first := self._find(_key(block_hashes[0]))[1]) == _NOBODY:
            return []
        holders, end = [first], 1
        while end == len(holders) < len(block_hashes):
            start, end = end, min(max(_FIRST_LOOK, 4 * end), len(block_hashes))
            holders += self._gather(block_hashes[start:end])
        return holders

    def _gather(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The same of blocks all at once."""
        keys = np.frombuffer(b"".join(block_hashes), "<i8")[:: len(block_hashes[0]) // 8]
        buckets = keys & self._mask
        slots = (self._buckets.take(buckets, axis=0) == keys[:, None]).argmax(axis=1)  # in the bucket
        buckets *= _WIDTH
        slots += buckets
        found = self._holders.take(slots)
        np.putmask(found, self._keys.take(slots) != keys, _NOBODY)
        holders: list[int] = found.tolist()
        while _NOBODY in holders:  # unless it is in the overflow
            index = holders.index(_NOBODY)
            holders[index] = self._find(_key(block_hashes[index]))[1]
            if holders[index] == _NOBODY:
                return holders[:index]
        return holders

    def _levels(self, holders: Sequence[int]) -> tuple[list[int], list[int]]:
        """The sets of rows that hold the first 1, 2, ... blocks, each set once, with the most blocks that it holds."""
        levels: list[int] = []
        ends: list[int] = []
        alive = last = 0
        for depth, holder in enumerate(holders):
            if depth and holder == last:
                continue
            rows = 1 << holder if holder >= 0 else self._sets[-2 - holder]
            both = alive & rows if depth else rows
            if both != alive:
                if depth:
                    levels.append(alive)
                    ends.append(depth)
                if not both:
                    return levels, ends
                alive = both
            last = holder
        return [*levels, alive], [*ends, len(holders)]

    def _find(self, key: int) -> tuple[int, int]:
        """Slot (-1: in the overflow) and holder of a block."""
        first = (key & self._mask) * _WIDTH
        bucket = self._keys[first : first + _WIDTH].tolist()
        if key in bucket:
            slot = first + bucket.index(key)
            return slot, int(self._holders[slot])
        return -1, self._overflow.get(key, _NOBODY) if self._overflow else _NOBODY

    def _insert(self, key: int, holder: int) -> None:
        if 2 * self._num_distinct >= len(self._keys):
            self._grow()
        self._num_distinct += 1
        first = (key & self._mask) * _WIDTH
        bucket = self._keys[first : first + _WIDTH].tolist()
        if 0 in bucket:
            slot = first + bucket.index(0)
            self._keys[slot], self._holders[slot] = key, holder
        else:
            self._overflow[key] = holder

    def _put(self, key: int, slot: int, holder: int) -> None:
        if slot >= 0:
            self._holders[slot] = holder
        else:
            self._overflow[key] = holder

    def _remove(self, key: int, slot: int) -> None:
        self._num_distinct -= 1
        if slot >= 0:
            self._keys[slot], self._holders[slot] = 0, _NOBODY
        else:
            del self._overflow[key]

    def _new_set(self, rows: int) -> int:
        if self._free_sets:
            number = self._free_sets.pop()
            self._sets[number] = rows
        else:
            number = len(self._sets)
            self._sets.append(rows)
        return -2 - number

    def _without(self, row: int, holder: int) -> int | None:
        """The holder that takes a set's place when one of two rows leaves it; None where nothing changes its place."""
        if holder > -2 or not self._sets[-2 - holder] >> row & 1:
            return None
        rows = self._sets[-2 - holder] ^ 1 << row
        if rows & (rows - 1):
            self._sets[-2 - holder] = rows
            return None
        self._free_sets.append(-2 - holder)
        return rows.bit_length() - 1

    def _allocate(self, num_buckets: int) -> None:
        self._mask = num_buckets - 1
        self._keys = np.zeros(num_buckets * _WIDTH, np.int64)  # 0: free
        self._buckets = self._keys.reshape(-1, _WIDTH)
        self._holders = np.full(num_buckets * _WIDTH, _NOBODY, np.int32)

    def _grow(self) -> None:
        used = np.flatnonzero(self._keys)
        keys, holders = self._keys[used], self._holders[used]
        if self._overflow:
            keys = np.concatenate([keys, np.fromiter(self._overflow, np.int64, len(self._overflow))])
            holders = np.concatenate([holders, np.fromiter(self._overflow.values(), np.int32, len(self._overflow))])
        self._allocate(2 * (self._mask + 1))
        order = np.argsort(keys & self._mask, kind="stable")
        keys, holders = keys[order], holders[order]
        buckets = keys & self._mask
        places = np.arange(len(keys)) - np.searchsorted(buckets, buckets)  # in the bucket, from 0
        fits = places < _WIDTH
        slots = buckets[fits] * _WIDTH + places[fits]
        self._keys[slots], self._holders[slots] = keys[fits], holders[fits]
        self._overflow = dict(zip(keys[~fits].tolist(), holders[~fits].tolist(), strict=True))


def _key(block_hash: bytes) -> int:
    """The first 8 bytes; 0 would be a free slot."""
    return int.from_bytes(block_hash[:8], "little", signed=True) or 1
