"""What engines that tell nothing of their cache probably hold: the prompts that were sent to them.

A prompt is cut into blocks, named by a chain of hashes over its UTF-8 (or by the hashes of its tokens, where those are
known), and remembered for the engine it went to; the least recently used blocks are forgotten first, ends of prompts
before their beginnings. An engine may have evicted what is remembered here, so a match is a guess.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.block_map import BlockMap

TEXT_BLOCK_BYTES = 512  # about 128 tokens of English
_MAX_TEXT_BLOCKS = 2048  # of one prompt; what follows says little about where its beginning lies


class TextIndex:
    """Prompts by the row that they went to. `max_blocks_per_row` bounds the memory of each."""

    def __init__(self, max_blocks_per_row: int = 16_384) -> None:
        self.max_blocks_per_row = max_blocks_per_row
        self._map = BlockMap()
        self._recent: dict[int, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        """Blocks remembered, those of several rows as often."""
        return self._map.num_held

    def record(self, row: int, keys: Sequence[bytes]) -> None:
        """A prompt of these blocks goes to the engine of a row."""
        recent = self._recent.setdefault(row, OrderedDict())
        for key in reversed(keys[: self.max_blocks_per_row]):  # its beginning is the most recent: others may share it
            self._map.add(row, key)
            recent[key] = None
            recent.move_to_end(key)
        while len(recent) > self.max_blocks_per_row:
            self._map.discard(row, recent.popitem(last=False)[0])

    def reset(self, row: int) -> None:
        """Forget an engine."""
        self._recent.pop(row, None)
        self._map.clear(row)

    def match(self, keys: Sequence[bytes], size: int) -> NDArray[np.int64]:
        """How many of a prompt's first blocks went to each of the rows 0 to `size` - 1 before."""
        return self._map.match(keys, size)


def text_keys(text: str) -> list[bytes]:
    """The blocks of a text: each named by itself and all before it. A rest shorter than a block counts as one."""
    data = text.encode("utf-8", "surrogatepass")[: TEXT_BLOCK_BYTES * _MAX_TEXT_BLOCKS]
    keys, parent = [], b""
    for start in range(0, len(data), TEXT_BLOCK_BYTES):
        parent = blake2b(parent + data[start : start + TEXT_BLOCK_BYTES], digest_size=8).digest()
        keys.append(parent)
    return keys
