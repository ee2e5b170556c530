"""`QuantMethod`, what all quantizers of weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sagellm_backend import OpTable, PackedLinear, QuantizedTensor

# Rows quantized at a time: their float32 copies stay small beside the weight.
_ROWS = 2048


class QuantMethod(ABC):
    """Turns a matrix into whole numbers, row by row: the same rows give the same codes in any company."""

    name: ClassVar[str]
    bits_per_weight: ClassVar[float]
    """Memory of a weight, scales included."""

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """A matrix [N, K] of any float dtype."""
        parts = [self.quantize_rows(rows) for rows in torch.split(weight, _ROWS)]
        mins = None if parts[0].mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
        return QuantizedTensor(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            mins,
            parts[0].bits,
            parts[0].group_size,
        )

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
