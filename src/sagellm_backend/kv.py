"""The paged KV cache in bytes and tensors: `KVLayout`, its allocation, and accounted single blocks.

Two users: the engine's worker takes one large tensor a layer (`allocate_kv_cache`) and pages it itself;
everything else (transfer, tools, tests) asks a provider for single accounted blocks (`KVBlockAllocator`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sagellm_protocol import DType, InvalidArgumentError, KVBlock, KVErrorCode, ResourceExhaustedError

_SCALE_BYTES = torch.float32.itemsize


def entry_size(head_dim: int, dtype: torch.dtype) -> int:
    """The last dimension of a cache: head_dim, in an int8 cache with a float32 scale behind the codes."""
    return head_dim + _SCALE_BYTES if dtype is torch.int8 else head_dim


def cached_head_dim(kv_cache: Tensor) -> int:
    """The head_dim of a cache `[2, num_blocks, num_kv_heads, block_size, entry_size]`."""
    return kv_cache.shape[-1] - entry_size(0, kv_cache.dtype)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of a model's KV cache: `[2, num_blocks, num_kv_heads, block_size, entry_size]` a layer, 0 = K, 1 = V.

    An entry holds head_dim numbers of `dtype`; torch.int8 means codes with a float32 scale an entry (see `entry_size`).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens a block
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidArgumentError(f"KVLayout.{name} must be at least 1, got {value}", field=name)

    @property
    def entry_size(self) -> int:
        """Numbers of `dtype` that the key or the value of one token and head takes, scale included."""
        return entry_size(self.head_dim, self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that K and V of one token take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.entry_size * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes over all layers."""
        return self.bytes_per_token * self.block_size

    def layer_shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's tensor."""
        return (2, num_blocks, self.num_kv_heads, self.block_size, self.entry_size)


def allocate_kv_cache(layout: KVLayout, num_blocks: int, device: torch.device) -> list[Tensor]:
    """One zeroed tensor a layer. Zeroed because attention multiplies unwritten values by a weight of exactly 0."""
    if num_blocks < 1:
        raise InvalidArgumentError(f"num_blocks must be at least 1, got {num_blocks}", field="num_blocks")
    shape = layout.layer_shape(num_blocks)
    return [_zeros(shape, layout.dtype, device) for _ in range(layout.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they are fresh pages that the system fills when they are first used.

    Writing gigabytes of zeros would take seconds of every start, and most requests never touch most of a cache.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVBlockAllocator:
    """Hands out single KV blocks and keeps account of them: ids, bytes, double frees.

    `elements_per_token` is how many numbers K and V of one token hold over all layers; `limit_bytes` says how
    many bytes may still be taken; `reserve`, where given, makes the memory behind a block.
    """

    def __init__(
        self,
        *,
        device: str,
        elements_per_token: int,
        limit_bytes: Callable[[], int],
        reserve: Callable[[int], Tensor] | None = None,
    ) -> None:
        if elements_per_token < 1:
            raise InvalidArgumentError(
                f"kv_elements_per_token must be at least 1, got {elements_per_token}", field="kv_elements_per_token"
            )
        self._device = device
        self._elements_per_token = elements_per_token
        self._limit_bytes = limit_bytes
        self._reserve = reserve
        self._live: dict[int, KVBlock] = {}
        self._memory: dict[int, Tensor] = {}
        self._next_id = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all live blocks."""
        return sum(block.nbytes for block in self._live.values())

    @property
    def num_blocks(self) -> int:
        """Blocks handed out and not yet given back."""
        return len(self._live)

    def allocate(self, num_tokens: int, dtype: DType) -> KVBlock:
        """A block for `num_tokens` tokens; raises ResourceExhaustedError if the device has too little memory."""
        if num_tokens < 1:
            raise InvalidArgumentError(f"num_tokens must be at least 1, got {num_tokens}", field="num_tokens")
        nbytes = dtype.nbytes(num_tokens * self._elements_per_token)
        limit = self._limit_bytes()
        if nbytes > limit:
            raise ResourceExhaustedError(
                f"a KV block of {num_tokens} tokens needs {nbytes} bytes, {self._device} has {limit} left; "
                "free blocks or ask for fewer tokens",
                kv_code=KVErrorCode.OUT_OF_BLOCKS.value,
                needed_bytes=nbytes,
                available_bytes=limit,
            )
        block = KVBlock(block_id=self._next_id, num_tokens=num_tokens, dtype=dtype, nbytes=nbytes, device=self._device)
        if self._reserve is not None:
            self._memory[block.block_id] = self._reserve(nbytes)
        self._live[block.block_id] = block
        self._next_id += 1
        return block

    def free(self, block: KVBlock) -> None:
        """Take a block back; a block that is not live here is an error that says whether it ever was."""
        if self._live.get(block.block_id) != block:
            was_ours = block.block_id < self._next_id and block.device == self._device
            code = KVErrorCode.DOUBLE_FREE if was_ours else KVErrorCode.BLOCK_NOT_FOUND
            what = "was freed before" if was_ours else "was not allocated by this backend"
            raise InvalidArgumentError(f"KV block {block.block_id} {what}", field="block", kv_code=code.value)
        del self._live[block.block_id]
        self._memory.pop(block.block_id, None)

    def memory(self, block: KVBlock) -> Tensor:
        """The bytes behind a live block, uint8 `[nbytes]` on the backend's device."""
        if block.block_id not in self._memory or self._live.get(block.block_id) != block:
            raise InvalidArgumentError(
                f"KV block {block.block_id} has no memory here: it was freed, or this backend only keeps account",
                field="block",
                kv_code=KVErrorCode.BLOCK_NOT_FOUND.value,
            )
        return self._memory[block.block_id]
