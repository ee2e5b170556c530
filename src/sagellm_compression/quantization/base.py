"""`QuantMethod`, what all quantizers of weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sagellm_backend import OpTable, PackedLinear, QuantizedTensor

# Weights quantized at a time: their float32 copies stay in a core's cache.
_PIECE = 1 << 20


class QuantMethod(ABC):
    """Turns a matrix into whole numbers, row by row: the same rows give the same codes in any company."""

    name: ClassVar[str]
    bits_per_weight: ClassVar[float]
    """Memory of a weight, scales included."""

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """A matrix [N, K] of any float dtype."""
        pieces = torch.split(weight, max(1, _PIECE // weight.shape[1]))
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        parts = []
        for rows, target in zip(pieces, torch.split(codes, len(pieces[0])), strict=True):
            part = self.quantize_rows(rows)
            target.copy_(part.codes)
            parts.append((part.scales, part.mins))
        mins = [minima for _, minima in parts if minima is not None]
        scales = torch.cat([scale for scale, _ in parts])
        return QuantizedTensor(codes, scales, torch.cat(mins) if mins else None, part.bits, part.group_size)

    def pack(self, ops: OpTable, weight: Tensor) -> PackedLinear:
        """The matrix quantized, in the form that the backend's `linear` reads."""
        return ops.pack_linear(self.quantize(weight))

    @abstractmethod
    def quantize_rows(self, rows: Tensor) -> QuantizedTensor:
        """Some rows [R, K] of any float dtype."""


class SymmetricRounding(QuantMethod):
    """Whole numbers around zero, one scale a group of `group_size` neighbours (None: a row); see
    `QuantizedTensor.round`, which backends may have natively."""

    bits: ClassVar[int]
    group_size: ClassVar[int | None]

    def quantize_rows(self, rows: Tensor) -> QuantizedTensor:
        """See `QuantMethod.quantize_rows`."""
        return QuantizedTensor.round(rows, self.bits, self.group_size or rows.shape[1])

    def pack(self, ops: OpTable, weight: Tensor) -> PackedLinear:
        """See `QuantMethod.pack`."""
        return ops.quantize_linear(weight, self.bits, self.group_size or weight.shape[1])
