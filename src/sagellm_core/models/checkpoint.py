"""Reading tensors of a checkpoint folder by name: one `model.safetensors`, or shards with an index.

Opening a folder reads the headers only and checks that the files are complete; every defect becomes one error that
names the file and the remedy. Tensors are mapped, so that a matrix is packed straight from the file cache; the reader
says when it is done with one (`release`), because pages of a map count as memory of this process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sagellm_protocol.errors import InvalidArgumentError, NotFoundError, UnsupportedError

from .mapped_file import MappedFile

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import QuantizedTensor

__all__ = [
    "SafetensorsCheckpoint",
    "TensorInfo",
    "TensorSource",
    "read_json",
    "read_json_list",
    "read_safetensors_header",
    "safetensors_files",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is and where it lies.

    `dtype` is in the notation of safetensors (`F32`, `BF16`, ...), `offset` in bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorSource(Protocol):
    """A set of named tensors that are read one at a time."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the dtype it is stored in (quantized ones dequantized).

        It may be a view of the file: not to be written to, and to be copied by whoever keeps it.
        """

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """The matrix `name` in whole numbers, if it is stored in a form that kernels read as it is."""

    def release(self) -> None:
        """Give back the memory behind what was read so far; it can be read again."""


class SafetensorsCheckpoint:
    """A model folder's safetensors files as one `TensorSource`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        for file in safetensors_files(path):
            self.tensors.update(read_safetensors_header(file)[0])
        self._mapped: dict[Path, MappedFile] = {}

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        import torch

        info = self.tensors[name]
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if info.dtype not in dtypes:
            raise UnsupportedError(
                f"{info.file}: {name} is stored as {info.dtype}, which is not supported; "
                "use a checkpoint in float32, float16 or bfloat16",
                field="dtype",
            )
        if info.file not in self._mapped:
            self._mapped[info.file] = MappedFile(info.file)
        return self._mapped[info.file].tensor(info.offset, info.shape, dtypes[info.dtype])

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """None: these files hold floats."""
        del name
        return None

    def release(self) -> None:
        """See `TensorSource.release`."""
        for file in self._mapped.values():
            file.release()


def safetensors_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model in the folder `path`; raises where there are none to trust."""
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such model folder; give a folder, a .gguf file or a hub id", field="model")
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    if (path / _INDEX).is_file():
        return _indexed_files(path)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise NotFoundError(f"{path}: {len(found)} safetensors files but no {_INDEX}; download the index too")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise InvalidArgumentError(
            f"{path}: {pickles[0]} is a pickle, which can run code when loaded, and is refused; convert the model with "
            "transformers (save_pretrained writes safetensors) or download its safetensors version",
            field="model",
        )
    raise NotFoundError(f"{path}: no {_SINGLE} in this folder; download the model's weights", field="model")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `InvalidArgumentError` where it is none."""
    values = _read_json(file)
    if not isinstance(values, dict):
        raise InvalidArgumentError(f"{file}: must hold a JSON object; download the file again")
    return values


def read_json_list(file: Path) -> list[Any]:
    """The list in a JSON file; raises `InvalidArgumentError` where it is none."""
    values = _read_json(file)
    if not isinstance(values, list):
        raise InvalidArgumentError(f"{file}: must hold a JSON list; download the file again")
    return values


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{file}: cannot be read as JSON ({error}); download the file again") from error


def _indexed_files(path: Path) -> list[Path]:
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidArgumentError(f"{path / _INDEX}: has no weight_map; download the file again")
    files = [path / str(name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if file.parent != path or not file.is_file()]
    if missing:
        raise NotFoundError(
            f"{path}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}; download them again"
        )
    return files


def read_safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file; checks that the file is as long as they need."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > _MAX_HEADER_BYTES:
            raise _corrupt(file, "it has no safetensors header")
        header = stream.read(size)
    if len(header) < size:
        raise _corrupt(file, "it ends within its header")
    try:
        entries = json.loads(header)
        metadata = dict(entries.pop("__metadata__", None) or {})
        start = len(prefix) + size
        spans = {name: tuple(int(offset) for offset in entry["data_offsets"]) for name, entry in entries.items()}
        infos = {
            name: TensorInfo(file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start + spans[name][0])
            for name, entry in entries.items()
        }
        lengths = {name: end - begin for name, (begin, end) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _corrupt(file, "its header cannot be read") from error
    for name, info in infos.items():
        item_bytes = _ITEM_BYTES.get(info.dtype)
        if item_bytes is not None and lengths[name] != math.prod(info.shape) * item_bytes:
            raise _corrupt(file, f"size and shape of {name} disagree")
    expected = max((info.offset + lengths[name] for name, info in infos.items()), default=start)
    actual = file.stat().st_size
    if actual < expected:
        raise _corrupt(file, f"it is truncated: {actual:,} bytes of {expected:,}")
    return infos, metadata


def _corrupt(file: Path, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{file}: {problem}; download the file again", field="model")
