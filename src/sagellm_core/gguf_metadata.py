"""The header of a GGUF file, read in a fraction of a second.

Holds `read_gguf_metadata` and `read_gguf_header`. The `gguf` package builds two array views an entry, which takes many
seconds for the vocabulary of a modern model; this reads the same header straight from a memory map. Tensors are
listed, not read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sagellm_protocol.errors import InvalidArgumentError, NotFoundError

__all__ = ["GGUFHeader", "GGUFTensor", "read_gguf_header", "read_gguf_metadata"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of the file: its shape, rows first, ggml's number of its type, and the byte of the file it starts at."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the data: metadata and the list of tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All keys of the file's header with their values as plain Python numbers, strings and lists.

    Raises as `read_gguf_header`.
    """
    return read_gguf_header(path).metadata


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """The file's metadata, as plain Python numbers, strings and lists, and its tensors.

    Raises `NotFoundError` if there is no file, `InvalidArgumentError` if it is not GGUF or cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no file {path}; give a .gguf file or a model folder", path=str(path))
    if path.stat().st_size == 0:
        raise InvalidArgumentError(f"{path} is empty; download it again", path=str(path))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(_MAGIC)] != _MAGIC:
            raise InvalidArgumentError(f"{path} is not a GGUF file; download it again", path=str(path))
        try:
            return _Reader(data).header()
        except (struct.error, ValueError, IndexError, TypeError, ArithmeticError, RecursionError) as error:
            raise InvalidArgumentError(
                f"{path} has no readable GGUF header ({error}); download it again", path=str(path)
            ) from error


class _Reader:
    """A cursor over the header; every read moves it on and fails at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(_MAGIC)

    def header(self) -> GGUFHeader:
        version = self._unpack("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, known are 2 and 3 in little endian")
        num_tensors, num_entries = self._unpack("<Q"), self._unpack("<Q")
        metadata = {}
        for _ in range(num_entries):
            key = self._string()
            metadata[key] = self._value(self._unpack("<I"))
        listed = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        start = -(-self._at // alignment) * alignment
        tensors = {name: GGUFTensor(shape, kind, start + offset) for name, shape, kind, offset in listed}
        return GGUFHeader(metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self._string(), self._unpack("<I")
        shape = tuple(reversed([self._unpack("<Q") for _ in range(num_dimensions)]))  # stored innermost first
        return name, shape, self._unpack("<I"), self._unpack("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self._unpack("<I"), self._unpack("<Q")
        if kind in (_STRING, _ARRAY):
            return [self._value(kind) for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        raw = self._take(count * dtype.itemsize)
        values: list[Any] = np.frombuffer(raw, dtype=dtype, count=count).tolist()
        return values

    def _string(self) -> str:
        # Vocabularies of old files hold pieces of characters.
        return self._take(self._unpack("<Q")).decode("utf-8", errors="replace")

    def _unpack(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._data):
            raise ValueError("the file ends within its header")
        taken = self._data[self._at : end]
        self._at = end
        return taken
