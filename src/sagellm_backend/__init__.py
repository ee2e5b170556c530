"""Hardware: devices, memory, streams and the op table; the only package that knows a chip.

`get_provider(kind)` gives the backend of this machine; everything above works through its `BackendProvider`.
Names are loaded at first use, because most of them need torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

# Read by libgomp when torch loads it. By default its threads spin for milliseconds at the end of every op; where
# another program is busy on the same cores that slows decoding many times over. A short spin is as fast on idle cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from sagellm_backend.attention import AttentionMetadata
    from sagellm_backend.kv import KVBlockAllocator, KVLayout
    from sagellm_backend.ops import OPS, OpImplementation, OpRegistry, OpTable, PackedLinear, register_op
    from sagellm_backend.provider import BackendProvider, MemoryInfo, StepOutput, StepWants
    from sagellm_backend.providers.ascend import AscendBackendProvider
    from sagellm_backend.providers.cpu import CPUBackendProvider
    from sagellm_backend.providers.cuda import CudaBackendProvider
    from sagellm_backend.providers.haiguang import HaiguangBackendProvider
    from sagellm_backend.providers.kunlun import KunlunBackendProvider
    from sagellm_backend.providers.mock import MockBackendProvider
    from sagellm_backend.quantized import QuantizedTensor, join_rows
    from sagellm_backend.registry import get_provider, list_kinds
    from sagellm_backend.streams import Event, Stream
    from sagellm_protocol import CapabilityDescriptor, DType, KernelKind, KVBlock
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".attention": ("AttentionMetadata",),
            ".kv": ("KVBlockAllocator", "KVLayout"),
            ".ops": ("OPS", "OpImplementation", "OpRegistry", "OpTable", "PackedLinear", "register_op"),
            ".provider": ("BackendProvider", "MemoryInfo", "StepOutput", "StepWants"),
            ".providers.ascend": ("AscendBackendProvider",),
            ".providers.cpu": ("CPUBackendProvider",),
            ".providers.cuda": ("CudaBackendProvider",),
            ".providers.haiguang": ("HaiguangBackendProvider",),
            ".providers.kunlun": ("KunlunBackendProvider",),
            ".providers.mock": ("MockBackendProvider",),
            ".registry": ("get_provider", "list_kinds"),
            ".quantized": ("QuantizedTensor", "join_rows"),
            ".streams": ("Event", "Stream"),
            "sagellm_protocol": ("CapabilityDescriptor", "DType", "KernelKind", "KVBlock"),
        },
    )

__all__ = [
    "OPS",
    "AscendBackendProvider",
    "AttentionMetadata",
    "BackendProvider",
    "CPUBackendProvider",
    "CapabilityDescriptor",
    "CudaBackendProvider",
    "DType",
    "Event",
    "HaiguangBackendProvider",
    "KVBlock",
    "KVBlockAllocator",
    "KVLayout",
    "KernelKind",
    "KunlunBackendProvider",
    "MemoryInfo",
    "MockBackendProvider",
    "OpImplementation",
    "OpRegistry",
    "OpTable",
    "PackedLinear",
    "QuantizedTensor",
    "StepOutput",
    "StepWants",
    "Stream",
    "get_provider",
    "join_rows",
    "list_kinds",
    "register_op",
]
