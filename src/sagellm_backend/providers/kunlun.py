"""The Kunlun backend: Baidu XPUs through the plug-in `torch_xmlir`.

The plug-in works in CUDA's place: after its import torch's device "cuda" is the XPU, and torch.distributed's
"nccl" is the vendor's BKCL. So the runtime is `torch.cuda`, and the CUDA backend steps back where it is installed.
"""

from __future__ import annotations

from typing import Any

import torch

from sagellm_backend.providers.accelerator import AcceleratorProvider, count_devices, has_module, import_plugin


class KunlunBackendProvider(AcceleratorProvider):
    """One Kunlun XPU."""

    kind = "kunlun"
    device_type = "cuda"
    collective_backend = "nccl"

    @classmethod
    def runtime(cls) -> Any:
        """`torch.cuda`, taken over by the plug-in."""
        return torch.cuda

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """No plug-in, a plug-in without its runtime, or no card."""
        if not has_module("torch_xmlir"):
            return "torch_xmlir is not installed: run `sage-llm install kunlun`"
        error = import_plugin("torch_xmlir")
        if error is not None:
            return f"torch_xmlir can't be loaded ({error}): install the XPU runtime (XRE) of the same version"
        if count_devices(torch.cuda) == 0:
            return "torch_xmlir finds no XPU: check the driver with `xpu-smi` and XPU_VISIBLE_DEVICES"
        return None


def create(**options: Any) -> KunlunBackendProvider:
    """The entry point `kunlun`."""
    return KunlunBackendProvider(**options)
