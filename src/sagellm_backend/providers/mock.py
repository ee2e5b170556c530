"""The mock backend: any capability, no hardware; for tests of what chooses, checks and refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sagellm_backend.ops import OpTable
from sagellm_backend.provider import (
    DEFAULT_KV_ELEMENTS_PER_TOKEN,
    TABLE_KERNELS,
    BackendProvider,
    MemoryInfo,
    parse_device,
)
from sagellm_backend.streams import HostEvent, HostStream
from sagellm_protocol import CapabilityDescriptor, DType, KernelKind, UnsupportedError


class MockBackendProvider(BackendProvider):
    """A device that claims what it is told to and fails fast on everything else.

    Ops are the torch reference on the CPU, so that an engine really runs on it. KV blocks are accounted against
    `total_memory_bytes`, without memory behind them.

    Args:
        supported_dtypes: dtypes that `kv_block_alloc` and `get_kernel` accept.
        has_collective, has_stream, has_event, has_graph_exec: what the capability claims; `create_stream` and
            `create_event` raise UnsupportedError where claimed absent.
        supported_kernels: kinds that `get_kernel` knows beside registered ones.
        total_memory_bytes: the device's memory.
        device_name, compute_capability, device_count, isa, block_size_multiple: as in CapabilityDescriptor.
        kv_elements_per_token: see `BackendProvider`.
        device: a torch device for the ops.
    """

    kind = "mock"

    def __init__(
        self,
        supported_dtypes: Sequence[DType] = (DType.FP32, DType.FP16, DType.BF16),
        has_collective: bool = False,
        *,
        has_stream: bool = True,
        has_event: bool = True,
        has_graph_exec: bool = False,
        supported_kernels: Sequence[KernelKind] = TABLE_KERNELS,
        total_memory_bytes: int = 16 * 2**30,
        device_name: str = "mock device",
        compute_capability: str | None = None,
        device_count: int = 1,
        isa: Sequence[str] = (),
        block_size_multiple: int = 1,
        kv_elements_per_token: int = DEFAULT_KV_ELEMENTS_PER_TOKEN,
        device: str = "cpu",
    ) -> None:
        self._claims = CapabilityDescriptor(
            device_name=device_name,
            device_type=self.kind,
            compute_capability=compute_capability,
            total_memory_bytes=total_memory_bytes,
            available_memory_bytes=total_memory_bytes,
            supported_dtypes=tuple(supported_dtypes),
            supported_kernels=tuple(supported_kernels),
            has_stream=has_stream,
            has_event=has_event,
            has_collective=has_collective,
            has_graph_exec=has_graph_exec,
            device_count=device_count,
            isa=tuple(isa),
            block_size_multiple=block_size_multiple,
        )
        ops = OpTable.build(self.kind, features=self._claims.isa)
        super().__init__(parse_device(device), ops, kv_elements_per_token=kv_elements_per_token)

    def capability(self) -> CapabilityDescriptor:
        """The claims, with the memory that live KV blocks leave."""
        return self._claims.model_copy(update={"available_memory_bytes": self.memory_info().available_bytes})

    def memory_info(self) -> MemoryInfo:
        """The claimed memory less that of live KV blocks."""
        total = self._claims.total_memory_bytes
        return MemoryInfo(total, total - self.kv_used_bytes)

    def compute_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """float32, as on the CPU that runs the ops."""
        del weight_dtype
        return torch.float32

    def create_stream(self) -> HostStream:
        """A host stream; UnsupportedError if the device claims to have no streams."""
        self._require(self._claims.has_stream, "streams")
        return HostStream()

    def create_event(self) -> HostEvent:
        """A host event; UnsupportedError if the device claims to have no events."""
        self._require(self._claims.has_event, "events")
        return HostEvent()

    def get_kernel(self, kind: KernelKind, dtype: DType | None = None) -> Callable[..., Any]:
        """As in the base class, but the op table serves only the kinds of `supported_kernels`."""
        registered = {kind for kind, _ in self._kernels}
        self._require(kind in registered or kind in self._claims.supported_kernels, f"kernel {KernelKind(kind).value}")
        return super().get_kernel(kind, dtype)

    def _kv_reserve(self) -> Callable[[int], Tensor] | None:
        return None  # any size may be claimed

    def _require(self, present: bool, what: str) -> None:
        if not present:
            raise UnsupportedError(f"this mock backend was made without {what}; ask for it when making the backend")


def create(**options: Any) -> MockBackendProvider:
    """The entry point `mock`."""
    return MockBackendProvider(**options)
