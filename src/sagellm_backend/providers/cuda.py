"""The CUDA backend: NVIDIA cards through `torch.cuda`."""

from __future__ import annotations

from typing import Any

import torch

from sagellm_backend.providers.accelerator import AcceleratorProvider, count_devices, has_module
from sagellm_protocol import DType


class CudaBackendProvider(AcceleratorProvider):
    """One NVIDIA card."""

    kind = "cuda"
    device_type = "cuda"
    collective_backend = "nccl"
    has_graph_exec = True

    @classmethod
    def runtime(cls) -> Any:
        """`torch.cuda`."""
        return torch.cuda

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """No CUDA build of torch, no card, or a card of another maker behind the same torch interface."""
        if torch.version.hip is not None:
            return "this torch is built for ROCm: use the haiguang backend, or run `sage-llm install cuda`"
        if has_module("torch_xmlir"):
            return "torch_xmlir turns torch's cuda device into a Kunlun card: use the kunlun backend"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA: run `sage-llm install cuda`"
        if count_devices(torch.cuda) == 0:
            return "torch finds no NVIDIA card: check the driver with `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        return None

    def _compute_capability(self) -> str:
        return f"{self._properties.major}.{self._properties.minor}"

    def _isa(self) -> tuple[str, ...]:
        return (f"sm_{self._properties.major}{self._properties.minor}",)

    def _supported_dtypes(self) -> tuple[DType, ...]:
        # bfloat16 came with compute capability 8.0; torch emulates it below, slower than float32.
        half = (DType.FP32, DType.FP16)
        return (*half, DType.BF16) if self._properties.major >= 8 else half


def create(**options: Any) -> CudaBackendProvider:
    """The entry point `cuda`."""
    return CudaBackendProvider(**options)
