"""`MappedFile`: the tensors in a file as views of its pages, without a copy."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["MappedFile"]


class MappedFile:
    """A file whose pages come into memory when they are first used and are shared with whoever else reads it.

    Tensors of it keep it mapped. They follow the file: whoever keeps one for long must know that nobody writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            # Private and writable, because torch warns of memory that it could not write to.
            self._pages = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies `offset` bytes into the file; raises `InvalidArgumentError` if the file ends before."""
        import torch

        count = math.prod(shape)
        missing = offset + count * dtype.itemsize - len(self._pages)
        if missing > 0:
            raise InvalidArgumentError(
                f"{self.path}: it ends {missing:,} bytes too early; download the file again", field="model"
            )
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # no writer does that on purpose
            raw = torch.frombuffer(self._pages, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._pages, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self) -> None:
        """Take the pages out of this process's memory; they come again if they are used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
