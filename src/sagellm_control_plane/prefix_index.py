"""The exact index of what every engine has cached, fed by the engines' own block events.

An engine numbers its events from 0 and names its present life by an epoch. The index follows each engine and knows
at any moment whether it is in step:

    a gap in the numbers, dropped events, another epoch  ->  out of step: the row is emptied at once
    another digest (count and xor of all cached hashes)  ->  out of step, found with the next report
    `AllBlocksCleared`, with which every snapshot begins ->  in step again, whatever was lost before

So a lost event never leaves credit for blocks that are gone longer than one report takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.block_map import BlockMap
from sagellm_kv_cache.events import AllBlocksCleared, BlockStored, CacheDigest, EventBatch, KVCacheEvent
from sagellm_kv_cache.hashing import digest_of


@dataclass(slots=True)
class _Row:
    """What is known of one engine's event stream. Count and xor are those of the events: see `CacheDigest`."""

    epoch: str
    next_sequence: int = 0  # -1: out of step
    num_blocks: int = 0
    xor: int = 0

    def lose(self) -> None:
        """Something is missing: nothing that is known holds."""
        self.next_sequence, self.num_blocks, self.xor = -1, 0, 0


class PrefixIndex:
    """Which blocks each row of the fleet has cached. `max_num_blocks` bounds the sum over all rows.

    A full index learns no further blocks: a match may then be shorter than the truth, never longer.
    """

    def __init__(self, max_num_blocks: int = 4_000_000) -> None:
        self.max_num_blocks = max_num_blocks
        self._map = BlockMap()
        self._rows: dict[int, _Row] = {}

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._map)

    @property
    def num_held(self) -> int:
        """Blocks known, those of several engines as often."""
        return self._map.num_held

    def num_blocks(self, row: int) -> int:
        """Blocks known of one engine."""
        return self._map.num_held_by(row)

    def follows(self, row: int) -> bool:
        """Whether the engine of a row tells of its cache at all."""
        return row in self._rows

    def apply(self, row: int, epoch: str, batch: EventBatch) -> bool:
        """Follow an engine's events; whether the row is in step. Where it is not, apply a snapshot, with its epoch.

        Batches may come twice or late: what is known already is skipped.
        """
        state = self._rows.get(row)
        if state is None or state.epoch != epoch:
            self._map.clear(row)
            state = self._rows[row] = _Row(epoch)
        events = self._unseen(state, batch)
        if events is None:
            self._map.clear(row)
            state.lose()
            return False
        for event in events:
            self._apply(row, state, event)
        return True

    def check(self, row: int, digest: CacheDigest) -> bool:
        """Whether the row is in step and its events add up to what the engine has; if not it is emptied."""
        state = self._rows.get(row)
        if state is None or state.next_sequence < 0:
            return False
        if (state.num_blocks, state.xor) == (digest.num_blocks, digest.xor):
            return True
        self._map.clear(row)
        state.lose()
        return False

    def reset(self, row: int) -> None:
        """Forget an engine: it has died, left or been replaced."""
        self._map.clear(row)
        self._rows.pop(row, None)

    def match(self, block_hashes: Sequence[bytes], size: int) -> NDArray[np.int64]:
        """How many of a prompt's first blocks each of the rows 0 to `size` - 1 has cached."""
        return self._map.match(block_hashes, size)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _unseen(self, state: _Row, batch: EventBatch) -> Sequence[KVCacheEvent] | None:
        """The events that are still to apply; None where some before them are missing."""
        expected, events = state.next_sequence, batch.events
        is_gapless = expected >= 0 and batch.sequence <= expected
        if is_gapless and batch.next_sequence <= expected:
            return ()
        first = expected - batch.sequence if is_gapless else None
        for index in range(len(events) - 1, -1 if first is None else first, -1):
            if isinstance(events[index], AllBlocksCleared):
                first = index
                break
        if first is None:
            return None
        state.next_sequence = batch.next_sequence
        return events[first:]

    def _apply(self, row: int, state: _Row, event: KVCacheEvent) -> None:
        if isinstance(event, AllBlocksCleared):
            self._map.clear(row)
            state.num_blocks = state.xor = 0
            return
        is_stored = isinstance(event, BlockStored)
        state.num_blocks += len(event.hashes) if is_stored else -len(event.hashes)
        for block_hash in event.hashes:
            state.xor ^= digest_of(block_hash)
            if not is_stored:
                self._map.discard(row, block_hash)
            elif self._map.num_held < self.max_num_blocks:
                self._map.add(row, block_hash)
