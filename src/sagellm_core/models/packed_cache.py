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
import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_core.version import __version__
from sagellm_protocol.errors import SageLLMError

from .checkpoint import TensorInfo, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import BackendProvider, PackedLinear

__all__ = ["PackedCache", "default_folder"]

logger = logging.getLogger(__name__)

_END_BYTES = 65536
_LINE = 64
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U8": "uint8"}


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
        self._pages: mmap.mmap | None = None
        self._new: dict[str, PackedLinear] = {}
        self._open()

    def get(self, key: str) -> PackedLinear | None:
        """The packed matrix of a parameter; None where this is the first start."""
        import torch

        if key not in self._descriptions:
            return None
        description = self._descriptions[key]
        buffers: dict[str, Tensor] = {}
        for name in description["buffers"]:
            info = self._stored[f"{key}:{name}"]
            dtype, count = getattr(torch, _DTYPES[info.dtype]), math.prod(info.shape)
            mapped = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=info.offset)
            buffers[name] = mapped.view(info.shape)
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
        except OSError as error:
            logger.warning("packed weights are not kept: %s", error)
        finally:
            self._new = {}

    def _open(self) -> None:
        if not self._file.is_file():
            return
        try:
            self._stored, metadata = read_safetensors_header(self._file)
            self._descriptions = json.loads(metadata["packed"])
            with self._file.open("rb") as stream:  # private: torch wants memory it could write to
                self._pages = mmap.mmap(
                    stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            os.utime(self._file)  # the last to go
        except (OSError, KeyError, ValueError, SageLLMError) as error:
            self._forget(error)

    def _forget(self, error: Exception) -> None:
        """Take a damaged file for absent; it is written anew."""
        logger.warning("%s is damaged and will be written again: %s", self._file, error)
        self._stored, self._descriptions = {}, {}

    def _write(self) -> None:
        from filelock import FileLock, Timeout
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        descriptions = {}
        for key, packed in self._new.items():
            buffers, description = packed.to_buffers()
            descriptions[key] = {**description, "buffers": list(buffers)}
            tensors |= {f"{key}:{name}": buffer for name, buffer in buffers.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._file.with_suffix(".lock"), timeout=0):
                unfinished = self._file.with_suffix(".part")
                metadata = {"packed": json.dumps(descriptions), "padding": ""}
                save_file(tensors, unfinished, metadata=metadata)
                missing = -_first_offset(unfinished) % _LINE
                if missing:  # kernels read whole cache lines: move the tensors to the beginning of one
                    save_file(tensors, unfinished, metadata={**metadata, "padding": " " * missing})
                with unfinished.open("rb") as stream:
                    os.fsync(stream.fileno())
                unfinished.replace(self._file)
        except Timeout:
            logger.info("another start is writing %s", self._file)

    def _make_room(self) -> None:
        """Remove the files that were used longest ago until the rest fits; this model's own stays."""
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self._max_bytes and file != self._file:
                file.unlink(missing_ok=True)


def _first_offset(file: Path) -> int:
    return min(info.offset for info in read_safetensors_header(file)[0].values())


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
