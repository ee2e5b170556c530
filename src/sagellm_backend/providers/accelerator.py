"""What cards with a torch plug-in have in common: one class over the plug-in's `torch.cuda`-like module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch

from sagellm_backend.ops import OpTable
from sagellm_backend.provider import (
    DEFAULT_KV_ELEMENTS_PER_TOKEN,
    TABLE_KERNELS,
    BackendProvider,
    MemoryInfo,
    parse_device,
)
from sagellm_backend.streams import Event, Stream
from sagellm_protocol import CapabilityDescriptor, DType, InvalidArgumentError, UnavailableError


class AcceleratorProvider(BackendProvider):
    """A card reached through torch. Subclasses name the device type, the runtime module and the test for presence.

    Args:
        device: "cuda", "cuda:1", "npu:0", ...; without an index the current device.
        kv_elements_per_token: see `BackendProvider`.
    """

    device_type: ClassVar[str]
    """torch's name for the device: "cuda", "npu"."""
    has_graph_exec: ClassVar[bool] = False

    def __init__(
        self, *, device: str | None = None, kv_elements_per_token: int = DEFAULT_KV_ELEMENTS_PER_TOKEN
    ) -> None:
        reason = self.unavailable_reason()
        if reason is not None:
            raise UnavailableError(reason, retryable=False, backend=self.kind)
        self._runtime = self.runtime()
        resolved = self._resolve(device or self.device_type)
        self._index = resolved.index or 0
        self._properties = self._runtime.get_device_properties(self._index)
        ops = OpTable.build(self.kind, features=self._isa())
        super().__init__(resolved, ops, kv_elements_per_token=kv_elements_per_token)

    @classmethod
    @abstractmethod
    def runtime(cls) -> Any:
        """The module that manages the cards (`torch.cuda`, `torch.npu`); called only where the plug-in is there."""

    def capability(self) -> CapabilityDescriptor:
        """The card's name, version and memory."""
        memory = self.memory_info()
        return CapabilityDescriptor(
            device_name=str(self._properties.name),
            device_type=self.kind,
            compute_capability=self._compute_capability(),
            total_memory_bytes=memory.total_bytes,
            available_memory_bytes=memory.available_bytes,
            supported_dtypes=self._supported_dtypes(),
            supported_kernels=TABLE_KERNELS,
            has_stream=True,
            has_event=True,
            has_collective=self.collective_backend is not None and torch.distributed.is_available(),
            has_graph_exec=self.has_graph_exec,
            device_count=int(self._runtime.device_count()),
            isa=self._isa(),
        )

    def memory_info(self) -> MemoryInfo:
        """The card's memory; what torch holds in reserve without using it counts as available."""
        free, total = self._runtime.mem_get_info(self._index)
        idle = self._runtime.memory_reserved(self._index) - self._runtime.memory_allocated(self._index)
        return MemoryInfo(int(total), int(free) + max(0, int(idle)))

    def create_stream(self) -> Stream:
        """A new stream of the card."""
        stream: Stream = self._runtime.Stream(device=self.device)
        return stream

    def create_event(self) -> Event:
        """A new timing event."""
        event: Event = self._runtime.Event(enable_timing=True)
        return event

    def synchronize(self) -> None:
        """Wait for all work on the card."""
        self._runtime.synchronize(self.device)

    def _compute_capability(self) -> str | None:
        return None

    def _isa(self) -> tuple[str, ...]:
        return ()

    def _supported_dtypes(self) -> tuple[DType, ...]:
        return (DType.FP32, DType.FP16, DType.BF16)

    def _resolve(self, name: str) -> torch.device:
        """The device with its index filled in; refuses other types and cards that are not there."""
        device = parse_device(name)
        count = int(self._runtime.device_count())
        index = int(self._runtime.current_device()) if device.index is None else device.index
        if device.type != self.device_type or index >= count:
            raise InvalidArgumentError(
                f"device {name!r} is not one of {self.kind}'s: "
                f"use {self.device_type}:0 to {self.device_type}:{count - 1}",
                field="device",
            )
        return torch.device(device.type, index)


def has_module(name: str) -> bool:
    """Whether a top-level module is installed; looks without importing it."""
    return name in sys.modules or importlib.util.find_spec(name) is not None


def count_devices(runtime: Any) -> int:
    """Cards that a runtime module can really use; 0 where it fails in any way, as drivers do in many."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "driver too old" and the like: the count says it
            return int(runtime.device_count()) if runtime.is_available() else 0
    except Exception:  # a plug-in without its driver raises what it likes; detection must not
        return 0


def import_plugin(name: str) -> str | None:
    """Import a torch plug-in, which registers its device with torch; the error as one line if it fails."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken plug-in raises anything from ImportError to RuntimeError
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
