"""`BackendProvider`: all that the engine asks of a device.

A provider answers for exactly one device: what it can do, how much memory is free, where tensors live, which
implementation of each op runs there. It is built once; the op table never changes afterwards. A new backend
subclasses it in one file and is found through the entry-point group `sagellm.backends` (see docs/backend.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import sagellm_backend.reference  # noqa: F401  (registers the ops that every table falls back to)
from sagellm_backend import kv
from sagellm_backend.attention import AttentionMetadata
from sagellm_backend.kv import KVBlockAllocator, KVLayout
from sagellm_backend.ops import OpTable, PackedLinear
from sagellm_backend.streams import Event, HostEvent, HostStream, Stream
from sagellm_protocol import CapabilityDescriptor, DType, InvalidArgumentError, KernelKind, KVBlock, UnsupportedError

Forward = Callable[[Tensor, AttentionMetadata], Tensor]
RowsFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StepWants:
    """What a step is run for: hidden states of all tokens, and of the logits perhaps only where they are largest."""

    hidden: bool = False
    only_best: bool = False


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed.

    `hidden` [T, H] is None where it was not wanted, `logits` [S, V] float32 where there is nothing to sample or where
    `best` (the most probable token of each sampled row, the lowest among equals) was enough.
    """

    hidden: Tensor | None
    logits: Tensor | None
    best: list[int] | None = None


StepFunction = Callable[[Tensor, AttentionMetadata, Tensor, StepWants], StepOutput]
"""(input_ids [T], meta, rows of the tokens to sample [S] int64, what is wanted) -> what was computed."""

# Numbers a token in blocks of `kv_block_alloc` where the caller names no model: K and V of one head of 128.
DEFAULT_KV_ELEMENTS_PER_TOKEN = 256

# The op that a kernel of a kind is, for kinds that are one op.
_OP_OF_KERNEL = {
    KernelKind.LINEAR: "linear",
    KernelKind.EMBEDDING: "embedding",
    KernelKind.NORM: "rms_norm",
    KernelKind.ROTARY: "rotary",
    KernelKind.ACTIVATION: "silu_and_mul",
    KernelKind.ATTENTION: "paged_attention",
    KernelKind.KV_CACHE: "reshape_and_cache",
    KernelKind.MOE: "moe_experts",
}
TABLE_KERNELS = tuple(_OP_OF_KERNEL)
"""Kernel kinds that every op table offers."""


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Memory of a device in bytes; `available_bytes` is what this process may still take."""

    total_bytes: int
    available_bytes: int


class BackendProvider(ABC):
    """One device and its ops. Subclasses set `kind` and implement `capability` and `memory_info`.

    Args:
        device: the torch device that tensors live on.
        ops: the op table, chosen for this device.
        kv_elements_per_token: how many numbers K and V of a token hold in blocks of `kv_block_alloc`
            (2 * layers * KV heads * head size of the model they are for).
    """

    kind: ClassVar[str]
    collective_backend: ClassVar[str | None] = None
    """torch.distributed's backend for this device; None if it has none."""

    def __init__(
        self,
        device: torch.device,
        ops: OpTable,
        *,
        kv_elements_per_token: int = DEFAULT_KV_ELEMENTS_PER_TOKEN,
    ) -> None:
        self.device = device
        self.ops = ops
        self._kernels: dict[tuple[KernelKind, DType | None], Callable[..., Any]] = {}
        self._kv_blocks = KVBlockAllocator(
            device=str(device),
            elements_per_token=kv_elements_per_token,
            limit_bytes=self._kv_limit_bytes,
            reserve=self._kv_reserve(),
        )

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why this backend can't be used here, with the remedy; None if it can. Never raises."""
        return None

    @abstractmethod
    def capability(self) -> CapabilityDescriptor:
        """What the device can do, as found on this machine."""

    @abstractmethod
    def memory_info(self) -> MemoryInfo:
        """The device's memory now."""

    def compute_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Dtype of activations where weights are stored as `weight_dtype`."""
        return weight_dtype

    def compile_step(self, forward: Forward, compute_logits: RowsFunction, hidden_size: int) -> StepFunction:
        """A whole step in the fastest form that computes, to the bit, what the two functions compute.

        `forward(input_ids [T], meta) -> [T, hidden_size]`, `compute_logits([S, hidden_size]) -> [S, V]` float32. The
        form may hold the addresses of weights and caches, and runs one step at a time. Here: one after the other.
        """
        del hidden_size

        def run(input_ids: Tensor, meta: AttentionMetadata, samples: Tensor, want: StepWants) -> StepOutput:
            hidden = forward(input_ids, meta)
            return StepOutput(hidden, compute_logits(hidden[samples]) if len(samples) else None)

        return run

    @property
    def packed_layout(self) -> str | None:
        """The name of the form that weights are packed in; None where packing is too cheap to be worth keeping."""
        return None

    def restore_packed(self, buffers: dict[str, Tensor], description: dict[str, Any]) -> PackedLinear:
        """The packed weight that `PackedLinear.to_buffers` took apart, where `packed_layout` is the same."""
        raise UnsupportedError(f"backend {self.kind!r} does not keep packed weights")

    def compile_rows(self, function: RowsFunction, width: int) -> RowsFunction:
        """As `compile_step` for a function of rows: `function(x [R, width]) -> [R, ...]`."""
        del width
        return function

    def allocate_kv_cache(self, layout: KVLayout, num_blocks: int) -> list[Tensor]:
        """One zeroed tensor `[2, num_blocks, num_kv_heads, block_size, head_dim]` a layer."""
        multiple = self.capability().block_size_multiple
        if layout.block_size % multiple:
            raise InvalidArgumentError(
                f"block_size must be a multiple of {multiple} on {self.device}, got {layout.block_size}",
                field="block_size",
            )
        return kv.allocate_kv_cache(layout, num_blocks, self.device)

    def create_stream(self) -> Stream:
        """A new queue of work on the device."""
        return HostStream()

    def create_event(self) -> Event:
        """A new event; timing is on."""
        return HostEvent()

    def synchronize(self) -> None:
        """Wait for all work on the device; returns at once on devices that work synchronously."""
        return

    def copy(self, tensor: Tensor, device: torch.device | str | None = None, *, non_blocking: bool = False) -> Tensor:
        """A copy of `tensor` on `device` (default: this provider's); never the tensor itself."""
        target = self.device if device is None else torch.device(device)
        return tensor.to(target, non_blocking=non_blocking, copy=True)

    def kv_block_alloc(self, num_tokens: int, dtype: DType) -> KVBlock:
        """KV memory for `num_tokens` tokens; raises ResourceExhaustedError, or UnsupportedError for the dtype."""
        self._check_dtype(dtype)
        return self._kv_blocks.allocate(num_tokens, dtype)

    def kv_block_free(self, block: KVBlock) -> None:
        """Give a block back; freeing a block twice or one of another provider raises InvalidArgumentError."""
        self._kv_blocks.free(block)

    def kv_block_memory(self, block: KVBlock) -> Tensor:
        """The bytes behind a live block, uint8 `[nbytes]` on the device."""
        return self._kv_blocks.memory(block)

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of the blocks that `kv_block_alloc` handed out and nobody gave back."""
        return self._kv_blocks.used_bytes

    def register_kernel(self, kind: KernelKind, kernel: Callable[..., Any], *, dtype: DType | None = None) -> None:
        """Offer `kernel` for a kind, for one dtype or (None) for all that have none of their own."""
        self._kernels[KernelKind(kind), dtype] = kernel

    def get_kernel(self, kind: KernelKind, dtype: DType | None = None) -> Callable[..., Any]:
        """The kernel for a kind: registered for the dtype, registered for all, else the op table's op."""
        kind = KernelKind(kind)
        if dtype is not None:
            self._check_dtype(dtype)
        for key in ((kind, dtype), (kind, None)):
            if key in self._kernels:
                return self._kernels[key]
        if kind in _OP_OF_KERNEL:
            return self.ops.get(_OP_OF_KERNEL[kind])
        offered = sorted({*(k.value for k, _ in self._kernels), *(k.value for k in TABLE_KERNELS)})
        raise UnsupportedError(
            f"backend {self.kind!r} has no kernel of kind {kind.value!r}; it has {', '.join(offered)}",
            kernel=kind.value,
        )

    def _check_dtype(self, dtype: DType) -> None:
        supported = self.capability().supported_dtypes
        if dtype not in supported:
            known = ", ".join(member.value for member in supported)
            raise UnsupportedError(
                f"backend {self.kind!r} does not support dtype {dtype.value}; use one of {known}",
                field="dtype",
                dtype=dtype.value,
            )

    def _kv_limit_bytes(self) -> int:
        return self.memory_info().available_bytes

    def _kv_reserve(self) -> Callable[[int], Tensor] | None:
        """How the memory behind a block is made; None for providers that only keep account."""
        return lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8, device=self.device)


def parse_device(name: str) -> torch.device:
    """The torch device of a name such as "cuda:1"; InvalidArgumentError where it is none."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidArgumentError(f"{name!r} is no device: use cpu, cuda:0, npu:0, ...", field="device") from error
