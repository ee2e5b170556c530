"""Memory in large pages for what is read from end to end at every step: weights and KV caches.

With pages of 4 KiB a core looks up an address every few hundred nanoseconds of a stream. Linux gives pages of 2 MiB to
memory that asks for them (madvise, MADV_HUGEPAGE) and is aligned to them; elsewhere this is ordinary memory.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 32 * _PAGE
_LINE = 64


class Arena:
    """Tensors from chunks of large pages, so that small ones share a page. A chunk goes with its last tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor that starts on a cache line."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                self._chunk = _large_pages(max(num_bytes, _CHUNK))
                self._used = 0
            start = self._used
            self._used = start + -(-num_bytes // _LINE) * _LINE
            memory = self._chunk[start : start + num_bytes]
        return memory.view(dtype).view(shape)


def _large_pages(num_bytes: int) -> Tensor:
    """At least that many bytes, aligned to a large page."""
    size = -(-num_bytes // _PAGE) * _PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + size]


WEIGHTS = Arena()
"""Where packed weights lie."""
