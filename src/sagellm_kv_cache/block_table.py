"""`BlockTables`: the block ids of all requests in one numpy array, and the slots that follow from them.

Kept from step to step, so that the arrays of a step are made by a few numpy calls, never by a loop over tokens.
A slot is one token's place in the KV tensors: `block_id * block_size + offset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sagellm_kv_cache.block import Block
from sagellm_protocol import InternalError, ResourceExhaustedError

Integers: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


class BlockTables:
    """`max_num_requests` rows of up to `max_blocks_per_request` int32 block ids; unused entries are 0."""

    def __init__(self, max_num_requests: int, max_blocks_per_request: int, block_size: int) -> None:
        self.block_size = block_size
        self._table = np.zeros((max_num_requests, max_blocks_per_request), dtype=np.int32)
        self._flat = self._table.reshape(-1)
        self._num_blocks = np.zeros(max_num_requests, dtype=np.int64)
        self._free_rows = list(range(max_num_requests - 1, -1, -1))

    def add_row(self) -> int:
        """An empty row for one request; ResourceExhaustedError if all are taken."""
        if not self._free_rows:
            raise ResourceExhaustedError(
                f"all {len(self._table)} rows of the block tables are taken; raise the number of concurrent requests"
            )
        return self._free_rows.pop()

    def free_row(self, row: int) -> None:
        """Give a row back, emptied."""
        assert row not in self._free_rows, f"row {row} is free already"
        self.clear(row)
        self._free_rows.append(row)

    def clear(self, row: int) -> None:
        """Empty a row whose request was freed but keeps its place."""
        self._table[row, : self._num_blocks[row]] = 0
        self._num_blocks[row] = 0

    def append(self, row: int, block_ids: Sequence[int]) -> None:
        """Add blocks at the end of a row."""
        start = int(self._num_blocks[row])
        end = start + len(block_ids)
        if end > self._table.shape[1]:
            raise InternalError(f"row {row} would hold {end} blocks of at most {self._table.shape[1]} a request")
        self._table[row, start:end] = block_ids
        self._num_blocks[row] = end

    def extend_to(self, row: int, blocks: Sequence[Block]) -> None:
        """Add those of a request's blocks that the row does not have yet; the first ones must be the same."""
        known = int(self._num_blocks[row])
        if known < len(blocks):
            self.append(row, [block.block_id for block in blocks[known:]])

    def num_blocks(self, row: int) -> int:
        """How many blocks a row holds."""
        return int(self._num_blocks[row])

    def rows(self, row_ids: Integers, width: int | None = None) -> NDArray[np.int32]:
        """A copy of these rows, [R, width]: cut to the first `width` blocks, by default to the longest of them."""
        row_ids = np.asarray(row_ids, dtype=np.int64)
        if width is None:
            width = int(self._num_blocks[row_ids].max(initial=0))
        picked: NDArray[np.int32] = self._table[row_ids, :width]
        return picked

    def slots(self, row: int, start: int, end: int) -> NDArray[np.int64]:
        """The slots of tokens `start` to `end` of one row, [end - start]."""
        return self.slots_batch([row], [start], [end - start])

    def slots_batch(self, rows: Integers, starts: Integers, counts: Integers) -> NDArray[np.int64]:
        """The slots of tokens `starts[i]` to `starts[i] + counts[i]` of row `rows[i]`, one after the other.

        rows, starts, counts: [R] integers. Returns [sum(counts)] int64, the `slot_mapping` of a step.
        """
        rows, starts, counts = (np.asarray(a, dtype=np.int64) for a in (rows, starts, counts))
        if (starts + counts > self._num_blocks[rows] * self.block_size).any():
            raise InternalError("slots asked for beyond the blocks of a row; allocate_slots comes first")
        first_entries = rows * self._table.shape[1]
        positions = starts
        if counts.size and (counts.min() != 1 or counts.max() != 1):  # else a step of decodes, one token a row
            before = np.cumsum(counts) - counts
            positions = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - before, counts)
            first_entries = np.repeat(first_entries, counts)
        indices = positions // self.block_size
        # block_id * block_size + position % block_size, with one division
        slots: NDArray[np.int64] = (self._flat[first_entries + indices] - indices) * self.block_size + positions
        return slots
