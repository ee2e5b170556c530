"""Packed weights on disk, so that a model is quantized and packed once and read back at every later start.

One safetensors file a model in `~/.cache/sage-llm/packed` (or below `XDG_CACHE_HOME`), named by a hash of all that its
content depends on: the checkpoint's files, how they are quantized, the layout of the kernels and the version of this
library. Of the checkpoint's files the hash takes name, size, time of change and both ends: reading gigabytes to find
out that they are the same would cost what the cache saves, and weights are replaced by other files, not edited.

A file is mapped, not read: its pages come when they are first used, stay in the system's file cache between starts, and
are shared by all engines that serve the model. Nobody writes to a file that has its name; replacing and removing it
leave the pages of those who mapped it alone.

A file is written under another name, complete and flushed, and renamed, by one process at a time; whoever finds the
lock taken does without writing. So nobody ever reads half a file, and concurrent starts don't wait for each other. A
file that is damaged anyway counts as absent. The oldest files go when the folder outgrows its limit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_core.version import __version__
from sagellm_protocol.errors import SageLLMError

from .checkpoint import TensorInfo, read_safetensors_header
from .mapped_file import MappedFile

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import BackendProvider, PackedLinear

__all__ = ["PackedCache", "default_folder"]

logger = logging.getLogger(__name__)

_END_BYTES = 65536
_LINE = 64
_ABANDONED_S = 3600.0
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U8": "uint8"}
_DTYPE_NAMES = {name: code for code, name in _DTYPES.items()}


def default_folder() -> Path:
    """Where packed weights lie unless the configuration says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sage-llm" / "packed"


class PackedCache:
    """The packed matrices of one model: those of an earlier start, or those of this one, to be saved.

    Args:
        folder: where the files lie.
        files: what the model is made of.
        how: whatever else decides what the packed bytes are.
        provider: makes packed weights of buffers.
        max_bytes: the folder's limit.
    """

    def __init__(
        self, folder: Path, files: Iterable[Path], how: Iterable[str], provider: BackendProvider, max_bytes: int
    ) -> None:
        self._folder = folder
        self._provider = provider
        self._max_bytes = max_bytes
        self._file = folder / f"{_fingerprint(files, [__version__, *how])}.safetensors"
        self._stored: dict[str, TensorInfo] = {}
        self._descriptions: dict[str, dict[str, Any]] = {}
        self._mapped: MappedFile | None = None
        self._new: dict[str, PackedLinear] = {}
        self._open()

    def get(self, key: str) -> PackedLinear | None:
        """The packed matrix of a parameter; None where this is the first start."""
        import torch

        if self._mapped is None or key not in self._descriptions:
            return None
        description = self._descriptions[key]
        buffers: dict[str, Tensor] = {}
        for name in description["buffers"]:
            info = self._stored[f"{key}:{name}"]
            buffers[name] = self._mapped.tensor(info.offset, info.shape, getattr(torch, _DTYPES[info.dtype]))
        return self._provider.restore_packed(buffers, description)

    def add(self, key: str, packed: PackedLinear) -> None:
        """Remember what had to be packed."""
        self._new[key] = packed

    def save(self) -> None:
        """Write what was packed, if anything was; a disk that is full or read-only is only a warning."""
        if not self._new:
            return
        try:
            self._write()
            self._make_room()
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            logger.warning("packed weights are not kept: %s", error)
        finally:
            self._new = {}

    def _open(self) -> None:
        if not self._file.is_file():
            return
        try:
            self._stored, metadata = read_safetensors_header(self._file)
            self._descriptions = json.loads(metadata["packed"])
            if metadata["checksum"] != _checksum(self._stored, self._descriptions):
                raise ValueError("its header has changed")
            self._mapped = MappedFile(self._file)
            os.utime(self._file)  # the last to go
        except (OSError, KeyError, ValueError, SageLLMError) as error:
            self._forget(error)

    def _forget(self, error: Exception) -> None:
        """Take a damaged file for absent; it is written anew."""
        logger.warning("%s is damaged and will be written again: %s", self._file, error)
        self._stored, self._descriptions = {}, {}

    def _write(self) -> None:
        from filelock import FileLock, Timeout

        tensors: dict[str, Tensor] = {}
        descriptions = {}
        for key, packed in self._new.items():
            buffers, description = packed.to_buffers()
            descriptions[key] = {**description, "buffers": list(buffers)}
            tensors |= {f"{key}:{name}": buffer for name, buffer in buffers.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".part")
        try:
            with FileLock(self._file.with_suffix(".lock"), timeout=0):
                try:
                    _write_safetensors(unfinished, tensors, descriptions)
                    unfinished.replace(self._file)
                finally:
                    unfinished.unlink(missing_ok=True)
        except Timeout:
            logger.info("another start is writing %s", self._file)

    def _make_room(self) -> None:
        """Remove the files that were used longest ago until the rest fits; this model's own stays.

        What a start that was killed left unfinished goes, too.
        """
        for unfinished in self._folder.glob("*.part"):
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                unfinished.unlink(missing_ok=True)
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self._max_bytes and file != self._file:
                file.unlink(missing_ok=True)


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor], descriptions: Mapping[str, Any]) -> None:
    """Write the tensors straight from their memory (the library's writer copies all of it first) and flush the file.

    Kernels read whole cache lines: those whose size is a multiple of one stand first, from the beginning of one.
    """
    import torch

    order = sorted(tensors, key=lambda name: tensors[name].nbytes % _LINE != 0)
    stored, end = {}, 0
    for name in order:
        dtype = _DTYPE_NAMES[str(tensors[name].dtype).removeprefix("torch.")]
        stored[name] = TensorInfo(file, dtype, tuple(tensors[name].shape), end)
        end += tensors[name].nbytes
    entries: dict[str, Any] = {
        name: {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": [info.offset, info.offset + tensors[name].nbytes],
        }
        for name, info in stored.items()
    }
    metadata = {"packed": json.dumps(descriptions), "checksum": _checksum(stored, descriptions)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def _checksum(stored: Mapping[str, TensorInfo], descriptions: Mapping[str, Any]) -> str:
    """Of all that a header says. What follows it has no checksum: reading it would cost what mapping saves."""
    first = min(info.offset for info in stored.values())
    listed = [[name, info.dtype, info.shape, info.offset - first] for name, info in sorted(stored.items())]
    return str(zlib.crc32(json.dumps([listed, descriptions], sort_keys=True).encode()))


def _fingerprint(files: Iterable[Path], how: Iterable[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(how)).encode())
    for file in sorted(files):
        stat = file.stat()
        digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_END_BYTES))
            stream.seek(max(0, stat.st_size - _END_BYTES))
            digest.update(stream.read(_END_BYTES))
    return digest.hexdigest()[:40]
