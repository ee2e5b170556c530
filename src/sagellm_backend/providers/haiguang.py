"""The Haiguang backend: Hygon DCUs through torch's ROCm build, where the device is called "cuda" too."""

from __future__ import annotations

from typing import Any

import torch

from sagellm_backend.providers.accelerator import AcceleratorProvider, count_devices


class HaiguangBackendProvider(AcceleratorProvider):
    """One DCU, or any other card that torch's ROCm build drives."""

    kind = "haiguang"
    device_type = "cuda"
    collective_backend = "nccl"  # RCCL answers to this name

    @classmethod
    def runtime(cls) -> Any:
        """`torch.cuda`, which a ROCm build maps to HIP."""
        return torch.cuda

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """No ROCm (DTK) build of torch, or no card."""
        if torch.version.hip is None:
            return f"torch {torch.__version__} is built without ROCm: run `sage-llm install haiguang`"
        if count_devices(torch.cuda) == 0:
            return "torch finds no DCU: check the driver with `hy-smi` (or `rocm-smi`) and HIP_VISIBLE_DEVICES"
        return None

    def _isa(self) -> tuple[str, ...]:
        # "gfx928:sramecc+:xnack-" -> "gfx928"
        return (str(self._properties.gcnArchName).split(":")[0],)


def create(**options: Any) -> HaiguangBackendProvider:
    """The entry point `haiguang`."""
    return HaiguangBackendProvider(**options)
