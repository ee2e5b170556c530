"""The package: exports, imports, small types, JSON Schema."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sagellm_protocol
from sagellm_protocol import (
    PROTOCOL_VERSION,
    BatchType,
    CapabilityDescriptor,
    DType,
    ErrorCode,
    InvalidArgumentError,
    KernelKind,
    KVAllocateParams,
    KVBlock,
    KVErrorCode,
    KVHandle,
    KVTransferMetadata,
    NotFoundError,
    openai,
    schema,
)
from sagellm_protocol.model import ProtocolEnum, ProtocolModel

PACKAGES = [sagellm_protocol, openai]


def isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: the order that the linter keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_exist(package: ModuleType) -> None:
    assert package.__all__ == sorted(package.__all__, key=isort_key)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_exports_are_complete() -> None:
    """Every public model, enum and exception of the modules is exported (the OpenAI ones from their package)."""
    internal = {"ApiModel", "GenerationRequest"}
    for info in pkgutil.walk_packages(sagellm_protocol.__path__, "sagellm_protocol."):
        module = importlib.import_module(info.name)
        exported = (openai if info.name.startswith("sagellm_protocol.openai") else sagellm_protocol).__all__
        for name, item in vars(module).items():
            is_ours = isinstance(item, type) and item.__module__ == info.name and not name.startswith("_")
            if is_ours and issubclass(item, (ProtocolModel, ProtocolEnum, Exception)) and name not in internal:
                assert name in exported, f"{info.name}.{name}"


def test_the_import_is_light() -> None:
    code = (
        "import sys, sagellm_protocol, sagellm_protocol.openai\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'transformers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", DType.FP32),
        ("float32", DType.FP32),
        ("torch.bfloat16", DType.BF16),
        ("Half", DType.FP16),
        ("float8_e4m3fn", DType.FP8),
        (DType.INT4, DType.INT4),
    ],
)
def test_dtype_names(name: str, dtype: DType) -> None:
    assert DType.parse(name) is dtype


def test_dtype_sizes() -> None:
    assert [(dtype.bits, dtype.itemsize) for dtype in (DType.FP32, DType.BF16, DType.INT4)] == [
        (32, 4),
        (16, 2),
        (4, 0.5),
    ]
    assert DType.INT4.nbytes(3) == 2
    with pytest.raises(InvalidArgumentError, match="unknown dtype 'complex64'; use one of fp32, "):
        DType.parse("complex64")


def test_batch_types() -> None:
    assert [str(kind) for kind in BatchType] == ["prefill", "decode", "mixed"]


def test_capability_round_trip() -> None:
    descriptor = CapabilityDescriptor(
        device_name="card",
        device_type="cuda",
        compute_capability="9.0",
        total_memory_bytes=100,
        supported_dtypes=[DType.FP16],
        supported_kernels=[KernelKind.ATTENTION],
    )
    assert CapabilityDescriptor.model_validate_json(descriptor.model_dump_json()) == descriptor
    assert descriptor.supports(DType.FP16)
    assert descriptor.supports(DType.FP16, KernelKind.ATTENTION)
    assert not descriptor.supports(DType.FP16, KernelKind.MOE)
    assert not descriptor.supports(DType.FP32)


def test_kv_types_round_trip() -> None:
    items: list[ProtocolModel] = [
        KVAllocateParams(num_tokens=4, dtype=DType.FP8),
        KVBlock(block_id=1, num_tokens=16, dtype=DType.FP16, nbytes=64),
        KVHandle(request_id="r", block_ids=(1, 2), num_tokens=20),
        KVTransferMetadata(request_id="r", block_ids=(3,), num_tokens=7, checksum="00"),
    ]
    for item in items:
        assert type(item).model_validate_json(item.model_dump_json()) == item
    with pytest.raises(InvalidArgumentError, match="num_tokens must be >= 1, got 0"):
        KVAllocateParams(num_tokens=0)
    assert {code.error_code for code in KVErrorCode} >= {ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.KV_TRANSFER_FAILED}


@pytest.mark.parametrize("name", schema.schema_types())
def test_every_schema_is_plain_json_with_resolvable_references(name: str) -> None:
    document = json.loads(json.dumps(schema.json_schema(name), allow_nan=False))
    assert document["title"] == name
    assert document["x-protocol-version"] == PROTOCOL_VERSION
    defined = set(document.get("$defs", {}))

    def references(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(child) for child in node.values()))
        return set().union(*(references(child) for child in node)) if isinstance(node, list) else set()

    assert references(document) <= {f"#/$defs/{entry}" for entry in defined}


def test_the_request_schema_says_what_the_model_does() -> None:
    document = schema.json_schema("Request")
    assert document["additionalProperties"] is False
    assert {"request_id", "prompt", "messages", "sampling_params", "priority"} <= set(document["properties"])
    sampling = document["$defs"]["SamplingParams"]["properties"]
    assert sampling["temperature"]["minimum"] == 0
    assert sampling["top_k"]["minimum"] == -1
    assert {"type": "null"} in sampling["stop"]["anyOf"]
    assert not {"ge", "le", "maxLength"} & (sampling["top_k"].keys() | sampling["stop"].keys())


def test_the_schema_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.main(["--out", str(tmp_path / "schemas")]) == 0
    assert sorted(path.stem for path in (tmp_path / "schemas").iterdir()) == sorted(schema.schema_types())
    assert schema.main(["--type", "StreamEvent"]) == 0
    printed = capsys.readouterr().out.partition("\n")[2]
    assert set(json.loads(printed)) == {"StreamEvent"}
    assert schema.main(["--type", "Nothing"]) == 1
    assert "no public type 'Nothing'" in capsys.readouterr().err
    with pytest.raises(NotFoundError):
        schema.json_schema("Nothing")
