"""What every provider promises, shown on the CPU, the mock, and an accelerator whose card is a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sagellm_backend import BackendProvider, CPUBackendProvider, DType, KernelKind, KVLayout, MockBackendProvider
from sagellm_backend.ops import OP_NAMES
from sagellm_backend.providers.accelerator import AcceleratorProvider, count_devices, import_plugin
from sagellm_backend.providers.ascend import AscendBackendProvider
from sagellm_backend.providers.cuda import CudaBackendProvider
from sagellm_backend.providers.haiguang import HaiguangBackendProvider
from sagellm_backend.providers.kunlun import KunlunBackendProvider
from sagellm_protocol import InvalidArgumentError, KVBlock, ResourceExhaustedError, UnavailableError, UnsupportedError


@pytest.fixture(params=["cpu", "mock"])
def provider(request: pytest.FixtureRequest) -> BackendProvider:
    return CPUBackendProvider() if request.param == "cpu" else MockBackendProvider()


def test_the_documented_snippet() -> None:
    backend = MockBackendProvider(supported_dtypes=[DType.FP16, DType.BF16], has_collective=True)
    cap = backend.capability()
    block = backend.kv_block_alloc(128, DType.FP16)
    assert cap.supported_dtypes == (DType.FP16, DType.BF16)
    assert cap.has_collective
    assert (block.num_tokens, block.dtype) == (128, DType.FP16)


def test_capability_and_memory_agree(provider: BackendProvider) -> None:
    capability, memory = provider.capability(), provider.memory_info()
    assert capability.device_type == provider.kind
    assert capability.total_memory_bytes == memory.total_bytes
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert capability.supports(DType.FP32, KernelKind.ATTENTION)
    assert set(provider.ops.explain()) >= set(OP_NAMES)


def test_activations_on_the_cpu_are_float32(provider: BackendProvider) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert provider.compute_dtype(dtype) is torch.float32


def test_the_kv_cache_has_the_layout_and_is_zero(provider: BackendProvider) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.bfloat16)
    caches = provider.allocate_kv_cache(layout, 5)
    assert [tuple(cache.shape) for cache in caches] == [(2, 5, 2, 4, 8)] * 3
    assert not any(cache.any() for cache in caches)
    assert sum(cache.nbytes for cache in caches) == 5 * layout.bytes_per_block
    assert layout.bytes_per_block == 4 * layout.bytes_per_token == 4 * 2 * 3 * 2 * 8 * 2


def test_an_int8_cache_holds_a_scale_behind_the_codes() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.int8)
    assert layout.layer_shape(5) == (2, 5, 2, 4, 8 + 4)
    assert layout.bytes_per_token == 2 * 3 * 2 * (8 + 4)


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "block_size"])
def test_a_layout_of_nothing_is_refused(field: str) -> None:
    values: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 1, field: 0}
    with pytest.raises(InvalidArgumentError, match=rf"KVLayout\.{field} must be at least 1, got 0"):
        KVLayout(**values, dtype=torch.float32)


def test_a_cache_of_nothing_or_of_odd_blocks_is_refused() -> None:
    layout = KVLayout(1, 1, 8, 20, torch.float32)
    with pytest.raises(InvalidArgumentError, match="num_blocks must be at least 1"):
        MockBackendProvider().allocate_kv_cache(layout, 0)
    with pytest.raises(InvalidArgumentError, match="block_size must be a multiple of 16 on cpu, got 20"):
        MockBackendProvider(block_size_multiple=16).allocate_kv_cache(layout, 1)


def test_kv_blocks_are_accounted(provider: BackendProvider) -> None:
    a = provider.kv_block_alloc(10, DType.FP32)
    b = provider.kv_block_alloc(3, DType.BF16)
    assert a.block_id != b.block_id
    assert (a.nbytes, b.nbytes) == (10 * 256 * 4, 3 * 256 * 2)
    assert provider.kv_used_bytes == a.nbytes + b.nbytes
    provider.kv_block_free(a)
    assert provider.kv_used_bytes == b.nbytes
    with pytest.raises(InvalidArgumentError, match=f"KV block {a.block_id} was freed before") as caught:
        provider.kv_block_free(a)
    assert caught.value.context["kv_code"] == "double_free"
    stranger = KVBlock(block_id=77, num_tokens=1, dtype=DType.FP32, nbytes=1024)
    with pytest.raises(InvalidArgumentError, match="not allocated by this backend"):
        provider.kv_block_free(stranger)
    provider.kv_block_free(b)
    assert provider.kv_used_bytes == 0


def test_ids_are_not_used_twice(provider: BackendProvider) -> None:
    """A stale handle must never free a newer block."""
    a = provider.kv_block_alloc(1, DType.FP32)
    provider.kv_block_free(a)
    b = provider.kv_block_alloc(1, DType.FP32)
    assert a.block_id != b.block_id
    with pytest.raises(InvalidArgumentError):
        provider.kv_block_free(a)


def test_blocks_of_the_cpu_have_memory_behind_them() -> None:
    provider = CPUBackendProvider(kv_elements_per_token=6)
    block = provider.kv_block_alloc(10, DType.FP16)
    memory = provider.kv_block_memory(block)
    assert (memory.dtype, memory.shape, block.nbytes) == (torch.uint8, (120,), 120)
    provider.kv_block_free(block)
    with pytest.raises(InvalidArgumentError, match="has no memory here"):
        provider.kv_block_memory(block)


def test_asking_for_too_much_or_too_little(provider: BackendProvider) -> None:
    with pytest.raises(InvalidArgumentError, match="num_tokens must be at least 1, got 0"):
        provider.kv_block_alloc(0, DType.FP32)
    with pytest.raises(ResourceExhaustedError, match="bytes, cpu has") as caught:
        provider.kv_block_alloc(10**12, DType.FP32)
    assert caught.value.context["kv_code"] == "out_of_blocks"
    assert provider.kv_used_bytes == 0


def test_the_mocks_memory_runs_out_and_comes_back() -> None:
    provider = MockBackendProvider(total_memory_bytes=1000, kv_elements_per_token=10)
    block = provider.kv_block_alloc(40, DType.FP16)
    assert provider.memory_info().available_bytes == provider.capability().available_memory_bytes == 200
    with pytest.raises(ResourceExhaustedError):
        provider.kv_block_alloc(11, DType.FP16)
    provider.kv_block_free(block)
    provider.kv_block_free(provider.kv_block_alloc(50, DType.FP16))


def test_the_mock_fails_fast() -> None:
    provider = MockBackendProvider([DType.FP16], has_stream=False, has_event=False, supported_kernels=[])
    with pytest.raises(UnsupportedError, match="backend 'mock' does not support dtype fp32; use one of fp16"):
        provider.kv_block_alloc(1, DType.FP32)
    with pytest.raises(UnsupportedError, match="without streams"):
        provider.create_stream()
    with pytest.raises(UnsupportedError, match="without events"):
        provider.create_event()
    with pytest.raises(UnsupportedError, match="without kernel attention"):
        provider.get_kernel(KernelKind.ATTENTION)


def test_kernels_are_found_by_dtype_then_by_kind_then_in_the_table(provider: BackendProvider) -> None:
    assert provider.get_kernel(KernelKind.NORM) is provider.ops.rms_norm
    provider.register_kernel(KernelKind.NORM, len)
    provider.register_kernel(KernelKind.NORM, max, dtype=DType.FP16)
    assert provider.get_kernel(KernelKind.NORM) is len
    assert provider.get_kernel(KernelKind.NORM, DType.FP32) is len
    assert provider.get_kernel(KernelKind.NORM, DType.FP16) is max
    with pytest.raises(UnsupportedError):
        provider.get_kernel(KernelKind.SAMPLING)
    with pytest.raises(UnsupportedError, match="dtype int4"):
        provider.get_kernel(KernelKind.NORM, DType.INT4)
    provider.register_kernel(KernelKind.SAMPLING, min)
    assert provider.get_kernel(KernelKind.SAMPLING) is min


def test_streams_and_events_of_the_host(provider: BackendProvider) -> None:
    stream, start, end = provider.create_stream(), provider.create_event(), provider.create_event()
    with pytest.raises(InvalidArgumentError, match="must be recorded"):
        start.elapsed_time(end)
    start.record()
    stream.wait_event(start)
    stream.synchronize()
    assert stream.record_event(end) is end
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) >= 0
    assert start.elapsed_time(stream.record_event()) >= start.elapsed_time(end)
    provider.synchronize()


def test_copies_are_new_tensors(provider: BackendProvider) -> None:
    tensor = torch.ones(3)
    for copy in (provider.copy(tensor), provider.copy(tensor, "cpu", non_blocking=True)):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()


def test_the_cpu_refuses_other_devices() -> None:
    with pytest.raises(InvalidArgumentError, match="the cpu backend runs on device 'cpu', got 'cuda:0'"):
        CPUBackendProvider(device="cuda:0")
    with pytest.raises(InvalidArgumentError, match="'toaster' is no device"):
        CPUBackendProvider(device="toaster")


def test_the_cpus_ops_can_be_forced_to_the_reference() -> None:
    assert set(CPUBackendProvider(native=False).ops.explain().values()) == {"reference"}
    assert CPUBackendProvider(op_sources={"linear": "reference"}).ops.explain()["linear"] == "reference"


class Runtime(SimpleNamespace):
    """A card's runtime module with two cards, as torch.cuda would show them."""

    def __init__(self) -> None:
        properties = SimpleNamespace(name="Stand-in", major=7, minor=5, gcnArchName="gfx928:sramecc+:xnack-")
        super().__init__(
            is_available=lambda: True,
            device_count=lambda: 2,
            current_device=lambda: 1,
            get_device_properties=lambda index: properties,
            mem_get_info=lambda index: (300, 1000),
            memory_reserved=lambda index: 50,
            memory_allocated=lambda index: 20,
            synchronize=lambda device: None,
            Event=lambda enable_timing: f"event {enable_timing}",
            Stream=lambda device: f"stream {device}",
        )


def stand_in(kind: type[AcceleratorProvider], monkeypatch: pytest.MonkeyPatch) -> type[AcceleratorProvider]:
    monkeypatch.setattr(kind, "unavailable_reason", classmethod(lambda cls: None))
    monkeypatch.setattr(kind, "runtime", classmethod(lambda cls: Runtime()))
    return kind


def test_an_accelerator_describes_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = stand_in(CudaBackendProvider, monkeypatch)()
    assert provider.device == torch.device("cuda:1")  # the current one
    capability = provider.capability()
    assert (capability.device_name, capability.compute_capability, capability.device_count) == ("Stand-in", "7.5", 2)
    assert (capability.total_memory_bytes, capability.available_memory_bytes) == (1000, 330)
    assert capability.isa == ("sm_75",)
    assert DType.BF16 not in capability.supported_dtypes  # before 8.0
    assert provider.compute_dtype(torch.bfloat16) is torch.bfloat16
    assert str(provider.create_stream()) == "stream cuda:1"
    assert str(provider.create_event()) == "event True"
    provider.synchronize()


@pytest.mark.parametrize("device", ["cuda:2", "cpu"])
def test_an_accelerator_has_only_its_cards(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="use cuda:0 to cuda:1"):
        stand_in(CudaBackendProvider, monkeypatch)(device=device)


def test_a_dcu_names_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stand_in(HaiguangBackendProvider, monkeypatch)(device="cuda:0").capability().isa == ("gfx928",)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (CudaBackendProvider, "sage-llm install cuda"),
        (AscendBackendProvider, "sage-llm install ascend"),
        (KunlunBackendProvider, "sage-llm install kunlun"),
        (HaiguangBackendProvider, "sage-llm install haiguang"),
    ],
)
def test_absent_software_is_named_with_the_remedy(
    kind: type[AcceleratorProvider], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("sagellm_backend.providers.ascend.has_module", lambda name: False)
    monkeypatch.setattr("sagellm_backend.providers.kunlun.has_module", lambda name: False)
    with pytest.raises(UnavailableError, match=remedy) as caught:
        kind()
    assert not caught.value.retryable


def test_makers_behind_the_same_torch_device_step_back_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "haiguang" in str(CudaBackendProvider.unavailable_reason())
    assert "no DCU" in str(HaiguangBackendProvider.unavailable_reason())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("sagellm_backend.providers.cuda.has_module", lambda name: name == "torch_xmlir")
    assert "kunlun" in str(CudaBackendProvider.unavailable_reason())
    monkeypatch.setattr("sagellm_backend.providers.cuda.has_module", lambda name: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("sagellm_backend.providers.cuda.count_devices", lambda runtime: 0)
    assert "nvidia-smi" in str(CudaBackendProvider.unavailable_reason())
    monkeypatch.setattr("sagellm_backend.providers.cuda.count_devices", lambda runtime: 1)
    assert CudaBackendProvider.unavailable_reason() is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise OSError('libascendcl.so: cannot open')", "torch_npu can't be loaded (OSError: libascendcl.so"),
        ("import types; npu = types.SimpleNamespace(is_available=lambda: False)", "torch_npu finds no NPU"),
        ("import types; npu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)", None),
    ],
)
def test_the_npus_plug_in_is_tried_and_never_trusted(
    source: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    reason = AscendBackendProvider.unavailable_reason()
    sys.modules.pop("torch_npu", None)
    assert reason == expected if expected is None else str(reason).startswith(expected)


def test_the_xpus_plug_in_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch_xmlir.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sagellm_backend.providers.kunlun.count_devices", lambda runtime: 0)
    assert "finds no XPU" in str(KunlunBackendProvider.unavailable_reason())
    monkeypatch.setattr("sagellm_backend.providers.kunlun.count_devices", lambda runtime: 1)
    assert KunlunBackendProvider.unavailable_reason() is None
    monkeypatch.setattr("sagellm_backend.providers.kunlun.import_plugin", lambda name: "RuntimeError: no XRE")
    assert "(RuntimeError: no XRE)" in str(KunlunBackendProvider.unavailable_reason())
    sys.modules.pop("torch_xmlir", None)


def test_detection_survives_any_driver() -> None:
    def broken() -> int:
        raise RuntimeError("driver/library version mismatch")

    assert count_devices(SimpleNamespace(is_available=lambda: True, device_count=broken)) == 0
    assert count_devices(SimpleNamespace()) == 0
    assert count_devices(Runtime()) == 2
    assert str(import_plugin("no_such_plugin")).startswith("ModuleNotFoundError")
