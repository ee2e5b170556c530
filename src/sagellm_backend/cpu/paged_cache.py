"""Which KV caches the kernels keep in their own order, and what they must know about one."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm_backend.kv import cached_head_dim

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_LANES = 16


def kernel_cache(kv_cache: Tensor) -> tuple[int, int, int, int, int, int] | None:
    """(address, num_blocks, num_kv_heads, head_dim, block_size, type), or None for a cache the reference ops keep.

    Within one (block, KV head) the kernels order the numbers as they read them (csrc/cpu/kv_cache.h), so whoever
    writes a cache must also read it. That is why the answer depends on nothing but the cache.
    """
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    head_dim = cached_head_dim(kv_cache)
    fits = head_dim % _LANES == 0 and block_size % _LANES == 0 and kv_cache.is_contiguous()
    if not fits or kv_cache.dtype not in _TYPES:
        return None
    return kv_cache.data_ptr(), num_blocks, num_kv_heads, head_dim, block_size, _TYPES[kv_cache.dtype]
