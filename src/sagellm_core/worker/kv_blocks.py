"""KV blocks as bytes: out of a worker's cache and into another's.

A block's bytes are those of its part of every layer's tensor, layer by layer, keys before values, in whatever order the
kernels keep them within it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagellm_backend.kv import cached_head_dim


def bytes_per_block(kv_caches: Sequence[Tensor]) -> int:
    """Bytes that one block takes over all layers."""
    return sum(cache[:, 0].numel() * cache.element_size() for cache in kv_caches)


def describe_layout(kv_caches: Sequence[Tensor]) -> str:
    """What decides where a number stands."""
    cache = kv_caches[0]
    _, _, num_kv_heads, block_size, _ = cache.shape
    dtype = str(cache.dtype).removeprefix("torch.")
    entries = f"{num_kv_heads} KV heads of {cached_head_dim(cache)} {dtype}"
    return f"{len(kv_caches)} layers, {entries}, {block_size} tokens a block"


@torch.inference_mode()
def read_blocks(kv_caches: Sequence[Tensor], block_ids: Sequence[int]) -> bytes:
    """The content of these blocks, one after the other."""
    index = torch.tensor(block_ids, dtype=torch.long, device=kv_caches[0].device)
    parts = [cache.index_select(1, index).transpose(0, 1) for cache in kv_caches]  # [blocks, 2, heads, tokens, numbers]
    blocks = torch.stack(parts, dim=1).cpu().view(torch.uint8)
    return blocks.numpy().tobytes()


@torch.inference_mode()
def write_blocks(kv_caches: Sequence[Tensor], block_ids: Sequence[int], data: memoryview) -> None:
    """Fill these blocks with what `read_blocks` returned."""
    first = kv_caches[0]
    index = torch.tensor(block_ids, dtype=torch.long, device=first.device)
    shape = (len(block_ids), len(kv_caches), 2, *first.shape[2:])
    blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(first.dtype).view(shape).to(first.device)
    for layer, cache in enumerate(kv_caches):
        cache.index_copy_(1, index, blocks[:, layer].transpose(0, 1))
