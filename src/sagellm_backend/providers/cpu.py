"""The CPU backend: float32 activations, weights in any stored dtype, native ops where they are built."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sagellm_backend.cpu.topology import read_memory, read_topology
from sagellm_backend.ops import OpTable, PackedLinear
from sagellm_backend.provider import (
    DEFAULT_KV_ELEMENTS_PER_TOKEN,
    TABLE_KERNELS,
    BackendProvider,
    Forward,
    MemoryInfo,
    RowsFunction,
    StepFunction,
    parse_device,
)
from sagellm_protocol import CapabilityDescriptor, DType, InvalidArgumentError

logger = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class CPUBackendProvider(BackendProvider):
    """This machine's processors and memory.

    Args:
        device: only "cpu" is meaningful; accepted so that every provider is made alike.
        native: False takes the torch reference for every op.
        op_sources: forces implementations by op name, see `OpTable.build`.
        kv_elements_per_token: see `BackendProvider`.
    """

    kind = "cpu"
    collective_backend = "gloo"

    def __init__(
        self,
        *,
        device: str = "cpu",
        native: bool = True,
        op_sources: Mapping[str, str] | None = None,
        kv_elements_per_token: int = DEFAULT_KV_ELEMENTS_PER_TOKEN,
    ) -> None:
        if parse_device(device).type != "cpu":
            raise InvalidArgumentError(f"the cpu backend runs on device 'cpu', got {device!r}", field="device")
        self._topology = read_topology()
        if native:
            load_native_ops()
        ops = OpTable.build("cpu", features=self._topology.features, prefer=op_sources, reference_only=not native)
        super().__init__(torch.device("cpu"), ops, kv_elements_per_token=kv_elements_per_token)

    def capability(self) -> CapabilityDescriptor:
        """The processor's name, instruction sets and memory."""
        memory = self.memory_info()
        return CapabilityDescriptor(
            device_name=self._topology.model_name,
            device_type=self.kind,
            total_memory_bytes=memory.total_bytes,
            available_memory_bytes=memory.available_bytes,
            supported_dtypes=(DType.FP32, DType.FP16, DType.BF16),
            supported_kernels=TABLE_KERNELS,
            has_stream=True,
            has_event=True,
            has_collective=torch.distributed.is_available() and torch.distributed.is_gloo_available(),
            isa=tuple(sorted(self._topology.features)),
        )

    def memory_info(self) -> MemoryInfo:
        """The machine's memory, or what its control group leaves of it."""
        memory = read_memory()
        return MemoryInfo(memory.total_bytes, memory.available_bytes)

    def compute_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Always float32: processors have few or no 16-bit units, and memory traffic is the weights'."""
        del weight_dtype
        return torch.float32

    def compile_step(self, forward: Forward, compute_logits: RowsFunction, hidden_size: int) -> StepFunction:
        """A step program where every op of the model has a kernel, else one function after the other."""
        eager = super().compile_step(forward, compute_logits, hidden_size)
        return self._compiled(eager, lambda programs, isa: programs.record_step(isa, forward, compute_logits))

    def compile_rows(self, function: RowsFunction, width: int) -> RowsFunction:
        """A program where every op of the function has a kernel, else the function itself."""
        return self._compiled(function, lambda programs, isa: programs.record_rows(isa, function, width))

    @property
    def packed_layout(self) -> str | None:
        """That of the kernels, where they are used."""
        return None if self._is_reference else str(self._module("packed").LAYOUT)

    def restore_packed(self, buffers: dict[str, Tensor], description: dict[str, Any]) -> PackedLinear:
        """See `BackendProvider.restore_packed`."""
        restored: PackedLinear = self._module("packed").restore(buffers, description)
        return restored

    @property
    def _is_reference(self) -> bool:
        return self.ops.explain()["linear"] == "reference"

    def _module(self, name: str) -> Any:
        """A module that needs the compiled kernels."""
        return importlib.import_module(f"sagellm_backend.cpu.{name}")

    def _compiled(self, function: _Function, record: Callable[[Any, int], _Function]) -> _Function:
        if self._is_reference:
            return function
        programs = self._module("step_program")
        isa = self._module("native").FASTEST.isa
        try:
            return record(programs, isa)
        except programs.NotRecordableError as error:
            logger.info("steps run op by op: %s", error)
            return function


@lru_cache(maxsize=1)
def load_native_ops() -> bool:
    """Register the compiled ops; False, with one warning, where this installation has none."""
    try:
        importlib.import_module("sagellm_backend.cpu.native")
    except ImportError as error:
        logger.warning("no native CPU ops (%s): the torch reference computes, more slowly", error)
        return False
    return True


def create(**options: Any) -> CPUBackendProvider:
    """The entry point `cpu`."""
    return CPUBackendProvider(**options)
