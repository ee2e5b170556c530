"""Reads a safetensors checkpoint with numpy alone, for peers' environments without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 copies of all tensors (stored as F32, F16 or BF16), file by file."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        header_len = int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8 : 8 + header_len]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = np.array(data[8 + header_len + begin : 8 + header_len + end])
            yield name, _to_float32(raw, entry["dtype"]).reshape(entry["shape"])


def _to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
