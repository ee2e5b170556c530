"""What a backend's device can do, for those who choose one or explain the choice."""

from __future__ import annotations

from pydantic import Field

from sagellm_protocol.dtypes import DType, KernelKind
from sagellm_protocol.model import ProtocolModel


class CapabilityDescriptor(ProtocolModel):
    """One device, as its provider found it; nothing here is a guess."""

    device_name: str = Field(description="The device's own name, e.g. the processor's or the card's model.")
    device_type: str = Field(description='The provider\'s kind: "cpu", "cuda", "ascend", ...')
    compute_capability: str | None = Field(default=None, description='Version of the compute units, e.g. "9.0".')
    total_memory_bytes: int = Field(default=0, ge=0)
    available_memory_bytes: int = Field(default=0, ge=0)
    supported_dtypes: tuple[DType, ...] = ()
    supported_kernels: tuple[KernelKind, ...] = ()
    has_stream: bool = False
    has_event: bool = False
    has_collective: bool = False
    has_graph_exec: bool = False
    device_count: int = Field(default=1, ge=0)
    isa: tuple[str, ...] = Field(default=(), description='Instruction sets that kernels may use, e.g. "avx2".')
    block_size_multiple: int = Field(default=1, ge=1, description="KV block sizes must be a multiple of this.")

    def supports(self, dtype: DType, kernel: KernelKind | None = None) -> bool:
        """Return whether the device computes in ``dtype`` (and offers ``kernel``)."""
        return dtype in self.supported_dtypes and (kernel is None or kernel in self.supported_kernels)
