"""The Ascend backend: Huawei NPUs through the plug-in `torch_npu`, which adds the device "npu" to torch."""

from __future__ import annotations

import importlib
from typing import Any

from sagellm_backend.providers.accelerator import AcceleratorProvider, count_devices, has_module, import_plugin


class AscendBackendProvider(AcceleratorProvider):
    """One Ascend NPU."""

    kind = "ascend"
    device_type = "npu"
    collective_backend = "hccl"

    @classmethod
    def runtime(cls) -> Any:
        """`torch_npu.npu`, the plug-in's counterpart of `torch.cuda`."""
        return importlib.import_module("torch_npu").npu

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """No plug-in, a plug-in without CANN, or no card."""
        if not has_module("torch_npu"):
            return "torch_npu is not installed: run `sage-llm install ascend`"
        error = import_plugin("torch_npu")
        if error is not None:
            return f"torch_npu can't be loaded ({error}): install CANN and source its set_env.sh"
        if count_devices(cls.runtime()) == 0:
            return "torch_npu finds no NPU: check the driver with `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
        return None


def create(**options: Any) -> AscendBackendProvider:
    """The entry point `ascend`."""
    return AscendBackendProvider(**options)
